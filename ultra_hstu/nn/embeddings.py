"""From item ids and codes to the input of the encoder."""

import dataclasses
import itertools
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kernels.typing import PerRow
from ultra_hstu.nn.dropout import KeyOrNone, dropout, row_keys
from ultra_hstu.nn.initializers import (
    param,
    table,
    truncated_normal,
    truncated_normal_002,
    xavier_normal,
)
from ultra_hstu.nn.item_features import ItemCodes, ItemFeatures
from ultra_hstu.parallel.embedding_sharding import gather, lookup
from ultra_hstu.parallel.shards import GroupRows
from ultra_hstu.sequences import Sequences


class CodeEmbedding(nnx.Module):
    """The sum of vectors of a row's codes; code 0 adds nothing.

    Each column of codes has vectors of its own; one table holds them all.
    """

    def __init__(self, sizes: tuple[int, ...], width: int, *, rngs: nnx.Rngs):
        # Code 1 of column i is entry firsts[i].
        *firsts, entries = itertools.accumulate((size - 1 for size in sizes), initial=0)
        self.firsts = tuple(firsts)
        self.table = param(truncated_normal_002, rngs, max(1, entries), width)

    def __call__(self, code_TS: Int[Array, "T S"]) -> Float[Array, "T D"]:
        x_TD = jnp.zeros((code_TS.shape[0], self.table.shape[1]), jnp.float32)
        for column, first in enumerate(self.firsts):
            code_T = code_TS[:, column]
            found_TD = gather(self.table[...], first + jnp.maximum(code_T - 1, 0))
            x_TD += jnp.where((code_T > 0)[:, None], found_TD, 0.0)
        return x_TD

    def reads(self, code_TS: Int[Array, "T S"]) -> Int[Array, "T S"]:
        """Numbers of the entries that codes stand for; negative for code 0."""
        first_1S = jnp.asarray(self.firsts, jnp.int32)[None, :]
        return jnp.where(code_TS > 0, first_1S + code_TS - 1, -1)


@dataclasses.dataclass(frozen=True)
class CodeSizes:
    """How many codes each column has of what a token of retrieval holds, 0 (none) counted.

    Attributes:
      signals: of what the user did with the event.
      features: of what was known of it before.
      contextual: of what is known of the user.
    """

    signals: tuple[int, ...] = ()
    features: tuple[int, ...] = ()
    contextual: tuple[int, ...] = ()

    @property
    def columns(self) -> int:
        return len(self.signals) + len(self.features) + len(self.contextual)

    def parts(self, code_TX: Int[Array, "T X"]) -> tuple[Int[Array, "T _"], ...]:
        """The columns of each of the three."""
        first, second = len(self.signals), len(self.signals) + len(self.features)
        return code_TX[:, :first], code_TX[:, first:second], code_TX[:, second:]


NO_CODES = CodeSizes()


@runtime_checkable
class SeriesTokens(Protocol):
    """Rows that hold one column of features of an item, by its number from 1; 0: not such a row."""

    @property
    def column_T(self) -> PerRow: ...

    @property
    def of_item_T(self) -> PerRow: ...

    @property
    def position_T(self) -> PerRow: ...


class InputEmbedding(nnx.Module):
    """`dropout(sqrt(D) * item_table[id] + position_table[position])`, and 0 on padding.

    So does the HSTU research code. With signals, what the user did with the item is part of its
    token, as in ULTRA-HSTU: `sqrt(D) * (item_table[id] + sum of signals)`. Features of items are
    added in the same way, or are tokens of series. Entry 0 of `item_table` is padding: it is never
    read into a result, so its gradient is 0.
    """

    def __init__(
        self,
        num_items: int,
        width: int,
        length: int,
        *,
        codes: CodeSizes = NO_CODES,
        item_features: ItemCodes | None = None,
        hidden_width: int = 0,
        item_std: float = 0.02,
        dropout_rate: float,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          codes: how many codes there are of what a token holds beside its item.
          item_features, hidden_width: what is known of items, as of `ItemFeatures`; None: nothing.
          item_std: of the first vectors of items, before they are cut at two of it.
        """
        self.item_table = table(truncated_normal(item_std), rngs, num_items + 1, width)
        self.position_table = table(xavier_normal, rngs, length, width)
        self.codes = codes

        def table_of(sizes: tuple[int, ...]) -> CodeEmbedding | None:
            return CodeEmbedding(sizes, width, rngs=rngs) if sizes else None

        self.signals, self.features = table_of(codes.signals), table_of(codes.features)
        self.contextual = table_of(codes.contextual)
        self.item_features = (
            None
            if item_features is None
            else ItemFeatures(item_features, width, hidden_width=hidden_width, rngs=rngs)
        )
        self.length, self.dropout_rate, self.dtype = length, dropout_rate, dtype

    def __call__(
        self,
        item_T: GroupRows[Int[Array, " T"]],
        sequences: Sequences,
        key: KeyOrNone = None,
        *,
        signal_TS: GroupRows[Int[Array, "T X"]] | None = None,
        with_id_I: Bool[Array, " I1"] | None = None,
        series: SeriesTokens | None = None,
    ) -> Float[Array, "t D"]:
        """This device's rows; positions beyond the table's length read its last entry.

        Args:
          signal_TS: codes of signals, features and the user's context, side by side.
          with_id_I: the items that have a vector of their own beside their features; None: all.
          series: the rows that are tokens of series, whose `item_T` is 0.
        """
        shards, rows = sequences.shards, sequences.rows
        item_t, real_t = shards.local((item_T, sequences.real_T))
        keep_t, position_t = real_t & rows.real, rows.position
        has_id_t = keep_t & (item_t > 0)
        if with_id_I is not None:
            has_id_t &= with_id_I[item_t]
        content_tD = lookup(self.item_table[...], jnp.where(has_id_t, item_t, -1), shards)
        if self.item_features is not None and series is None:
            content_tD = content_tD + self.item_features(item_t)
        if self.item_features is not None and series is not None:
            of_item_t, column_t, position_t = shards.local(
                (series.of_item_T, series.column_T, series.position_T)
            )
            content_tD = content_tD + self.item_features.series(of_item_t, column_t)
        position_t = jnp.minimum(position_t, self.length - 1)
        if signal_TS is not None:
            for embed, code_tX in zip(
                (self.signals, self.features, self.contextual),
                self.codes.parts(shards.local(signal_TS)),
                strict=True,
            ):
                if embed is not None:
                    content_tD = content_tD + embed(code_tX)
        position_tD = lookup(self.position_table[...], jnp.where(keep_t, position_t, -1), shards)
        x_tD = math.sqrt(self.item_table.shape[1]) * content_tD + position_tD
        x_tD = dropout(x_tD, self.dropout_rate, row_keys(key, sequences))
        return jnp.where(keep_t[:, None], x_tD, 0.0).astype(self.dtype)
