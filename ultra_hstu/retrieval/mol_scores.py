"""The best items of a catalogue by a mixture of logits: in two stages, with a proof; or about.

A score is a weighted mean of its logits, so none exceeds the largest of them. The products of
components cost a fraction of the gate. So the first stage bounds all items by their largest logit
and keeps the M best bounds; the second one scores these. If the k-th score is above the bound of
every item that was left out, no other item can be among the k best: that is the proof. Without it
all items are scored.

A bound is only as good as a mean is close to its largest logit: weights that are spread over many
logits make bounds that prove nothing, and then all items are scored. `candidates` of `best` stops
before that, at the cost of some recall (docs/mixture_of_logits.md).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ultra_hstu.retrieval.metrics import Best, Corpus, Seen, best_items, entries
from ultra_hstu.retrieval.mol import EXACT, ItemPart, MixtureOfLogits, Net, UserPart, mixed
from ultra_hstu.retrieval.scores import all_scores, digits

CHUNK_NUMBERS = {"cpu": 2**20, "accelerator": 2**26}  # of users x items x width of the gate
ROUNDS = (512,)  # candidates of each attempt to prove the best; then all items are scored
ROUNDING = 2.0**-23


def item_part(mixture: MixtureOfLogits, table_ID: Float[Array, "I1 D"]) -> ItemPart:
    """The parts of all items, each decided by its vector alone."""
    return mixture.items(table_ID, EXACT)


class Answering(NamedTuple):
    """The parts of users, and the net that meets every pair."""

    rows: UserPart
    cross: Net

    @staticmethod
    def of(mixture: MixtureOfLogits, query_UX: Float[Array, "U X"]) -> "Answering":
        """From what `Recommender.queries` gives."""
        width = mixture.config.component_width
        of_id_UW = None
        if mixture.user_table is not None:
            query_UX, of_id_UW = jnp.split(query_UX, [query_UX.shape[1] - width], axis=1)
        return Answering(mixture.users(query_UX, of_id_UW, EXACT), mixture.cross)


@dataclasses.dataclass(frozen=True)
class Mixtures:
    """Scores of a mixture, of which each pair has one value."""

    of_users: Answering

    @property
    def users(self) -> int:
        return self.of_users.rows.gate_UL.shape[0]

    @property
    def chunk_items(self) -> int:
        numbers = CHUNK_NUMBERS["cpu" if jax.default_backend() == "cpu" else "accelerator"]
        width = sum(self.of_users.cross.hidden_DH.shape)
        return max(16, numbers // (self.users * width))

    def prepared(self, items: ItemPart) -> ItemPart:
        return items

    def __call__(
        self, items: ItemPart, target: ItemPart | None
    ) -> tuple[Float[Array, "U I"], Float[Array, " U"] | None]:
        rows, (count, parts, width) = self.of_users.rows, items.component_IQW.shape
        users = self.users
        h = digits(rows.component_UPW.reshape(-1, width))
        e = digits(items.component_IQW.reshape(-1, width))
        logit = all_scores(h, e, e.scale_X).reshape(users, -1, count, parts)
        logit = logit.transpose(0, 2, 1, 3).reshape(users, count, -1)
        gate_UIL = jnp.broadcast_to(items.gate_IL[None], logit.shape)
        if target is None:
            return self._mixed(logit, gate_UIL), None
        # Scored with the chunk's, so that equal ones are equal.
        own = _logits(rows, jax.tree.map(lambda leaf: leaf[:, None], target))
        logit, gate_UIL = (
            jnp.concatenate(both, axis=1)
            for both in ((logit, own), (gate_UIL, target.gate_IL[:, None]))
        )
        score_UI = self._mixed(logit, gate_UIL)
        return score_UI[:, :-1], score_UI[:, -1]

    def of_each(self, items_UM: ItemPart) -> Float[Array, "U M"]:
        """The scores of M items for each user: the same bits as among all."""
        return self._mixed(_logits(self.of_users.rows, items_UM), items_UM.gate_IL)

    def _mixed(
        self, logit: Float[Array, "U I L"], gate_UIL: Float[Array, "U I L"]
    ) -> Float[Array, "U I"]:
        user_gate = self.of_users.rows.gate_UL[:, None]
        return mixed(logit, user_gate, gate_UIL, self.of_users.cross, EXACT)[0]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What orders candidates: no score exceeds the largest logit, with room for rounding.

    `mean`: by the mean of the logits instead, which is one product of sums of components.
    """

    rows: UserPart
    mean: bool = False

    @property
    def users(self) -> int:
        return self.rows.gate_UL.shape[0]

    @property
    def chunk_items(self) -> int:
        numbers = CHUNK_NUMBERS["cpu" if jax.default_backend() == "cpu" else "accelerator"]
        return max(16, numbers // (self.users * self.rows.gate_UL.shape[1]))

    def prepared(self, items: ItemPart) -> ItemPart:
        return items

    def __call__(self, items: ItemPart, target: None) -> tuple[Float[Array, "U I"], None]:
        user_UPW, (count, parts, width) = self.rows.component_UPW, items.component_IQW.shape
        if self.mean:
            sums = (jnp.sum(x, axis=1) for x in (user_UPW, items.component_IQW))
            return _product(*sums), None
        logit = _product(user_UPW.reshape(-1, width), items.component_IQW.reshape(-1, width))
        logit = logit.reshape(self.users, -1, count, parts)
        longest_U, longest_I = (
            jnp.sqrt(jnp.max(jnp.sum(x * x, axis=2), axis=1))
            for x in (user_UPW, items.component_IQW)
        )
        terms = width + 4 * self.rows.gate_UL.shape[1]  # of the sums that are rounded
        slack_UI = terms * ROUNDING * longest_U[:, None] * longest_I[None]
        return jnp.max(logit, axis=(1, 3)) + slack_UI, None


def best(
    users: Answering,
    items: ItemPart,
    seen_US: Seen = None,
    *,
    k: int,
    corpus_I: Corpus = None,
    candidates: int | None = None,
    rounds: tuple[int, ...] = ROUNDS,
) -> Best:
    """The k best items of each user and their scores, as `metrics.best_items` has them.

    Args:
      candidates: only so many items are scored for each user, half of them those of the highest
        means of logits, half those of the highest bounds; None: as many as it takes to know the
        best, which are then those that scoring all items finds, to the bit.
      rounds: candidates of each attempt to prove them.
    """
    if k < 1:
        raise ValueError(f"{k=} must be at least 1")
    scorer = Mixtures(users)
    if candidates is not None:
        if candidates < k:
            raise ValueError(f"{candidates=} must be at least {k=}")
        halves = [
            best_items(Bounds(users.rows, mean), items, seen_US, k=max(1, half), corpus_I=corpus_I)[
                0
            ]
            for mean, half in ((True, candidates - candidates // 2), (False, candidates // 2))
        ]
        return _scored(scorer, items, jnp.concatenate(halves, axis=1), k)

    def attempt(rounds: tuple[int, ...]) -> Best:
        if not rounds:
            return best_items(scorer, items, seen_US, k=k, corpus_I=corpus_I)
        found, proven_U = proved(users, items, seen_US, k=k, corpus_I=corpus_I, count=rounds[0])
        return jax.lax.cond(jnp.all(proven_U), lambda: found, lambda: attempt(rounds[1:]))

    return attempt(tuple(count for count in rounds if k < count < items.shape[0]))


def proved(
    users: Answering,
    items: ItemPart,
    seen_US: Seen = None,
    *,
    k: int,
    corpus_I: Corpus = None,
    count: int,
) -> tuple[Best, Bool[Array, " U"]]:
    """The k best among the `count` highest bounds, and whether they are the best of all."""
    bounds = Bounds(users.rows)
    id_UM, bound_UM = best_items(bounds, items, seen_US, k=count, corpus_I=corpus_I)
    found = _scored(Mixtures(users), items, id_UM, k)
    # Strictly: an item with the same score may have a lower id. With less than `count` items that
    # may be recommended, none was left out.
    return found, (found[1][:, -1] > bound_UM[:, -1]) | (id_UM[:, -1] == 0)


def _scored(scorer: Mixtures, items: ItemPart, id_UM: Int[Array, "U M"], k: int) -> Best:
    """The k best of some items of each user, 0 for none and the same ones any number of times."""
    id_UM = jnp.sort(id_UM, axis=1)  # of equal scores the lower id is first
    again_UM = jnp.pad(id_UM[:, 1:] == id_UM[:, :-1], ((0, 0), (1, 0)))
    part_X = entries(items, id_UM.reshape(-1))
    part_UM = jax.tree.map(lambda leaf: leaf.reshape(*id_UM.shape, *leaf.shape[1:]), part_X)
    score_UM = scorer.of_each(part_UM)
    score_UM = jnp.where(score_UM == 0, 0.0, score_UM)
    allowed_UM = (id_UM > 0) & ~again_UM & (score_UM > -jnp.inf)
    score_UM = jnp.where(allowed_UM, score_UM, -jnp.inf)
    score_UK, place_UK = jax.lax.top_k(score_UM, k, is_stable=True)
    id_UK = jnp.take_along_axis(id_UM, place_UK, axis=1)
    return jnp.where(score_UK > -jnp.inf, id_UK, 0), score_UK


def _logits(rows: UserPart, items_UM: ItemPart) -> Float[Array, "U M L"]:
    """The logits of M items of each user, sums without rounding."""
    users, count, parts, width = items_UM.component_IQW.shape

    def one(h_PW: Float[Array, "P W"], e_XW: Float[Array, "X W"]) -> Float[Array, "P X"]:
        h, e = digits(h_PW), digits(e_XW)
        return all_scores(h, e, e.scale_X)

    logit_UPX = jax.vmap(one)(rows.component_UPW, items_UM.component_IQW.reshape(users, -1, width))
    logit = logit_UPX.reshape(users, -1, count, parts)
    return logit.transpose(0, 2, 1, 3).reshape(users, count, -1)


def _product(x_XW: Float[Array, "X W"], y_YW: Float[Array, "Y W"]) -> Float[Array, "X Y"]:
    return jnp.matmul(x_XW, y_YW.T, precision="highest")
