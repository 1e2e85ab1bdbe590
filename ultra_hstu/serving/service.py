"""From requests to responses: raw ids and users to queries, encoded users kept, and the most
popular items where there is no history."""

import abc
import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from ultra_hstu.data import signals
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.serving import export
from ultra_hstu.serving.inputs import Query
from ultra_hstu.serving.options import ServingOptions, is_ranking
from ultra_hstu.serving.recommend import RecommendationModel
from ultra_hstu.serving.schema import (
    MAX_BLOCK,
    MAX_EVENTS,
    MAX_K,
    AboutUser,
    Recommendation,
    Request,
    Response,
    ScoredItem,
    ScoreRequest,
    ScoreResponse,
)
from ultra_hstu.serving.scoring import RunData, ScoringModel, UserData, load_ranker
from ultra_hstu.serving.users import CachedUsers, EncodedUsers

log = logging.getLogger(__name__)
EMPTY = "the history is empty: these are the scores for somebody of whom no event is known"
POPULAR = "the history is empty: these are the most popular items"


class Service[R: AboutUser, A: Response | ScoreResponse](abc.ABC):
    """Answers requests with a run. `prepare` may run anywhere; `answer` in one thread at a time."""

    request_type: type[R]
    model: RecommendationModel | ScoringModel
    users: EncodedUsers[np.ndarray] | CachedUsers
    reads: Sequence[str]  # the source's columns of events that the run reads
    expects: Sequence[str]  # those whose lack is said
    features: Sequence[str] = ()  # those that a candidate has, too

    def __init__(self, catalog: Catalog, data: RunData | None):
        # Without data, requests bring their histories: users of the data are not known.
        self.catalog, self.data = catalog, data

    @abc.abstractmethod
    def prepare(self, request: R) -> Query:
        """Looks up ids and users. Raises ValueError for what cannot be answered, with the
        reason."""

    @abc.abstractmethod
    def answer(self, queries: Sequence[Query]) -> list[A]:
        """The responses, in the order of up to `model.max_users` queries."""

    @abc.abstractmethod
    def warm_up(self) -> int:
        """Compiles all that requests can need. Returns the number of programs."""

    @abc.abstractmethod
    def check_health(self) -> None:
        """Asks the device for something short."""

    def user(self, user: int | str) -> UserData:
        """A user of the data. Raises ValueError for an unknown one."""
        if self.data is None:
            raise ValueError(
                "users of the data are not known here, since this is an exported model: "
                "give a history"
            )
        return self.data.user(user)

    def events(self, request: R) -> tuple[UserData, list[str]]:
        """The history and context of a request, and what of them was ignored or missing."""
        if request.user is not None:
            return self.user(request.user), []
        given = request.actions or {}
        found_E, warnings = known_ids(self.catalog, request.history or [], "history")
        kept_E = found_E > 0
        if unread := sorted(set(given) - set(self.reads)):
            warnings.append(f"actions {_shown(unread)} are not read by this run and were ignored")
        times = None if request.times is None else np.asarray(request.times, np.int64)[kept_E]
        actions = {
            name: np.asarray(values)[kept_E] for name, values in given.items() if name in self.reads
        }
        warnings += _missing("actions", self.expects if kept_E.any() else (), given)
        context, more = self._context(request.context or {})
        return (found_E[kept_E], times, actions, context), [*warnings, *more]

    def _context(self, given: Mapping[str, str]) -> tuple[dict[str, int], list[str]]:
        """Codes of what is known of a user, and what of it was ignored or missing."""
        known, warnings = self.model.vocabulary.contexts, []
        context = {
            name: known[name].index(text)
            for name, text in given.items()
            if text in known.get(name, ())[1:]
        }
        unknown = [f"{name!r:.40}: {given[name]!r:.40}" for name in given if name not in context]
        if unknown:
            warnings.append(
                f"context: {', '.join(unknown[:5])} is not known to this run and was ignored"
            )
        return context, [*warnings, *_missing("context", known, given)]


