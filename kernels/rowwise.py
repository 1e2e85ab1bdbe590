"""What Triton kernels over whole rows share: what they take, and the sizes of their launches."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels import triton_call

# The name of mean and 1 / deviation of a row, given with jax.ad_checkpoint.checkpoint_name.
NORM_STATS = "norm_stats"
WIDEST = 8192
PER_WARP = 512  # entries of a block that a warp holds, in registers
WARPS = 4  # of a program, where a row is not wider than they hold
PROGRAMS = 264  # that make sums over rows, a part of them each: two a processor
STAGES = 3  # of their loads: those of the next two blocks are under way


Affine = tuple[Float[Array, " D"], Float[Array, " D"]] | None  # weight and bias of a norm


class RowSpec(NamedTuple):
    """What implementations of an op over rows decide by: dtype and width of the rows."""

    dtype: DTypeLike
    width: int


def refusal(spec: RowSpec) -> str | None:
    """Why no Triton kernel can take such rows here, or None."""

    def unfit(_: tuple[int, int]) -> str | None:
        dtype = jnp.dtype(spec.dtype)
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"triton takes float32, bfloat16 or float16, got {dtype.name}; use 'xla'"
        if not 0 < spec.width <= WIDEST:
            return (
                f"triton takes rows of width 1 to {WIDEST}, got {spec.width}; implementation='xla' "
                "takes any"
            )
        return None

    return triton_call.refusal(unfit)


def launch(
    kernel: str,
    arrays: Sequence[Array],
    outs: Sequence[jax.ShapeDtypeStruct],
    *,
    rows: int,
    width: int,
    constants: Mapping[str, bool | int | float | str],
    sums: Sequence[int] = (),
) -> list[Array]:
    """Runs a kernel on blocks of rows of so many columns.

    Args:
      kernel, arrays, outs: as in `triton_call.launch`.
      width: of the widest of them.
      sums: widths of the sums over all rows that the kernel makes in float32; they follow the
        outputs.
    """
    padded = padded_width(width)
    block = max(1, WARPS * PER_WARP // padded)
    blocks = -(-rows // block)
    programs = min(PROGRAMS, blocks) if sums else blocks
    parts = [jax.ShapeDtypeStruct((programs, each), jnp.float32) for each in sums]
    results = triton_call.launch(
        kernel,
        arrays,
        [*outs, *parts],
        programs=programs,
        warps=max(1, block * padded // PER_WARP),
        stages=1,
        constants={
            "T": rows,
            "D": width,
            "W": padded,
            "BR": block,
            **({"PROGRAMS": programs, "STAGES": STAGES} if sums else {}),
            **constants,
        },
    )
    return [*results[: len(outs)], *(part.sum(0) for part in results[len(outs) :])]


def padded_width(width: int) -> int:
    """Columns that a kernel computes with: a power of two."""
    return max(16, 1 << (width - 1).bit_length())


def row_numbers(rows: int) -> jax.ShapeDtypeStruct:
    """An output with a float32 number a row."""
    return jax.ShapeDtypeStruct((rows,), jnp.float32)


def affine_of(op: str, weight: Array | None, bias: Array | None) -> Affine:
    """Weight and bias of a norm. ValueError for one without the other."""
    if weight is not None and bias is not None:
        return weight, bias
    if weight is None and bias is None:
        return None
    missing = "weight" if weight is None else "bias"
    raise ValueError(f"{op} takes weight and bias or none of them, got no {missing}")


def in_float32(norm: Affine) -> Affine:
    """Weight and bias as kernels read them."""
    return None if norm is None else (norm[0].astype(jnp.float32), norm[1].astype(jnp.float32))


def like(x: Float[Array, "..."]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def results(
    rows: int, columns: int, dtype: DTypeLike, *, write: bool, quantize: bool
) -> list[jax.ShapeDtypeStruct]:
    """Outputs of a kernel that writes rows in `dtype`, in e4m3 with a factor a row, or both.

    What it does not write has one entry.
    """
    return [
        jax.ShapeDtypeStruct((rows, columns) if write else (1,), dtype),
        jax.ShapeDtypeStruct((rows, columns) if quantize else (1,), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((rows,) if quantize else (1,), jnp.float32),
    ]
