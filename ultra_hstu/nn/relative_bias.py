"""The trained tables of HSTU's relative bias, one pair a layer, shared by its heads."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.hstu_attention.api import RelativeBias
from kernels.hstu_attention.relative_bias import position_bias, time_buckets
from ultra_hstu.nn.initializers import normal_002, param
from ultra_hstu.sequences import Times


class RelativeBiasTables(nnx.Module):
    """`bias[i, j] = position_table[N - 1 + j - i] + time_table[bucket]`.

    The bucket is `min(floor(ln(max(|t_(i+1) - t_j|, 1)) / 0.301), time_buckets)`.
    """

    def __init__(self, length: int, time_buckets: int, *, rngs: nnx.Rngs):
        self.position_table = param(normal_002, rngs, 2 * length - 1)
        self.time_table = param(normal_002, rngs, time_buckets + 1)

    def flat(self, time_T: Times, next_time_T: Times) -> RelativeBias:
        """The bias in the form of the attention kernels.

        Times are in seconds: of the rows as keys, of the events after them as queries.
        """
        times = (jnp.asarray(time_T), jnp.asarray(next_time_T))
        return RelativeBias(self.position_table[...], self.time_table[...], *times)

    def padded(
        self, time_BN: Int[Array, "B N"], next_time_BN: Int[Array, "B N"]
    ) -> Float[Array, "B N N"]:
        """The bias of every (query i, key j) of padded sequences, future and padding included."""
        position = jnp.arange(time_BN.shape[1], dtype=jnp.int32)
        bucket_BNN = time_buckets(
            next_time_BN[:, :, None] - time_BN[:, None, :], self.time_table.shape[0]
        )
        return (
            position_bias(self.position_table[...], position[None, :] - position[:, None])[None]
            + self.time_table[bucket_BNN]
        )
