"""HTTP in front of a `Service`, on Ray Serve, which brings the server, replicas, batching, health checks and metrics.

A scoring endpoint for ranking runs is one more method with `@app.post` here, over a service of its own.
"""

import asyncio
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve import metrics

from ultra_hstu.serving import schema
from ultra_hstu.serving.retrieval import MAX_USERS, RecommendationModel
from ultra_hstu.serving.schema import Answer, Problem, Request
from ultra_hstu.serving.service import Prepared, RunData, Service

QUEUED = 256  # requests that wait in a replica; more are refused with 503
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "the body cannot be read"},
    413: {
        "description": f"the body has more than {schema.MAX_BODY_BYTES} bytes",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    },
    422: {"model": Problem, "description": "the request does not fit the schema, or cannot be answered"},
    503: {"description": f"more than {QUEUED} requests are waiting", "content": {"text/plain": {"schema": {"type": "string"}}}},
}

app = FastAPI(title="ultra_hstu", description="Recommendations of a trained run.", max_body_size=schema.MAX_BODY_BYTES)


@app.exception_handler(RequestValidationError)
async def _refused(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
    # FastAPI's own answer echoes the input, which may hold what JSON cannot: NaN, lone surrogates.
    return JSONResponse({"detail": schema.problem(error.errors())}, 422)


# No line a request in the log: metrics count them.
@serve.deployment(max_ongoing_requests=4 * MAX_USERS, max_queued_requests=QUEUED, logging_config={"enable_access_log": False})
@serve.ingress(app)
class Recommender:
    """One replica: a model on its device, and the users that it has encoded."""

    def __init__(self, workdir: str, *, raw_dir: str | None, tables: str, cache_bytes: int, block: list[int | str], wait_ms: float):
        model = RecommendationModel(workdir, tables=tables)
        blocked = model.catalog.find(block)  # lists outlive items: unknown ids have nothing to block
        if blocked.any():
            model.block(blocked[blocked > 0])
        self.service = Service(model, RunData(workdir, raw_dir), cache_bytes=cache_bytes)
        self.service.warm_up()
        self._pulse = model.query([1])
        self._answers.set_batch_wait_timeout_s(wait_ms / 1000)  # type: ignore[attr-defined]
        self._hits = metrics.Gauge("recommend_cache_hits", "users whose vector was held, since the start")
        self._misses = metrics.Gauge("recommend_cache_misses", "users who had to be encoded, since the start")
        self._bytes = metrics.Gauge("recommend_cache_bytes", "memory of the cached users")

    @app.post("/recommend", responses=PROBLEMS)
    async def recommend(self, request: Request) -> Answer:
        """The best items that the user has not seen, or the most popular ones where the history is empty."""
        try:
            prepared = self.service.prepare(request)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        return await self._answers(prepared)

    @serve.batch(max_batch_size=MAX_USERS)
    async def _answers(self, prepared: list[Prepared]) -> list[Answer]:
        answers = await asyncio.to_thread(self.service.answer, prepared)
        self._hits.set(self.service.hits)
        self._misses.set(self.service.misses)
        self._bytes.set(self.service.users.bytes)
        return answers

    async def check_health(self) -> None:
        """Ray Serve asks every few seconds, and replaces a replica whose device does not answer."""
        await asyncio.to_thread(self.service.model.encode, [self._pulse])
