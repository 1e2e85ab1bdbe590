"""Loads a deployment of `experiments.serve`, checks every answer, and kills a replica.

python -m scripts.load.serve --workdir=runs/ml1m_hstu [--raw_dir=PATH] [--requests=10000]
    [--record=experiments/results/serve_load_cpu.json]
python -m scripts.load.serve --workdir=runs/ml1m_rank_hstu
    [--record=experiments/results/serve_scores_cpu.json]

Closed loop: each connection sends its next request when the last one is answered; the client runs
on the same machine. There are three parts, each with a deployment of its own: requests a second
over connections, with histories that are new and then with the same ones again; good and bad
requests mixed, answers compared with those of the model in this process, memory of the replica
watched; two replicas, of which one is killed.
"""

import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from absl import flags

from experiments import command
from experiments.record import Json, Record
from scripts.load import requests as load_requests
from scripts.load import scores as load_scores
from scripts.load.loop import Seen, Served, closed_loop, deployment, speed
from scripts.load.requests import Sent
from ultra_hstu import report
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.serving.score_service import ScoreService
from ultra_hstu.serving.service import Service
from ultra_hstu.serving.services import open_service

FLAGS = flags.FLAGS

IN_LOOP = 8  # connections of the mixed part and of the kill
CALL = 8  # requests of a device call, where parts are timed
WARM_UP = 0.2  # share of the mixed requests before memory must be flat


class Traffic(Protocol):
    """A module of requests to one kind of run, and what their answers must be."""

    EXAMPLE: Json

    def timed(
        self, interactions: Interactions, count: int, events: int, seed: int
    ) -> list[Sent]: ...

    def bad(self, count: int, seed: int) -> list[Sent]: ...

    def right(self, sent: Sent, body: bytes) -> bool: ...


def main(_: list[str]) -> None:
    service = open_service(FLAGS.workdir, FLAGS.raw_dir)
    if service.data is None:
        raise ValueError(
            f"{FLAGS.workdir} is an exported model: requests are made from the data of a run's "
            "folder"
        )
    interactions = service.data.interactions
    scores = isinstance(service, ScoreService)
    traffic: Traffic = load_scores if scores else load_requests
    record = Record(
        FLAGS.record,
        config=service.model.config.name,
        items=interactions.num_items,
        history=FLAGS.history,
        serve=FLAGS.serve,
        load_average_before=os.getloadavg(),
    )
    record.values |= {"candidates": load_scores.CANDIDATES} if scores else {}
    record.values |= {"note": FLAGS.note} if FLAGS.note else {}
    steps, checked = steps_and_requests(service)
    record.add(stages_ms=stages(steps, traffic.timed(interactions, 400, FLAGS.history, seed=4)))
    arguments = [*([f"--raw_dir={FLAGS.raw_dir}"] if FLAGS.raw_dir else []), *FLAGS.serve.split()]
    with deployment(FLAGS.workdir, *arguments, port=FLAGS.port) as served:
        count = len(FLAGS.connections) * FLAGS.timed
        alike = traffic.timed(interactions, count, FLAGS.history, seed=0)
        record.add(
            seconds_to_start=served.seconds,
            example=asyncio.run(example(served, traffic.EXAMPLE, alike[0].path)),
            rates=asyncio.run(rates(served, alike)),
        )
    with deployment(FLAGS.workdir, *arguments, port=FLAGS.port) as served:
        record.add(mixed=asyncio.run(mixed(served, traffic, checked, FLAGS.requests)))
    with deployment(FLAGS.workdir, "--replicas=2", *arguments, port=FLAGS.port) as served:
        record.add(kill=asyncio.run(kill(served, traffic, checked * 3)))
    record.add(load_average_after=os.getloadavg())
    report.make_console().print(record.values)
    if failed := judge(record.values):
        raise ValueError("; ".join(failed))


Steps = dict[str, Callable[[Any], Any]]


def steps_and_requests(service: Service | ScoreService) -> tuple[Steps, list[Sent]]:
    """(the parts of a call, good requests with their answers by the model in this process)."""
    count = FLAGS.requests // 10
    if isinstance(service, ScoreService):
        checked = load_scores.checked(service, count, FLAGS.history, seed=1)
        return load_scores.steps(service), checked
    checked = load_requests.checked(service, count, FLAGS.history, seed=1)
    return load_requests.steps(service), checked


def judge(result: Json) -> list[str]:
    """What must hold on any machine, however slow."""
    mixed, kill = result["mixed"], result["kill"]
    wrong = {
        "good requests were refused, bad ones taken, or a status was 5xx": mixed["wrong_status"],
        "answers were wrong": mixed["wrong_answers"] + kill["wrong_answers"],
        "requests hung": mixed["hung"] + kill["hung"],
        "a killed replica lost requests that it did not hold": kill["lost_before_or_after"]
        or kill["lost"] > kill["connections"],
        "no replica came back": kill["replicas_at_the_end"] != 2,
    }
    return [name for name, found in wrong.items() if found]


