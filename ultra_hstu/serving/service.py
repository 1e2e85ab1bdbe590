"""From requests to answers: raw ids and users to queries, encoded users kept, the popularity answer where there is no history."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from ultra_hstu.data import signals
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.serving.retrieval import Query, Recommendation, RecommendationModel
from ultra_hstu.serving.schema import MAX_BLOCK, MAX_EVENTS, MAX_K, Answer, Item, Request
from ultra_hstu.serving.user_vectors import UserVectors
from ultra_hstu.task import Task
from ultra_hstu.workdir import Workdir


class RunData:
    """The data that a run was trained on, read when it is first asked for."""

    def __init__(self, workdir: str, raw_dir: str | None = None):
        self.folder = Workdir(workdir)
        self.config = self.folder.read_for_one_device(raw_dir)

    @functools.cached_property
    def interactions(self) -> Interactions:
        """Raises ValueError where the data is not what the run was trained on, or cannot be read."""
        interactions = load_interactions(self.config.data)
        self.folder.check_data(interactions)
        return interactions

    @functools.cached_property
    def count_I(self) -> Float[np.ndarray, " I1"]:
        """How often each item occurs in the training data."""
        task: Any = Task.of(self.config, self.interactions)
        return np.ceil(task.popularity())


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A request that is ready for the device."""

    query: Query
    warnings: tuple[str, ...] = ()


class Service:
    """Answers requests with a trained run. `prepare` may run anywhere; `answer` in one thread at a time."""

    def __init__(self, model: RecommendationModel, data: RunData, *, cache_bytes: int = 2**26):
        self.model = model
        self.data = data
        self.users = UserVectors(cache_bytes)
        self.hits = self.misses = 0

    def prepare(self, request: Request) -> Prepared:
        """Looks up ids and users. Raises ValueError for what cannot be answered, with the reason."""
        blocked, warnings = self._known(request.block, "block")
        options: dict[str, Any] = {"k": request.k, "now": request.now, "block": blocked[blocked > 0], "allow_empty": True}
        if request.user is not None:
            return Prepared(self.of_user(request.user, **options), tuple(warnings))
        found, more = self._known(request.history or [], "history")
        kept = found > 0
        unused = sorted(set(request.actions or {}) - set(signals.needs(self.model.config.rank.signals)))
        ignored = (
            [f"actions {', '.join(repr(name)[:40] for name in unused[:5])} are not read by this run and were ignored"] if unused else []
        )
        columns = {name: np.asarray(values)[kept] for name, values in (request.actions or {}).items() if name not in unused}
        times = None if request.times is None else np.asarray(request.times, np.int64)[kept]
        query = self.model.query(found[kept], times, actions=columns or None, **options)
        return Prepared(query, (*more, *warnings, *ignored))

    def of_user(self, user: int | str, **options: Any) -> Query:
        """The query of a user of the data, by raw id: the whole history. Raises ValueError for an unknown one."""
        interactions = self.data.interactions
        events = interactions.history(user)
        times = None if interactions.timestamps is None else interactions.timestamps[events]
        actions = {name: values[events] for name, values in interactions.actions.items()}
        return self.model.query(interactions.items[events], times, actions=actions, **options)

    def answer(self, prepared: Sequence[Prepared]) -> list[Answer]:
        """One device call for new histories and one for the catalogue, for up to `model.max_users` requests."""
        queries = [p.query for p in prepared if p.query.length]
        ranked = iter(self.model.best(self._vectors(queries), queries) if queries else [])
        empty = "the history is empty: these are the most popular items"
        return [
            as_answer(next(ranked), "model", p.warnings)
            if p.query.length
            else as_answer(self._popular(p.query), "popularity", (*p.warnings, empty))
            for p in prepared
        ]

    def warm_up(self) -> int:
        """Reads the data and compiles all that requests within the schema's limits can need. Returns the number of programs."""
        longest = max(MAX_EVENTS, int(self.data.interactions.lengths.max()))
        self._popularity  # noqa: B018
        return self.model.warm_up(max_k=MAX_K, max_hidden=longest + MAX_BLOCK)

    @functools.cached_property
    def _popularity(self) -> Int[np.ndarray, " n"]:
        """Items that may be recommended, the most frequent first, of equal ones the lower id."""
        order_I = np.argsort(-self.data.count_I[1:], kind="stable").astype(np.int32) + 1
        return order_I[~np.isin(order_I, self.model.blocked)]

    def _popular(self, query: Query) -> list[Recommendation]:
        """The most frequent items that the query does not hide; scores are the counts."""
        candidates = self._popularity[: query.k + len(query.hidden)]
        best_K = candidates[~np.isin(candidates, query.hidden)][: query.k]
        return self.model.decode(best_K, self.data.count_I[best_K])

    def _vectors(self, queries: Sequence[Query]) -> Float[np.ndarray, "n D"]:
        keys = [self.users.key(query) for query in queries]
        new = {key: query for key, query in zip(keys, queries, strict=True) if key not in self.users}
        self.hits += len(keys) - len(new)
        self.misses += len(new)
        encoded = dict(zip(new, self.model.encode(list(new.values())), strict=True))
        vectors = [encoded[key] if key in encoded else self.users.get(key) for key in keys]
        for key, vector_D in encoded.items():
            self.users.put(key, vector_D)
        return np.stack(vectors)

    def _known(self, raw_ids: Sequence[int | str], name: str) -> tuple[np.ndarray, list[str]]:
        """Dense ids, 0 for unknown ones, and a warning that counts those."""
        dense = self.model.catalog.find(list(raw_ids))
        unknown = [raw for raw, found in zip(raw_ids, dense, strict=True) if not found]
        if not unknown:
            return dense, []
        shown = ", ".join(repr(raw)[:40] for raw in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        return dense, [f"{name}: {len(unknown)} of {len(raw_ids)} items are not in the catalogue and were ignored: {shown}"]


def as_answer(items: Sequence[Recommendation], source: Literal["model", "popularity"], warnings: Sequence[str]) -> Answer:
    """An answer from what the model ranked."""
    return Answer(items=[Item.model_construct(**dataclasses.asdict(item)) for item in items], source=source, warnings=list(warnings))
