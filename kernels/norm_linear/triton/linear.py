"""The implementation `triton` of `norm_linear`, for GPUs from sm80 on.

The norm and what joins gradients are Triton kernels, which also make the sums over rows; products
are cuBLAS's. Each part of the result is a product of its own, so that nobody cuts it out.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels import rowwise
from kernels.layer_norm.triton.norm import norm as layer_norm
from kernels.norm_linear.api import LinearSpec, NormLinear, Parts
from kernels.rowwise import Affine, RowSpec

PARTS = (1, 2, 4)  # that are joined


def unsupported(spec: LinearSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    if spec.precision != "same":
        return (
            f"triton multiplies in the dtype of x, not in {spec.precision}; use 'mosaic' or 'xla'"
        )
    if len(spec.widths) not in PARTS:
        return f"triton cuts the result into 1, 2 or 4 parts, got {spec.widths}; use 'xla'"
    return rowwise.refusal(RowSpec(spec.dtype, max(spec.width, *spec.widths)))


def norm_linear(x: Array, norm: Affine, w: Array, bias: Array | None, static: NormLinear) -> Parts:
    """See `norm_linear`."""
    y, x = layer_norm(x, norm, eps=static.eps, residual=True)
    return _project(static.widths, y, w, bias), x


def columns(widths: tuple[int, ...]) -> list[slice]:
    """The columns of each part."""
    ends = list(itertools.accumulate(widths))
    return [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(widths: tuple[int, ...], y: Array, w: Array, bias: Array | None) -> list[Array]:
    w, parts = w.astype(y.dtype), []
    for part in columns(widths):
        product = y @ w[:, part]
        parts.append(product if bias is None else product + bias[part].astype(y.dtype)[None])
    return parts


Saved = tuple[Array, Array, Array | None]


def _forward(
    widths: tuple[int, ...], y: Array, w: Array, bias: Array | None
) -> tuple[list[Array], Saved]:
    return _project(widths, y, w, bias), (y, w, bias)


def _backward(
    widths: tuple[int, ...], saved: Saved, gs: list[Array]
) -> tuple[Array, Array, Array | None]:
    y, w, bias = saved
    joined, _, _, sums = join(gs)
    dy = joined @ w.astype(y.dtype).T
    return dy, weight_gradient(y, joined, w), None if bias is None else sums.astype(bias.dtype)


_project.defvjp(_forward, _backward)


def weight_gradient(y: Array, g: Array, w: Array) -> Array:
    return jnp.einsum("tx,ty->xy", y, g, preferred_element_type=jnp.float32).astype(w.dtype)


def join(gs: list[Array], *, write: bool = True, quantize: bool = False) -> list[Array]:
    """The parts side by side, the same in e4m3 and its factors; and their sums over rows."""
    rows, dtype, widths = gs[0].shape[0], gs[0].dtype, [g.shape[1] for g in gs]
    if rows == 0:
        joined, sums = jnp.concatenate(gs, axis=1), jnp.zeros(sum(widths), jnp.float32)
        return [joined, joined.astype(jnp.float8_e4m3fn), jnp.zeros(0, jnp.float32), sums]
    four = [*gs, *gs[:1] * 3][:4]
    *outs, sum0, sum1, sum2, sum3 = rowwise.launch(
        "kernels.norm_linear.triton.kernels:join_rows",
        four,
        rowwise.results(rows, sum(widths), dtype, write=write, quantize=quantize),
        rows=rows,
        width=max(widths),
        constants={
            "D": sum(widths),
            "PARTS": len(gs),
            **{f"D{i}": g.shape[1] for i, g in enumerate(four)},
            "WRITE": write,
            "QUANTIZE": quantize,
        },
        sums=[g.shape[1] for g in four],
    )
    return [*outs, jnp.concatenate([sum0, sum1, sum2, sum3][: len(gs)])]
