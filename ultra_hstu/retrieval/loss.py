"""Softmax losses over the catalogue, sampled or full, that never hold the logits of all rows.

Rows are worked off in chunks. The forward pass of a differentiated call computes loss and gradients
of a chunk together, so every score is computed once and only the gradients themselves are kept; the
backward pass multiplies them by the cotangent of the loss. Chunks behind the last row that counts
(the padding at the end of a flat buffer) are not computed at all.

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

Loss = tuple[Float[Array, ""], Float[Array, " T"]]


def sampled_softmax(
    h_TD: Float[Array, "T D"],
    table_ID: Float[Array, "I1 D"],
    positive_T: Int[Array, " T"],
    weight_T: Float[Array, " T"],
    negative_TR: Int[Array, "T R"],
    *,
    temperature: float,
    l2_normalize: bool,
    chunk_rows: int,
    log_q: Float[Array, " I1"] | None = None,
    total: Float[Array, ""] | None = None,
) -> Loss:
    """Cross entropy of the positive among itself and R negatives, as in HSTU's research code.

    With s = h . table / temperature, both sides first divided by max(norm, 1e-6) if `l2_normalize`:
    `loss_t = -log softmax([s_positive, s_negatives])_0`, where a negative that equals the positive
    has the constant logit -5e4.

    Args:
      h_TD: encoder output before any normalisation; rows of weight 0 may hold anything, NaN
        included.
      table_ID: item embeddings [I + 1, D], row 0 is padding.
      positive_T: target ids 1..I; anything where the weight is 0.
      weight_T: weight of each row, not negative.
      negative_TR: ids 1..I.
      chunk_rows: rows whose logits exist at one time.
      log_q: natural log of the probability that one draw gives an item, [I + 1]; not
        differentiated. A negative's logit becomes `s - log(R q)`, so that the sum over negatives
        estimates the sum over the catalogue without bias: the loss tends to `full_softmax` as R
        grows.
      total: the sum of the weights, where more rows than these have a part in it; then the losses
        of all parts add up to the mean.

    Returns:
      `sum(w * loss) / sum(w)` (0 if no row counts), and the loss of each row, 0 where its weight is
      0; no gradient flows through the latter.

    Raises:
      ValueError: if `chunk_rows` or `temperature` is not positive.
    """
    negatives, items = negative_TR.shape[1], table_ID.shape[0]
    shift_I = None
    if log_q is not None:
        shift_I = jax.lax.stop_gradient(log_q) + jnp.log(jnp.float32(negatives))
    scores = _scores_of_all if whole_table_is_cheaper(items, negatives) else _scores_of_gathered
    ids = (positive_T.astype(jnp.int32), negative_TR.astype(jnp.int32))
    inputs = _inputs(h_TD, table_ID, weight_T, ids, shift_I, total, temperature, l2_normalize)
    return _softmax(functools.partial(_sampled_chunk, scores), chunk_rows, inputs)


def full_softmax(
    h_TD: Float[Array, "T D"],
    table_ID: Float[Array, "I1 D"],
    positive_T: Int[Array, " T"],
    weight_T: Float[Array, " T"],
    *,
    temperature: float,
    l2_normalize: bool,
    chunk_rows: int,
    total: Float[Array, ""] | None = None,
) -> Loss:
    """Cross entropy of the positive among the whole catalogue; all else as in `sampled_softmax`."""
    ids = (positive_T.astype(jnp.int32),)
    inputs = _inputs(h_TD, table_ID, weight_T, ids, None, total, temperature, l2_normalize)
    return _softmax(_full_chunk, chunk_rows, inputs)


class _Inputs(NamedTuple):
    """What a loss is a function of, in float32."""

    q_TD: Float[Array, "T D"]  # outputs over the temperature
    e_ID: Float[Array, "I1 D"]
    weight_T: Float[Array, " T"]
    ids: PyTree  # int32 [T], the positive of each row, and its negatives [T, R]
    shift_I: Float[Array, " I1"] | None  # what a negative's logit is lowered by
    total: Float[Array, ""]


def _inputs(
    h_TD: Float[Array, "T D"],
    table_ID: Float[Array, "I1 D"],
    weight_T: Float[Array, " T"],
    ids: PyTree,
    shift_I: Float[Array, " I1"] | None,
    total: Float[Array, ""] | None,
    temperature: float,
    l2_normalize: bool,
) -> _Inputs:
    if not temperature > 0:
        raise ValueError(f"{temperature=} must be positive")
    counts_T = weight_T > 0
    # Before the norm: a NaN must not meet a product, not even times 0.
    q_TD = jnp.where(counts_T[:, None], h_TD.astype(jnp.float32), 0.0)
    e_ID = table_ID.astype(jnp.float32)
    if l2_normalize:
        q_TD, e_ID = unit_rows(q_TD), unit_rows(e_ID)
    weight_T = weight_T.astype(jnp.float32)
    total = jnp.sum(jnp.where(counts_T, weight_T, 0.0)) if total is None else total
    return _Inputs(q_TD / temperature, e_ID, weight_T, ids, shift_I, total)


# --- one chunk of C rows ---

Logits = Float[Array, "C X"]
Gradients = tuple[Float[Array, "C D"], Float[Array, "I1 D"]]
# (d scores, gradient of the table so far) -> (d q, gradient of the table)
Backward = Callable[[Logits, Float[Array, "I1 D"]], Gradients]
Scores = Callable[
    [Float[Array, "C D"], Float[Array, "I1 D"], Int[Array, "C X"]], tuple[Logits, Backward]
]


class _Chunk(NamedTuple):
    loss_C: Float[Array, " C"]
    dlogit_CX: Logits  # d loss_c / d score_cx
    backward: Backward


Chunk = Callable[[_Inputs], _Chunk]  # of the inputs of C rows


def _scores_of_all(
    q_CD: Float[Array, "C D"], e_ID: Float[Array, "I1 D"], id_CX: Int[Array, "C X"]
) -> tuple[Logits, Backward]:
    """q . e[id] by one product with the whole table; its gradient for the table is one too."""
    row_C1 = jnp.arange(q_CD.shape[0])[:, None]

    def backward(d_CX: Logits, de_ID: Float[Array, "I1 D"]) -> Gradients:
        # Equal ids of a row carry equal values (the positive, zeros), so the order of these
        # additions does not change a bit of the sum.
        zeros_CI = jnp.zeros((q_CD.shape[0], e_ID.shape[0]))
        d_CI = zeros_CI.at[row_C1, id_CX].add(d_CX, mode="promise_in_bounds")
        return _times_table(d_CI, e_ID), de_ID + (q_CD.T @ d_CI).T

    return (q_CD @ e_ID.T).at[row_C1, id_CX].get(mode="promise_in_bounds"), backward


def _scores_of_gathered(
    q_CD: Float[Array, "C D"], e_ID: Float[Array, "I1 D"], id_CX: Int[Array, "C X"]
) -> tuple[Logits, Backward]:
    """q . e[id] from gathered embeddings.

    The order in which a GPU adds up the gradient of the table is not fixed.
    """
    e_CXD = e_ID.at[id_CX].get(mode="promise_in_bounds")

    def backward(d_CX: Logits, de_ID: Float[Array, "I1 D"]) -> Gradients:
        de_ID = de_ID.at[id_CX].add(d_CX[:, :, None] * q_CD[:, None, :], mode="promise_in_bounds")
        return jnp.sum(d_CX[:, :, None] * e_CXD, axis=1), de_ID

    return jnp.einsum("cd,cxd->cx", q_CD, e_CXD), backward


def _sampled_chunk(scores: Scores, rows: _Inputs) -> _Chunk:
    positive_C, negative_CR = rows.ids
    id_CX = jnp.concatenate([positive_C[:, None], negative_CR], axis=1)
    first_1X = jnp.arange(id_CX.shape[1])[None, :] == 0
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
    log_sum_C = jax.nn.logsumexp(logit_CI, axis=1)
    row_C = jnp.arange(positive_C.shape[0])
    share_CI = jnp.exp(logit_CI - log_sum_C[:, None])
    dlogit_CI = share_CI.at[row_C, positive_C].add(-1.0, mode="promise_in_bounds")
    loss_C = log_sum_C - logit_CI.at[row_C, positive_C].get(mode="promise_in_bounds")

    def backward(d_CI: Logits, de_ID: Float[Array, "I1 D"]) -> Gradients:
        return _times_table(d_CI, e_ID), de_ID + (q_CD.T @ d_CI).T

    return _Chunk(loss_C, dlogit_CI, backward)


def _times_table(d_CI: Float[Array, "C I1"], e_ID: Float[Array, "I1 D"]) -> Float[Array, "C D"]:
    """d @ e, with the columns of e filled up to whole vectors of 16.

    That is a third faster on a CPU where D is small, as 50 is.
    """
    width = e_ID.shape[1]
    return (d_CI @ jnp.pad(e_ID, ((0, 0), (0, -width % 16))))[:, :width]


# --- the loop over chunks ---


def _softmax(chunk: Chunk, chunk_rows: int, inputs: _Inputs) -> Loss:
    if chunk_rows < 1:
        raise ValueError(f"{chunk_rows=} must be at least 1")
    loss, loss_T = _chunked(chunk, min(chunk_rows, inputs.q_TD.shape[0]), inputs)
    return loss, jax.lax.stop_gradient(loss_T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(chunk: Chunk, chunk_rows: int, inputs: _Inputs) -> Loss:
    return _sweep(chunk, chunk_rows, inputs, with_gradients=False)[0]


def _chunked_forward(chunk: Chunk, chunk_rows: int, inputs: _Inputs) -> tuple[Loss, PyTree]:
    return _sweep(chunk, chunk_rows, inputs, with_gradients=True)


def _chunked_backward(
    chunk: Chunk, chunk_rows: int, gradients: PyTree, cotangents: Loss
) -> tuple[_Inputs]:
    g, _ = cotangents  # the losses of single rows carry no gradient
    dq_TD, de_ID, dweight_T, dtotal = (g * gradient for gradient in gradients)
    return (_Inputs(dq_TD, de_ID, dweight_T, None, None, dtotal),)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _sweep(
    chunk: Chunk, chunk_rows: int, inputs: _Inputs, *, with_gradients: bool
) -> tuple[Loss, PyTree]:
    """The loss, and its gradients for q, e, the weights and their total.

    Goes chunk by chunk up to the last row that counts.
    """
    q_TD, e_ID, weight_T, ids, shift_I, total = inputs
    num_rows = q_TD.shape[0]
    counts_T: Bool[Array, " T"] = weight_T > 0
    total = jnp.where(total > 0, total, 1.0)
    share_T = weight_T / total
    end = jnp.max(jnp.where(counts_T, jnp.arange(num_rows) + 1, 0))

    def step(i: Array, carry: PyTree) -> PyTree:
        loss_T, dq_TD, de_ID = carry
        # The last chunk may overlap the one before it.
        first = jnp.minimum(i * chunk_rows, num_rows - chunk_rows)
        take = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=chunk_rows
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        mine_C = take(counts_T) & (first + jnp.arange(chunk_rows) >= i * chunk_rows)
        rows = inputs._replace(q_TD=take(q_TD), ids=jax.tree.map(take, ids))
        loss_C, dlogit_CX, backward = chunk(rows)
        loss_T = put(loss_T, jnp.where(mine_C, loss_C, take(loss_T)))
        if with_gradients:
            share_C = jnp.where(mine_C, take(share_T), 0.0)
            dq_CD, de_ID = backward(share_C[:, None] * dlogit_CX, de_ID)
            dq_TD = put(dq_TD, take(dq_TD) + dq_CD)
        return loss_T, dq_TD, de_ID

    zeros: PyTree = (jnp.zeros(num_rows), None, None)
    if with_gradients:
        zeros = (jnp.zeros(num_rows), jnp.zeros_like(q_TD), jnp.zeros_like(e_ID))
    chunks = (end + chunk_rows - 1) // chunk_rows
    loss_T, dq_TD, de_ID = jax.lax.fori_loop(0, chunks, step, zeros)
    loss = jnp.sum(share_T * loss_T)
    return (loss, loss_T), (dq_TD, de_ID, jnp.where(counts_T, loss_T / total, 0.0), -loss / total)