class RecommendService(Service[Request, Response]):
    """Answers requests with a retrieval run."""

    request_type = Request
    unknown_blocked = 0  # ids of the block list that the catalogue lacks

    def __init__(self, model: RecommendationModel, data: RunData, *, cache_bytes: int = 2**26):
        super().__init__(model.catalog, data)
        self.model: RecommendationModel = model
        self.data: RunData = data
        data.step = model.step
        rank = model.config.rank
        self.reads = signals.needs((*rank.signals, *rank.features))
        self.expects = signals.needs(rank.features)
        self.users: EncodedUsers[np.ndarray] = EncodedUsers(cache_bytes)

    def prepare(self, request: Request) -> Query:
        blocked, warnings = known_ids(self.catalog, request.block, "block")
        (items, times, actions, context), ignored = self.events(request)
        query = self.model.query(
            items,
            times,
            actions=actions or None,
            context=context,
            now=request.now,
            k=request.k,
            block=blocked[blocked > 0],
            user=request.user,
            allow_empty=True,
        )
        return dataclasses.replace(query, warnings=(*ignored, *warnings))

    def answer(self, queries: Sequence[Query]) -> list[Response]:
        """One device call for new histories and one for the catalogue."""
        some = [query for query in queries if query.num_events]
        vectors = self.users.of(some, lambda new: list(self.model.encode(new)))
        ranked = iter(self.model.best(np.stack(vectors), some) if some else [])
        return [
            recommended(query, next(ranked)) if query.num_events else self._popular(query)
            for query in queries
        ]

    def warm_up(self) -> int:
        longest = max(MAX_EVENTS, int(self.data.interactions.lengths.max()))
        self._popularity  # noqa: B018
        return self.model.warm_up(max_k=MAX_K, max_hidden=longest + MAX_BLOCK)

    def check_health(self) -> None:
        self.model.encode([self.model.query([1])])

    @functools.cached_property
    def _popularity(self) -> Int[np.ndarray, " n"]:
        """Items that may be recommended, the most frequent first, of equal ones the lower id."""
        order_I = np.argsort(-self.data.count_I[1:], kind="stable").astype(np.int32) + 1
        return order_I[~np.isin(order_I, self.model.blocked)]

    def _popular(self, query: Query) -> Response:
        """The most frequent items that the query does not hide; scores are the counts."""
        candidates = self._popularity[: query.k + len(query.hidden)]
        best_K = candidates[~np.isin(candidates, query.hidden)][: query.k]
        query = dataclasses.replace(query, warnings=(*query.warnings, POPULAR))
        items = self.model.decode(best_K, self.data.count_I[best_K])
        return recommended(query, items).model_copy(update={"source": "popularity"})


class ScoreService(Service[ScoreRequest, ScoreResponse]):
    """Answers requests with a ranking run."""

    request_type = ScoreRequest

    def __init__(self, model: ScoringModel, data: RunData | None, users: CachedUsers):
        super().__init__(model.vocabulary.catalog, data)
        self.model: ScoringModel = model
        self.users: CachedUsers = users
        rank, mixture = model.config.rank, model.config.model.channels.values()
        filters = [channel.signal for channel in mixture if channel.signal]
        columns = signals.needs((*rank.signals, *rank.features))
        self.reads = self.expects = list(dict.fromkeys([*columns, *filters]))
        self.features = signals.needs(rank.features)

    def prepare(self, request: ScoreRequest) -> Query:
        known_C, warnings = known_ids(self.catalog, request.candidates, "candidates")
        feature_CF, more = self._features(request.features, len(known_C))
        user, ignored = self.events(request)
        kept_C = known_C > 0
        query = self.model.query(
            *user, candidates=known_C[kept_C], feature_CF=feature_CF[kept_C], now=request.now
        )
        empty = [] if query.num_events else [EMPTY]
        return dataclasses.replace(
            query,
            raw_ids=request.candidates,
            known_C=known_C,
            warnings=(*ignored, *warnings, *more, *empty),
        )

    def answer(self, queries: Sequence[Query]) -> list[ScoreResponse]:
        """One device call for new histories and one for all candidates."""
        some = [query for query in queries if query.known_C.any()]
        scores = iter(self.model.score(self.users.of(some), some) if some else [])
        nothing = np.zeros((0, len(self.model.kinds)))
        return [
            self.scored(query, next(scores) if query.known_C.any() else nothing)
            for query in queries
        ]

    def warm_up(self) -> int:
        return self.users.warm_up()

    def check_health(self) -> None:
        self.model.check_health()

    def scored(self, query: Query, score_CK: Float[np.ndarray, "C K"]) -> ScoreResponse:
        """A response from the scores of the candidates that the catalogue has."""
        known_C, titles, tasks = query.known_C, self.catalog.titles, list(self.model.kinds)
        raw_ids = self.catalog.decode(known_C[known_C > 0]).tolist()
        found = iter(zip(raw_ids, score_CK.tolist(), strict=True))
        candidates = []
        for given, dense in zip(query.raw_ids, known_C.tolist(), strict=True):
            item, values = next(found) if dense else (given, None)
            candidates.append(
                ScoredItem.model_construct(
                    item=item,
                    title=titles[dense] if dense and titles is not None else None,
                    scores=None if values is None else dict(zip(tasks, values, strict=True)),
                )
            )
        return ScoreResponse.model_construct(
            candidates=candidates, events=query.num_events, warnings=list(query.warnings)
        )

    def _features(
        self, given: Mapping[str, Sequence[float]], count: int
    ) -> tuple[Int[np.ndarray, "C F"], list[str]]:
        """Codes of the candidates' features, and what of them was ignored or missing."""
        read, warnings = self.model.config.rank.features, []
        code_CF = self.model.vocabulary.features_of(given, count)
        for name, code_C in zip(read, code_CF.T, strict=True):
            if signals.needs((name,))[0] in given and (unknown := int((code_C == 0).sum())):
                warnings.append(
                    f"features: {unknown} of {count} values of {name!r} are not in the data and "
                    "were ignored"
                )
        if unread := sorted(set(given) - set(self.features)):
            warnings.append(f"features {_shown(unread)} are not read by this run and were ignored")
        return code_CF, [*warnings, *_missing("features", self.features, given)]


