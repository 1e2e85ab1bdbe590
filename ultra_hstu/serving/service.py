"""From requests to answers: raw ids and users to queries, encoded users kept, the popularity answer where there is no history."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from ultra_hstu.data import signals
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.serving.encoded_users import EncodedUsers
from ultra_hstu.serving.retrieval import Query, Recommendation, RecommendationModel
from ultra_hstu.serving.schema import MAX_BLOCK, MAX_EVENTS, MAX_K, Answer, Item, Request
from ultra_hstu.serving.trained import RunData


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A request that is ready for the device."""

    query: Any  # the model's
    warnings: tuple[str, ...] = ()
    asked: Any = None  # what the answer has to repeat


class Service:
    """Answers requests with a retrieval run. `prepare` may run anywhere; `answer` in one thread at a time."""

    request_type = Request

    def __init__(self, model: RecommendationModel, data: RunData, *, cache_bytes: int = 2**26):
        self.model = model
        self.data = data
        self.users = EncodedUsers(cache_bytes)

    def prepare(self, request: Request) -> Prepared:
        """Looks up ids and users. Raises ValueError for what cannot be answered, with the reason."""
        blocked, warnings = known_ids(self.model.catalog, request.block, "block")
        options: dict[str, Any] = {
            "k": request.k,
            "now": request.now,
            "block": blocked[blocked > 0],
            "allow_empty": True,
        }
        if request.user is not None:
            return Prepared(self.of_user(request.user, **options), tuple(warnings))
        found, more = known_ids(self.model.catalog, request.history or [], "history")
        kept = found > 0
        read = signals.needs(self.model.config.rank.signals)
        ignored = unread_actions(request.actions or {}, read)
        columns = {
            name: np.asarray(values)[kept]
            for name, values in (request.actions or {}).items()
            if name in read
        }
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
        ranked = iter(
            self.model.best(
                np.stack(self.users.of(queries, lambda new: list(self.model.encode(new)))), queries
            )
            if queries
            else []
        )
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

    def pulse(self) -> None:
        """Asks the device for something short."""
        self.model.encode([self.model.query([1])])

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


def known_ids(
    catalog: Catalog, raw_ids: Sequence[int | str], name: str
) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """Dense ids, 0 for those that the catalogue lacks, and a warning that counts these. Raises ValueError for ids of another kind."""
    dense = catalog.find(list(raw_ids))
    unknown = [raw for raw, found in zip(raw_ids, dense, strict=True) if not found]
    if not unknown:
        return dense, []
    shown = ", ".join(repr(raw)[:40] for raw in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
    return dense, [
        f"{name}: {len(unknown)} of {len(raw_ids)} items are not in the catalogue and were ignored: {shown}"
    ]


def unread_actions(actions: Iterable[str], read: Iterable[str]) -> list[str]:
    """A warning of actions that a run does not read, if there are such."""
    unused = sorted(set(actions) - set(read))
    return (
        [
            f"actions {', '.join(repr(name)[:40] for name in unused[:5])} are not read by this run and were ignored"
        ]
        if unused
        else []
    )


def as_answer(
    items: Sequence[Recommendation], source: Literal["model", "popularity"], warnings: Sequence[str]
) -> Answer:
    """An answer from what the model ranked."""
    return Answer(
        items=[Item.model_construct(**dataclasses.asdict(item)) for item in items],
        source=source,
        warnings=list(warnings),
    )
