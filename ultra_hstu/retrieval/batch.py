"""Batches of histories: their events laid out in one flat buffer.

An *example* is a slice `[start, stop)` of the event arrays: rows `start .. stop-1` are the history,
and each row should predict the event after it, so the event at `stop` is the target of the last
row. The same `HistoryGather` runs on the device (`xp=jax.numpy`, in the compiled step) and on the
host (`xp=numpy`, for streamed data).
"""

import dataclasses
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from kernels.jagged import Rows, lengths_to_offsets
from kernels.typing import Leaf, PerRow
from ultra_hstu.sequences import Columns, Sequences, seconds_since_first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B histories in T rows; integers are int32. Rows from `offsets[B]` on are padding.

    A padded layout has offsets `0, N, 2N, ...` and item 0 behind every history.
    """

    item_T: Leaf[PerRow]  # item ids 1..I, 0 on padding
    time_T: Leaf[PerRow]  # seconds since the first event of the data
    next_time_T: Leaf[PerRow]  # time of the event after the row, a target's too
    target_T: Leaf[PerRow]  # the item after the row, 0 where nothing is predicted
    weight_T: Leaf[Float32[Array, " T"]]  # 1 where a row is trained on, 0 elsewhere
    offsets: Leaf[Int32[Array | np.ndarray, " B1"]]
    last_row_B: Leaf[Int32[Array, " B"]]  # the user's row; of an empty history, row 0
    signal_TS: Leaf[Int32[Array, "T S"] | None] = None  # codes, 0 none; None: no signals

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.offsets, self.item_T > 0, self.time_T, self.next_time_T)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Events:
    """All events of a data set, users one after another: arrays of the host, or of JAX."""

    item_E: Leaf[Int32[Array | np.ndarray, " E"]]
    time_E: Leaf[Int32[Array | np.ndarray, " E"]]  # seconds since the first event
    signal_ES: Leaf[Int32[Array | np.ndarray, "E S"] | None] = None  # codes; None: no signals

    @staticmethod
    def from_arrays(
        items: Int[np.ndarray, " E"],
        timestamps: Int[np.ndarray, " E"] | None,
        signal_ES: Int32[np.ndarray, "E S"] | None = None,
    ) -> "Events":
        """From ids, absolute seconds and codes.

        Raises ValueError as `seconds_since_first`.
        """
        return Events(
            items.astype(np.int32), seconds_since_first(timestamps, len(items)), signal_ES
        )


@dataclasses.dataclass(frozen=True)
class HistoryGather:
    """Makes flat batches of B examples, columns `start` and `stop`; where they are equal the
    history is empty. With a column `event`, `start` and `stop` are places in it.

    Equal settings are equal objects, which share compiled steps.

    Attributes:
      rows: T.
      padded_length: None packs the histories without gaps; a number N puts each at a multiple of N
        (the padded layout of the published research code), and T must be B * N.
    """

    rows: int
    padded_length: int | None = None

    @staticmethod
    def of(
        rows: tuple[int, ...], examples: int, *, padded_length: int | None = None
    ) -> "HistoryGather":
        """For a `Loader`; padded histories need the same rows whatever their lengths."""
        (packed,) = rows
        return HistoryGather(
            packed if padded_length is None else examples * padded_length, padded_length
        )

    def __call__(self, data: Events, columns_B: Columns, xp: ModuleType = jnp) -> Batch:
        start_B, index = columns_B["start"], columns_B.get("event")
        lengths_B = (columns_B["stop"] - start_B).astype(xp.int32)
        if self.padded_length is None:
            offsets = lengths_to_offsets(lengths_B, xp=xp)
        else:
            offsets = xp.arange(len(lengths_B) + 1, dtype=xp.int32) * self.padded_length
        place = Rows.of(offsets, self.rows, lengths=lengths_B, xp=xp)
        real_T, zero = place.real, xp.int32(0)
        event_T = xp.where(real_T, start_B[place.segment] + place.position, 0)
        event_T = event_T if index is None else xp.where(real_T, index[event_T], 0)
        next_T = xp.where(real_T, event_T + 1, 0)
        signal_TS = None
        if data.signal_ES is not None:
            signal_TS = xp.where(real_T[:, None], data.signal_ES[event_T], zero)
        return Batch(
            item_T=xp.where(real_T, data.item_E[event_T], zero),
            time_T=xp.where(real_T, data.time_E[event_T], zero),
            next_time_T=xp.where(real_T, data.time_E[next_T], zero),
            target_T=xp.where(real_T, data.item_E[next_T], zero),
            weight_T=real_T.astype(xp.float32),
            offsets=offsets,
            last_row_B=xp.where(lengths_B > 0, offsets[:-1] + lengths_B - 1, zero),
            signal_TS=signal_TS,
        )
