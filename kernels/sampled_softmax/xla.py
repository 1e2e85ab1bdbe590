"""The sampled softmax in plain JAX, chunk by chunk: on any device."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from kernels import device, softmax_rows
from kernels.sampled_softmax.spec import COLLISION_LOGIT, IdsOf, SampledSpec
from kernels.softmax_rows import Gradients, PerItem, PerRow, Rows, Table

# What fits the cache of a CPU, what fills a GPU (measured on MovieLens-1M, 128 negatives).
CHUNK_ROWS = {"cpu": 512}
CHUNK_ROWS_ELSEWHERE = 4096

Logits = Float[Array, "C X"]
Queries = Float[Array, "C D"]
Ids = Int[Array, "C X"]
# (d scores, gradient of the table so far) -> (d q, gradient of the table)
Backward = Callable[[Logits, Table], tuple[Queries, Table]]


def unsupported(spec: SampledSpec) -> None:
    """Nothing: any call is taken."""


def whole_table_is_cheaper(items: int, negatives: int) -> bool:
    """Whether to score a row against all items, instead of gathering those of its negatives.

    The whole table costs work in proportion to I, in matrix products; gathering costs work in
    proportion to R, at random places. The limit lies between MovieLens-1M (I / R = 30), whose loss
    and gradients took less time over the whole table, on a GPU and on a CPU, and MovieLens-20M
    (213), whose took less gathered.
    """
    return items <= 64 * negatives


def gradients(
    q_TD: Rows,
    e_ID: Table,
    weight_T: PerRow,
    rest: PyTree,
    ids_of: IdsOf,
    shift_I: PerItem | None,
    *,
    chunk_rows: int | None,
) -> Gradients:
    """See `sampled_softmax`."""
    table_ID = e_ID.astype(q_TD.dtype)

    def chunk(
        q_CD: Rows, weight_C: PerRow, rest: PyTree, de_ID: Table
    ) -> tuple[PerRow, Rows, Table]:
        id_CX = ids_of(rest, weight_C)
        whole = whole_table_is_cheaper(len(e_ID), id_CX.shape[1] - 1)
        scores = scores_of_all if whole else scores_of_gathered
        logit_CX, backward = scores(q_CD, table_ID, id_CX)
        first_1X = jnp.arange(id_CX.shape[1], dtype=jnp.int32)[None, :] == 0
        if shift_I is not None:
            shift_CX = shift_I.at[id_CX].get(mode="promise_in_bounds")
            logit_CX = logit_CX - jnp.where(first_1X, 0.0, shift_CX)
        collision_CX = (id_CX == id_CX[:, :1]) & ~first_1X
        logit_CX = jnp.where(collision_CX, COLLISION_LOGIT, logit_CX)
        log_sum_C = jax.nn.logsumexp(logit_CX, axis=1)
        slope_CX = jnp.exp(logit_CX - log_sum_C[:, None]) - first_1X
        slope_CX = jnp.where(collision_CX, 0.0, weight_C[:, None] * slope_CX)
        return log_sum_C - logit_CX[:, 0], *backward(slope_CX, de_ID)

    return softmax_rows.by_chunks(
        chunk, q_TD, weight_T, rest, e_ID, chunk_rows or default_chunk_rows()
    )


def default_chunk_rows() -> int:
    return CHUNK_ROWS.get(device.current().platform, CHUNK_ROWS_ELSEWHERE)


def scores_of_all(q_CD: Queries, e_ID: Table, id_CX: Ids) -> tuple[Logits, Backward]:
    """q . e[id] by one product with the whole table; its gradient for the table is one too."""
    row_C1 = jnp.arange(len(q_CD), dtype=jnp.int32)[:, None]

    def backward(d_CX: Logits, de_ID: Table) -> tuple[Queries, Table]:
        # Equal ids of a row carry equal values (the positive, zeros), so the order of these
        # additions does not change a bit of the sum.
        zeros_CI = jnp.zeros((len(q_CD), len(e_ID)), jnp.float32)
        d_CI = zeros_CI.at[row_C1, id_CX].add(d_CX, mode="promise_in_bounds")
        return product_backward(q_CD, e_ID, d_CI, de_ID)

    score_CI = product(q_CD, e_ID.T)
    return score_CI.at[row_C1, id_CX].get(mode="promise_in_bounds"), backward


def scores_of_gathered(q_CD: Queries, e_ID: Table, id_CX: Ids) -> tuple[Logits, Backward]:
    """q . e[id] from gathered embeddings.

    The order in which a GPU adds up the gradient of the table is not fixed.
    """
    e_CXD = e_ID.at[id_CX].get(mode="promise_in_bounds")

    def backward(d_CX: Logits, de_ID: Table) -> tuple[Queries, Table]:
        de_ID = de_ID.at[id_CX].add(d_CX[:, :, None] * q_CD[:, None, :], mode="promise_in_bounds")
        return jnp.sum(d_CX[:, :, None] * e_CXD, axis=1), de_ID

    return jnp.einsum("cd,cxd->cx", q_CD, e_CXD, preferred_element_type=jnp.float32), backward


def product_backward(
    q_CD: Queries, e_ID: Table, d_CI: Float[Array, "C I1"], de_ID: Table
) -> tuple[Queries, Table]:
    """The backward of q @ e.T.

    The columns of e are filled up to whole vectors of 16: a third faster on a CPU where D is small,
    as 50 is.
    """
    d_CI, width = d_CI.astype(q_CD.dtype), e_ID.shape[1]
    dq_CD = product(d_CI, jnp.pad(e_ID, ((0, 0), (0, -width % 16))))
    return dq_CD[:, :width], de_ID + product(q_CD.T, d_CI).T


product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
