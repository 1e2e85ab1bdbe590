"""Layer normalisation in float32: the definition of correct."""

import jax.numpy as jnp
from jaxtyping import Array

from kernels.rowwise import Affine, RowSpec


def unsupported(spec: RowSpec) -> None:
    """Nothing: any call is taken."""


def norm(x: Array, affine: Affine, *, eps: float, residual: bool) -> tuple[Array, Array]:
    """See `layer_norm` and `norm_and_residual`. JAX differentiates it."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    y = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    if affine is not None:
        weight, bias = affine
        y = y * weight.astype(jnp.float32)[None] + bias.astype(jnp.float32)[None]
    return y.astype(x.dtype), x
