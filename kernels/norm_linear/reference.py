"""A norm and a projection in float32: the definition of correct."""

import itertools

import jax.numpy as jnp
from jaxtyping import Array

from kernels.fp8 import exact_linear
from kernels.layer_norm import reference as layer_norm
from kernels.norm_linear.api import LinearSpec, NormLinear, Parts
from kernels.rowwise import Affine


def unsupported(spec: LinearSpec) -> None:
    """Nothing: any call is taken."""


def norm_linear(x: Array, norm: Affine, w: Array, bias: Array | None, static: NormLinear) -> Parts:
    """See `norm_linear`. JAX differentiates it."""
    y, _ = layer_norm.norm(x.astype(jnp.float32), norm, eps=static.eps, residual=False)
    y = exact_linear(y, w, bias).astype(x.dtype)
    return jnp.split(y, list(itertools.accumulate(static.widths))[:-1], axis=1), x
