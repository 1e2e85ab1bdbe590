"""The gate in float32: the definition of correct."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.gate.api import Gate
from kernels.layer_norm import reference as layer_norm
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
    """See `gate`. JAX differentiates it."""
    u, a = (x.astype(jnp.float32) for x in (u_TY, a_TY))
    opened = u * jax.nn.sigmoid(u)
    normed, _ = layer_norm.norm(a, affine, eps=static.eps, residual=False)
    y = opened * normed
    if static.joined:
        y = jnp.concatenate([opened, a, y], axis=1)
    if keep_TZ is not None:
        y = jnp.where(keep_TZ, y / (1.0 - static.rate), 0.0)
    return y.astype(u_TY.dtype)
