"""HTTP in front of a service, on Ray Serve, which brings the server, replicas, batching, health checks and metrics.

A retrieval run and a ranking run differ in one method, their endpoint.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve import metrics

from ultra_hstu.serving import schema
from ultra_hstu.serving.capacity import MAX_USERS
from ultra_hstu.serving.schema import Answer, Problem, Request
from ultra_hstu.serving.score_schema import ScoreAnswer, ScoreRequest
from ultra_hstu.serving.service import Prepared
from ultra_hstu.serving.services import open_service

QUEUED = 256  # requests that wait in a replica; more are refused with 503
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "the body cannot be read"},
    413: {
        "description": f"the body has more than {schema.MAX_BODY_BYTES} bytes",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    },
    422: {
        "model": Problem,
        "description": "the request does not fit the schema, or cannot be answered",
    },
    503: {
        "description": f"more than {QUEUED} requests are waiting",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    },
}


def _application(path: str, description: str) -> FastAPI:
    """An application that tells what is wrong with a request, and where requests go."""
    app = FastAPI(title="ultra_hstu", description=description, max_body_size=schema.MAX_BODY_BYTES)

    @app.exception_handler(RequestValidationError)
    async def _refused(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own answer echoes the input, which may hold what JSON cannot: NaN, lone surrogates.
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


class _Replica:
    """The service of a run on its device, and the users that it has encoded."""

    name: str  # in metrics

    def __init__(self, workdir: str, *, wait_ms: float, **options: Any):
        self.service = open_service(workdir, **options)
        # One thread for all calls: with several, each has a heap of its own, and the memory of users who were dropped stays with the one that made it.
        self._thread = ThreadPoolExecutor(1)
        self.service.warm_up()
        self._answers.set_max_batch_size(self.service.model.max_users)  # type: ignore[attr-defined]
        self._answers.set_batch_wait_timeout_s(wait_ms / 1000)  # type: ignore[attr-defined]
        self._hits = metrics.Gauge(
            f"{self.name}_cache_hits", "users who were held, since the start"
        )
        self._misses = metrics.Gauge(
            f"{self.name}_cache_misses", "users who had to be encoded, since the start"
        )
        self._bytes = metrics.Gauge(f"{self.name}_cache_bytes", "memory of the cached users")

    async def _answer(self, request: Any) -> Any:
        try:
            prepared = self.service.prepare(request)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        return await self._answers(prepared)

    @serve.batch(max_batch_size=MAX_USERS)
    async def _answers(self, prepared: list[Prepared]) -> list[Any]:
        answers = await self._on_device(self.service.answer, prepared)
        self._hits.set(self.service.users.hits)
        self._misses.set(self.service.users.misses)
        self._bytes.set(self.service.users.bytes)
        return answers

    async def check_health(self) -> None:
        """Ray Serve asks every few seconds, and replaces a replica whose device does not answer."""
        await self._on_device(self.service.pulse)

    async def _on_device(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)


# No line a request in the log: metrics count them.
_OPTIONS: dict[str, Any] = dict(
    max_ongoing_requests=4 * MAX_USERS,
    max_queued_requests=QUEUED,
    logging_config={"enable_access_log": False},
)


@serve.deployment(**_OPTIONS)
@serve.ingress(recommendations)
class Recommender(_Replica):
    """A replica of a retrieval run."""

    name = "recommend"

    @recommendations.post(RECOMMEND, responses=PROBLEMS)
    async def recommend(self, request: Request) -> Answer:
        """The best items that the user has not seen, or the most popular ones where the history is empty."""
        return await self._answer(request)


@serve.deployment(**_OPTIONS)
@serve.ingress(scores)
class Scorer(_Replica):
    """A replica of a ranking run."""

    name = "score"

    @scores.post(SCORE, responses=PROBLEMS)
    async def score(self, request: ScoreRequest) -> ScoreAnswer:
        """What the user will do with each candidate: its scores for every task, in the order of the candidates."""
        return await self._answer(request)
