"""The implementation `mosaic` of `gated_linear`: a product in e4m3, for Hopper.

A Triton kernel makes the gated rows and rounds them; a Mosaic kernel multiplies, scales and adds
the residual.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from kernels import hopper_product, rowwise
from kernels.gate.triton import gate
from kernels.gated_linear.api import GatedLinear, GatedRows
from kernels.norm_linear.api import LinearSpec
from kernels.norm_linear.mosaic import multiply
from kernels.norm_linear.triton.linear import join, weight_gradient
from kernels.rowwise import NORM_STATS, RowSpec


def unsupported(spec: LinearSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    if spec.precision != "fp8":
        return "mosaic multiplies in fp8, not in the dtype of u; use 'triton' or 'xla'"
    reason = hopper_product.refusal(spec.dtype, spec.rows, (spec.width, *spec.widths))
    return reason or rowwise.refusal(RowSpec(spec.dtype, max(spec.width, *spec.widths)))


def gated_linear(
    x: GatedRows, w: Array, bias: Array | None, residual: Array, static: GatedLinear
) -> Array:
    """See `gated_linear`."""
    norm = (
        None if x.norm is None else (x.norm[0].astype(jnp.float32), x.norm[1].astype(jnp.float32))
    )
    keep = None if x.keep_TZ is None else x.keep_TZ.astype(jnp.int8)
    return _gated_linear(static, x._replace(norm=norm, keep_TZ=keep), w, bias, residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_linear(
    static: GatedLinear, x: GatedRows, w: Array, bias: Array | None, residual: Array
) -> Array:
    _, values, factors, *_ = gate.forward(static.gate, *x, write=False, quantize=True)
    (out,) = multiply(values, factors, w, bias, residual, (w.shape[1],), residual.dtype)
    return out


def _forward(static, x, w, bias, residual):
    z, values, factors, *stats = gate.forward(static.gate, *x, quantize=True)
    (out,) = multiply(values, factors, w, bias, residual, (w.shape[1],), residual.dtype)
    stats = [checkpoint_name(one, NORM_STATS) for one in stats]
    return out, (x, w, bias, z, stats)


def _backward(static, saved, g):
    x, w, bias, z, stats = saved
    sums = None if bias is None else g.astype(jnp.float32).sum(0)
    if static.gradient == "fp8":
        _, values, factors, sums = join([g], write=False, quantize=True)
        (dz,) = multiply(values, factors, w.T, None, None, (w.shape[0],), g.dtype)
    else:
        dz = g @ w.astype(g.dtype).T
    du, da, d_norm, _ = gate.backward(static.gate, *x, stats, dz)
    d_bias = None if bias is None else sums.astype(bias.dtype)
    return GatedRows(du, da, d_norm, None), weight_gradient(z, g, w), d_bias, g


_gated_linear.defvjp(_forward, _backward)
