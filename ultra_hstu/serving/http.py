"""HTTP in front of a service, on Ray Serve, which brings the server, replicas, batching, health
checks and metrics.

A retrieval run and a ranking run differ in one method, their endpoint. Both have a page to try them
with, static/page.html, and the routes that it reads.
"""

import asyncio
import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, cast

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from jaxtyping import Int, Shaped
from pydantic import JsonValue
from ray import serve
from ray.serve import metrics
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultra_hstu import compilation_cache
from ultra_hstu.data.catalog import first
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.titles import TitleSearch
from ultra_hstu.serving import inputs, schema
from ultra_hstu.serving.schema import (
    AboutUser,
    FoundItem,
    FoundItems,
    ItemSearch,
    KnownUser,
    Problem,
    Request,
    Response,
    ScoreRequest,
    ScoreResponse,
    UserSearch,
)
from ultra_hstu.serving.service import (
    RecommendService,
    ScoreService,
    Service,
    ServingOptions,
    open_service,
)

WAITING = 320  # requests in a replica, answered or waiting; more are refused with 503
BODY_S = 10  # in which the whole body of a request must be there
BODIES_BYTES = 2**28  # of all requests in a replica
CONNECTIONS = 100_000  # more than the proxy has: the limits above count, not Ray's
PROBLEMS: dict[int | str, dict[str, JsonValue | type[Problem]]] = {
    400: {"model": Problem, "description": "the body cannot be read"},
    408: {"model": Problem, "description": f"the body was not there after {BODY_S} s"},
    413: {
        "model": Problem,
        "description": f"the body has more than {schema.MAX_BODY_BYTES} bytes",
    },
    415: {"model": Problem, "description": "the content-type is not application/json"},
    422: {
        "model": Problem,
        "description": "the request does not fit the schema, or cannot be answered",
    },
    503: {
        "model": Problem,
        "description": f"{WAITING} requests are in the replica, or the service is starting",
    },
}
RECOMMEND, SCORE = "/recommend", "/score"
READ_PROBLEMS: dict[int | str, dict[str, JsonValue | type[Problem]]] = {
    404: {"model": Problem, "description": "the server was started with --nopage"},
    422: PROBLEMS[422],
    503: PROBLEMS[503],
}
# Nothing on the page comes from elsewhere, or goes there.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Admission:
    """ASGI middleware: a request is let in, and counted, when its whole body is there.

    So a slow client holds a connection, and nothing that others wait for.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self.waiting = 0  # requests that were let in
        self.held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        try:
            refused = await self._read(body, receive)
            if refused is not None:
                await refused(scope, receive, send)
                return
            messages: list[Message] = [{"type": "http.request", "body": bytes(body)}]

            async def received() -> Message:
                return messages.pop() if messages else await receive()

            self.waiting += 1
            try:
                await self.app(scope, received, send)
            finally:
                self.waiting -= 1
        finally:
            self.held -= len(body)

    async def _read(self, body: bytearray, receive: Receive) -> JSONResponse | None:
        """Reads the body. Returns the answer to a request that is not let in."""
        try:
            async with asyncio.timeout(BODY_S):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return _refusal(400, "the client left before its body was there")
                    part = message.get("body", b"")
                    body += part
                    self.held += len(part)
                    if len(body) > schema.MAX_BODY_BYTES:
                        most = f"a body has at most {schema.MAX_BODY_BYTES} bytes"
                        return _refusal(413, f"Content Too Large: {most}")
                    if self.held > BODIES_BYTES:
                        return _refusal(503, "too many large bodies at once: try again later")
                    more = message.get("more_body", False)
        except TimeoutError:
            return _refusal(408, f"the body was not there after {BODY_S} s: send it faster")
        if self.waiting >= WAITING:
            return _refusal(503, f"{WAITING} requests are waiting: try again later")
        return None


def _refusal(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)


class Page:
    """What the page shows of a service: its items by title, and its users' histories."""

    def __init__(self, service: Service):
        self._service = service
        self._data = None if service.data is None else service.data.interactions
        slots = service.catalog.num_items + 1
        self._count_I = (
            None if self._data is None else np.bincount(self._data.items, minlength=slots)
        )
        self._titles = TitleSearch(service.catalog, self._count_I)
        html = Path(__file__).with_name("static").joinpath("page.html").read_text("utf-8")
        self.html = html.replace("{{run}}", json.dumps(self._run()).replace("<", "\\u003c"))

    def _run(self) -> dict[str, JsonValue]:
        """What the page says of the run."""
        service, data, config = self._service, self._data, self._service.model.config
        run: dict[str, JsonValue] = {
            "path": RECOMMEND,
            "name": config.name,
            "source": config.data.source,
            "items": service.catalog.num_items,
            "users": None if data is None else data.num_users,
            "events": None if data is None else data.num_events,
            "examples": [] if data is None else data.users[:: -(-data.num_users // 3)].tolist(),
            "actions": {
                name: None if data is None else _span(data.actions[name]) for name in service.reads
            },
            "max_history": config.data.max_history,
            "max_k": min(schema.MAX_K, service.catalog.num_items),
            "max_found": schema.MAX_FOUND,
        }
        if isinstance(service, ScoreService):
            words = service.model.vocabulary.contexts
            run |= {"path": SCORE, "tasks": dict(service.model.kinds)}
            run |= {"features": list(service.features)}
            run |= {"context": {name: list(texts[1:]) for name, texts in words.items()}}
        return run

    def items(self, search: ItemSearch) -> FoundItems:
        """The items of a search."""
        found = self._titles.find(search.search, search.limit)
        count_I = self._count_I
        items = [
            FoundItem(item=raw, title=title, events=None if count_I is None else int(count_I[item]))
            for item, raw, title in zip(found.items, *self._named(found.items), strict=True)
        ]
        return FoundItems(items=items, found=found.count, complete=found.complete)

    def user(self, search: UserSearch) -> KnownUser:
        """A user of the data. Raises ValueError for an unknown one."""
        items, times, actions, codes = self._service.user(search.user)
        data = cast(Interactions, self._data)
        newest = slice(max(0, len(items) - schema.MAX_EVENTS), None)
        raw_ids, titles = self._named(items[newest])
        return KnownUser(
            user=first(data.users[data.row(search.user) :]),
            events=len(items),
            history=raw_ids,
            titles=titles,
            times=None if times is None else times[newest].tolist(),
            actions={
                name: [value if math.isfinite(value) else None for value in values[newest].tolist()]
                for name, values in actions.items()
            },
            context={name: data.context_values[name][code] for name, code in codes.items() if code},
        )

    def _named(self, items: Int[np.ndarray, " n"]) -> tuple[list[int | str], list[str | None]]:
        """Raw ids and titles of dense ids."""
        raw_ids, titles = self._service.catalog.decode(items), self._service.catalog.titles
        return raw_ids.tolist(), [None if titles is None else titles[item] for item in items]


def _span(values: Shaped[np.ndarray, " n"]) -> list[JsonValue] | None:
    """The least and the largest of the values, if there are any."""
    finite = values[np.isfinite(values)]
    return [finite.min().item(), finite.max().item()] if finite.size else None


def _page() -> Page:
    page = cast(_Replica, serve.get_replica_context().servable_object).page
    if page is None:
        raise HTTPException(404)
    return page


OfReplica = Annotated[Page, Depends(_page)]


def _application(path: str, description: str) -> FastAPI:
    """An application that says what is wrong with a request, and where requests go."""
    # FastAPI's own pages load their scripts from elsewhere.
    app = FastAPI(title="ultra_hstu", description=description, docs_url=None, redoc_url=None)
    app.add_middleware(Admission)

    @app.exception_handler(RequestValidationError)
    async def _refused(request: HttpRequest, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type")
        if request.method == "POST" and not re.match(
            r"application/(\S+\+)?json *(;|$)", kind or "", re.I
        ):
            given = "no content-type" if kind is None else f"the content-type {kind!r:.80}"
            return _refusal(
                415, f"the request has {given}: send JSON, with 'content-type: application/json'"
            )
        # FastAPI's own response echoes the input, which may hold what JSON cannot: NaN, lone
        # surrogates.
        return _refusal(422, schema.problem(error.errors()))

    @app.exception_handler(404)
    async def _not_here(_: HttpRequest, __: Exception) -> JSONResponse:
        return _refusal(404, f"this run answers POST {path}; /docs describes it, and what else")

    @app.get("/docs", include_in_schema=False)
    async def _docs(request: HttpRequest) -> HTMLResponse:
        return HTMLResponse(schema.page(request.app.openapi()))

    @app.get("/", include_in_schema=False)
    def _root(page: OfReplica) -> HTMLResponse:
        return HTMLResponse(page.html, headers={"content-security-policy": POLICY})

    @app.get("/items", responses=READ_PROBLEMS)
    def _items(search: Annotated[ItemSearch, Query()], page: OfReplica) -> FoundItems:
        """Items by words of their titles."""
        return page.items(search)

    @app.get("/user", responses=READ_PROBLEMS)
    def _user(search: Annotated[UserSearch, Query()], page: OfReplica) -> KnownUser:
        """The history of a user of the data."""
        try:
            return page.user(search)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    return app


recommendations = _application(RECOMMEND, "Recommendations of a retrieval run.")
scores = _application(SCORE, "Scores of a ranking run for given candidates.")


class _Replica[R: AboutUser, A: Response | ScoreResponse]:
    """The service of a run on its device, and the users that it has encoded."""

    name: str  # in metrics

    def __init__(
        self,
        workdir: str,
        raw_dir: str | None,
        options: ServingOptions,
        *,
        wait_ms: float,
        page: bool,
    ):
        """
        Args:
          wait_ms: how long a batch waits for more requests than are there.
          page: whether there is a page to try the run with, which shows users' histories.
        """
        compilation_cache.use()
        self.service = cast(Service[R, A], open_service(workdir, raw_dir, options))
        self.page = Page(self.service) if page else None
        # One thread for all calls: with several, each has a heap of its own, and the memory of
        # users who were dropped stays with the one that made it.
        self._thread = ThreadPoolExecutor(1)
        self.service.warm_up()
        self._answers.set_max_batch_size(options.max_users)  # type: ignore[attr-defined]
        self._answers.set_batch_wait_timeout_s(wait_ms / 1000)  # type: ignore[attr-defined]
        self._gauges = {
            name: metrics.Gauge(f"{self.name}_cache_{name}", description)
            for name, description in self.service.users.METRICS.items()
        }

    async def _answer(self, request: R) -> A:
        try:
            query = self.service.prepare(request)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        return await self._answers(query)

    @serve.batch(max_batch_size=inputs.MAX_USERS)
    async def _answers(self, queries: list[inputs.Query]) -> list[A]:
        service = self.service
        # Both in the thread that changes what is counted.
        responses, values = await self._on_device(
            lambda: (service.answer(queries), service.users.metrics())
        )
        for name, value in values.items():
            self._gauges[name].set(value)
        return responses

    async def check_health(self) -> None:
        """Ray Serve asks every few seconds, and replaces a replica whose device does not answer."""
        await self._on_device(self.service.check_health)

    async def _on_device[T](self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


# No line a request in the log: metrics count them.
_deployment = serve.deployment(
    max_ongoing_requests=CONNECTIONS,
    logging_config={"enable_access_log": False},
)


@_deployment
@serve.ingress(recommendations)
class RecommendReplica(_Replica[Request, Response]):
    """A replica of a retrieval run."""

    name = "recommend"

    def __init__(
        self,
        workdir: str,
        raw_dir: str | None,
        options: ServingOptions,
        *,
        wait_ms: float,
        page: bool,
    ):
        super().__init__(workdir, raw_dir, options, wait_ms=wait_ms, page=page)
        unknown = metrics.Gauge(
            "recommend_block_unknown", "ids of the block list that the catalogue lacks"
        )
        unknown.set(cast(RecommendService, self.service).unknown_blocked)

    @recommendations.post(RECOMMEND, responses=PROBLEMS)
    async def recommend(self, request: Request) -> Response:
        """The best items that the user has not seen, or the most popular ones where the history is
        empty."""
        return await self._answer(request)


@_deployment
@serve.ingress(scores)
class ScoreReplica(_Replica[ScoreRequest, ScoreResponse]):
    """A replica of a ranking run."""

    name = "score"

    @scores.post(SCORE, responses=PROBLEMS)
    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """What the user will do with each candidate: its scores for every task, in the order of the
        candidates."""
        return await self._answer(request)
