"""Puts a newer model in the place of one that is served, under load, and checks every answer.

python -m scripts.load.swap --workdir=runs/seeds/seed_42 --newer=runs/seeds/seed_43
    [--raw_dir=PATH] [--connections=8] [--record=experiments/results/serve_swap_cpu.json]

A link leads to the one run, and then to the other, which the deployment follows. Connections send
requests all the time; every answer must be that of the model whose version it names.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import portpicker
from absl import flags

from experiments import command
from experiments.record import Json, Record
from scripts.load import requests as load_requests
from scripts.load.loop import Seen, closed_loop, deployment, speed
from scripts.load.requests import Sent
from ultra_hstu import report
from ultra_hstu.serving.service import RecommendService, open_service

FLAGS = flags.FLAGS

FOLLOW_S = 0.5
AROUND_S = 5.0  # of load before the newer model is there, and after it has taken over
LIMIT_S = 180.0  # in which it must have


def main(_: list[str]) -> None:
    paths = [Path(str(path)).resolve() for path in (FLAGS.workdir, FLAGS.newer)]
    services = []
    for path in paths:
        service = open_service(str(path), FLAGS.raw_dir)
        if not isinstance(service, RecommendService):
            raise ValueError(f"{path} is a ranking run: name retrieval runs")
        services.append(service)
    expected = dict(zip([path.name for path in paths], map(answers, services), strict=True))
    arguments = [f"--follow_s={FOLLOW_S}", f"--replicas={FLAGS.replicas}"]
    arguments += [f"--raw_dir={FLAGS.raw_dir}"] if FLAGS.raw_dir else []
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "current")
        link.symlink_to(paths[0])
        port = portpicker.pick_unused_port()
        with deployment(str(link), *arguments, port=port) as served:
            run = swapped(served.url, link, paths[1], expected, FLAGS.connections, AROUND_S)
            found = asyncio.run(run)
    record = Record(
        FLAGS.record,
        config=services[0].model.config.name,
        replicas=FLAGS.replicas,
        connections=FLAGS.connections,
    )
    record.add(swap=found)
    report.make_console().print(found)
    if found["lost"] or found["wrong"]:
        raise ValueError("requests were lost, or answered by another model than they name")


def answers(service: RecommendService) -> list[Sent]:
    """Requests with the answers of a model; the requests of both are the same."""
    return load_requests.checked(service, 200, 20, seed=1)


async def swapped(
    url: str,
    link: Path,
    newer: Path,
    expected: dict[str, list[Sent]],
    connections: int,
    around_s: float,
) -> Json:
    """What became of all requests while a link was put to the newer model.

    Args:
      expected: by the name of a run's folder, requests with its answers, the same in all.
      around_s: how long there is load before, and after.
    """
    seen: list[Seen] = []
    stop = asyncio.Event()
    any_model = next(iter(expected.values()))
    numbered = [dataclasses.replace(one, expected=i) for i, one in enumerate(any_model)]

    def endless() -> Iterator[Sent]:
        yield from itertools.takewhile(lambda _: not stop.is_set(), itertools.cycle(numbered))

    load = asyncio.create_task(closed_loop(url, endless(), connections, seen))
    await asyncio.sleep(around_s)
    began = time.perf_counter()
    other = link.with_name("next")
    other.symlink_to(newer)
    other.replace(link)  # in one step, as a deployment script should
    while time.perf_counter() < began + LIMIT_S:
        await asyncio.sleep(0.2)
        if len(seen) > 50 and all(of(one) == newer.name for one in seen[-50:]):
            break
    taken = next((one.ended for one in seen if of(one) == newer.name), float("nan"))
    await asyncio.sleep(around_s)
    stop.set()
    await load
    wrong = [one for one in seen if one.status == 200 and not as_named(one, expected)]
    before = [one for one in seen if one.ended < began]
    during = [one for one in seen if began <= one.ended <= taken]
    after = [one for one in seen if one.began > taken]
    return {
        "requests": len(seen),
        "lost": sum(one.status != 200 for one in seen),
        "wrong": len(wrong),
        "by_version": {name: sum(of(one) == name for one in seen) for name in expected},
        "seconds_until_the_newer_answers": taken - began,
        "before": speed(before),
        "during": speed(during),
        "after": speed(after),
    }


def of(seen: Seen) -> str:
    """The folder that an answer names."""
    return seen.version.partition(":")[0]


def as_named(seen: Seen, expected: dict[str, list[Sent]]) -> bool:
    """Whether an answer is that of the model which it names."""
    with contextlib.suppress(KeyError):
        return load_requests.right(expected[of(seen)][seen.sent.expected], seen.body)
    return False


if __name__ == "__main__":
    command.define_run("folder of the run that is served first, of retrieval")
    command.as_path(flags.DEFINE_string("newer", None, "folder of the other", required=True))
    flags.DEFINE_integer("connections", 8, "connections that send requests")
    flags.DEFINE_integer("replicas", 1, "replicas of the deployment")
    command.define_record()
    command.run(main)
