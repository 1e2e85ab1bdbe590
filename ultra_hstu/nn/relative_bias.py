"""The trained tables of HSTU's relative bias, one pair a layer, shared by its heads."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.hstu_attention.api import RelativeBias
from kernels.hstu_attention.relative_bias import position_bias, time_buckets
from kernels.typing import PositionTable, TimeTable
from ultra_hstu.nn.initializers import normal_002, param
from ultra_hstu.sequences import Times


class RelativeBiasTables(nnx.Module):
    """`bias[i, j] = position_table[N - 1 + j - i] + time_table[bucket]`.

    The bucket is `min(floor(ln(max(|t_(i+1) - t_j|, 1)) / 0.301), time_buckets)`. Without time
    buckets there is no table of times, and none is read.
    """

    def __init__(self, length: int, time_buckets: int, *, rngs: nnx.Rngs):
        self.position_table = param(normal_002, rngs, 2 * length - 1)
        self.time_table = param(normal_002, rngs, time_buckets + 1) if time_buckets else None

    @property
    def values(self) -> tuple[PositionTable, TimeTable | None]:
        """Of both tables."""
        return self.position_table[...], None if self.time_table is None else self.time_table[...]

    def flat(self, time_T: Times, next_time_T: Times) -> RelativeBias:
        """The bias in the form of the attention kernels.

        Times are in seconds: of the rows as keys, of the events after them as queries.
        """
        if self.time_table is None:
            return RelativeBias(*self.values)
        return RelativeBias(*self.values, jnp.asarray(time_T), jnp.asarray(next_time_T))

    def padded(
        self, time_BN: Int[Array, "B N"], next_time_BN: Int[Array, "B N"]
    ) -> Float[Array, "B N N"]:
        """The bias of every (query i, key j) of padded sequences, future and padding included."""
        position = jnp.arange(time_BN.shape[1], dtype=jnp.int32)
        distance_NN = position[None, :] - position[:, None]
        gap_BNN = next_time_BN[:, :, None] - time_BN[:, None, :]
        bias_NN = position_bias(self.position_table[...], distance_NN)
        if self.time_table is None:
            return jnp.broadcast_to(bias_NN, gap_BNN.shape)
        return bias_NN[None] + self.time_table[time_buckets(gap_BNN, self.time_table.shape[0])]
