"""The implementation `triton` of `full_softmax` (jax-triton), for GPUs from sm80 on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels import device, triton_call
from kernels.full_softmax.spec import FullSpec
from kernels.hstu_attention.triton.sizes import shared_kib
from kernels.softmax_rows import Gradients, PerRow, Rows, Table

PROGRAMS = 264  # that run at one time: two for each processor of a Hopper GPU
LEAST_BLOCKS = 4  # of rows, for a program of items


class TileSizes(NamedTuple):
    """Rows and items of a tile, warps of a program, stages of its loads."""

    rows: int
    items: int
    warps: int
    stages: int


# By bytes of an element and padded width, for programs of rows and of items.
SIZES = {
    (2, 64): (TileSizes(128, 64, 4, 3), TileSizes(64, 128, 4, 3)),
    (2, 128): (TileSizes(128, 64, 8, 3), TileSizes(64, 128, 8, 3)),
    (2, 256): (TileSizes(64, 64, 4, 2), TileSizes(64, 64, 4, 2)),
    (2, 512): (TileSizes(64, 64, 8, 2), TileSizes(64, 64, 8, 2)),
    (4, 64): (TileSizes(64, 64, 4, 2), TileSizes(64, 64, 4, 2)),
    (4, 128): (TileSizes(64, 32, 4, 2), TileSizes(32, 64, 4, 2)),
    (4, 256): (TileSizes(32, 32, 4, 2), TileSizes(32, 32, 4, 2)),
}


def unsupported(spec: FullSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    reason = triton_call.refusal()
    if reason is not None:
        return reason
    capability = device.current().compute_capability
    assert capability is not None, "no GPU, which `refusal` says"
    if shared_kib(capability) < 227:
        return (
            "triton's tiles need the shared memory of sm90 (H100) or sm100, the device has "
            f"{shared_kib(capability)} KiB a program; implementation='xla' runs anywhere"
        )
    itemsize = jnp.dtype(spec.dtype).itemsize
    widest = max(width for size, width in SIZES if size == itemsize)
    if not 0 < spec.width <= widest:
        return (
            f"triton takes rows of {spec.dtype} of width 1 to {widest}, got D = {spec.width}; "
            "implementation='xla' takes any"
        )
    return None


def gradients(
    q_TD: Rows,
    e_ID: Table,
    weight_T: PerRow,
    positive_T: Int[Array, " T"],
    *,
    chunk_rows: int | None,
) -> Gradients:
    """See `full_softmax`; without logits, `chunk_rows` says nothing. The same bits on every run."""
    (rows, width), items, f32 = q_TD.shape, e_ID.shape[0], jnp.float32
    padded = max(64, triton_call.padded(width))
    of_rows, of_items = SIZES[q_TD.dtype.itemsize, padded]
    constants: dict[str, bool | int | float | str] = {
        "T": rows,
        "I": items,
        "D": width,
        "WD": padded,
        "PRECISION": triton_call.product_precision(),
    }
    inputs = (q_TD, e_ID.astype(q_TD.dtype), positive_T.astype(jnp.int32), weight_T)
    loss_T, log_sum_T, dq_TD = triton_call.launch(
        "kernels.full_softmax.triton.kernels:rows",
        inputs,
        [
            jax.ShapeDtypeStruct((rows,), f32),
            jax.ShapeDtypeStruct((rows,), f32),
            jax.ShapeDtypeStruct((rows, width), q_TD.dtype),
        ],
        programs=-(-rows // of_rows.rows),
        constants=constants | {"BT": of_rows.rows, "BI": of_rows.items},
        warps=of_rows.warps,
        stages=of_rows.stages,
    )
    tiles = -(-items // of_items.items)
    shares = shares_of_rows(tiles, -(-rows // of_items.rows))
    last = jnp.max(jnp.where(weight_T > 0, jnp.arange(1, rows + 1, dtype=jnp.int32), 0))
    (de_SID,) = triton_call.launch(
        "kernels.full_softmax.triton.kernels:items",
        (*inputs, log_sum_T, last[None]),
        [jax.ShapeDtypeStruct((shares, items, width), f32)],
        programs=tiles * shares,
        constants=constants | {"BT": of_items.rows, "BI": of_items.items, "SHARES": shares},
        warps=of_items.warps,
        stages=of_items.stages,
    )
    return Gradients(loss_T, dq_TD, de_SID[0] if shares == 1 else de_SID.sum(0))


def shares_of_rows(tiles: int, blocks: int) -> int:
    """Shares that programs of items cut the rows into: enough to give every processor some."""
    return max(1, min(-(-PROGRAMS // tiles), blocks // LEAST_BLOCKS))