def stages(steps: Steps, requests: Sequence[Sent]) -> dict[str, float]:
    """Milliseconds of each part of a request in this process, with nothing else at work.

    Medians over calls of 8 requests.
    """
    took: dict[str, list[float]] = {name: [] for name in steps}
    for first in range(0, len(requests), CALL):
        call = requests[first : first + CALL]
        value: Any = [sent.body for sent in call]
        for name, step in steps.items():
            started = time.perf_counter()
            value = step(value)
            took[name].append(1e3 * (time.perf_counter() - started) / len(call))
    return {name: statistics.median(values) for name, values in took.items()}


async def example(served: Served, request: Json, path: str) -> Json:
    """A request and its answer, as they are."""
    seen = await closed_loop(served.url, [Sent(json.dumps(request).encode(), path=path)], 1)
    return {"request": request, "answer": json.loads(seen[0].body)}


async def rates(served: Served, good: Sequence[Sent]) -> list[Json]:
    """Requests a second and latency over connections.

    With histories that the cache has not met, and then with the same ones again.
    """
    rows = []
    for number, connections in enumerate(map(int, FLAGS.connections)):
        for histories in ("new", "known"):
            requests = good[number * FLAGS.timed : (number + 1) * FLAGS.timed]
            what = f"{connections} connections, {histories} histories"
            seen = await closed_loop(served.url, requests, connections, what=what)
            if refused := [one.status for one in seen if one.status != 200]:
                raise ValueError(
                    f"{len(refused)} of {len(seen)} good requests were not answered, "
                    f"the first has status {refused[0]}"
                )
            rows.append({"connections": connections, "histories": histories, **speed(seen)})
    return rows


async def mixed(served: Served, traffic: Traffic, known: Sequence[Sent], count: int) -> Json:
    """Four good requests to one bad one in random order.

    The good ones are drawn from `known`, so that the cache is hit, too.
    """
    rng = np.random.default_rng(3)
    wrong_ones = traffic.bad(count // 5, seed=2)
    requests = [
        *wrong_ones,
        *(known[i] for i in rng.integers(len(known), size=count - len(wrong_ones))),
    ]
    requests = [requests[i] for i in rng.permutation(len(requests))]
    seen: list[Seen] = []
    memory: list[tuple[int, float]] = []

    async def watch() -> None:
        while True:
            memory.append((len(seen), served.rss_mib()))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await closed_loop(served.url, requests, IN_LOOP, seen, "good and bad requests")
    watching.cancel()
    memory.append((len(seen), served.rss_mib()))
    flat = [mib for done, mib in memory if done >= WARM_UP * len(requests)]
    statuses = sorted({one.status for one in seen})
    return {
        "requests": len(seen),
        "bad": len(wrong_ones),
        "connections": IN_LOOP,
        "statuses": {str(status): sum(one.status == status for one in seen) for status in statuses},
        "wrong_status": sum(
            not (one.status == 200 if one.sent.good else 400 <= one.status < 500) for one in seen
        ),
        "wrong_answers": sum(
            one.sent.good and one.status == 200 and not traffic.right(one.sent, one.body)
            for one in seen
        ),
        "hung": sum(one.status == -1 for one in seen),
        **speed(seen),
        "rss_mib": memory,
        "rss_after_warm_up_largest_over_smallest": max(flat) / min(flat),
    }


async def kill(served: Served, traffic: Traffic, good: Sequence[Sent]) -> Json:
    """One of two replicas ends by SIGKILL under load.

    Lost requests must have been under way at that moment.
    """
    seen: list[Seen] = []
    loop = asyncio.create_task(closed_loop(served.url, good, IN_LOOP, seen, "a replica is killed"))
    while len(seen) < len(good) // 4 and not loop.done():
        await asyncio.sleep(0.05)
    victims = served.replicas()
    victims[0].kill()
    moment = time.perf_counter()
    await loop
    back = time.monotonic()
    while len(served.replicas()) < len(victims) and time.monotonic() < back + 120:
        await asyncio.sleep(0.5)
    lost = [one for one in seen if one.status != 200]
    return {
        "requests": len(seen),
        "connections": IN_LOOP,
        "replicas": len(victims),
        "lost": len(lost),
        "lost_statuses": [one.status for one in lost],
        "lost_before_or_after": sum(
            not one.began <= moment + 0.05 <= one.ended + 0.1 for one in lost
        ),
        "slowest_lost_s": max((one.ended - one.began for one in lost), default=0.0),
        "slowest_answered_s": max(one.ended - one.began for one in seen if one.status == 200),
        "hung": sum(one.status == -1 for one in seen),
        "wrong_answers": sum(
            one.status == 200 and not traffic.right(one.sent, one.body) for one in seen
        ),
        "replicas_at_the_end": len(served.replicas()),
    }


if __name__ == "__main__":
    command.define_run()
    flags.DEFINE_integer("history", 200, "events of a history")
    flags.DEFINE_integer("requests", 10_000, "good and bad requests of the mixed part")
    flags.DEFINE_integer("timed", 1500, "requests of each measurement of the rate")
    flags.DEFINE_list("connections", ["1", "4", "8", "16"], "connections of the closed loop")
    flags.DEFINE_integer("port", 8400, "port of the deployment")
    flags.DEFINE_string("serve", "", "more arguments for experiments.serve, separated by blanks")
    flags.DEFINE_string("note", None, "what else the machine did, for the record")
    command.define_record()
    command.run(main)
