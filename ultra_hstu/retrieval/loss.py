"""Softmax losses over the catalogue, sampled or full, that never hold the logits of all rows.

Rows are worked off in chunks. The forward pass computes loss and gradients of a chunk together, so
every score is computed once and only the gradients themselves are kept; the backward pass
multiplies them by the cotangent of the loss. Chunks behind the last row that counts (the padding at
the end of a flat buffer) are not computed at all.

Everything is in float32, whatever the dtype of the inputs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ultra_hstu.flops import whole_table_is_cheaper
from ultra_hstu.nn.norms import l2_normalize as unit_rows

COLLISION_LOGIT = -5e4  # of a negative that is the positive (published research code)

Rows = Float[Array, "T D"]
Table = Float[Array, "I1 D"]
PerItem = Float[Array, " I1"]
Loss = tuple[Float[Array, ""], Float[Array, " T"]]


def softmax_loss(
    h_TD: Rows,
    table_ID: Table,
    positive_T: Int[Array, " T"],
    weight_T: Float[Array, " T"],
    negative_TR: Int[Array, "T R"] | None = None,
    *,
    temperature: float,
    l2_normalize: bool,
    chunk_rows: int,
    log_q: PerItem | None = None,
    corpus_I: Bool[Array, " I1"] | None = None,
    total: Float[Array, ""] | None = None,
) -> Loss:
    """Cross entropy of the positive among itself and R negatives, or among the whole catalogue.

    With s = h . table / temperature, both sides first divided by max(norm, 1e-6) if `l2_normalize`:
    `loss_t = -log softmax([s_positive, s_negatives])_0`, where a negative that equals the positive
    has the constant logit -5e4, as in HSTU's research code.

    Args:
      h_TD: encoder output before any normalisation; rows of weight 0 may hold anything, NaN
        included.
      table_ID: item embeddings [I + 1, D], row 0 is padding.
      positive_T: target ids 1..I; anything where the weight is 0.
      weight_T: weight of each row, not negative.
      negative_TR: ids 1..I; None: all other items are negatives.
      chunk_rows: rows whose logits exist at one time.
      log_q: natural log of the probability that one draw gives an item, [I + 1]; not
        differentiated. A negative's logit becomes `s - log(R q)`, so that the sum over negatives
        estimates the sum over the catalogue without bias: the loss tends to that of the whole
        catalogue as R grows.
      corpus_I: the entries of the table that are items, where `negative_TR` is None; None: all but
        padding.
      total: the sum of the weights, where more rows than these have a part in it; then the losses
        of all parts add up to the mean.

    Returns:
      `sum(w * loss) / sum(w)` (0 if no row counts), and the loss of each row, 0 where its weight is
      0; no gradient flows through the latter.

    Raises:
      ValueError: if `chunk_rows` or `temperature` is not positive.
    """
    ids: PyTree = (positive_T.astype(jnp.int32),)
    chunk, shift_I = _full_chunk, None
    if corpus_I is not None:
        shift_I = jnp.where(corpus_I, 0.0, jnp.inf)
    if negative_TR is not None:
        negatives = negative_TR.shape[1]
        whole = whole_table_is_cheaper(len(table_ID), negatives)
        chunk = functools.partial(_sampled_chunk, _scores_of_all if whole else _scores_of_gathered)
        ids, shift_I = (*ids, negative_TR.astype(jnp.int32)), None
        if log_q is not None:
            shift_I = jax.lax.stop_gradient(log_q) + jnp.log(jnp.float32(negatives))
    return chunked_loss(
        chunk,
        ids,
        h_TD,
        table_ID,
        weight_T,
        temperature=temperature,
        l2_normalize=l2_normalize,
        chunk_rows=chunk_rows,
        shift_I=shift_I,
        total=total,
    )


def chunked_loss(
    chunk: "Chunk",
    ids: PyTree,
    h_TD: Rows,
    table_ID: Table,
    weight_T: Float[Array, " T"],
    *,
    temperature: float,
    l2_normalize: bool,
    chunk_rows: int,
    shift_I: PerItem | None = None,
    total: Float[Array, ""] | None = None,
) -> Loss:
    """A loss from that of a chunk of rows; the arguments and the results of `softmax_loss`."""
    if not temperature > 0:
        raise ValueError(f"{temperature=} must be positive")
    if chunk_rows < 1:
        raise ValueError(f"{chunk_rows=} must be at least 1")
    counts_T = weight_T > 0
    # Before the norm: a NaN must not meet a product, not even times 0.
    q_TD = jnp.where(counts_T[:, None], h_TD.astype(jnp.float32), 0.0)
    e_ID = table_ID.astype(jnp.float32)
    if l2_normalize:
        q_TD, e_ID = unit_rows(q_TD), unit_rows(e_ID)
    weight_T = weight_T.astype(jnp.float32)
    if total is None:
        total = jnp.sum(jnp.where(counts_T, weight_T, 0.0))
    inputs = _Inputs(q_TD / temperature, e_ID, weight_T, ids, shift_I, total)
    loss, loss_T = _chunked(chunk, min(chunk_rows, len(q_TD)), inputs)
    return loss, jax.lax.stop_gradient(loss_T)


class _Inputs(NamedTuple):
    """What a loss is a function of, in float32."""

    q_TD: Rows  # outputs over the temperature
    e_ID: Table
    weight_T: Float[Array, " T"]
    ids: PyTree  # int32 [T], the positive of each row, and its negatives [T, R]
    shift_I: PerItem | None  # what a negative's logit is lowered by
    total: Float[Array, ""]


# --- one chunk of C rows ---

Logits = Float[Array, "C X"]
Queries = Float[Array, "C D"]
Ids = Int[Array, "C X"]
Gradients = tuple[Queries, Table]
# (d scores, gradient of the table so far) -> (d q, gradient of the table)
Backward = Callable[[Logits, Table], Gradients]
Scores = Callable[[Queries, Table, Ids], tuple[Logits, Backward]]


class _Chunk(NamedTuple):
    loss_C: Float[Array, " C"]
    dlogit_CX: Logits  # d loss_c / d score_cx
    backward: Backward


Chunk = Callable[[_Inputs], _Chunk]  # of the inputs of C rows


def _scores_of_all(q_CD: Queries, e_ID: Table, id_CX: Ids) -> tuple[Logits, Backward]:
    """q . e[id] by one product with the whole table; its gradient for the table is one too."""
    row_C1 = jnp.arange(len(q_CD), dtype=jnp.int32)[:, None]

    def backward(d_CX: Logits, de_ID: Table) -> Gradients:
        # Equal ids of a row carry equal values (the positive, zeros), so the order of these
        # additions does not change a bit of the sum.
        zeros_CI = jnp.zeros((len(q_CD), len(e_ID)), jnp.float32)
        d_CI = zeros_CI.at[row_C1, id_CX].add(d_CX, mode="promise_in_bounds")
        return _product_backward(q_CD, e_ID, d_CI, de_ID)

    return (q_CD @ e_ID.T).at[row_C1, id_CX].get(mode="promise_in_bounds"), backward


def _scores_of_gathered(q_CD: Queries, e_ID: Table, id_CX: Ids) -> tuple[Logits, Backward]:
    """q . e[id] from gathered embeddings.

    The order in which a GPU adds up the gradient of the table is not fixed.
    """
    e_CXD = e_ID.at[id_CX].get(mode="promise_in_bounds")

    def backward(d_CX: Logits, de_ID: Table) -> Gradients:
        de_ID = de_ID.at[id_CX].add(d_CX[:, :, None] * q_CD[:, None, :], mode="promise_in_bounds")
        return jnp.sum(d_CX[:, :, None] * e_CXD, axis=1), de_ID

    return jnp.einsum("cd,cxd->cx", q_CD, e_CXD), backward


def _sampled_chunk(scores: Scores, rows: _Inputs) -> _Chunk:
    positive_C, negative_CR = rows.ids
    id_CX = jnp.concatenate([positive_C[:, None], negative_CR], axis=1)
    first_1X = jnp.arange(id_CX.shape[1], dtype=jnp.int32)[None, :] == 0
    collision_CX = (id_CX == positive_C[:, None]) & ~first_1X
    logit_CX, backward = scores(rows.q_TD, rows.e_ID, id_CX)
    if rows.shift_I is not None:
        shift_CX = rows.shift_I.at[id_CX].get(mode="promise_in_bounds")
        logit_CX = logit_CX - jnp.where(first_1X, 0.0, shift_CX)
    logit_CX = jnp.where(collision_CX, COLLISION_LOGIT, logit_CX)
    log_sum_C = jax.nn.logsumexp(logit_CX, axis=1)
    dlogit_CX = jnp.where(collision_CX, 0.0, jnp.exp(logit_CX - log_sum_C[:, None]) - first_1X)
    return _Chunk(log_sum_C - logit_CX[:, 0], dlogit_CX, backward)


def _full_chunk(rows: _Inputs) -> _Chunk:
    (positive_C,), q_CD, e_ID = rows.ids, rows.q_TD, rows.e_ID
    logit_CI = (q_CD @ e_ID.T).at[:, 0].set(-jnp.inf)  # padding is no item
    if rows.shift_I is not None:
        logit_CI -= rows.shift_I[None]
    log_sum_C = jax.nn.logsumexp(logit_CI, axis=1)
    row_C = jnp.arange(positive_C.shape[0], dtype=jnp.int32)
    share_CI = jnp.exp(logit_CI - log_sum_C[:, None])
    dlogit_CI = share_CI.at[row_C, positive_C].add(-1.0, mode="promise_in_bounds")
    loss_C = log_sum_C - logit_CI.at[row_C, positive_C].get(mode="promise_in_bounds")

    return _Chunk(loss_C, dlogit_CI, functools.partial(_product_backward, q_CD, e_ID))


def _product_backward(
    q_CD: Queries, e_ID: Table, d_CI: Float[Array, "C I1"], de_ID: Table
) -> Gradients:
    """The backward of q @ e.T.

    The columns of e are filled up to whole vectors of 16: a third faster on a CPU where D is small,
    as 50 is.
    """
    width = e_ID.shape[1]
    dq_CD = d_CI @ jnp.pad(e_ID, ((0, 0), (0, -width % 16)))
    return dq_CD[:, :width], de_ID + (q_CD.T @ d_CI).T


# --- the loop over chunks ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(chunk: Chunk, chunk_rows: int, inputs: _Inputs) -> Loss:
    return _sweep(chunk, chunk_rows, inputs)[0]


def _backward(chunk: Chunk, chunk_rows: int, gradients: PyTree, cotangents: Loss) -> tuple[_Inputs]:
    g, _ = cotangents  # the losses of single rows carry no gradient
    dq_TD, de_ID, dweight_T, dtotal = (g * gradient for gradient in gradients)
    return (_Inputs(dq_TD, de_ID, dweight_T, None, None, dtotal),)


def _sweep(chunk: Chunk, chunk_rows: int, inputs: _Inputs) -> tuple[Loss, PyTree]:
    """The loss, and its gradients for q, e, the weights and their total.

    Goes chunk by chunk up to the last row that counts.
    """
    q_TD, e_ID, weight_T, ids, shift_I, total = inputs
    num_rows = q_TD.shape[0]
    counts_T: Bool[Array, " T"] = weight_T > 0
    total = jnp.where(total > 0, total, 1.0)
    share_T = weight_T / total
    end = jnp.max(jnp.where(counts_T, jnp.arange(num_rows, dtype=jnp.int32) + 1, 0))

    def step(i: Array, carry: PyTree) -> PyTree:
        loss_T, dq_TD, de_ID = carry
        # The last chunk may overlap the one before it.
        first = jnp.minimum(i * chunk_rows, num_rows - chunk_rows)
        take = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=chunk_rows
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        mine_C = take(counts_T) & (
            first + jnp.arange(chunk_rows, dtype=jnp.int32) >= i * chunk_rows
        )
        rows = inputs._replace(q_TD=take(q_TD), ids=jax.tree.map(take, ids))
        loss_C, dlogit_CX, backward = chunk(rows)
        loss_T = put(loss_T, jnp.where(mine_C, loss_C, take(loss_T)))
        share_C = jnp.where(mine_C, take(share_T), 0.0)
        dq_CD, de_ID = backward(share_C[:, None] * dlogit_CX, de_ID)
        return loss_T, put(dq_TD, take(dq_TD) + dq_CD), de_ID

    zeros = (jnp.zeros(num_rows, jnp.float32), jnp.zeros_like(q_TD), jnp.zeros_like(e_ID))
    chunks = (end + chunk_rows - 1) // chunk_rows
    loss_T, dq_TD, de_ID = jax.lax.fori_loop(0, chunks, step, zeros)
    loss = jnp.sum(share_T * loss_T)
    return (loss, loss_T), (dq_TD, de_ID, jnp.where(counts_T, loss_T / total, 0.0), -loss / total)


_chunked.defvjp(_sweep, _backward)
