"""Histories with the features of their items as series of tokens, merged in (HSTU 2.1).

Each column of features is a series over a user's events. It is compressed to the first event of
every stretch with one value, and each of these is a token of its own in front of that event's. A
history that begins inside a stretch has a token of every series in front.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from kernels.typing import Leaf, PerRow
from ultra_hstu.nn.item_features import ItemCodes

AnyArray = Array | np.ndarray
PerExample = Int[AnyArray, " B"]
RowNumbers = Int[AnyArray, " T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Merged:
    """All tokens of a data set's events, M of them, users one after another.

    An event's own token stands behind those of the series that change with it.
    """

    event_M: Leaf[Int32[AnyArray, " M"]]
    column_M: Leaf[Int32[AnyArray, " M"]]  # 0: the event's own token; from 1: of which series
    token_E: Leaf[Int32[AnyArray, " E"]]  # where an event's own token is

    @staticmethod
    def of(
        item_E: Int[np.ndarray, " E"], first_E: Bool[np.ndarray, " E"], codes: ItemCodes
    ) -> "Merged":
        """
        Args:
          first_E: the events that begin a user.
        """
        changes = [np.zeros((len(item_E), 0), bool)]
        for part_IV in codes.parts(codes.code_IV):
            set_E = np.unique(part_IV, axis=0, return_inverse=True)[1].reshape(-1)[item_E]
            before_E = np.concatenate([set_E[:1], set_E[:-1]])
            some_E = (part_IV > 0).any(axis=1)[item_E]
            changes.append((some_E & (first_E | (set_E != before_E)))[:, None])
        # The event's own token is last.
        here_EX = np.concatenate([*changes, np.ones((len(item_E), 1), bool)], axis=1)
        event_M, place_M = np.nonzero(here_EX)
        column_M = np.where(place_M < len(codes.widths), place_M + 1, 0)
        token_E = np.flatnonzero(column_M == 0)
        return Merged(*(x.astype(np.int32) for x in (event_M, column_M, token_E)))

    def rows(self, start_B: PerExample, stop_B: PerExample, series: int) -> PerExample:
        """How many tokens the histories [start, stop) have."""
        events = self.token_E.shape[0]  # of an empty history, any of them
        first_B, last_B = self.token_E[start_B % events], self.token_E[(stop_B - 1) % events]
        return (stop_B > start_B) * (series + 1 + last_B - first_B)

    def places(
        self, start_T: RowNumbers, position_T: RowNumbers, series: int
    ) -> tuple[RowNumbers, RowNumbers]:
        """The event and the series of rows, by the history's first event and the row's position."""
        into_T = position_T - series
        token_T = self.token_E[start_T] + into_T * (into_T > 0)
        token_T = token_T % self.event_M.shape[0]  # of padding, anything
        front_T = into_T < 0
        xp = np if isinstance(self.event_M, np.ndarray) else jnp
        event_T = xp.where(front_T, start_T, self.event_M[token_T])
        return event_T, xp.where(front_T, position_T + 1, self.column_M[token_T])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeriesRows:
    """What the rows of a batch are, where series are merged into histories."""

    column_T: Leaf[PerRow]  # 0: an event's own token, or padding; from 1: of which series
    of_item_T: Leaf[PerRow]  # the item whose feature the token holds
    position_T: Leaf[PerRow]  # of the event in its history
