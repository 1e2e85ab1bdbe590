"""HTTP in front of a service, on Ray Serve, which brings the server, replicas, batching, health
checks and metrics.

A retrieval run and a ranking run differ in one method, their endpoint.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import JsonValue
from ray import serve
from ray.serve import metrics

from ultra_hstu import compilation_cache
from ultra_hstu.serving import schema
from ultra_hstu.serving.inputs import MAX_USERS, Query
from ultra_hstu.serving.schema import (
    AboutUser,
    Problem,
    Request,
    Response,
    ScoreRequest,
    ScoreResponse,
)
from ultra_hstu.serving.service import Service, ServingOptions, open_service

QUEUED = 256  # requests that wait in a replica; more are refused with 503
_TEXT: JsonValue = {"text/plain": {"schema": {"type": "string"}}}
PROBLEMS: dict[int | str, dict[str, JsonValue | type[Problem]]] = {
    400: {"model": Problem, "description": "the body cannot be read"},
    413: {
        "description": f"the body has more than {schema.MAX_BODY_BYTES} bytes",
        "content": _TEXT,
    },
    422: {
        "model": Problem,
        "description": "the request does not fit the schema, or cannot be answered",
    },
    503: {"description": f"more than {QUEUED} requests are waiting", "content": _TEXT},
}


def _application(path: str, description: str) -> FastAPI:
    """An application that says what is wrong with a request, and where requests go."""
    app = FastAPI(title="ultra_hstu", description=description, max_body_size=schema.MAX_BODY_BYTES)

    @app.exception_handler(RequestValidationError)
    async def _refused(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own response echoes the input, which may hold what JSON cannot: NaN, lone
        # surrogates.
        return JSONResponse({"detail": schema.problem(error.errors())}, 422)

    @app.exception_handler(404)
    async def _not_here(_: HttpRequest, __: Exception) -> JSONResponse:
        return JSONResponse(
            {"detail": f"this run answers POST {path} and nothing else; /docs describes it"}, 404
        )

    return app


RECOMMEND, SCORE = "/recommend", "/score"
recommendations = _application(RECOMMEND, "Recommendations of a retrieval run.")
scores = _application(SCORE, "Scores of a ranking run for given candidates.")


class _Replica[R: AboutUser, A: Response | ScoreResponse]:
    """The service of a run on its device, and the users that it has encoded."""

    name: str  # in metrics

    def __init__(
        self, workdir: str, raw_dir: str | None, options: ServingOptions, *, wait_ms: float
    ):
        """
        Args:
          wait_ms: how long a batch waits for more requests than are there.
        """
        compilation_cache.use()
        self.service = cast(Service[R, A], open_service(workdir, raw_dir, options))
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

    @serve.batch(max_batch_size=MAX_USERS)
    async def _answers(self, queries: list[Query]) -> list[A]:
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
    max_ongoing_requests=4 * MAX_USERS,
    max_queued_requests=QUEUED,
    logging_config={"enable_access_log": False},
)


@_deployment
@serve.ingress(recommendations)
class RecommendReplica(_Replica[Request, Response]):
    """A replica of a retrieval run."""

    name = "recommend"

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
