"""Requests to a deployment of a ranking run, good and bad, and what their answers must be."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.record import Json
from scripts.load import requests as load_requests
from scripts.load.requests import Sent, histories, stretches
from ultra_hstu.data.catalog import first
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.serving.schema import MAX_CANDIDATES, MAX_EVENTS, ScoreRequest, ScoreResponse
from ultra_hstu.serving.service import ScoreService
from ultra_hstu.serving.users import CachedUsers

CANDIDATES = 100  # of a request
ONE_EVENT = (100, 1024)  # candidates of a request by a known user with one new event
# By how much scores may differ, by the dtype of layers: which users share a device call differs.
ROUNDING = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
SCORE = "/score"
EXAMPLE = {"user": 42, "candidates": [608, 2858, 1193]}


def whole(
    interactions: Interactions, count: int, events: int, seed: int, candidates: int = CANDIDATES
) -> list[Json]:
    """All that the data holds of random stretches of events, and so many random items."""
    rng = np.random.default_rng((seed, 1))
    known = interactions.catalog.raw_ids[1:]
    requests = histories(interactions, count, events, seed)
    spans = stretches(interactions, count, events, seed)
    for request, (user, span) in zip(requests, spans, strict=True):
        words = {
            name: interactions.context_values[name][codes[user]]
            for name, codes in interactions.contexts.items()
        }
        actions = interactions.actions.items()
        request["actions"] = {name: values[span].tolist() for name, values in actions}
        request["context"] = {name: word for name, word in words.items() if word}
        request["candidates"] = rng.choice(known, candidates).tolist()
    return requests


def timed(interactions: Interactions, count: int, events: int, seed: int) -> list[Sent]:
    """Good requests that are all alike: a history of so many events, `CANDIDATES` candidates."""
    return [
        Sent(json.dumps(request).encode(), path=SCORE)
        for request in whole(interactions, count, events, seed)
    ]


def checked(service: ScoreService, count: int, events: int, seed: int) -> list[Sent]:
    """Good requests of every kind, with their answers by the model in this process."""
    data: Any = service.data
    interactions = data.interactions
    rng = np.random.default_rng(seed)
    _, absent = load_requests.raw_ids(interactions)
    requests: list[Json] = []
    for request in whole(interactions, count, events, seed):
        length = int(rng.integers(1, events + 1))
        cut: Json = {
            name: request[name][:length] for name in ("history", "times") if name in request
        }
        cut["actions"] = {name: values[:length] for name, values in request["actions"].items()}
        some = request["candidates"][: int(rng.integers(1, CANDIDATES))]
        user = first(interactions.users[rng.integers(interactions.num_users) :])
        kinds = [
            request,
            request | cut | {"candidates": some},
            {"user": user, "candidates": some},
            {"history": [], "candidates": some},
            {**cut, "candidates": [*some, absent, *some]},
        ]
        requests.append(kinds[rng.choice(len(kinds), p=[0.4, 0.25, 0.2, 0.05, 0.1])])
    expected = load_requests.answers(service, requests)
    rounding = ROUNDING[service.model.config.model.dtype]
    return [
        Sent(json.dumps(request).encode(), answer, path=SCORE, rounding=rounding)
        for request, answer in zip(requests, expected, strict=True)
    ]


def right(sent: Sent, body: bytes) -> bool:
    """Whether an answer is the expected one."""
    if sent.expected is None:
        return True
    got, wanted = ScoreResponse.model_validate_json(body), sent.expected
    if (got.events, got.warnings) != (wanted.events, wanted.warnings):
        return False
    items, scores = ([(one.item, one.scores or {}) for one in x.candidates] for x in (got, wanted))
    return len(items) == len(scores) and all(
        item == other
        and values.keys() == others.keys()
        and all(abs(values[task] - others[task]) <= sent.rounding for task in values)
        for (item, values), (other, others) in zip(items, scores, strict=True)
    )


# Bodies that must be refused.
_WRONG = (
    r"""
{}
[]
null
not json
{"user": 1}
{"candidates": [1]}
{"history": [1], "candidates": []}
{"history": [1], "candidates": [NaN]}
{"history": [1], "candidates": [1.5]}
{"history": [1], "candidates": 1}
{"history": [1], "candidates": [true]}
{"history": [1], "candidates": [[1]]}
{"history": [1], "candidates": [null]}
{"history": [1], "candidates": [1], "k": 3}
{"history": [1], "candidates": [1], "user": 1}
{"user": 987654321, "candidates": [1]}
{"history": [NaN], "candidates": [1]}
{"history": [1, 2], "times": [2, 1], "candidates": [1]}
{"history": [1], "times": [1], "now": 0, "candidates": [1]}
{"history": [1, 2], "times": [0, 9007199254740992], "candidates": [1]}
{"history": [1], "actions": {"x": [1, 2]}, "candidates": [1]}
{"history": [1], "actions": {"x": [1e400]}, "candidates": [1]}
{"history": [1], "candidates": [1], "features": {"x": [1, 2]}}
{"history": [1], "candidates": [1], "features": {"x": ["a"]}}
{"history": [1], "candidates": [1], "context": {"x": 1}}
{"user": 1, "candidates": [1], "context": {}}
{"history": [1], "candidates": [99999999999999999999999]}
{"history": [1], "candidates": ["\ud800"]}
{"history": [1], "candidates": [1]
""".strip().splitlines()
    + [
        "[" * 5000,
        '{"candidates": ' + "[" * 5000,
        json.dumps({"history": [1] * (MAX_EVENTS + 1), "candidates": [1]}),
        json.dumps({"history": [1], "candidates": [1] * (MAX_CANDIDATES + 1)}),
    ]
)


def bad(count: int, seed: int) -> list[Sent]:
    """Requests that must be refused: each is answered with 4xx."""
    return load_requests.bad(count, seed, _WRONG, SCORE)


def steps(service: ScoreService) -> dict[str, Callable[[Any], Any]]:
    """The parts of a call, from bodies to answers."""
    model = service.model
    return {
        "read": lambda bodies: [ScoreRequest.model_validate(json.loads(body)) for body in bodies],
        "prepare": lambda read: [service.prepare(request) for request in read],
        "encode": lambda queries: (queries, model.encode(queries)),
        "score": lambda both: (both[0], model.score(both[1], both[0])),
        "write": lambda both: [
            service.scored(query, score_CK).model_dump_json()
            for query, score_CK in zip(*both, strict=True)
        ],
    }


def one_event(
    service: ScoreService, count: int, events: int, seed: int, device_bytes: int = 0
) -> list[Json]:
    """Milliseconds of a request by a known user with one new event, beside encoding anew.

    Medians over `count` users, one request at a time, in this process. `history_ms` is the part
    that makes the history's keys and values. Where the model's rows do not stay (`extended_share`
    is 0) both are encoded.
    """
    assert service.data is not None
    model, rows = service.model, []
    anew = ScoreService(model, service.data, CachedUsers(model, host_bytes=0))
    for candidates in ONE_EVENT:
        users = CachedUsers(model, device_bytes=device_bytes)
        remembers = ScoreService(model, service.data, users)
        took: dict[str, list[float]] = {}
        for request in whole(service.data.interactions, count + 1, events, seed, candidates):
            before = request | {
                name: request[name][:-1] for name in ("history", "times") if name in request
            }
            before["actions"] = {name: column[:-1] for name, column in request["actions"].items()}
            remembers.answer([remembers.prepare(ScoreRequest.model_validate(before))])
            for name, served in (("extended", remembers), ("anew", anew)):
                query = served.prepare(ScoreRequest.model_validate(request))
                started = time.perf_counter()
                cache = served.users.of([query])
                jax.block_until_ready(cache.channels)
                middle = time.perf_counter()
                scores = model.score(cache, [query])
                served.scored(query, scores[0])
                ended = time.perf_counter()
                took.setdefault(f"{name}_ms", []).append(1e3 * (ended - started))
                took.setdefault(f"{name}_history_ms", []).append(1e3 * (middle - started))
        medians = {name: statistics.median(values[1:]) for name, values in took.items()}
        # At best .5: each user comes before and after the event.
        share = users.metrics()["extended_share"]
        row = {"history": events, "candidates": candidates, **medians, "extended_share": share}
        rows.append(row)
    return rows
