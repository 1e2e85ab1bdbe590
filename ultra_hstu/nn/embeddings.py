"""From item ids and codes to the input of the encoder."""

import itertools
import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ultra_hstu.nn.dropout import KeyOrNone, dropout, row_keys
from ultra_hstu.nn.initializers import param, table, truncated_normal_002, xavier_normal
from ultra_hstu.parallel.embedding_sharding import gather, lookup
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


class InputEmbedding(nnx.Module):
    """`dropout(sqrt(D) * item_table[id] + position_table[position])`, and 0 on padding.

    So does the HSTU research code. With signals, what the user did with the item is part of its
    token, as in ULTRA-HSTU: `sqrt(D) * (item_table[id] + sum of signals)`. Entry 0 of `item_table`
    is padding: it is never read into a result, so its gradient is 0.
    """

    def __init__(
        self,
        num_items: int,
        width: int,
        length: int,
        *,
        signals: tuple[int, ...] = (),
        dropout_rate: float,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          signals: how many codes each signal has, 0 (none) counted.
        """
        self.item_table = table(truncated_normal_002, rngs, num_items + 1, width)
        self.position_table = table(xavier_normal, rngs, length, width)
        self.signals = CodeEmbedding(signals, width, rngs=rngs) if signals else None
        self.length, self.dropout_rate, self.dtype = length, dropout_rate, dtype

    def __call__(
        self,
        item_T: Int[Array, " T"],
        sequences: Sequences,
        key: KeyOrNone = None,
        *,
        signal_TS: Int[Array, "T S"] | None = None,
    ) -> Float[Array, "t D"]:
        """This device's rows; positions beyond the table's length read its last entry."""
        shards, rows = sequences.shards, sequences.rows
        item_t, real_t = shards.local((item_T, sequences.real_T))
        keep_t = real_t & rows.real
        position_t = jnp.minimum(rows.position, self.length - 1)
        content_tD = lookup(self.item_table[...], jnp.where(keep_t, item_t, -1), shards)
        if self.signals is not None and signal_TS is not None:
            content_tD = content_tD + self.signals(shards.local(signal_TS))
        position_tD = lookup(self.position_table[...], jnp.where(keep_t, position_t, -1), shards)
        x_tD = math.sqrt(self.item_table.shape[1]) * content_tD + position_tD
        x_tD = dropout(x_tD, self.dropout_rate, row_keys(key, sequences))
        return jnp.where(keep_t[:, None], x_tD, 0.0).astype(self.dtype)
