"""The implementation `triton` of `layer_norm` (jax-triton), for GPUs from sm80 on.

The forward reads x once; the backward reads x, the gradient and the residual's gradient once and
makes parts of the sums over rows on the way. Same bits on every run.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from kernels import rowwise
from kernels.rowwise import NORM_STATS, RowSpec

Parameters = tuple[Array, Array] | None  # weight and bias


def unsupported(spec: RowSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    return rowwise.refusal(spec)


def norm(
    x: Array, weight: Array | None, bias: Array | None, *, eps: float, residual: bool
) -> tuple[Array, Array]:
    """See `layer_norm` and `norm_and_residual`."""
    if x.size == 0:
        return x, x
    parameters = None
    if weight is not None and bias is not None:
        parameters = (weight.astype(jnp.float32), bias.astype(jnp.float32))
    rows = x.reshape(-1, x.shape[-1])
    if residual:
        return _with_residual(eps, rows, parameters)
    return _norm(eps, rows, parameters).reshape(x.shape), x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(eps: float, x: Array, parameters: Parameters) -> Array:
    return forward(eps, x, parameters)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_residual(eps: float, x: Array, parameters: Parameters) -> tuple[Array, Array]:
    return forward(eps, x, parameters)[0], x


def forward(
    eps: float,
    x: Array,
    parameters: Parameters,
    *,
    write: bool = True,
    quantize: bool = False,
) -> list[Array]:
    """y, its e4m3 values and their factors; and mean and 1 / deviation of every row."""
    rows, width = x.shape
    return rowwise.launch(
        "kernels.layer_norm.triton.kernels:forward",
        (x, *(parameters or (x, x))),  # x stands where nothing is read
        [
            *rowwise.results(rows, width, x.dtype, write=write, quantize=quantize),
            rowwise.row_numbers(rows),
            rowwise.row_numbers(rows),
        ],
        rows=rows,
        width=width,
        constants={
            "EPS": eps,
            "AFFINE": parameters is not None,
            "WRITE": write,
            "QUANTIZE": quantize,
        },
    )


def _forward(eps, x, parameters):
    y, _, _, *stats = forward(eps, x, parameters)
    return y, (x, parameters, [checkpoint_name(one, NORM_STATS) for one in stats])


def _forward_with_residual(eps, x, parameters):
    y, saved = _forward(eps, x, parameters)
    return (y, x), saved


def backward(
    x: Array, parameters: Parameters, stats: list[Array], g: Array, beside: Array | None
) -> tuple[Array, Parameters]:
    """Gradients of x and the parameters.

    Args:
      beside: the gradient of x from elsewhere, which is added.
    """
    rows, width = x.shape
    dx, *d_parameters = rowwise.launch(
        "kernels.layer_norm.triton.kernels:backward",
        (x, (parameters or (x, x))[0], *stats, g, g if beside is None else beside),
        [rowwise.like(x)],
        rows=rows,
        width=width,
        constants={"AFFINE": parameters is not None, "BESIDE": beside is not None},
        sums=(width, width),
    )
    return dx, None if parameters is None else tuple(d_parameters)


_norm.defvjp(_forward, lambda eps, saved, g: backward(*saved, g, None))
_with_residual.defvjp(_forward_with_residual, lambda eps, saved, g: backward(*saved, *g))
