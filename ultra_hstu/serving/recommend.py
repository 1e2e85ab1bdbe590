"""Retrieval: histories in, user vectors out, and the best items of the whole catalogue that the
user has not seen."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32
from numpy.typing import ArrayLike

from ultra_hstu import quantization
from ultra_hstu.checkpoint import load_params
from ultra_hstu.config import Config
from ultra_hstu.data import signals
from ultra_hstu.data.item_features import item_codes, user_code
from ultra_hstu.data.packing import ROW_MULTIPLE
from ultra_hstu.ranking.form import EVERYTHING
from ultra_hstu.retrieval import catalogue
from ultra_hstu.retrieval.batch import Batch, Events, HistoryGather
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.retrieval.series import Merged
from ultra_hstu.serving.artefact import Numbers
from ultra_hstu.serving.compiled import count_programs
from ultra_hstu.serving.inputs import (
    MAX_USERS,
    Query,
    UserEvents,
    UserHistory,
    bucket_size,
    bucket_sizes,
)
from ultra_hstu.serving.schema import Recommendation
from ultra_hstu.serving.tokens import key_of, since_first
from ultra_hstu.step import Params
from ultra_hstu.vocabulary import Vocabulary
from ultra_hstu.workdir import Workdir

SMALLEST_K, SMALLEST_HIDDEN = 16, 256  # smallest buckets; each holds 8 times the one before


class RecommendationModel:
    """A trained run, ready to recommend.

    Histories of different lengths share one flat buffer, and their vectors meet the catalogue in
    chunks: beside the table itself nothing on the device grows with the number of items. Rows of
    the buffer, hidden items and k come in few sizes; each is compiled once, when it is first met or
    by `warm_up`.
    """

    def __init__(
        self,
        workdir: str,
        *,
        tables: str = "float32",
        max_users: int = MAX_USERS,
        candidates: int | None = None,
    ):
        """
        Args:
          tables: how the item table goes to the device and stays there: one of
            `quantization.KINDS`.
          max_users: histories in one device call.
          candidates: of a mixture of logits, how many items are scored for a user; None: as many as
            it takes to know the best.

        Raises:
          ValueError: a folder without a retrieval run, parameters that are not finite, a kind of
            table that does not fit, candidates without a mixture.
        """
        folder = Workdir(workdir)
        self.config: Config = folder.read_for_one_device()
        require_retrieval(workdir, self.config)
        require_mixture(candidates, self.config)
        self.candidates = candidates
        self.catalog = folder.read_catalog()
        codes = item_codes(self.config.features, self.catalog.features, self.catalog.titles)
        self.vocabulary = Vocabulary.load(folder).codes()
        sizes = self.vocabulary.code_sizes(self.config)
        trained = Recipe(self.config, self.catalog.num_items, code_sizes=sizes, item_features=codes)
        self.max_users = max_users
        self.step, params = load_params(folder, trained)
        self.recipe, params = trained.folded(params)
        self.params: Params = jax.device_put(quantization.packed(params, tables))
        # What items are scored by, where it is not what tokens are made of.
        self._scored: catalogue.Scored | None = None
        self._series = self.config.features.series
        mixture = self.recipe.model(self.params).mixture
        if self._series or mixture is not None:
            require_dense(tables, self.config)
            make = functools.partial(catalogue.scored_items, self.recipe)
            self._scored = catalogue.scored(self.params, jax.jit(make)(self.params))
        self.query_width = self.config.model.width
        self.user_ids = 0 if mixture is None else mixture.config.user_ids
        if self.user_ids:
            self.query_width += self.config.mol.component_width
        self.blocked: Int[np.ndarray, " b"] = np.zeros(0, np.int32)
        self._allowed_I: Bool[Array, " I1"] | None = None
        self._encode = jax.jit(functools.partial(catalogue.encode, self.recipe))
        best = functools.partial(catalogue.best, self.config.loss.l2_normalize)
        if mixture is not None:
            best = functools.partial(catalogue.best_of_mixture, self.recipe, self.candidates)
        self._best = jax.jit(best, static_argnames="k")

    def block(self, items: Int[np.ndarray, " n"]) -> None:
        """Dense ids that are recommended to nobody from now on, in place of those given before. One
        byte an item on the device."""
        self.blocked = self._dense(items, "items")
        allowed_I = np.ones(self.catalog.num_items + 1, bool)
        allowed_I[self.blocked] = False
        self._allowed_I = jax.device_put(allowed_I)

    def recommend(
        self,
        items: ArrayLike,
        times: Numbers | None = None,
        *,
        actions: Mapping[str, ArrayLike] | None = None,
        context: Mapping[str, int] | None = None,
        now: int | None = None,
        k: int = 10,
        block: ArrayLike | None = None,
        user: int | str | None = None,
    ) -> list[Recommendation]:
        """The k unseen items with the highest scores, fewer where fewer remain. Arguments and
        errors as in `query`."""
        query = self.query(
            items, times, actions=actions, context=context, now=now, k=k, block=block, user=user
        )
        return self.best(self.encode([query]), [query])[0]

    def query(
        self,
        items: ArrayLike,
        times: Numbers | None = None,
        *,
        actions: Mapping[str, ArrayLike] | None = None,
        context: Mapping[str, int] | None = None,
        now: int | None = None,
        k: int = 10,
        block: ArrayLike | None = None,
        user: int | str | None = None,
        allow_empty: bool = False,
    ) -> Query:
        """Checks one request, on the host.

        Args:
          items: dense ids (`catalog.encode` makes them), oldest first; all are hidden from the
            response, the newest `max_history` are encoded.
          times: seconds, one an event; without them all events count as simultaneous.
          actions: what the user did with each item, by the names of the source ("rating"), for a
            run whose tokens hold signals; without them such a run sees items alone. Features of
            events are among them; a column that is missing is unknown.
          context: codes of what is known of the user, by name; unknown where they are missing.
          now: time of the request in the same seconds; None takes the next event to follow the last
            at once.
          k: how many items.
          block: dense ids that this response must not hold.
          user: the raw id, which a run with `mol.user_ids` reads; None: of nobody who is known.
          allow_empty: accept a history without items; it cannot be encoded.

        Raises:
          ValueError: for an empty history, a wrong number of times or actions, times that go back
            or span more than 2^31 - 1 seconds, actions that the run's signals cannot be made from,
            or k outside 1..items.
        """
        item_E, blocked = (
            self._dense(items, "items"),
            self._dense([] if block is None else block, "block"),
        )
        count = len(item_E)
        if not count and not allow_empty:
            raise ValueError(
                "the history is empty: give at least one item, or take the most popular items of "
                "the training data"
            )
        if self.candidates is not None and k > self.candidates:
            raise ValueError(f"k={k} is more than the {self.candidates} candidates of this service")
        if not 1 <= k <= self.catalog.num_items:
            raise ValueError(f"k={k} must be in 1..{self.catalog.num_items}, the number of items")
        first = max(0, count - self.config.data.max_history)
        time_E = since_first(count, times, now, first=first)
        kept = UserEvents(
            item_E[first:],
            time_E[:-1],
            self._codes(actions, context or {}, count)[first:],
            np.zeros((count - first, 0), np.int32),
            np.array([0, count - first], np.int32),
        )
        history = UserHistory({EVERYTHING: kept}, np.zeros((1, 0), np.int32), time_E[-1:])
        hidden = np.unique(np.concatenate([item_E, blocked]))
        code = user_code(user, self.user_ids) if self.user_ids and user is not None else 0
        key = key_of(history, with_now=True) + code.to_bytes(4, "little")
        return Query(history, key, k, hidden, user=code)

    def encode(self, queries: Sequence[Query]) -> Float[np.ndarray, "n X"]:
        """A vector for every query, on the host. Rounding may depend on which queries share a
        device call.

        Raises:
          ValueError: for a query without events.
        """
        if empty := sum(not query.num_events for query in queries):
            raise ValueError(
                f"{empty} of {len(queries)} queries have an empty history: "
                "there is nothing to encode"
            )
        user_nD = [np.zeros((0, self.query_width), np.float32)]
        for i in range(0, len(queries), self.max_users):
            group = queries[i : i + self.max_users]
            user_UD = self._encode(self.params, self._batch(group))
            user_nD.append(np.asarray(user_UD)[: len(group)])
        return np.concatenate(user_nD)

    def best(
        self, user_nD: Float[np.ndarray, "n D"], queries: Sequence[Query]
    ) -> list[list[Recommendation]]:
        """The best items of vectors that `encode` gave: a function of the vector and its query
        alone, to the bit, whatever shares the call."""
        table = quantization.served_table(self.params) if self._scored is None else self._scored
        ranked: list[list[Recommendation]] = []
        for i in range(0, len(queries), self.max_users):
            group = queries[i : i + self.max_users]
            k, slots = self._sizes_of(group)
            user_UD = np.zeros((self.max_users, user_nD.shape[1]), np.float32)
            user_UD[: len(group)] = user_nD[i : i + len(group)]
            hidden_US = np.zeros((self.max_users, slots), np.int32)
            for row, query in enumerate(group):
                hidden_US[row, : len(query.hidden)] = query.hidden
            # Behind them is the first one again: what proves hers the best does so there, too.
            user_UD[len(group) :], hidden_US[len(group) :] = user_UD[0], hidden_US[0]
            best_UK, score_UK = jax.device_get(
                self._best(table, user_UD, hidden_US, self._allowed_I, k=k)
            )
            for row, query in enumerate(group):
                ranked.append(self.decode(best_UK[row, : query.k], score_UK[row, : query.k]))
        return ranked

    def warm_up(self, *, max_k: int, max_hidden: int) -> int:
        """Compiles for all sizes up to these, so that no request waits for it. Returns the number
        of programs."""
        items = self.catalog.num_items
        query = self.query([1] * self.config.data.max_history)
        for users in bucket_sizes(1, self.max_users, 2):
            self.encode([query] * users)
        user_1D = np.zeros((1, self.query_width), np.float32)
        for k in self._sizes(SMALLEST_K, max_k):
            for hidden in self._sizes(SMALLEST_HIDDEN, max_hidden):
                hide = np.ones(min(hidden, items), np.int32)
                self.best(user_1D, [dataclasses.replace(query, hidden=hide, k=min(k, items))])
        return self.programs

    @property
    def programs(self) -> int:
        """How many programs have been compiled."""
        return count_programs(self._encode, self._best)

    def _dense(self, ids: ArrayLike, name: str) -> Int32[np.ndarray, " n"]:
        ids = np.asarray(ids)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"{name} must be dense ids (integers), got {ids.dtype}: catalog.encode makes them"
            )
        if ids.size and not (1 <= ids.min() and ids.max() <= self.catalog.num_items):
            raise ValueError(
                f"{name} must be dense ids in 1..{self.catalog.num_items}, "
                f"got {ids.min()}..{ids.max()}: catalog.encode makes them"
            )
        return ids.astype(np.int32)

    def _codes(
        self, actions: Mapping[str, ArrayLike] | None, context: Mapping[str, int], count: int
    ) -> Int32[np.ndarray, "E X"]:
        """What tokens hold beside their items."""
        names = self.config.rank.signals
        columns = {name: np.asarray(values) for name, values in (actions or {}).items()}
        if wrong := [name for name, values in columns.items() if len(values) != count]:
            raise ValueError(
                f"{count} items but {len(columns[wrong[0]])} values of {wrong[0]!r}: "
                "give one an item"
            )
        signal_ES = np.zeros((count, len(names)), np.int32)
        features = set(signals.needs(self.config.rank.features))
        if actions is not None and names and not (columns and columns.keys() <= features):
            signal_ES = signals.signals(columns, names, count)
        return self.vocabulary.event_codes(signal_ES, columns, context)

    def _batch(self, queries: Sequence[Query]) -> Batch:
        """The flat buffer of up to `max_users` histories, at the smallest size that holds them: 1,
        2, 4, ... whole histories."""
        history = UserHistory.concatenate([query.history for query in queries])
        given, longest = history.channels[EVERYTHING], self.config.data.max_history
        # Each history gets one slot more, which carries the time of the request.
        end_B = given.offsets[1:]
        signal_ES = np.insert(given.signal_ES, end_B, 0, axis=0)
        length_U = np.zeros(self.max_users, np.int32)
        length_U[: len(queries)] = given.lengths
        start_U = np.concatenate([[0], np.cumsum(length_U + (length_U > 0))[:-1]]).astype(np.int32)
        item_E, row_U = np.insert(given.item_E, end_B, 0), length_U
        merged, codes = None, self.recipe.item_features
        if codes is not None:
            first_E = np.isin(np.arange(len(item_E)), start_U)
            merged = Merged.of(item_E, first_E, codes)
            row_U = np.asarray(merged.rows(start_U, start_U + length_U, self._series))
            longest *= 1 + self._series
        events = Events(
            item_E,
            np.insert(given.time_E, end_B, history.now_B),
            signal_ES if signal_ES.shape[1] else None,
            merged,
        )
        sizes = bucket_sizes(1, self.max_users, 2)
        users = bucket_size(-(-int(row_U.sum()) // longest), sizes)
        rows = -(-users * longest // ROW_MULTIPLE) * ROW_MULTIPLE
        columns = {"start": start_U, "stop": start_U + length_U}
        if self.user_ids:
            columns["user"] = np.zeros(self.max_users, np.int32)
            columns["user"][: len(queries)] = [query.user for query in queries]
        return HistoryGather(rows, series=self._series)(events, columns, np)

    def _sizes(self, smallest: int, needed: int) -> list[int]:
        """The sizes up to the one that holds `needed`. None needs more than there are items."""
        items = self.catalog.num_items
        sizes = bucket_sizes(smallest, items, 8)
        return sizes[: 1 + sizes.index(bucket_size(min(needed, items), sizes))]

    def _sizes_of(self, queries: Sequence[Query]) -> tuple[int, int]:
        """k and hidden items of a call."""
        k = max(query.k for query in queries)
        hidden = max(len(query.hidden) for query in queries)
        return self._sizes(SMALLEST_K, k)[-1], self._sizes(SMALLEST_HIDDEN, hidden)[-1]

    def decode(
        self, best_K: Int[np.ndarray, " K"], score_K: Float[np.ndarray, " K"]
    ) -> list[Recommendation]:
        """Raw ids and titles of dense ids; those from the first 0 on are left out."""
        found, titles = best_K[best_K > 0], self.catalog.titles
        raw_ids = self.catalog.decode(found).tolist()
        return [
            Recommendation.model_construct(
                item=raw, title=None if titles is None else titles[item], score=score
            )
            for raw, item, score in zip(raw_ids, found, score_K.tolist(), strict=False)
        ]


def require_retrieval(workdir: str, config: Config) -> None:
    """Raises ValueError for a ranking run."""
    if config.rank.tasks:
        raise ValueError(
            f"{workdir} is a ranking run (rank.tasks={config.rank.tasks}): it predicts what a user "
            "does with given items. Recommendations over the catalogue come from a retrieval run; "
            "--candidates=ID,ID, --requests=FILE and experiments.serve score what they are given"
        )


def require_mixture(candidates: int | None, config: Config) -> None:
    """Raises ValueError for candidates where scores are products, or for less than one."""
    if candidates is not None and config.loss.similarity != "mol":
        raise ValueError(
            f"candidates={candidates} is for runs with loss.similarity='mol', and this one has "
            f"{config.loss.similarity!r}: its best items are found among all. Leave it out"
        )
    if candidates is not None and candidates < 1:
        raise ValueError(f"{candidates=} must be at least 1")


def require_dense(tables: str, config: Config) -> None:
    """Raises ValueError for a packed table where items are scored by another one."""
    if tables != "float32" and config.loss.similarity == "mol":
        raise ValueError(
            f"tables={tables!r} cannot be used with loss.similarity='mol', which scores items by "
            "the components that it makes of them, in float32: use tables='float32'"
        )
    if tables != "float32":
        raise ValueError(
            f"tables={tables!r} cannot be used with features.merge='series', which reads items "
            "from one table and scores them by another: use tables='float32', or train with "
            "merge='sum'"
        )
