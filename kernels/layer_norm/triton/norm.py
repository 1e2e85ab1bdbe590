"""The implementation `triton` of `layer_norm` (jax-triton), for GPUs from sm80 on.

The forward reads x once; the backward reads x, the gradient and the residual's gradient once and
makes parts of the sums over rows on the way. Same bits on every run.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from kernels import rowwise
from kernels.rowwise import NORM_STATS, Affine, RowSpec

Saved = tuple[Array, Affine, list[Array]]  # x, and mean and 1 / deviation of every row


def unsupported(spec: RowSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    return rowwise.refusal(spec)


def norm(x: Array, affine: Affine, *, eps: float, residual: bool) -> tuple[Array, Array]:
    """See `layer_norm` and `norm_and_residual`."""
    if x.size == 0:
        return x, x
    rows, affine = x.reshape(-1, x.shape[-1]), rowwise.in_float32(affine)
    if residual:
        return _with_residual(eps, rows, affine)
    return _norm(eps, rows, affine).reshape(x.shape), x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(eps: float, x: Array, affine: Affine) -> Array:
    return forward(eps, x, affine)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_residual(eps: float, x: Array, affine: Affine) -> tuple[Array, Array]:
    return forward(eps, x, affine)[0], x


def forward(
    eps: float,
    x: Array,
    affine: Affine,
    *,
    write: bool = True,
    quantize: bool = False,
) -> list[Array]:
    """y, its e4m3 values and their factors; and mean and 1 / deviation of every row."""
    rows, width = x.shape
    return rowwise.launch(
        "kernels.layer_norm.triton.kernels:norm_forward",
        (x, *(affine or (x, x))),  # x stands where nothing is read
        [
            *rowwise.results(rows, width, x.dtype, write=write, quantize=quantize),
            rowwise.row_numbers(rows),
            rowwise.row_numbers(rows),
        ],
        rows=rows,
        width=width,
        constants={
            "EPS": eps,
            "AFFINE": affine is not None,
            "WRITE": write,
            "QUANTIZE": quantize,
        },
    )


def _forward(eps: float, x: Array, affine: Affine) -> tuple[Array, Saved]:
    y, _, _, *stats = forward(eps, x, affine)
    return y, (x, affine, [checkpoint_name(one, NORM_STATS) for one in stats])


def _forward_with_residual(
    eps: float, x: Array, affine: Affine
) -> tuple[tuple[Array, Array], Saved]:
    y, saved = _forward(eps, x, affine)
    return (y, x), saved


def backward(
    x: Array, affine: Affine, stats: list[Array], g: Array, beside: Array | None
) -> tuple[Array, Affine]:
    """Gradients of x, weight and bias.

    Args:
      beside: the gradient of x from elsewhere, which is added.
    """
    rows, width = x.shape
    dx, d_weight, d_bias = rowwise.launch(
        "kernels.layer_norm.triton.kernels:norm_backward",
        (x, (affine or (x, x))[0], *stats, g, g if beside is None else beside),
        [rowwise.like(x)],
        rows=rows,
        width=width,
        constants={"AFFINE": affine is not None, "BESIDE": beside is not None},
        sums=(width, width),
    )
    return dx, None if affine is None else (d_weight, d_bias)


def _backward(eps: float, saved: Saved, g: Array) -> tuple[Array, Affine]:
    return backward(*saved, g, None)


def _backward_with_residual(
    eps: float, saved: Saved, gradients: tuple[Array, Array]
) -> tuple[Array, Affine]:
    return backward(*saved, *gradients)


_norm.defvjp(_forward, _backward)
_with_residual.defvjp(_forward_with_residual, _backward_with_residual)
