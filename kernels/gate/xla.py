"""The implementation `xla` of `gate`: plain jnp, which JAX differentiates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.gate.api import Gate
from kernels.layer_norm import xla as layer_norm
from kernels.rowwise import Affine, RowSpec


def unsupported(spec: RowSpec) -> None:
    """Nothing: any call is taken."""


def gate(
    u_TY: Array,
    a_TY: Array,
    affine: Affine,
    keep_TZ: Array | None,
    static: Gate,
) -> Array:
    """See `gate`. Every step is rounded to the dtype of u."""
    opened_TY = jax.nn.silu(u_TY)
    normed_TY, _ = layer_norm.norm(a_TY, affine, eps=static.eps, residual=False)
    y_TZ = opened_TY * normed_TY
    if static.joined:
        y_TZ = jnp.concatenate([opened_TY, a_TY, y_TZ], axis=1)
    if keep_TZ is None:
        return y_TZ
    return jnp.where(keep_TZ, y_TZ / (1.0 - static.rate), jnp.zeros((), y_TZ.dtype))
