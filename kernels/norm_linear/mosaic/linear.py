"""The implementation `mosaic` of `norm_linear`, for Hopper.

Triton kernels make the norm, its gradient and sums over rows; a Mosaic kernel multiplies and writes
each part of the result where it stays, and reads the parts of the gradient where they lie. In fp8
the norm's kernel rounds its rows, too.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from kernels import rowwise
from kernels.fp8 import quantize
from kernels.layer_norm.triton import norm as layer_norm
from kernels.norm_linear.api import LinearSpec, NormLinear, Parts
from kernels.norm_linear.mosaic import product
from kernels.norm_linear.mosaic.product import Scales
from kernels.norm_linear.triton import linear
from kernels.rowwise import NORM_STATS, Affine, RowSpec


def unsupported(spec: LinearSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    if len(spec.widths) not in linear.PARTS:
        return f"mosaic cuts the result into 1, 2 or 4 parts, got {spec.widths}; use 'xla'"
    reason = product.refusal(spec.dtype, spec.rows, (spec.width, *spec.widths))
    return reason or rowwise.refusal(RowSpec(spec.dtype, max(spec.width, *spec.widths)))


def norm_linear(x: Array, norm: Affine, w: Array, bias: Array | None, static: NormLinear) -> Parts:
    """See `norm_linear`."""
    if static.precision == "same":
        y, x = layer_norm.norm(x, norm, eps=static.eps, residual=True)
        return _project(static.widths, y, w, bias), x
    return _norm_linear(static, x, rowwise.in_float32(norm), w, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(widths: tuple[int, ...], y: Array, w: Array, bias: Array | None) -> list[Array]:
    w_XD = w.astype(y.dtype).T
    return product.product((y,), w_XD, bias, widths=widths, dtype=y.dtype)


def _forward_of_product(widths, y, w, bias):
    return _project(widths, y, w, bias), (y, w, bias)


def _backward_of_product(widths, saved, gs):
    y, w, bias = saved
    return gradients(y, w, bias, gs)


_project.defvjp(_forward_of_product, _backward_of_product)


def gradients(
    y: Array, w: Array, bias: Array | None, gs: list[Array]
) -> tuple[Array, Array, Array | None]:
    """Those of y, w and bias."""
    (dy,) = product.product(tuple(gs), w.astype(y.dtype), widths=(y.shape[1],), dtype=y.dtype)
    return dy, *parameter_gradients(y, w, bias, gs)


def parameter_gradients(
    y: Array, w: Array, bias: Array | None, gs: list[Array], sums: Array | None = None
) -> tuple[Array, Array | None]:
    """Those of w and bias; `sums` of the parts over rows, if they are known."""
    dw = jnp.concatenate([linear.weight_gradient(y, g, w) for g in gs], axis=1)
    if bias is None:
        return dw, None
    if sums is None:
        sums = linear.join(gs, write=False)[-1]
    return dw, sums.astype(bias.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_linear(static: NormLinear, x: Array, norm: Affine, w: Array, bias: Array | None) -> Parts:
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
    return product.product(
        (values,), w_values.T, bias, residual, scales, widths=widths, dtype=dtype
    )


def _forward(static, x, norm, w, bias):
    y, values, factors, *stats = layer_norm.forward(static.eps, x, norm, quantize=True)
    parts = multiply(values, factors, w, bias, None, static.widths, x.dtype)
    stats = [checkpoint_name(one, NORM_STATS) for one in stats]
    return (parts, x), (x, norm, w, bias, y, stats)


def _backward(static, saved, cotangents):
    (gs, beside), (x, norm, w, bias, y, stats) = cotangents, saved
    if static.gradient == "fp8":
        _, values, factors, sums = linear.join(gs, write=False, quantize=True)
        (dy,) = multiply(values, factors, w.T, None, None, (y.shape[1],), y.dtype)
        d_parameters = parameter_gradients(y, w, bias, gs, sums)
    else:
        dy, *d_parameters = gradients(y, w, bias, gs)
    dx, d_norm = layer_norm.backward(x, norm, stats, dy, beside)
    return dx, d_norm, *d_parameters


_norm_linear.defvjp(_forward, _backward)
