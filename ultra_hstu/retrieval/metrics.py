"""Ranking over the whole catalogue: the rank of the target, hit rate, NDCG and reciprocal rank.

The scores [U, I] never exist at once: the catalogue is passed in chunks, and a rank is a count of
better items, which adds up. One score of an item has one value (`scores`), in chunks of any size,
compiled or not: items with equal embeddings tie, on every device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ultra_hstu import quantization
from ultra_hstu.retrieval.scores import Digits, all_scores, digits, factors, paired_scores

CUTOFFS = (1, 5, 10, 50, 100, 200)
# the published code looks for the target among this many; further down it is not found
PUBLISHED_CUTOFF = 2500
CHUNK_ITEMS = {"cpu": 1024, "accelerator": 4096}  # whose scores exist at one time

PerUser = Int[Array, " U"]
Users = Float[Array, "U D"]
Seen = Int[Array, "U S"] | None
Corpus = Bool[Array, " I1"] | None
Best = tuple[Int[Array, "U K"], Float[Array, "U K"]]


class CorpusChunk(NamedTuple):
    """Some items of the catalogue, with the scores of all users and those of their targets."""

    item_I: Int[Array, " I"]
    score_UI: Float[Array, "U I"]
    target_U: Float[Array, " U"] | None  # made with the chunk's, so that equal ones are equal
    allowed_UI: Bool[Array, "U I"]


@runtime_checkable
class Similarity(Protocol):
    """Scores items for some users: each pair has one value, whatever else is scored with it."""

    @property
    def users(self) -> int: ...

    @property
    def chunk_items(self) -> int:
        """Items that suit the device at one time."""
        ...

    def prepared(self, items: PyTree) -> PyTree:
        """What is made of entries of the table before they are scored."""
        ...

    def __call__(
        self, items: PyTree, target: PyTree | None
    ) -> tuple[Float[Array, "U I"], Float[Array, " U"] | None]:
        """The scores of prepared items, and of one target for each user."""
        ...


@dataclasses.dataclass(frozen=True)
class Products:
    """Scores that are products of a user's vector and an item's, or cosines."""

    h: Digits
    l2_normalize: bool

    @property
    def users(self) -> int:
        return self.h.scale_X.shape[0]

    @property
    def chunk_items(self) -> int:
        return CHUNK_ITEMS["cpu" if jax.default_backend() == "cpu" else "accelerator"]

    def prepared(self, items: PyTree) -> Digits:
        return digits(items)

    def __call__(
        self, items: Digits, target: Digits | None
    ) -> tuple[Float[Array, "U I"], Float[Array, " U"] | None]:
        both = (items,) if target is None else (items, target)
        factor_I, *of_targets = factors(*both, l2_normalize=self.l2_normalize)
        score_UI = all_scores(self.h, items, factor_I)
        return score_UI, None if target is None else paired_scores(self.h, target, *of_targets)


def ranks(
    h_UD: Users | Similarity,
    table_ID: PyTree,
    target_U: PerUser,
    seen_US: Seen = None,
    *,
    l2_normalize: bool = True,
    corpus_I: Corpus = None,
    cutoff: int | None = PUBLISHED_CUTOFF,
    chunk_items: int | None = None,
) -> PerUser:
    """Rank of each user's target among the items of the corpus, 1 is best.

    An item that scores the same as the target, or NaN, counts as better, so that a broken model
    cannot look good; the target never counts against itself. A tie is decided by the embeddings and
    never by rounding, which makes a score cost six products in the place of one (see `scores`).

    Args:
      h_UD: encoder output of the users, whose norm does not matter for the order; or what scores
        items for them.
      table_ID: item embeddings [I + 1, D], dense or a table of `quantization`, of which one chunk
        is unpacked at a time, or what the scorer reads; row 0 is padding and never ranked.
      target_U: ids 1..I; any other is not found.
      seen_US: ids that are left out of the ranking, 0 for none, repeats allowed. A target among
        them is not found. None: nothing is left out.
      l2_normalize: divide the items by max(norm, 1e-6), for models trained on cosines.
      corpus_I: the items that are ranked; None: all of 1..I.
      cutoff: a target of a higher rank is not found (published: 2500). None: no limit.
      chunk_items: items scored at one time; None: 1024 on a CPU (its cache), 4096 on an
        accelerator.

    Returns:
      int32 ranks; not found is `cutoff + 1`, or I + 1 where there is no cutoff.
    """
    items = table_ID.shape[0]
    target_U1, known_U = target_U[:, None], jnp.clip(target_U, 0, items - 1)
    scorer = _scorer(h_UD, l2_normalize)
    target = scorer.prepared(entries(table_ID, known_U))

    def count(ahead_U: PerUser, chunk: CorpusChunk) -> PerUser:
        assert chunk.target_U is not None
        better_UI = ~(chunk.score_UI < chunk.target_U[:, None])
        better_UI &= chunk.allowed_UI & (chunk.item_I[None, :] != target_U1)
        return ahead_U + jnp.sum(better_UI, axis=1, dtype=jnp.int32)

    ahead_U = _sweep(
        count,
        jnp.zeros(target_U.shape, jnp.int32),
        scorer,
        table_ID,
        seen_US,
        corpus_I,
        chunk_items,
        target,
    )
    found_U = (target_U > 0) & (target_U < items)
    if corpus_I is not None:
        found_U &= corpus_I[known_U]
    if seen_US is not None:
        found_U &= ~jnp.any(seen_US == target_U1, axis=1)
    last = items if cutoff is None else cutoff
    return jnp.where(found_U & (ahead_U < last), ahead_U + 1, last + 1)


def best_items(
    h_UD: Users | Similarity,
    table_ID: PyTree,
    seen_US: Seen = None,
    *,
    k: int,
    l2_normalize: bool = True,
    corpus_I: Corpus = None,
    chunk_items: int | None = None,
) -> tuple[Int[Array, "U {k}"], Float[Array, "U {k}"]]:
    """The k best items of each user and their scores, best first; then ids 0 with scores -inf.

    Of items with the same score the one with the lower id comes first, and an item whose score is
    NaN is left out. Scores are those of `ranks`, to the bit, and arguments as there. What is made
    on the device does not grow with the catalogue.
    """
    if k < 1:
        raise ValueError(f"{k=} must be at least 1")

    def merge(best: Best, chunk: CorpusChunk) -> Best:
        id_UC = jnp.broadcast_to(chunk.item_I, chunk.score_UI.shape)
        id_UX = jnp.concatenate([best[0], id_UC], axis=1)
        # NaN and -0 have an order of their own in `top_k`.
        score_UC = jnp.where(chunk.score_UI == 0, 0.0, chunk.score_UI)
        score_UC = jnp.where(chunk.allowed_UI & (score_UC > -jnp.inf), score_UC, -jnp.inf)
        score_UX = jnp.concatenate([best[1], score_UC], axis=1)
        score_UK, place_UK = jax.lax.top_k(score_UX, k, is_stable=True)
        id_UK = jnp.take_along_axis(id_UX, place_UK, axis=1)
        return jnp.where(score_UK > -jnp.inf, id_UK, 0), score_UK

    scorer = _scorer(h_UD, l2_normalize)
    shape = (scorer.users, k)
    none = (jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32))
    return _sweep(merge, none, scorer, table_ID, seen_US, corpus_I, chunk_items)


def entries(table: PyTree, ids: Int[Array, " n"]) -> PyTree:
    """Entries of a table by their numbers: of one as `quantization` has them, or a tuple."""
    if isinstance(table, tuple):
        return jax.tree.map(lambda leaf: jnp.take(leaf, ids, axis=0, mode="clip"), table)
    return quantization.rows(table, ids)


def _scorer(h_UD: Users | Similarity, l2_normalize: bool) -> Similarity:
    return h_UD if isinstance(h_UD, Similarity) else Products(digits(h_UD), l2_normalize)


def _sweep[Carry](
    visit: Callable[[Carry, CorpusChunk], Carry],
    carry: Carry,
    scorer: Similarity,
    table_ID: PyTree,
    seen_US: Seen,
    corpus_I: Corpus,
    chunk_items: int | None,
    target: PyTree | None = None,
) -> Carry:
    """Folds `visit` over chunks of the catalogue; each item is allowed in one chunk only."""
    items, users = table_ID.shape[0], scorer.users
    if chunk_items is None:
        chunk_items = scorer.chunk_items
    if chunk_items < 1:
        raise ValueError(f"{chunk_items=} must be at least 1")
    size = min(chunk_items, items)

    def step(i: Array, carry: Carry) -> Carry:
        first = jnp.minimum(i * size, items - size)  # the last chunk may overlap the one before it
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
        chunk_I = first + jnp.arange(size, dtype=jnp.int32)
        chunk = scorer.prepared(quantization.unpacked(jax.tree.map(take, table_ID)))
        score_UI, goal_U = scorer(chunk, target)
        allowed_I = chunk_I >= jnp.maximum(i * size, 1)
        if corpus_I is not None:
            allowed_I &= take(corpus_I)
        allowed_UI = jnp.broadcast_to(allowed_I, score_UI.shape)
        if seen_US is not None:
            # Items out of the chunk on either side are dropped.
            column_US = jnp.where(seen_US >= first, seen_US - first, size)
            user_U1 = jnp.arange(users, dtype=jnp.int32)[:, None]
            allowed_UI = allowed_UI.at[user_U1, column_US].set(False, mode="drop")
        return visit(carry, CorpusChunk(chunk_I, score_UI, goal_U, allowed_UI))

    return jax.lax.fori_loop(0, -(-items // size), step, carry)


def mean_metrics(
    rank_U: Int[Array | np.ndarray, " U"], weight_U: Float[np.ndarray, " U"] | None = None
) -> dict[str, float]:
    """The means over users of `hr@k`, `ndcg@k` and `mrr`, in float64 on the host; weighted.

    `hr@k = [rank <= k]`, `ndcg@k = [rank <= k] / log2(rank + 1)`, `mrr = 1 / rank`: as in the
    published code, a target that is not found adds 1 / 2501 to MRR and not 0.

    Raises:
      ValueError: if there is no user.
    """
    if not rank_U.size:
        raise ValueError("no user to average over")
    rank = np.asarray(rank_U, np.float64)
    gain_U = 1 / np.log2(rank + 1)
    values: dict[str, np.ndarray] = {f"hr@{k}": rank <= k for k in CUTOFFS}
    values |= {f"ndcg@{k}": (rank <= k) * gain_U for k in CUTOFFS}
    values |= {"mrr": 1 / rank}
    return {name: float(np.average(value_U, weights=weight_U)) for name, value_U in values.items()}