def recommended(query: Query, items: Sequence[Recommendation]) -> Response:
    """A response from what the model ranked."""
    return Response(items=list(items), source="model", warnings=list(query.warnings))


def known_ids(
    catalog: Catalog, raw_ids: Sequence[int | str], field: str
) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """Dense ids, 0 for those that the catalogue lacks, and a warning that counts these. Raises
    ValueError for ids of another kind."""
    dense = catalog.find(list(raw_ids))
    unknown = [raw for raw, found in zip(raw_ids, dense, strict=True) if not found]
    if not unknown:
        return dense, []
    return dense, [
        f"{field}: {len(unknown)} of {len(raw_ids)} items are not in the catalogue and were "
        f"ignored: {_shown(unknown)}{', ...' if len(unknown) > 5 else ''}"
    ]


def _shown(names: Sequence[int | str]) -> str:
    return ", ".join(repr(name)[:40] for name in names[:5])


def _missing(
    field: str, read: Iterable[str], given: Mapping[str, Sequence[float] | str]
) -> list[str]:
    """A warning of what a run reads and was not given."""
    names = ", ".join(repr(name) for name in read if name not in given)
    warning = f"{field}: this run reads {names}, which was not given and counts as unknown"
    return [warning] if names else []


def open_service(
    workdir: str, raw_dir: str | None = None, options: ServingOptions | None = None
) -> RecommendService | ScoreService:
    """The service of a run, or of the file that `experiments.export` wrote of a ranking run.

    Args:
      raw_dir: where the raw data is now, if not where the run found it.

    Raises:
      ValueError: no run, one that cannot be served, or options of the other kind.
    """
    options = options or ServingOptions()
    options.check(workdir)
    if not is_ranking(workdir):
        model = RecommendationModel(
            workdir,
            tables=options.tables,
            max_users=options.max_users,
            candidates=options.candidates,
        )
        blocked, warnings = known_ids(model.catalog, options.block, "--block")
        for warning in warnings:
            log.warning(warning)
        if blocked.any():
            model.block(blocked[blocked > 0])
        service = RecommendService(
            model, RunData(workdir, raw_dir), cache_bytes=options.cache_bytes
        )
        service.unknown_blocked = int((blocked == 0).sum())
        return service
    data = None if Path(workdir).is_file() else RunData(workdir, raw_dir)
    ranker, config, vocabulary, tasks = export.load(workdir) if data is None else load_ranker(data)
    scoring = ScoringModel(
        ranker,
        config,
        vocabulary,
        tasks,
        # Users are kept in host memory alone where the device has none for them.
        kind=options.kind if options.device_bytes else options.host_kind or options.kind,
        max_users=options.max_users,
        host_table=options.host_table,
        drop_blocks=options.drop_blocks,
    )
    users = CachedUsers(
        scoring,
        host_bytes=options.cache_bytes,
        host_kind=options.host_kind,
        device_bytes=options.device_bytes,
    )
    return ScoreService(scoring, data, users)
