"""The gate and a projection in float32: the definition of correct."""

import jax.numpy as jnp
from jaxtyping import Array

from kernels.fp8 import exact_linear
from kernels.gate import reference as gate
from kernels.gated_linear.api import GatedLinear, GatedRows
from kernels.norm_linear.api import LinearSpec


def unsupported(spec: LinearSpec) -> None:
    """Nothing: any call is taken."""


def gated_linear(
    x: GatedRows, w: Array, bias: Array | None, residual: Array, static: GatedLinear
) -> Array:
    """See `gated_linear`. JAX differentiates it."""
    u, a = (one.astype(jnp.float32) for one in (x.u_TY, x.a_TY))
    z = gate.gate(u, a, x.norm, x.keep_TZ, static.gate)
    return (residual.astype(jnp.float32) + exact_linear(z, w, bias)).astype(residual.dtype)
