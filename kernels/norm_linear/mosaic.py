"""The implementation `mosaic` of `norm_linear`: a product in e4m3, for Hopper.

A Triton kernel makes the norm and rounds it by rows; a Mosaic kernel multiplies, scales and writes
each part of the result where it stays.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from kernels import hopper_product, rowwise
from kernels.fp8 import quantize
from kernels.hopper_product import Scales
from kernels.layer_norm.triton import norm as layer_norm
from kernels.norm_linear.api import LinearSpec, Norm, NormLinear, Parts
from kernels.norm_linear.triton import linear
from kernels.rowwise import NORM_STATS, RowSpec


def unsupported(spec: LinearSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    if spec.precision != "fp8":
        return "mosaic multiplies in fp8, not in the dtype of x; use 'triton' or 'xla'"
    if len(spec.widths) not in linear.PARTS:
        return f"mosaic cuts the result into 1, 2 or 4 parts, got {spec.widths}; use 'xla'"
    reason = hopper_product.refusal(
        spec.dtype, spec.rows, spec.width, spec.widths, spec.gradient == "fp8"
    )
    return reason or rowwise.refusal(RowSpec(spec.dtype, max(spec.width, *spec.widths)))


def norm_linear(x: Array, norm: Norm, w: Array, bias: Array | None, static: NormLinear) -> Parts:
    """See `norm_linear`."""
    norm = None if norm is None else (norm[0].astype(jnp.float32), norm[1].astype(jnp.float32))
    return _norm_linear(static, x, norm, w, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_linear(static: NormLinear, x: Array, norm: Norm, w: Array, bias: Array | None) -> Parts:
    _, values, factors, *_ = layer_norm.forward(static.eps, x, norm, write=False, quantize=True)
    return multiply(values, factors, w, bias, None, static.widths, x.dtype), x


def multiply(
    values: Array,
    factors: Array,
    w: Array,
    bias: Array | None,
    residual: Array | None,
    widths: tuple[int, ...],
    dtype: jnp.dtype,
) -> list[Array]:
    """`(values * factors) @ w + bias + residual` in parts, of w rounded by columns."""
    w_values, w_factors = quantize(w, axis=0)
    scales = Scales(factors, w_factors[0])
    return hopper_product.product(
        (values,), w_values.T, bias, residual, scales, widths=widths, dtype=dtype
    )


def _forward(static, x, norm, w, bias):
    y, values, factors, *stats = layer_norm.forward(static.eps, x, norm, quantize=True)
    parts = multiply(values, factors, w, bias, None, static.widths, x.dtype)
    stats = [checkpoint_name(one, NORM_STATS) for one in stats]
    return (parts, x), (x, norm, w, bias, y, stats)


def _backward(static, saved, gradients):
    (gs, beside), (x, norm, w, bias, y, stats) = gradients, saved
    small = static.gradient == "fp8"
    joined, values, factors, sums = linear.join(gs, quantize=small)
    if small:
        (dy,) = multiply(values, factors, w.T, None, None, (y.shape[1],), y.dtype)
    else:
        dy = joined @ w.astype(y.dtype).T
    dx, d_norm = layer_norm.backward(x, norm, stats, dy, beside)
    d_bias = None if bias is None else sums.astype(bias.dtype)
    return dx, d_norm, linear.weight_gradient(y, joined, w), d_bias


_norm_linear.defvjp(_forward, _backward)
