"""What the softmax losses of rows over items share: gradients made together with the loss.

The gradient of a sum of losses depends on what follows by one factor alone. So the forward pass
computes the gradients together with the losses, each score once, and the backward pass multiplies
them by the cotangent: what is kept has the size of the gradients, never that of the logits.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Shaped

from kernels import device

Rows = Float[Array, "T D"]
Table = Float[Array, "I1 D"]
PerRow = Float[Array, " T"]
PerItem = Float[Array, " I1"]
Unshaped = Shaped[Array, "..."]  # until `check` names the remedy
Loss = tuple[Float[Array, ""], PerRow]

# Measured on MovieLens-1M, with 128 negatives and with all items.
CPU_FLOATS = 2**21
ROWS_ELSEWHERE, FLOATS_ELSEWHERE = 4096, 2**29
DTYPES = ("float32", "bfloat16")


class Gradients(NamedTuple):
    """Losses of T rows, and the gradients of their weighted sum.

    Attributes:
      loss_T: float32; 0 where the weight is 0.
      dq_TD: in the dtype of q; 0 where the weight is 0.
      de_ID: float32.
    """

    loss_T: PerRow
    dq_TD: Rows
    de_ID: Table


# (q_TD, e_ID, weight_T, what else the rows have) -> losses and gradients
Run = Callable[[Rows, Table, PerRow, PyTree], Gradients]


def weighted_loss(run: Run, q_TD: Rows, e_ID: Table, weight_T: PerRow, rest: PyTree) -> Loss:
    """`sum(weight * loss)`, differentiable in q, e and the weights, and the loss of each row.

    No gradient flows through the latter, nor into `rest`.
    """
    if q_TD.shape[0] == 0:
        return jnp.zeros((), jnp.float32), jnp.zeros(0, jnp.float32)
    loss, loss_T = _weighted_loss(run, q_TD, e_ID, weight_T, rest)
    return loss, jax.lax.stop_gradient(loss_T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(run: Run, q_TD: Rows, e_ID: Table, weight_T: PerRow, rest: PyTree) -> Loss:
    return _forward(run, q_TD, e_ID, weight_T, rest)[0]


def _forward(
    run: Run, q_TD: Rows, e_ID: Table, weight_T: PerRow, rest: PyTree
) -> tuple[Loss, Gradients]:
    found = run(q_TD, e_ID, weight_T, rest)
    return (jnp.sum(jnp.where(weight_T > 0, weight_T, 0.0) * found.loss_T), found.loss_T), found


def _backward(run: Run, found: Gradients, cotangents: Loss) -> tuple[Rows, Table, PerRow, None]:
    g, _ = cotangents  # the losses of single rows carry no gradient
    return (g * found.dq_TD).astype(found.dq_TD.dtype), g * found.de_ID, g * found.loss_T, None


_weighted_loss.defvjp(_forward, _backward)


# Losses of C rows, d q, and the gradient of the table so far.
ChunkGradients = tuple[Float[Array, " C"], Float[Array, "C D"], Table]
# (q_CD, weight_C, rest of C rows, gradient of the table before)
Chunk = Callable[[Rows, PerRow, PyTree, Table], ChunkGradients]


def by_chunks(
    chunk: Chunk,
    q_TD: Rows,
    weight_T: PerRow,
    rest: PyTree,
    table: Table,
    chunk_rows: int,
    *,
    multiple: int = 1,
) -> Gradients:
    """Losses and gradients from those of a chunk of rows.

    Chunks behind the last row that counts (the padding at the end of a flat buffer) are not
    computed. The chunks are of one size, at most `chunk_rows`, as equal as T allows; the last one
    may begin before the one in front of it ends. Rows that do not count, and those that were
    counted, are zeros of weight 0 in it.

    Args:
      rest: a pytree of arrays [T, ...].
      table: an array of the table's shape.
      multiple: chunks begin and end at multiples of it, as T does; one has it at least.
    """
    rows = q_TD.shape[0]
    blocks = rows // multiple
    size = multiple * -(-blocks // -(-blocks // max(1, chunk_rows // multiple)))
    row_T = jnp.arange(rows, dtype=jnp.int32)
    end = jnp.max(jnp.where(weight_T > 0, row_T + 1, 0))

    def step(i: Int[Array, ""], carry: PyTree) -> PyTree:
        loss_T, dq_TD, de_ID = carry
        first = jnp.minimum(i * size, rows - size)
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        weight_C = take(weight_T)
        mine_C = (weight_C > 0) & (take(row_T) >= i * size)
        loss_C, dq_CD, de_ID = chunk(
            # Before any product: 0 * NaN is NaN.
            jnp.where(mine_C[:, None], take(q_TD), jnp.zeros((), q_TD.dtype)),
            jnp.where(mine_C, weight_C, 0.0),
            jax.tree.map(take, rest),
            de_ID,
        )
        loss_T = put(loss_T, jnp.where(mine_C, loss_C, take(loss_T)))
        dq_CD = jnp.where(mine_C[:, None], dq_CD.astype(q_TD.dtype), take(dq_TD))
        return loss_T, put(dq_TD, dq_CD), de_ID

    zeros = (
        jnp.zeros(rows, jnp.float32),
        jnp.zeros_like(q_TD),
        jnp.zeros(table.shape, jnp.float32),
    )
    return Gradients(*jax.lax.fori_loop(0, (end + size - 1) // size, step, zeros))


def default_chunk_rows(floats_a_row: int) -> int:
    """Rows of a chunk that keeps so many numbers of each row.

    They are what fits the cache of a CPU, or what fills a GPU.
    """
    if device.current().platform == "cpu":
        return max(1, CPU_FLOATS // floats_a_row)
    return max(1, min(ROWS_ELSEWHERE, FLOATS_ELSEWHERE // floats_a_row))


def check(q_TD: Unshaped, e_ID: Unshaped, weight_T: Unshaped, chunk_rows: int | None) -> None:
    """Raises ValueError for what no implementation could take."""
    if q_TD.ndim != 2 or e_ID.ndim != 2 or q_TD.shape[1] != e_ID.shape[1]:
        raise ValueError(f"q {q_TD.shape} and e {e_ID.shape} must be [T, D] and [I + 1, D]")
    if q_TD.dtype.name not in DTYPES:
        raise ValueError(f"q is {q_TD.dtype}: softmax losses take {' and '.join(DTYPES)}")
    if e_ID.dtype != jnp.float32 or weight_T.dtype != jnp.float32:
        raise ValueError(
            f"e and weight must be float32, got {e_ID.dtype} and {weight_T.dtype}: "
            "scores read e in the dtype of q"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{chunk_rows=} must be at least 1, or None for what suits the device")
