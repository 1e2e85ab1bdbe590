"""From item ids to the input of the encoder."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.jagged import is_real, positions
from ultra_hstu.nn import initializers
from ultra_hstu.nn.dropout import KeyOrNone, dropout


class InputEmbedding(nnx.Module):
    """`dropout(sqrt(D) * item_table[id] + position_table[position])`, and 0 on padding (HSTU research code).

    Row 0 of `item_table` is padding: it is never read into a result, so its gradient is 0.
    """

    def __init__(self, num_items: int, width: int, length: int, *, dropout_rate: float, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.item_table = initializers.param(initializers.truncated_normal_002, rngs, num_items + 1, width)
        self.position_table = initializers.param(initializers.xavier_normal, rngs, length, width)
        self.dropout_rate = dropout_rate
        self.dtype = dtype

    def __call__(self, item_T: Int[Array, " T"], offsets: Int[Array, " B1"], key: KeyOrNone = None) -> Float[Array, "T D"]:
        """Rows of positions beyond the table's length read its last entry."""
        rows = item_T.shape[0]
        keep_T1 = ((item_T > 0) & is_real(offsets, rows))[:, None]
        x_TD = math.sqrt(self.item_table.shape[1]) * self.item_table[item_T] + self.position_table[positions(offsets, rows)]
        return jnp.where(keep_T1, dropout(x_TD, self.dropout_rate, key), 0.0).astype(self.dtype)
