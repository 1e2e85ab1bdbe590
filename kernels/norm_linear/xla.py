"""The implementation `xla` of `norm_linear`: plain jnp, which JAX differentiates."""

import itertools

import jax.numpy as jnp
from jaxtyping import Array

from kernels.fp8 import linear
from kernels.layer_norm import xla as layer_norm
from kernels.norm_linear.api import LinearSpec, NormLinear, Parts
from kernels.rowwise import Affine


def unsupported(spec: LinearSpec) -> None:
    """Nothing: any call is taken."""


def norm_linear(x: Array, norm: Affine, w: Array, bias: Array | None, static: NormLinear) -> Parts:
    """See `norm_linear`. One product, which is cut."""
    y, _ = layer_norm.norm(x, norm, eps=static.eps, residual=False)
    y = linear(y, w, bias, precision=static.precision, gradient=static.gradient)
    return jnp.split(y, list(itertools.accumulate(static.widths))[:-1], axis=1), x
