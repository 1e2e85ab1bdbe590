"""The sampled softmax in plain JAX, chunk by chunk: on any device."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from kernels import device, softmax_rows
from kernels.sampled_softmax.spec import COLLISION_LOGIT, IdsOf, SampledSpec
from kernels.softmax_rows import ChunkGradients, Gradients, PerItem, PerRow, Rows, Table

# Up to so many items a negative, the whole table is cheaper.
WHOLE_TABLE = {"cpu": 12}
WHOLE_TABLE_ELSEWHERE = 64

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
    proportion to R, at random places. MovieLens-1M (I / R = 30) took less time gathered on a CPU,
    and over the whole table on a GPU; MovieLens-20M (213) took less gathered on both.
    """
    return items <= WHOLE_TABLE.get(device.current().platform, WHOLE_TABLE_ELSEWHERE) * negatives


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
    """See `sampled_softmax`."""
    table_ID, negatives, together = e_ID.astype(q_TD.dtype), spec.negatives, spec.rows_per_draw
    whole = whole_table_is_cheaper(len(e_ID), negatives)
    scores = scores_of_all if whole else scores_of_gathered

    def chunk(q_CD: Rows, weight_C: PerRow, rest: PyTree, de_ID: Table) -> ChunkGradients:
        positive_C, negative_GR = ids_of(rest)
        negative_CR = jnp.repeat(negative_GR, together, axis=0)
        id_CX = jnp.concatenate([positive_C[:, None], negative_CR], axis=1)
        if together > 1:
            logit_CX, backward = _scores_of_shared(q_CD, table_ID, positive_C, negative_GR)
        else:
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

    if chunk_rows is None:
        if together > 1:
            floats = 1 + negatives
        else:
            floats = len(e_ID) if whole else (1 + negatives) * q_TD.shape[1]
        chunk_rows = softmax_rows.default_chunk_rows(floats)
    return softmax_rows.by_chunks(chunk, q_TD, weight_T, rest, e_ID, chunk_rows, multiple=together)


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
    """q . e[id] from gathered embeddings, gathered once.

    The order in which a GPU adds up the gradient of the table is not fixed.
    """
    e_CXD = jax.lax.optimization_barrier(e_ID.at[id_CX].get(mode="promise_in_bounds"))

    def backward(d_CX: Logits, de_ID: Table) -> tuple[Queries, Table]:
        add = _add_by_columns if device.current().platform == "cpu" else _add
        return dotted("cx,cxd->cd", d_CX.astype(q_CD.dtype), e_CXD), add(q_CD, id_CX, d_CX, de_ID)

    return dotted("cd,cxd->cx", q_CD, e_CXD), backward


def _add(q_CD: Queries, id_CX: Ids, d_CX: Logits, de_ID: Table) -> Table:
    """`de_ID` plus the sum of d * q over the occurrences of each item."""
    return de_ID.at[id_CX].add(d_CX[:, :, None] * q_CD[:, None, :], mode="promise_in_bounds")


def _add_by_columns(q_CD: Queries, id_CX: Ids, d_CX: Logits, de_ID: Table) -> Table:
    """`_add`, one column of ids after another, so that what is added stays in the cache.

    Rows are filled up to whole vectors of 16: twice as fast at a width of 50.
    """
    width, id_XC, d_XC = q_CD.shape[1], id_CX.T, d_CX.T
    q_CD, sum_ID = (jnp.pad(x, ((0, 0), (0, -width % 16))) for x in (q_CD, de_ID))

    def add(column: Int[Array, ""], sum_ID: Table) -> Table:
        d_CD = d_XC[column][:, None] * q_CD
        return sum_ID.at[id_XC[column]].add(d_CD, mode="promise_in_bounds")

    return jax.lax.fori_loop(0, len(id_XC), add, sum_ID)[:, :width]


def _scores_of_shared(
    q_CD: Queries, e_ID: Table, positive_C: Int[Array, " C"], negative_GR: Int[Array, "G R"]
) -> tuple[Logits, Backward]:
    """Scores of the positive, and of negatives that C / G rows share, by products."""
    groups, (rows, width) = len(negative_GR), q_CD.shape
    q_GCD = q_CD.reshape(groups, -1, width)
    e_CD = e_ID.at[positive_C].get(mode="promise_in_bounds")
    e_GRD = jax.lax.optimization_barrier(e_ID.at[negative_GR].get(mode="promise_in_bounds"))

    def backward(d_CX: Logits, de_ID: Table) -> tuple[Queries, Table]:
        d_C1, d_GCR = (
            d_CX[:, :1],
            d_CX[:, 1:].astype(q_CD.dtype).reshape(groups, rows // groups, -1),
        )
        dq_CD = d_C1 * e_CD + dotted("gcr,grd->gcd", d_GCR, e_GRD).reshape(rows, width)
        de_ID = de_ID.at[positive_C].add(d_C1 * q_CD, mode="promise_in_bounds")
        de_GRD = dotted("gcr,gcd->grd", d_GCR, q_GCD)
        return dq_CD, de_ID.at[negative_GR].add(de_GRD, mode="promise_in_bounds")

    score_CR = dotted("gcd,grd->gcr", q_GCD, e_GRD).reshape(rows, -1)
    return jnp.concatenate([dotted("cd,cd->c", q_CD, e_CD)[:, None], score_CR], axis=1), backward


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
dotted = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
