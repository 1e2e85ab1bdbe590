"""The loss of a mixture of logits: a softmax, and what keeps its weights balanced."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from kernels.sampled_softmax import Negatives
from kernels.softmax_rows import PerItem, PerRow, Rows, Table
from ultra_hstu.nn.dropout import KeysOrNone
from ultra_hstu.parallel.shards import Shards
from ultra_hstu.retrieval.mol import EPS, Dropped, MixtureOfLogits, fast, mixed
from ultra_hstu.retrieval.mol_chunks import CHUNK_ITEMS, Given, products, softmax_loss


def mixture_loss(
    mixture: MixtureOfLogits,
    h_TD: Rows,
    code_T: Int[Array, " T"] | None,
    table_ID: Table,
    number_I: Int[Array, " I1"],
    positive_T: Int[Array, " T"],
    weight_T: PerRow,
    negatives: Negatives | None,
    *,
    shards: Shards,
    key: Key[Array, ""] | None,
    key_T: KeysOrNone,
    log_q: PerItem | None = None,
    num_items: Int[Array, ""] | None = None,
    chunk_rows: int | None = None,
    chunk_items: int = CHUNK_ITEMS,
) -> Float[Array, ""]:
    """Cross entropy of the positive, with the terms that balance the weights and keep users short.

    This device's share of the mean over all rows of all devices. Rows, items and negatives are as
    of `loss.softmax_loss`.

    Args:
      code_T: of each row's user by the id, 0 for none; None: the mixture has no such component.
      number_I: the number of each item in the catalogue, where the table holds some.
      key, key_T: of the step, and one a row: they decide what is dropped. None: nothing.
    """
    config, dtype = mixture.config, h_TD.dtype
    counts_T, weight_T = weight_T > 0, weight_T.astype(jnp.float32)
    total = shards.total(jnp.sum(weight_T))
    share_T = jnp.where(counts_T, weight_T, 0.0) / jnp.where(total > 0, total, 1.0)
    # Before the norm: a NaN must not meet a product, not even times 0.
    h_TD = jnp.where(counts_T[:, None], h_TD, jnp.zeros((), dtype))
    of_id_TW = None if code_T is None else mixture.of_ids(code_T, shards)
    zeros_T = jnp.zeros(len(h_TD), jnp.uint32)
    word_T, user_key_T, of_items, rate = zeros_T, None, None, 0.0
    if key is not None and key_T is not None:
        rate = config.gate_dropout
        word_T = jax.vmap(lambda one: jax.random.bits(one, (), jnp.uint32))(key_T)
        user_key_T = jax.vmap(lambda one: jax.random.fold_in(one, 1))(key_T)
        word = jnp.broadcast_to(jax.random.bits(key, (), jnp.uint32), number_I.shape)
        of_items = Dropped(word, number_I, config.item_dropout)
    rows = mixture.users(h_TD, of_id_TW, fast(dtype), key=user_key_T)
    items = mixture.items(table_ID, fast(dtype), of_items)
    id_T = jnp.where(counts_T, jnp.clip(positive_T, 0, len(table_ID) - 1), 0)
    own = jax.tree.map(lambda leaf: leaf[id_T], items)
    positive_T, weight_TL = mixed(
        products("tpw,tqw->tpq", rows.component_UPW, own.component_IQW, dtype),
        rows.gate_UL,
        own.gate_IL,
        mixture.cross,
        fast(dtype),
        Dropped(word_T, number_I[id_T], rate),
    )
    loss = softmax_loss(
        Given(rows, items, mixture.cross, positive_T),
        share_T,
        id_T,
        word_T,
        number_I,
        negatives,
        dtype=dtype,
        rate=rate,
        shift_I=None if log_q is None else log_q + math.log(negatives.count if negatives else 1),
        num_items=num_items,
        chunk_rows=chunk_rows,
        chunk_items=chunk_items,
    )
    loss += config.balance * negative_information(weight_TL, share_T, shards)
    if of_id_TW is not None:
        loss += config.user_penalty * jnp.sum(share_T * jnp.sum(of_id_TW * of_id_TW, axis=1))
    return loss


def negative_information(
    weight_TL: Float[Array, "T L"], share_T: PerRow, shards: Shards
) -> Float[Array, ""]:
    """`-H(mean weights) + mean H(weights)` over the rows of all devices, this device's share.

    It is minus the mutual information of a pair and the logit that its weights choose. No gradient
    flows through the logarithm of the mean: those of weights that add up to 1 add up to 0 there.
    """
    mean_L = shards.total(jnp.sum(share_T[:, None] * weight_TL, axis=0))
    log_mean_L = jax.lax.stop_gradient(jnp.log(mean_L + EPS))
    each_T = jnp.sum(weight_TL * (log_mean_L[None] - jnp.log(weight_TL + EPS)), axis=1)
    return jnp.sum(share_T * each_T)
