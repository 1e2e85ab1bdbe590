"""Ranking over the whole catalogue: the rank of the target, hit rate, NDCG and reciprocal rank.

The scores [U, I] never exist at once: the catalogue is passed in chunks, and a rank is a count of
better items, which adds up. Products are at full float32 precision (`highest`): TF32 changes ranks.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ultra_hstu.nn.norms import l2_normalize as unit_rows
from ultra_hstu.quantization import unpacked

CUTOFFS = (1, 5, 10, 50, 100, 200)
# the published code looks for the target among this many; further down it is not found
PUBLISHED_CUTOFF = 2500


PerUser = Int[Array, " U"]
Users = Float[Array, "U D"]
Seen = Int[Array, "U S"] | None
Corpus = Bool[Array, " I1"] | None
Best = tuple[Int[Array, "U K"], Float[Array, "U K"]]


class CorpusChunk(NamedTuple):
    """Some items of the catalogue, with the scores of all users."""

    item_I: Int[Array, " I"]
    score_UI: Float[Array, "U I"]
    allowed_UI: Bool[Array, "U I"]


def ranks(
    h_UD: Users,
    table_ID: Float[Array, "I1 D"],
    target_U: PerUser,
    seen_US: Seen = None,
    *,
    l2_normalize: bool = True,
    corpus_I: Corpus = None,
    cutoff: int | None = PUBLISHED_CUTOFF,
    chunk_items: int = 4096,
) -> PerUser:
    """Rank of each user's target among the items of the corpus, 1 is best.

    An item that scores the same as the target, or NaN, counts as better, so that a broken model
    cannot look good; the target never counts against itself, whatever the rounding.

    Args:
      h_UD: encoder output of the users. Its norm does not matter for the order.
      table_ID: item embeddings [I + 1, D]; row 0 is padding and never ranked.
      target_U: ids 1..I; 0 is not found.
      seen_US: ids that are left out of the ranking, 0 for none, repeats allowed. A target among
        them is not found. None: nothing is left out.
      l2_normalize: divide the items by max(norm, 1e-6), for models trained on cosines.
      corpus_I: the items that are ranked; None: all of 1..I.
      cutoff: a target of a higher rank is not found (published: 2500). None: no limit.
      chunk_items: items scored at one time.

    Returns:
      int32 ranks; not found is `cutoff + 1`, or I + 1 where there is no cutoff.
    """
    if chunk_items < 1:
        raise ValueError(f"{chunk_items=} must be at least 1")
    items = table_ID.shape[0]
    h_UD, target_U1 = h_UD.astype(jnp.float32), target_U[:, None]
    target_UD = _prepared(table_ID[target_U], l2_normalize)
    goal_U1 = jnp.sum(h_UD * target_UD, axis=1, keepdims=True)

    def count(ahead_U: PerUser, chunk: CorpusChunk) -> PerUser:
        better_UI = ~(chunk.score_UI < goal_U1) & (chunk.item_I[None, :] != target_U1)
        return ahead_U + jnp.sum(better_UI & chunk.allowed_UI, axis=1, dtype=jnp.int32)

    none_U = jnp.zeros(target_U.shape, jnp.int32)
    ahead_U = _sweep(count, none_U, h_UD, table_ID, seen_US, corpus_I, l2_normalize, chunk_items)
    found_U = target_U > 0
    if corpus_I is not None:
        found_U &= corpus_I[target_U]
    if seen_US is not None:
        found_U &= ~jnp.any(seen_US == target_U1, axis=1)
    last = items if cutoff is None else cutoff
    return jnp.where(found_U & (ahead_U < last), ahead_U + 1, last + 1)


def best_items(
    h_UD: Users,
    table_ID: PyTree,
    seen_US: Seen = None,
    *,
    k: int,
    l2_normalize: bool = True,
    corpus_I: Corpus = None,
    chunk_items: int = 4096,
) -> tuple[Int[Array, "U {k}"], Float[Array, "U {k}"]]:
    """The k best items of each user and their scores, best first; then ids 0 with scores -inf.

    Of items with the same score the one with the lower id comes first. Arguments as in `ranks`; the
    table [I + 1, D] may also be one of `quantization`. One chunk of it is unpacked at a time, so
    that what is made on the device does not grow with the catalogue.
    """
    if k < 1 or chunk_items < 1:
        raise ValueError(f"{k=} and {chunk_items=} must be at least 1")

    def merge(best: Best, chunk: CorpusChunk) -> Best:
        id_UC = jnp.broadcast_to(chunk.item_I, chunk.score_UI.shape)
        id_UX = jnp.concatenate([best[0], id_UC], axis=1)
        allowed_UC = jnp.where(chunk.allowed_UI, chunk.score_UI, -jnp.inf)
        score_UX = jnp.concatenate([best[1], allowed_UC], axis=1)
        score_UK, place_UK = jax.lax.top_k(score_UX, k)
        id_UK = jnp.take_along_axis(id_UX, place_UK, axis=1)
        return jnp.where(score_UK > -jnp.inf, id_UK, 0), score_UK

    none = (
        jnp.zeros((h_UD.shape[0], k), jnp.int32),
        jnp.full((h_UD.shape[0], k), -jnp.inf, jnp.float32),
    )
    h_UD = h_UD.astype(jnp.float32)
    return _sweep(merge, none, h_UD, table_ID, seen_US, corpus_I, l2_normalize, chunk_items)


def _sweep[Carry](
    visit: Callable[[Carry, CorpusChunk], Carry],
    carry: Carry,
    h_UD: Users,
    table_ID: PyTree,
    seen_US: Seen,
    corpus_I: Corpus,
    l2_normalize: bool,
    chunk_items: int,
) -> Carry:
    """Folds `visit` over chunks of the catalogue; each item is allowed in one chunk only."""
    items, users = table_ID.shape[0], h_UD.shape[0]
    size = min(chunk_items, items)

    def step(i: Array, carry: Carry) -> Carry:
        first = jnp.minimum(i * size, items - size)  # the last chunk may overlap the one before it
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
        chunk_I = first + jnp.arange(size, dtype=jnp.int32)
        chunk_ID = _prepared(unpacked(jax.tree.map(take, table_ID)), l2_normalize)
        score_UI = jnp.matmul(h_UD, chunk_ID.T, precision="highest")
        allowed_I = chunk_I >= jnp.maximum(i * size, 1)
        if corpus_I is not None:
            allowed_I &= take(corpus_I)
        allowed_UI = jnp.broadcast_to(allowed_I, score_UI.shape)
        if seen_US is not None:
            # Items out of the chunk on either side are dropped.
            column_US = jnp.where(seen_US >= first, seen_US - first, size)
            user_U1 = jnp.arange(users, dtype=jnp.int32)[:, None]
            allowed_UI = allowed_UI.at[user_U1, column_US].set(False, mode="drop")
        return visit(carry, CorpusChunk(chunk_I, score_UI, allowed_UI))

    return jax.lax.fori_loop(0, -(-items // size), step, carry)


def _prepared(e_XD: Float[Array, "X D"], l2_normalize: bool) -> Float[Array, "X D"]:
    return unit_rows(e_XD) if l2_normalize else e_XD.astype(jnp.float32)


def mean_metrics(rank_U: PerUser) -> dict[str, float]:
    """The means over users of `hr@k`, `ndcg@k` and `mrr`.

    `hr@k = [rank <= k]`, `ndcg@k = [rank <= k] / log2(rank + 1)`, `mrr = 1 / rank`: as in the
    published code, a target that is not found adds 1 / 2501 to MRR and not 0.

    Raises:
      ValueError: if there is no user.
    """
    if not rank_U.size:
        raise ValueError("no user to average over")
    rank_U = rank_U.astype(jnp.float32)
    gain_U = 1.0 / jnp.log2(rank_U + 1.0)
    values = {f"hr@{k}": rank_U <= k for k in CUTOFFS}
    values |= {f"ndcg@{k}": (rank_U <= k) * gain_U for k in CUTOFFS}
    values |= {"mrr": 1.0 / rank_U}
    return {name: float(jnp.sum(value_U)) / rank_U.size for name, value_U in values.items()}
