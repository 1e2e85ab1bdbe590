"""The implementation `mosaic` of `gated_linear`, for Hopper.

A Triton kernel makes the gated rows; a Mosaic kernel multiplies and adds the residual. In fp8 the
first one rounds the rows, too.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from kernels import rowwise
from kernels.gate.triton import gate
from kernels.gated_linear.api import GatedLinear, GatedRows
from kernels.norm_linear.api import LinearSpec
from kernels.norm_linear.mosaic import product
from kernels.norm_linear.mosaic.linear import multiply
from kernels.norm_linear.triton.linear import join, weight_gradient
from kernels.rowwise import NORM_STATS, RowSpec


def unsupported(spec: LinearSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    reason = product.refusal(spec.dtype, spec.rows, (spec.width, *spec.widths))
    return reason or rowwise.refusal(RowSpec(spec.dtype, max(spec.width, *spec.widths)))


def gated_linear(
    x: GatedRows, w: Array, bias: Array | None, residual: Array, static: GatedLinear
) -> Array:
    """See `gated_linear`."""
    norm, keep = x.norm, None if x.keep_TZ is None else x.keep_TZ.astype(jnp.int8)
    if norm is not None:
        norm = (norm[0].astype(jnp.float32), norm[1].astype(jnp.float32))
    return _gated_linear(static, x._replace(norm=norm, keep_TZ=keep), w, bias, residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_linear(
    static: GatedLinear, x: GatedRows, w: Array, bias: Array | None, residual: Array
) -> Array:
    small = static.precision == "fp8"
    made = gate.forward(static.gate, *x, write=not small, apart=True, quantize=small)
    return _product(static, made, w, bias, residual)


def _product(
    static: GatedLinear, made: gate.Gated, w: Array, bias: Array | None, residual: Array
) -> Array:
    width, dtype = w.shape[1], residual.dtype
    if static.precision == "fp8":
        (out,) = multiply(made.values, made.factors, w, bias, residual, (width,), dtype)
    else:
        (out,) = product.product(
            tuple(made.parts), w.astype(dtype).T, bias, residual, widths=(width,), dtype=dtype
        )
    return out


def _forward(static, x, w, bias, residual):
    made = gate.forward(static.gate, *x, apart=True, quantize=static.precision == "fp8")
    out = _product(static, made, w, bias, residual)
    stats = [checkpoint_name(one, NORM_STATS) for one in made.stats]
    return out, (x, w, bias, made.parts, stats)


def _backward(static, saved, g):
    x, w, bias, parts, stats = saved
    if static.gradient == "fp8":
        _, values, factors, sums = join([g], write=False, quantize=True)
        (dz,) = multiply(values, factors, w.T, None, None, (w.shape[0],), g.dtype)
    else:
        dz = g @ w.astype(g.dtype).T
        sums = None if bias is None else join([g], write=False)[-1]
    du, da, d_norm, _ = gate.backward(static.gate, *x, stats, dz)
    dw = jnp.concatenate([weight_gradient(part, g, w) for part in parts])
    d_bias = None if bias is None else sums.astype(bias.dtype)
    return GatedRows(du, da, d_norm, None), dw, d_bias, g


_gated_linear.defvjp(_forward, _backward)
