"""Loads a deployment of `experiments.serve` on this machine, checks every answer, and kills a
replica under load.

python -m scripts.load.serve --workdir=runs/ml1m_hstu [--raw_dir=PATH] [--requests=10000]
    [--record=experiments/results/serve_load_cpu.json]
python -m scripts.load.serve --workdir=runs/ml1m_rank_hstu [--host_table=int4]
    [--record=experiments/results/serve_scores_cpu.json]

Closed loop: each connection sends its next request when the last one is answered; the client runs
on the same machine. Three parts, each with a deployment of its own: requests a second over
connections, with histories that are new and then with the same ones again; good and bad requests
mixed, answers compared with those of the model in this process, memory of the replica watched; two
replicas, one of which is killed.
"""

import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import command
from scripts.load import requests as load_requests
from scripts.load import scores as load_scores
from scripts.load.loop import Seen, Served, closed_loop, deployment, speed
from scripts.load.requests import Sent
from ultra_hstu import provenance, report, workdir
from ultra_hstu.quantization import HOST_KINDS
from ultra_hstu.serving.service import ScoreService, Service, open_service

FLAGS = flags.FLAGS

IN_LOOP = 8  # connections of the mixed part and of the kill
CALL = 8  # requests of a device call, where parts are timed
WARM_UP = 0.2  # share of the mixed requests before memory must be flat


def main(_: list[str]) -> None:
    console = report.make_console()
    service = open_service(
        FLAGS.workdir,
        FLAGS.raw_dir,
        cache_bytes=FLAGS.cache_mib * 2**20,
        host_table=FLAGS.host_table,
    )
    module = requests_of(service)
    if service.data is None:
        raise ValueError(
            f"{FLAGS.workdir} is an exported model: requests are made from a run's data"
        )
    interactions = service.data.interactions
    result: dict[str, Any] = {
        **provenance.provenance(),
        "config": service.model.config.name,
        "items": interactions.num_items,
        "history": FLAGS.history,
        **({"candidates": load_scores.CANDIDATES} if module is load_scores else {}),
        **({"note": FLAGS.note} if FLAGS.note else {}),
        "serve": FLAGS.serve,
        "load_average_before": os.getloadavg(),
        "stages_ms": stages(service, module.timed(interactions, 400, FLAGS.history, seed=4)),
    }
    if isinstance(service, ScoreService):
        result["one_event"] = load_scores.one_event(
            service, 40, FLAGS.history, 6, FLAGS.device_cache_mib * 2**20
        )
    arguments = [*([f"--raw_dir={FLAGS.raw_dir}"] if FLAGS.raw_dir else []), *FLAGS.serve.split()]
    if FLAGS.host_table:
        arguments.append(f"--host_table={FLAGS.host_table}")
    if FLAGS.device_cache_mib:
        arguments.append(f"--device_cache_mib={FLAGS.device_cache_mib}")
    with deployment(FLAGS.workdir, *arguments, port=FLAGS.port) as served:
        result["seconds_to_start"] = served.seconds
        alike = module.timed(
            interactions, len(FLAGS.connections) * FLAGS.timed, FLAGS.history, seed=0
        )
        result["example"] = asyncio.run(example(served, module.EXAMPLE, alike[0].path))
        result["rates"] = asyncio.run(rates(served, alike))
    known = module.checked(service, FLAGS.requests // 10, FLAGS.history, seed=1)
    with deployment(FLAGS.workdir, *arguments, port=FLAGS.port) as served:
        result["mixed"] = asyncio.run(mixed(served, module, known, FLAGS.requests))
    with deployment(FLAGS.workdir, "--replicas=2", *arguments, port=FLAGS.port) as served:
        result["kill"] = asyncio.run(kill(served, module, known * 3))
    result["load_average_after"] = os.getloadavg()
    console.print(result)
    if FLAGS.record:
        workdir.write_json(Path(FLAGS.record), result)
    if failed := judge(result):
        raise ValueError("; ".join(failed))


def requests_of(service: Service) -> Any:
    """The module of requests to this kind of run."""
    return load_scores if isinstance(service, ScoreService) else load_requests


def judge(result: dict[str, Any]) -> list[str]:
    """What must hold on any machine, however slow."""
    mixed, kill = result["mixed"], result["kill"]
    claims = {
        "good requests were refused, bad ones taken, or a status was 5xx": mixed["wrong_status"]
        == 0,
        "answers were wrong": mixed["wrong_answers"] == kill["wrong_answers"] == 0,
        "requests hung": mixed["hung"] == kill["hung"] == 0,
        "a killed replica lost requests that it did not hold": kill["lost_before_or_after"] == 0
        and kill["lost"] <= kill["connections"],
        "no replica came back": kill["replicas_at_the_end"] == 2,
    }
    return [name for name, holds in claims.items() if not holds]


def stages(service: Service, requests: Sequence[Sent]) -> dict[str, float]:
    """Milliseconds of each part of a request in this process, with nothing else at work: medians
    over calls of 8 requests."""
    steps = requests_of(service).steps(service)
    took: dict[str, list[float]] = {name: [] for name in steps}
    for first in range(0, len(requests), CALL):
        value: Any = [sent.body for sent in requests[first : first + CALL]]
        for name, step in steps.items():
            started = time.perf_counter()
            value = step(value)
            took[name].append(
                1e3 * (time.perf_counter() - started) / len(requests[first : first + CALL])
            )
    return {name: statistics.median(values) for name, values in took.items()}


async def example(served: Served, request: dict[str, Any], path: str) -> dict[str, Any]:
    """A request and its answer, as they are."""
    seen = await closed_loop(served.url, [Sent(json.dumps(request).encode(), path=path)], 1)
    return {"request": request, "answer": json.loads(seen[0].body)}


async def rates(served: Served, good: Sequence[Sent]) -> list[dict[str, Any]]:
    """Requests a second and latency over connections, with histories that the cache has not met,
    and with the same ones again."""
    rows = []
    for number, connections in enumerate(map(int, FLAGS.connections)):
        for histories in ("new", "known"):
            requests = good[number * FLAGS.timed : (number + 1) * FLAGS.timed]
            seen = await closed_loop(
                served.url,
                requests,
                connections,
                what=f"{connections} connections, {histories} histories",
            )
            if refused := [one.status for one in seen if one.status != 200]:
                raise ValueError(
                    f"{len(refused)} of {len(seen)} good requests were not answered, "
                    f"the first has status {refused[0]}"
                )
            rows.append({"connections": connections, "histories": histories, **speed(seen)})
    return rows


async def mixed(served: Served, module: Any, known: Sequence[Sent], count: int) -> dict[str, Any]:
    """Four good requests to one bad one in random order; the good ones are drawn from `known`, so
    that the cache is hit too."""
    rng = np.random.default_rng(3)
    wrong_ones = module.bad(count // 5, seed=2)
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
            one.sent.good and one.status == 200 and not module.right(one.sent, one.body)
            for one in seen
        ),
        "hung": sum(one.status == -1 for one in seen),
        **speed(seen),
        "rss_mib": memory,
        "rss_after_warm_up_largest_over_smallest": max(flat) / min(flat),
    }


