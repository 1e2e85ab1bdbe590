"""From item ids and codes to the input of the encoder."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.jagged import is_real, positions
from ultra_hstu.nn import initializers
from ultra_hstu.nn.dropout import KeyOrNone, dropout, row_keys
from ultra_hstu.parallel.embedding_sharding import lookup
from ultra_hstu.parallel.shards import ONE, Shards


class CodeEmbedding(nnx.Module):
    """Several codes of a row, each with its own vectors, summed; code 0 adds nothing. One table holds them all."""

    def __init__(self, sizes: tuple[int, ...], width: int, *, rngs: nnx.Rngs):
        self.firsts = tuple(
            sum(size - 1 for size in sizes[:i]) for i in range(len(sizes))
        )  # code 1 of column i is line firsts[i]
        self.table = initializers.param(
            initializers.truncated_normal_002, rngs, max(1, sum(size - 1 for size in sizes)), width
        )

    def __call__(self, code_TS: Int[Array, "T S"]) -> Float[Array, "T D"]:
        x_TD = jnp.zeros((code_TS.shape[0], self.table.shape[1]))
        for column, first in enumerate(self.firsts):
            code_T = code_TS[:, column]
            x_TD += jnp.where(
                (code_T > 0)[:, None], self.table[...][first + jnp.maximum(code_T - 1, 0)], 0.0
            )
        return x_TD


class InputEmbedding(nnx.Module):
    """`dropout(sqrt(D) * item_table[id] + position_table[position])`, and 0 on padding (HSTU research code).

    With signals, what the user did with the item is part of its token, as in ULTRA-HSTU: `sqrt(D) * (item_table[id] + sum of signals)`.
    Row 0 of `item_table` is padding: it is never read into a result, so its gradient is 0.
    """

    def __init__(
        self,
        num_items: int,
        width: int,
        length: int,
        *,
        signals: tuple[int, ...] = (),
        dropout_rate: float,
        dtype: Any = jnp.float32,
        shards: Shards = ONE,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          signals: how many codes each signal has, 0 (none) counted.
        """
        self.item_table = initializers.table(
            initializers.truncated_normal_002, rngs, num_items + 1, width
        )
        self.position_table = initializers.table(initializers.xavier_normal, rngs, length, width)
        self.length, self.shards = length, shards
        self.signals = CodeEmbedding(signals, width, rngs=rngs) if signals else None
        self.dropout_rate = dropout_rate
        self.dtype = dtype

    def __call__(
        self,
        item_T: Int[Array, " T"],
        offsets: Int[Array, " B1"],
        key: KeyOrNone = None,
        *,
        signal_TS: Int[Array, "T S"] | None = None,
    ) -> Float[Array, "t D"]:
        """Rows of positions beyond the table's length read its last entry. In a mesh: this device's rows of the T."""
        rows, shards = item_T.shape[0], self.shards
        keep_T = (item_T > 0) & is_real(offsets, rows)
        position_T = jnp.minimum(positions(offsets, rows), self.length - 1)
        keep_t, item_t, position_t, signal_tS = shards.local(
            (keep_T, item_T, position_T, signal_TS)
        )
        content_tD = lookup(self.item_table[...], jnp.where(keep_t, item_t, -1), shards)
        if self.signals is not None and signal_tS is not None:
            content_tD = content_tD + self.signals(signal_tS)
        position_tD = lookup(self.position_table[...], jnp.where(keep_t, position_t, -1), shards)
        x_tD = math.sqrt(self.item_table.shape[1]) * content_tD + position_tD
        keys_t = row_keys(
            key, offsets, shards.rows(rows), shards.first_sequence(offsets.shape[0] - 1)
        )
        return jnp.where(keep_t[:, None], dropout(x_tD, self.dropout_rate, keys_t), 0.0).astype(
            self.dtype
        )
