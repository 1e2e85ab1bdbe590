"""The implementation `triton` of `gate` (jax-triton), for GPUs from sm80 on.

Each pass reads its inputs once. What is between them stays in float32, so that a value is rounded
once. Same bits on every run.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from kernels import rowwise
from kernels.gate.api import Gate
from kernels.rowwise import NORM_STATS, Affine, RowSpec

# u, a, weight and bias, the mask, and mean and 1 / deviation of every row of a.
Saved = tuple[Array, Array, Affine, Array | None, list[Array]]


def unsupported(spec: RowSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    return rowwise.refusal(spec)


def gate(
    u_TY: Array,
    a_TY: Array,
    affine: Affine,
    keep_TZ: Array | None,
    static: Gate,
) -> Array:
    """See `gate`."""
    if u_TY.size == 0:
        return jnp.concatenate([u_TY] * 3, axis=1) if static.joined else u_TY
    keep = None if keep_TZ is None else keep_TZ.astype(jnp.int8)
    return _gate(static, u_TY, a_TY, rowwise.in_float32(affine), keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gate(static: Gate, u: Array, a: Array, affine: Affine, keep: Array | None) -> Array:
    return forward(static, u, a, affine, keep).parts[0]


class Gated(NamedTuple):
    """What the kernel of the forward makes.

    Attributes:
      parts: of the output, side by side or apart.
      values, factors: of the output in e4m3, if it was wanted.
      stats: mean and 1 / deviation of every row of a.
    """

    parts: list[Array]
    values: Array
    factors: Array
    stats: list[Array]


def forward(
    static: Gate,
    u: Array,
    a: Array,
    affine: Affine,
    keep: Array | None,
    *,
    write: bool = True,
    apart: bool = False,
    quantize: bool = False,
) -> Gated:
    """The output.

    Args:
      write, quantize: what is made: the output in the dtype of u, in e4m3.
      apart: its parts are arrays of their own.
    """
    (rows, width), apart = u.shape, apart and static.joined
    columns = width * (3 if static.joined else 1)
    like_u, none = rowwise.like(u), jax.ShapeDtypeStruct((1,), u.dtype)
    joined, *small = rowwise.results(rows, columns, u.dtype, write=write, quantize=quantize)
    wanted = [joined, none, none]
    if write and apart:
        wanted = [like_u, none if keep is None else like_u, like_u]
    *parts, values, factors, mean, rstd = rowwise.launch(
        "kernels.gate.triton.kernels:gate_forward",
        (u, a, *(affine or (u, u)), u if keep is None else keep),  # u where nothing is read
        [*wanted, *small, rowwise.row_numbers(rows), rowwise.row_numbers(rows)],
        rows=rows,
        width=width,
        constants={
            "EPS": static.eps,
            "WRITE": write,
            "APART": apart,
            "QUANTIZE": quantize,
            **_constants(static, affine, keep),
        },
    )
    if not apart:
        parts = parts[:1]
    elif keep is None:
        parts[1] = a
    return Gated(parts, values, factors, [mean, rstd])


def _constants(static: Gate, affine: Affine, keep: Array | None) -> dict[str, bool | float]:
    return {
        "AFFINE": affine is not None,
        "JOINED": static.joined,
        "MASKED": keep is not None,
        "FACTOR": 1.0 / (1.0 - static.rate),
    }


def _forward(
    static: Gate, u: Array, a: Array, affine: Affine, keep: Array | None
) -> tuple[Array, Saved]:
    made = forward(static, u, a, affine, keep)
    stats = [checkpoint_name(one, NORM_STATS) for one in made.stats]
    return made.parts[0], (u, a, affine, keep, stats)


def backward(
    static: Gate,
    u: Array,
    a: Array,
    affine: Affine,
    keep: Array | None,
    stats: list[Array],
    g: Array,
) -> tuple[Array, Array, Affine, None]:
    """Gradients of u, a, weight and bias, and none of the mask."""
    rows, width = u.shape
    du, da, d_weight, d_bias = rowwise.launch(
        "kernels.gate.triton.kernels:gate_backward",
        (u, a, *(affine or (u, u)), u if keep is None else keep, *stats, g),
        [rowwise.like(u), rowwise.like(a)],
        rows=rows,
        width=width,
        constants=_constants(static, affine, keep),
        sums=(width, width),
    )
    return du, da, None if affine is None else (d_weight, d_bias), None


def _backward(static: Gate, saved: Saved, g: Array) -> tuple[Array, Array, Affine, None]:
    return backward(static, *saved, g)


_gate.defvjp(_forward, _backward)