async def kill(served: Served, module: Any, good: Sequence[Sent]) -> dict[str, Any]:
    """One of two replicas ends by SIGKILL under load. Lost requests must have been under way at
    that moment."""
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
            one.status == 200 and not module.right(one.sent, one.body) for one in seen
        ),
        "replicas_at_the_end": len(served.replicas()),
    }


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a trained run", required=True)
    flags.DEFINE_string("raw_dir", None, "where the raw data is now, if not where the run found it")
    flags.DEFINE_integer("history", 200, "events of a history")
    flags.DEFINE_integer("requests", 10_000, "good and bad requests of the mixed part")
    flags.DEFINE_integer("timed", 1500, "requests of each measurement of the rate")
    flags.DEFINE_list("connections", ["1", "4", "8", "16"], "connections of the closed loop")
    flags.DEFINE_integer("port", 8400, "port of the deployment")
    flags.DEFINE_integer("cache_mib", 256, "host memory for encoded users, of this process")
    flags.DEFINE_integer("device_cache_mib", 0, "device memory for the users of a ranking run")
    flags.DEFINE_enum("host_table", None, HOST_KINDS, "item table of a ranking run, in host memory")
    flags.DEFINE_string("serve", "", "more arguments for experiments.serve, separated by blanks")
    flags.DEFINE_string("note", None, "what else the machine did, for the record")
    flags.DEFINE_string("record", None, "JSON file for the result")
    command.run(main)
