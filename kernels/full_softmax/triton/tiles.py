"""The implementation `triton` of `full_softmax` (jax-triton), for GPUs from sm80 on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import triton_call
from kernels.full_softmax.spec import FullSpec
from kernels.hstu_attention.triton.sizes import shared_kib
from kernels.softmax_rows import Gradients, PerRow, Rows, Table

PROGRAMS = 264  # that run at one time: two for each processor of a Hopper GPU
LARGEST_TILE = 128
LEAST_BLOCKS = 4  # of rows, for a program of items


class SoftmaxTiles(NamedTuple):
    """Rows and items of a tile, warps of a program, stages of its loads."""

    rows: int
    items: int
    warps: int
    stages: int


# By bytes of an element and padded width, for programs of rows and of items: what an H200 does
# 18,432 rows x 3,883 items, or at a width of 128 65,536 x 20,000, fastest with. At other widths it
# does products that write their logits faster (`xla`).
SIZES = {
    (2, 64): (SoftmaxTiles(64, 64, 4, 3), SoftmaxTiles(64, 64, 4, 3)),
    (2, 128): (SoftmaxTiles(64, 64, 4, 3), SoftmaxTiles(64, 128, 8, 3)),
    (4, 64): (SoftmaxTiles(64, 64, 4, 2), SoftmaxTiles(32, 64, 4, 2)),
}


def unsupported(spec: FullSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""

    def unfit(capability: tuple[int, int]) -> str | None:
        if shared_kib(capability) < 227:
            return (
                "triton's tiles need the shared memory of sm90 (H100) or sm100, the device has "
                f"{shared_kib(capability)} KiB a program; implementation='xla' runs anywhere"
            )
        itemsize = jnp.dtype(spec.dtype).itemsize
        widest = max(width for size, width in SIZES if size == itemsize)
        if not 0 < spec.width <= widest:
            return (
                f"triton takes rows of {jnp.dtype(spec.dtype)} of width 1 to {widest}, got "
                f"D = {spec.width}, where implementation='xla' is faster"
            )
        return None

    return triton_call.refusal(unfit)


def gradients(
    q_TD: Rows,
    e_ID: Table,
    weight_T: PerRow,
    positive_T: Int[Array, " T"],
    num_items: Int[Array, ""] | None = None,
    *,
    chunk_rows: int | None,
) -> Gradients:
    """See `full_softmax`; without logits, `chunk_rows` says nothing. The same bits on every run."""
    (rows, width), items = q_TD.shape, e_ID.shape[0] - 1
    bound = jnp.int32(items) if num_items is None else num_items.astype(jnp.int32)
    of_rows, of_items = SIZES[q_TD.dtype.itemsize, _padded(width)]
    counts_T = weight_T > 0
    q_TD = filled(jnp.where(counts_T[:, None], q_TD, jnp.zeros((), q_TD.dtype)))
    e_ID = filled(e_ID[1:].astype(q_TD.dtype))
    missing = len(q_TD) - rows
    positive_T = jnp.where(counts_T, positive_T.astype(jnp.int32) - 1, -1)
    positive_T = jnp.pad(positive_T, (0, missing), constant_values=-1)
    weight_T = jnp.pad(weight_T, (0, missing))
    transposed = q_TD.dtype == jnp.float32
    constants: dict[str, bool | int | float | str] = {
        "IP": len(e_ID),
        "WD": q_TD.shape[1],
        "TRANSPOSED": transposed,
        "PRECISION": triton_call.product_precision(),
    }
    positive_TD = e_ID.at[positive_T].get(mode="clip").astype(jnp.float32)
    score_T = jnp.sum(q_TD.astype(jnp.float32) * positive_TD, axis=1)
    per_row = jax.ShapeDtypeStruct(weight_T.shape, jnp.float32)
    loss_T, shift_T, slope_T, dq_TD = triton_call.launch(
        "kernels.full_softmax.triton.kernels:rows",
        (q_TD, e_ID, e_ID.T if transposed else e_ID, positive_T, score_T, weight_T, bound[None]),
        [per_row, per_row, per_row, jax.ShapeDtypeStruct(q_TD.shape, q_TD.dtype)],
        programs=len(q_TD) // of_rows.rows,
        constants=constants | {"BT": of_rows.rows, "BI": of_rows.items},
        warps=of_rows.warps,
        stages=of_rows.stages,
    )
    dq_TD = dq_TD.astype(jnp.float32) + slope_T[:, None] * positive_TD
    tiles = len(e_ID) // of_items.items
    shares = shares_of_rows(tiles, len(q_TD) // of_items.rows)
    last = jnp.max(jnp.where(counts_T, jnp.arange(1, rows + 1, dtype=jnp.int32), 0))
    q_again_TD = q_TD.T if transposed else q_TD
    (de_SID,) = triton_call.launch(
        "kernels.full_softmax.triton.kernels:items",
        (q_TD, q_again_TD, e_ID, positive_T, shift_T, slope_T, last[None]),
        [jax.ShapeDtypeStruct((shares, *e_ID.shape), jnp.float32)],
        programs=tiles * shares,
        constants=constants
        | {"TP": len(q_TD), "BT": of_items.rows, "BI": of_items.items, "SHARES": shares},
        warps=of_items.warps,
        stages=of_items.stages,
    )
    de_ID = de_SID.sum(0)[:items, :width]
    if num_items is not None:
        de_ID = jnp.where(jnp.arange(items, dtype=jnp.int32)[:, None] < bound, de_ID, 0.0)
    de_ID = jnp.pad(de_ID, ((1, 0), (0, 0)))
    return Gradients(loss_T[:rows], dq_TD[:rows, :width].astype(q_TD.dtype), de_ID)


def filled(x_TD: Rows) -> Float[Array, "TP WD"]:
    """With zeros up to whole tiles and the width of products."""
    missing = (-len(x_TD) % LARGEST_TILE, _padded(x_TD.shape[1]) - x_TD.shape[1])
    return jnp.pad(x_TD, ((0, missing[0]), (0, missing[1])))


def _padded(width: int) -> int:
    return max(64, triton_call.padded(width))


def shares_of_rows(tiles: int, blocks: int) -> int:
    """Shares that programs of items cut the rows into: enough to give every processor some."""
    return max(1, min(-(-PROGRAMS // tiles), blocks // LEAST_BLOCKS))
