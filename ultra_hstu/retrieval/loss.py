"""Softmax losses over the catalogue, sampled or full, that never hold the logits of all rows.

The losses themselves are ops (`kernels.sampled_softmax`, `kernels.full_softmax`): of scores, which
are products of two rows. Here is what becomes of a model's output before it is scored, and what
becomes of losses of rows: their weighted mean.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.full_softmax import full_softmax
from kernels.sampled_softmax import Negatives, sampled_softmax
from kernels.softmax_rows import Loss, PerItem, PerRow, Rows, Table
from ultra_hstu.nn.norms import l2_normalize as unit_rows


def softmax_loss(
    h_TD: Rows,
    table_ID: Table,
    positive_T: Int[Array, " T"],
    weight_T: PerRow,
    negatives: Negatives | Int[Array, "T R"] | None = None,
    *,
    temperature: float,
    l2_normalize: bool,
    chunk_rows: int | None = None,
    log_q: PerItem | None = None,
    num_items: Int[Array, ""] | None = None,
    total: Float[Array, ""] | None = None,
    implementation: str | None = None,
) -> Loss:
    """Cross entropy of the positive among itself and R negatives, or among the whole catalogue.

    With s = h . table / temperature, both sides first divided by max(norm, 1e-6) if `l2_normalize`:
    `loss_t = -log softmax([s_positive, s_negatives])_0`, where a negative that equals the positive
    has the constant logit -5e4, as in HSTU's research code.

    Norms, sums and losses are float32. Scores are products in the dtype of h: of bfloat16 outputs,
    unit rows and table are rounded to bfloat16 for them.

    Args:
      h_TD: encoder output before any normalisation; rows of weight 0 may hold anything, NaN
        included.
      table_ID: item embeddings [I + 1, D], row 0 is padding.
      positive_T: target ids 1..I; anything where the weight is 0.
      weight_T: weight of each row, not negative.
      negatives: ids 1..I, or how they are drawn; None: all other items are negatives.
      chunk_rows: rows whose logits exist at one time; None: what suits the device.
      log_q: natural log of the probability that one draw gives an item, [I + 1]; not
        differentiated. A negative's logit becomes `s - log(R q)`, so that the sum over negatives
        estimates the sum over the catalogue without bias: the loss tends to that of the whole
        catalogue as R grows.
      num_items: the whole catalogue, where the table has room for more; None: the table. Of sampled
        negatives, what draws them knows it.
      total: the sum of the weights, where more rows than these have a part in it; then the losses
        of all parts add up to the mean.
      implementation: of the op; None: the best for the device.

    Returns:
      `sum(w * loss) / sum(w)` (0 if no row counts), and the loss of each row, 0 where its weight is
      0; no gradient flows through the latter.

    Raises:
      ValueError: if `chunk_rows` or `temperature` is not positive.
      NotImplementedError: the named implementation cannot take these inputs.
    """
    q_TD, e_ID, share_T = scaled(
        h_TD, table_ID, weight_T, temperature=temperature, l2_normalize=l2_normalize, total=total
    )
    if negatives is None:
        return full_softmax(
            q_TD,
            e_ID,
            positive_T,
            share_T,
            num_items=num_items,
            chunk_rows=chunk_rows,
            implementation=implementation,
        )
    if not isinstance(negatives, Negatives):
        negatives = Negatives.of(negatives)
    return sampled_softmax(
        q_TD,
        e_ID,
        positive_T,
        share_T,
        negatives,
        shift_I=None if log_q is None else log_q + jnp.log(jnp.float32(negatives.count)),
        chunk_rows=chunk_rows,
        implementation=implementation,
    )


def scaled(
    h_TD: Rows,
    table_ID: Table,
    weight_T: PerRow,
    *,
    temperature: float,
    l2_normalize: bool,
    total: Float[Array, ""] | None,
) -> tuple[Rows, Table, PerRow]:
    """Rows and table whose products are scores, and each row's share of the weights.

    The rows are in the dtype of h, the others in float32; the arguments are those of
    `softmax_loss`.
    """
    if not temperature > 0:
        raise ValueError(f"{temperature=} must be positive")
    counts_T, weight_T = weight_T > 0, weight_T.astype(jnp.float32)
    # Before the norm: a NaN must not meet a product, not even times 0.
    q_TD = jnp.where(counts_T[:, None], h_TD.astype(jnp.float32), 0.0)
    e_ID = table_ID.astype(jnp.float32)
    if l2_normalize:
        q_TD, e_ID = unit_rows(q_TD), unit_rows(e_ID)
    if total is None:
        total = jnp.sum(jnp.where(counts_T, weight_T, 0.0))
    share_T = weight_T / jnp.where(total > 0, total, 1.0)
    return (q_TD / temperature).astype(h_TD.dtype), e_ID, share_T
