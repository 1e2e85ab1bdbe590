"""From item ids and codes to the input of the encoder."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.jagged import is_real, positions
from ultra_hstu.nn import initializers
from ultra_hstu.nn.dropout import KeyOrNone, dropout


class CodeEmbedding(nnx.Module):
    """Several codes of a row, each with its own vectors, summed; code 0 adds nothing. One table holds them all."""

    def __init__(self, sizes: tuple[int, ...], width: int, *, rngs: nnx.Rngs):
        self.firsts = tuple(sum(size - 1 for size in sizes[:i]) for i in range(len(sizes)))  # code 1 of column i is line firsts[i]
        self.table = initializers.param(initializers.truncated_normal_002, rngs, max(1, sum(size - 1 for size in sizes)), width)

    def __call__(self, code_TS: Int[Array, "T S"]) -> Float[Array, "T D"]:
        x_TD = jnp.zeros((code_TS.shape[0], self.table.shape[1]))
        for column, first in enumerate(self.firsts):
            code_T = code_TS[:, column]
            x_TD += jnp.where((code_T > 0)[:, None], self.table[...][first + jnp.maximum(code_T - 1, 0)], 0.0)
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
        rngs: nnx.Rngs,
    ):
        """
        Args:
          signals: how many codes each signal has, 0 (none) counted.
        """
        self.item_table = initializers.param(initializers.truncated_normal_002, rngs, num_items + 1, width)
        self.position_table = initializers.param(initializers.xavier_normal, rngs, length, width)
        self.signals = CodeEmbedding(signals, width, rngs=rngs) if signals else None
        self.dropout_rate = dropout_rate
        self.dtype = dtype

    def __call__(
        self, item_T: Int[Array, " T"], offsets: Int[Array, " B1"], key: KeyOrNone = None, *, signal_TS: Int[Array, "T S"] | None = None
    ) -> Float[Array, "T D"]:
        """Rows of positions beyond the table's length read its last entry."""
        rows = item_T.shape[0]
        keep_T1 = ((item_T > 0) & is_real(offsets, rows))[:, None]
        content_TD = self.item_table[item_T]
        if self.signals is not None and signal_TS is not None:
            content_TD = content_TD + self.signals(signal_TS)
        x_TD = math.sqrt(self.item_table.shape[1]) * content_TD + self.position_table[positions(offsets, rows)]
        return jnp.where(keep_T1, dropout(x_TD, self.dropout_rate, key), 0.0).astype(self.dtype)
