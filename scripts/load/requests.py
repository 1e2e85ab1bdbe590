"""Requests to a deployment of a retrieval run, good and bad, and what their answers must be."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.record import Json
from ultra_hstu.data.catalog import first
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.serving.schema import MAX_BODY_BYTES, MAX_EVENTS, MAX_K, Request, Response
from ultra_hstu.serving.service import RecommendService, Service, recommended

SCORE_ERROR = 1e-5  # rounding: which histories share a device call differs
JSON = "application/json"
RECOMMEND = "/recommend"
EXAMPLE = {"user": 42, "k": 3}


@dataclasses.dataclass(frozen=True)
class Sent:
    """A request, and what becomes of it."""

    body: bytes
    expected: Any = None  # of a good request; None: any, or a bad request
    good: bool = True
    kind: str = JSON
    path: str = RECOMMEND
    method: str = "POST"
    rounding: float = SCORE_ERROR  # by how much a score may differ from the expected one


def stretches(
    interactions: Interactions, count: int, events: int, seed: int
) -> list[tuple[int, slice]]:
    """(user's number, events) of random stretches of so many events of users who have them."""
    rng = np.random.default_rng(seed)
    long = np.flatnonzero(interactions.lengths >= events)
    if not len(long):
        raise ValueError(
            f"no user has {events} events: the longest history has {interactions.lengths.max()}"
        )
    found = []
    for user in rng.choice(long, count):
        later = int(rng.integers(interactions.lengths[user] - events + 1))
        start = int(interactions.offsets[user]) + later
        found.append((int(user), slice(start, start + events)))
    return found


def histories(interactions: Interactions, count: int, events: int, seed: int) -> list[Json]:
    """The histories of `stretches`."""
    found = []
    for _, span in stretches(interactions, count, events, seed):
        request = {"history": interactions.catalog.decode(interactions.items[span]).tolist()}
        if interactions.timestamps is not None:
            request["times"] = interactions.timestamps[span].tolist()
        found.append(request)
    return found


def raw_ids(interactions: Interactions) -> tuple[list[int | str], int | str]:
    """(ids of all items, an id that no item has), as the publisher writes them."""
    ids = interactions.catalog.raw_ids[1:]
    return ids.tolist(), int(ids.max()) + 1 if ids.dtype.kind == "i" else "absent"


def timed(interactions: Interactions, count: int, events: int, seed: int) -> list[Sent]:
    """Good requests that are all alike: a history of so many events, top 10."""
    return [
        Sent(json.dumps(request).encode())
        for request in histories(interactions, count, events, seed)
    ]


def checked(service: RecommendService, count: int, events: int, seed: int) -> list[Sent]:
    """Good requests of every kind, with their answers by the model in this process."""
    interactions = service.data.interactions
    rng = np.random.default_rng(seed)
    known, absent = raw_ids(interactions)
    requests: list[Json] = []
    for whole in histories(interactions, count, events, seed):
        length = int(rng.integers(1, events + 1))
        cut = {name: values[:length] for name, values in whole.items()}
        user = first(interactions.users[rng.integers(interactions.num_users) :])
        kinds = [
            whole,
            cut | {"k": int(rng.integers(1, 50))},
            {"user": user},
            {"user": user, "block": rng.choice(known, 20).tolist(), "k": 20},
            {"history": []},
            {"history": [*whole["history"][:length], absent]},
        ]
        requests.append(kinds[rng.choice(len(kinds), p=[0.4, 0.25, 0.15, 0.1, 0.05, 0.05])])
    # More items than the request wants: two whose scores differ by rounding may change places at
    # the end, too.
    wide = [request | {"k": request.get("k", 10) + 5} for request in requests]
    return [
        Sent(json.dumps(request).encode(), answer)
        for request, answer in zip(requests, answers(service, wide), strict=True)
    ]


def answers(service: Service, requests: Sequence[Json]) -> list[Any]:
    """Answers of the model in this process."""
    prepared = [
        service.prepare(service.request_type.model_validate_json(json.dumps(request)))
        for request in requests
    ]
    size = service.model.max_users
    batches = [prepared[first : first + size] for first in range(0, len(prepared), size)]
    return [answer for batch in batches for answer in service.answer(batch)]


def right(sent: Sent, body: bytes) -> bool:
    """Whether an answer is the expected one, places of equal scores aside."""
    if sent.expected is None:
        return True
    got, k = Response.model_validate_json(body), json.loads(sent.body).get("k", 10)
    scores = {item.item: item.score for item in sent.expected.items}
    same = (got.source, got.warnings, len(got.items)) == (
        sent.expected.source,
        sent.expected.warnings,
        min(k, len(sent.expected.items)),
    )
    return same and all(
        abs(item.score - wanted.score) <= sent.rounding
        and abs(scores.get(item.item, np.inf) - wanted.score) <= sent.rounding
        for item, wanted in zip(got.items, sent.expected.items, strict=False)
    )


# Bodies that must be refused.
_WRONG = (
    r"""
{}
[]
null
not json
{"history": [NaN]}
{"history": [1], "times": [Infinity]}
{"history": [1.5]}
{"history": "1"}
{"history": [1], "k": 0}
{"history": [1], "k": "10"}
{"history": [1], "k": true}
{"history": [1], "user": 1}
{"history": [1], "colour": "red"}
{"history": [1, 2], "times": [1]}
{"history": [1, 2], "times": [2, 1]}
{"history": [1, 2], "times": [0, 9007199254740992]}
{"user": 987654321}
{"user": null}
{"user": {"$gt": 0}}
{"history": [[1]]}
{"history": [99999999999999999999999]}
{"user": "\ud800"}
{"\ud800": 1}
{"history": [1], "actions": {"rating": [1e400]}}
{"history": [1], "block": 5}
{"history": [1]
{"history": [1], "times": [1], "now": 0}
""".strip().splitlines()
    + [
        f'{{"history": [1], "k": {MAX_K + 1}}}',
        "[" * 5000,
        '{"history": ' + "[" * 5000,
        json.dumps({"history": [1] * (MAX_EVENTS + 1)}),
        json.dumps({"history": [1], "block": [1] * (MAX_EVENTS + 1)}),
    ]
)


def bad(count: int, seed: int, wrong: Sequence[str] = _WRONG, path: str = RECOMMEND) -> list[Sent]:
    """Requests that must be refused: each is answered with 4xx."""
    rng = np.random.default_rng(seed)
    bad = functools.partial(Sent, good=False, path=path)
    made = [bad(body.encode()) for body in wrong]
    made += [bad(b" " * (MAX_BODY_BYTES + 1)), bad(b'{"history": [1]}', kind="text/plain")]
    made += [bad(b"", path="/nowhere"), bad(b"", method="GET"), bad(b"")]
    noise = [bad(rng.bytes(int(rng.integers(1, 400)))) for _ in range(count // 4)]
    return [*noise, *(made[i] for i in rng.integers(len(made), size=count - len(noise)))]


def steps(service: RecommendService) -> dict[str, Callable[[Any], Any]]:
    """The parts of a call, from bodies to answers."""
    return {
        "read": lambda bodies: [Request.model_validate(json.loads(body)) for body in bodies],
        "prepare": lambda read: [service.prepare(request) for request in read],
        "encode": lambda queries: (queries, service.model.encode(queries)),
        "best": lambda both: (both[0], service.model.best(both[1], both[0])),
        "write": lambda both: [
            recommended(query, items).model_dump_json() for query, items in zip(*both, strict=True)
        ],
    }
