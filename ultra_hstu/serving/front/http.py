"""HTTP in front of a service, on Ray Serve, which brings the server, replicas, batching, health
checks and metrics.

A retrieval run and a ranking run differ in one method, their endpoint. Both have a page to try them
with, static/page.html, and the routes that it reads.
"""

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, cast

from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi import Request as HttpRequest
from fastapi import Response as HttpResponse
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import JsonValue
from ray import serve
from ray.serve import metrics
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultra_hstu import compilation_cache
from ultra_hstu.serving import inputs, schema
from ultra_hstu.serving.front.live import Asked, Live
from ultra_hstu.serving.front.page import RECOMMEND, SCORE, Page
from ultra_hstu.serving.options import ServingOptions
from ultra_hstu.serving.schema import (
    AboutUser,
    FoundItems,
    Health,
    ItemSearch,
    KnownUser,
    Problem,
    Request,
    Response,
    ScoreRequest,
    ScoreResponse,
    UserSearch,
)
from ultra_hstu.serving.service import RecommendService

VERSION = "x-model-version"  # a header of answers
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


def _live() -> Live:
    return cast(_Replica, serve.get_replica_context().servable_object).live


def _page() -> Page:
    if (page := _live().model.page) is None:
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

    @app.get("/health")
    def _health() -> Health:
        """Which model answers, and why a newer one does not, if that is so."""
        return Health(version=_live().version, problem=_live().problem)

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
        follow_s: float | None = None,
    ):
        """
        Args:
          wait_ms: how long a batch waits for more requests than are there.
          page: whether there is a page to try the run with, which shows users' histories.
          follow_s: how often to look for a newer model; None: never.
        """
        compilation_cache.use()
        self.live: Live[R, A] = Live(workdir, raw_dir, options, page=page)
        # One thread for all calls: with several, each has a heap of its own, and the memory of
        # users who were dropped stays with the one that made it.
        self._thread = ThreadPoolExecutor(1)
        self._answers.set_max_batch_size(options.max_users)  # type: ignore[attr-defined]
        self._answers.set_batch_wait_timeout_s(wait_ms / 1000)  # type: ignore[attr-defined]
        self._gauges = {
            name: metrics.Gauge(f"{self.name}_cache_{name}", description)
            for name, description in self.live.model.service.users.METRICS.items()
        }
        if follow_s is not None:
            self.live.follow(follow_s)

    async def _answer(self, request: R, response: HttpResponse) -> A:
        try:
            asked = self.live.prepare(request)
        except ValueError as error:
            named = {VERSION: self.live.version}
            raise HTTPException(422, str(error), headers=named) from None
        response.headers[VERSION] = asked.model.version
        return await self._answers(asked)

    @serve.batch(max_batch_size=inputs.MAX_USERS)
    async def _answers(self, asked: list[Asked[R, A]]) -> list[A]:
        live = self.live
        # Both in the thread that changes what is counted.
        responses, values = await self._on_device(
            lambda: (live.answer(asked), live.model.service.users.metrics())
        )
        for name, value in values.items():
            self._gauges[name].set(value)
        return responses

    async def check_health(self) -> None:
        """Ray Serve asks every few seconds, and replaces a replica whose device does not answer."""
        await self._on_device(self.live.model.service.check_health)

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
        follow_s: float | None = None,
    ):
        super().__init__(workdir, raw_dir, options, wait_ms=wait_ms, page=page, follow_s=follow_s)
        unknown = metrics.Gauge(
            "recommend_block_unknown", "ids of the block list that the catalogue lacks"
        )
        unknown.set(cast(RecommendService, self.live.model.service).unknown_blocked)

    @recommendations.post(RECOMMEND, responses=PROBLEMS)
    async def recommend(self, request: Request, response: HttpResponse) -> Response:
        """The best items that the user has not seen, or the most popular ones where the history is
        empty."""
        return await self._answer(request, response)


@_deployment
@serve.ingress(scores)
class ScoreReplica(_Replica[ScoreRequest, ScoreResponse]):
    """A replica of a ranking run."""

    name = "score"

    @scores.post(SCORE, responses=PROBLEMS)
    async def score(self, request: ScoreRequest, response: HttpResponse) -> ScoreResponse:
        """What the user will do with each candidate: its scores for every task, in the order of the
        candidates."""
        return await self._answer(request, response)
