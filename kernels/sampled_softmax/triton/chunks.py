"""The implementation `triton` of `sampled_softmax` (jax-triton), for GPUs from sm80 on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from kernels import softmax_rows, triton_call
from kernels.sampled_softmax.spec import COLLISION_LOGIT, IdsOf, SampledSpec
from kernels.softmax_rows import ChunkGradients, Gradients, PerItem, PerRow, Rows, Table

# Rows of a chunk: so many that their q stay in the L2 cache. Fewer where they have more ids
# together than this, each of which takes some 30 bytes.
CHUNK_ROWS, CHUNK_IDS = 16384, 2**24
WIDEST = 1024
# Of embeddings that a program of rows, of items, holds at one time.
ROWS_BYTES, ITEMS_BYTES = 4096, 8192


def unsupported(spec: SampledSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""

    def unfit(_: tuple[int, int]) -> str | None:
        if not 0 < spec.width <= WIDEST:
            return (
                f"triton takes rows of width 1 to {WIDEST}, got D = {spec.width}; "
                "implementation='xla' takes any"
            )
        if spec.rows_per_draw > 1:
            return (
                f"triton gathers the negatives of each row, and {spec.rows_per_draw} rows share "
                "them: implementation='xla' takes their scores as products"
            )
        return None

    return triton_call.refusal(unfit)


def gradients(
    q_TD: Rows,
    e_ID: Table,
    weight_T: PerRow,
    rest: PyTree,
    ids_of: IdsOf,
    shift_I: PerItem | None,
    *,
    spec: SampledSpec,
    chunk_rows: int | None,
) -> Gradients:
    """See `sampled_softmax`. The same bits on every run."""
    table_ID = e_ID.astype(q_TD.dtype)

    def chunk(q_CD: Rows, weight_C: PerRow, rest: PyTree, de_ID: Table) -> ChunkGradients:
        positive_C, negative_CR = ids_of(rest)
        id_CX = jnp.concatenate([positive_C[:, None], negative_CR], axis=1)
        slope_CX, loss_C, dq_CD = of_rows(q_CD, table_ID, id_CX, weight_C, shift_I)
        return loss_C, dq_CD, add_to_items(q_CD, id_CX, slope_CX, weight_C, de_ID)

    if chunk_rows is None:
        chunk_rows = max(1, min(CHUNK_ROWS, CHUNK_IDS // (1 + spec.negatives)))
    return softmax_rows.by_chunks(chunk, q_TD, weight_T, rest, e_ID, chunk_rows)


def of_rows(
    q_CD: Rows,
    e_ID: Table,
    id_CX: Int[Array, "C X"],
    weight_C: PerRow,
    shift_I: PerItem | None,
) -> tuple[Float[Array, "C X"], PerRow, Rows]:
    """The gradients of the scores, the losses and the gradient of q."""
    (rows, columns), width = id_CX.shape, q_CD.shape[1]
    per_row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    logit_CX, log_sum_C, slope_C, loss_C, dq_CD = triton_call.launch(
        "kernels.sampled_softmax.triton.kernels:rows",
        (q_CD, e_ID, id_CX, weight_C, weight_C if shift_I is None else shift_I),
        [
            jax.ShapeDtypeStruct((rows, columns), jnp.float32),
            per_row,
            per_row,
            per_row,
            jax.ShapeDtypeStruct((rows, width), q_CD.dtype),
        ],
        programs=rows,
        constants={
            "X": columns,
            "SHIFTED": shift_I is not None,
            "COLLISION": COLLISION_LOGIT,
            **_widths(width),
            "BX": _tile(width, q_CD.dtype, ROWS_BYTES),
        },
        warps=1,
        stages=1,
    )
    # The positive, and negatives that are it, which have a constant logit.
    same_CX = id_CX == id_CX[:, :1]
    first_1X = jnp.arange(columns, dtype=jnp.int32)[None, :] == 0
    others_CX = weight_C[:, None] * jnp.exp(logit_CX - log_sum_C[:, None])
    others_CX = jnp.where(same_CX | (weight_C == 0)[:, None], 0.0, others_CX)
    return jnp.where(first_1X, slope_C[:, None], others_CX), loss_C, dq_CD


def add_to_items(
    q_CD: Rows,
    id_CX: Int[Array, "C X"],
    slope_CX: Float[Array, "C X"],
    weight_C: PerRow,
    de_ID: Table,
) -> Table:
    """`de_ID` plus the sum of slope * q over the occurrences of each item."""
    (_, columns), (items, width) = id_CX.shape, de_ID.shape
    # Rows that do not count stand behind all items, where no program looks.
    id_N = jnp.where((weight_C > 0)[:, None], id_CX, items).ravel()
    if items < 2**16:
        id_N = id_N.astype(jnp.uint16)  # half the passes of a radix sort
    order_N = jnp.arange(id_N.size, dtype=jnp.int32)
    id_N, order_N = jax.lax.sort((id_N, order_N), num_keys=1)
    begin_I = jnp.searchsorted(
        id_N, jnp.arange(items + 1).astype(id_N.dtype), method="scan_unrolled"
    ).astype(jnp.int32)
    (de_ID,) = triton_call.launch(
        "kernels.sampled_softmax.triton.kernels:items",
        (q_CD, order_N, slope_CX, begin_I, de_ID),
        [jax.ShapeDtypeStruct((items, width), jnp.float32)],
        programs=items,
        constants={"X": columns, **_widths(width), "BN": _tile(width, q_CD.dtype, ITEMS_BYTES)},
        warps=1,
        stages=1,
    )
    return de_ID


def _widths(width: int) -> dict[str, int]:
    return {"D": width, "WD": triton_call.padded(width)}


def _tile(width: int, dtype: jnp.dtype, size: int) -> int:
    """How many embeddings have so many bytes."""
    return max(1, min(32, size // (triton_call.padded(width) * dtype.itemsize)))
