"""Requests a second with the item table in host memory, and the bytes that each sends.

python -m scripts.bench.host_requests --config=long_ultra
    [--record=experiments/results/host_requests_h200.json] [--history=16384] [--candidates=1024]
    [--items=200000] [--workers=4] [--seconds=10] [--kinds=float32,bfloat16,int8,int4] [--count]

ULTRA-HSTU moves INT4 rows in 7.9 ms where INT8 ones take 13, and serves 22 % more requests at its
peak (quoted from arXiv 2602.16986, table 11). Here workers of one process send requests, each the
next one as soon as its last is answered: a history that is encoded anew, and candidates scored
against it, both with rows of items from host memory. Parameters and requests are random. It takes
about 3 minutes of an H200. With --count nothing is run, and the record has bytes alone, which need
no device.
"""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from absl import flags
from flax import nnx

from experiments import command
from experiments.record import Json, Record
from scripts.bench.serving import ranking_config
from scripts.bench.terminal import show
from ultra_hstu import quantization, serving
from ultra_hstu.config import from_config_dict
from ultra_hstu.quantization import HostKind
from ultra_hstu.ranking.form import EVERYTHING, Sizes
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.serving.inputs import ROW_SIZES, bucket_size

FLAGS = flags.FLAGS
NOW = 10**7


class HostRequest(NamedTuple):
    history: serving.UserHistory
    candidates: serving.Candidates

    @property
    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """The items whose rows travel: to encode the history, and to score the candidates."""
        history = np.asarray(self.history.channels[EVERYTHING].item_E)
        return np.unique(history), np.unique(np.asarray(self.candidates.item_C))


def main(_: list[str]) -> None:
    config, history, candidates = from_config_dict(FLAGS.config), FLAGS.history, FLAGS.candidates
    config = ranking_config(config, {}, longest=history, targets=candidates)
    width, items = config.model.width, FLAGS.items
    rng = np.random.default_rng(0)
    requests = [draw(rng, items, history, candidates) for _ in range(2 * FLAGS.workers)]
    record = Record(
        FLAGS.record,
        config=config.name,
        model={name: getattr(config.model, name) for name in ("width", "layers", "implementation")},
        items=items,
        history=history,
        candidates=candidates,
        workers=FLAGS.workers,
        shared_device=FLAGS.shared_device,
    )
    found: dict[str, Json] = {
        kind: transfer(kind, width, [request.items for request in requests]) for kind in FLAGS.kinds
    }
    record.add(tables=found)
    if not FLAGS.count:
        sizes = Sizes(items, (3,), (), (), ("binary",), timestamps=True)
        model = Ranker(config, sizes, rngs=nnx.Rngs(0))
        for kind in FLAGS.kinds:
            compiled = serving.CompiledRanker(model, host_table=kind)
            found[kind] |= measure(compiled, requests, FLAGS.workers, FLAGS.seconds)
            record.add(tables=found)
    show(found, ("row_bytes", "item_bytes", "requests_per_s", "p50_ms", "p99_ms"), "table")


def draw(rng: np.random.Generator, items: int, history: int, candidates: int) -> HostRequest:
    """A random history, all of whose items differ where there are so many, and candidates."""
    times = np.sort(rng.integers(0, NOW, history))
    ids = 1 + rng.choice(items, history, replace=history > items)
    events = serving.UserEvents.of([ids], [times], [rng.integers(1, 3, (history, 1))])
    user = serving.UserHistory(
        {EVERYTHING: events}, np.zeros((1, 0), np.int32), np.array([NOW], np.int32)
    )
    asked = 1 + rng.choice(items, candidates, replace=candidates > items)
    return HostRequest(user, serving.Candidates.of([asked], NOW))


def transfer(kind: HostKind, width: int, items: list[tuple[np.ndarray, np.ndarray]]) -> Json:
    """Bytes that a request sends: the packed rows of its items, at the sizes of their buckets."""
    row = quantization.row_bytes(quantization.host_table(np.zeros((1, width), np.float32), kind))
    rows = [bucket_size(len(part), ROW_SIZES) for parts in items for part in parts]
    return {"row_bytes": row, "item_bytes": row * sum(rows) / len(items)}


def measure(
    model: serving.CompiledRanker, requests: list[HostRequest], workers: int, seconds: float
) -> Json:
    """Requests a second of all workers together, and how long one takes."""

    def answer(request: HostRequest) -> float:
        started = time.perf_counter()
        cache = serving.encode_history(model, request.history)
        serving.score(model, cache, request.candidates)
        return time.perf_counter() - started

    for request in requests:  # compiles
        answer(request)
    numbers, lock = itertools.count(), threading.Lock()
    started = time.perf_counter()

    def loop(_: int) -> list[float]:
        samples: list[float] = []
        while time.perf_counter() - started < seconds or not samples:
            with lock:
                number = next(numbers)
            samples.append(answer(requests[number % len(requests)]))
        return samples

    with ThreadPoolExecutor(workers) as pool:
        samples = [one for part in pool.map(loop, range(workers)) for one in part]
    elapsed = time.perf_counter() - started
    return {
        "requests_per_s": len(samples) / elapsed,
        "requests": len(samples),
        "p50_ms": 1e3 * float(np.median(samples)),
        "p99_ms": 1e3 * float(np.quantile(samples, 0.99, method="higher")),
    }


if __name__ == "__main__":
    command.define_config(what="the sizes of the encoder")
    flags.DEFINE_integer("history", 16384, "events of a history")
    flags.DEFINE_integer("candidates", 1024, "candidates of a request")
    flags.DEFINE_integer("items", 200_000, "rows of the item table")
    flags.DEFINE_integer("workers", 4, "requests at one time")
    flags.DEFINE_float("seconds", 10.0, "time to measure a kind of table for")
    flags.DEFINE_list("kinds", list(quantization.HOST_KINDS), "which kinds of table")
    flags.DEFINE_bool("count", False, "count bytes, and run nothing")
    flags.DEFINE_bool("shared_device", False, "other programs run beside this one")
    command.define_record()
    command.run(main)
