"""The implementation `xla` of `layer_norm`: plain jnp, which JAX differentiates."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from kernels.rowwise import NORM_STATS, Affine, RowSpec


def unsupported(spec: RowSpec) -> None:
    """Nothing: any call is taken."""


def norm(x: Array, affine: Affine, *, eps: float, residual: bool) -> tuple[Array, Array]:
    """See `layer_norm` and `norm_and_residual`."""
    x32 = x.astype(jnp.float32)
    centred = x32 - checkpoint_name(jnp.mean(x32, axis=-1, keepdims=True), NORM_STATS)
    y = centred * checkpoint_name(
        jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps), NORM_STATS
    )
    if affine is not None:
        weight, bias = affine
        y = y * weight[None] + bias[None]
    return y.astype(x.dtype), x
