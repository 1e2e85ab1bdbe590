"""Scores candidates for one user with a cached history, in micro-batches, beside doing without a cache and beside one candidate at a time.

python -m scripts.bench.serving --config=long_ultra --record=experiments/results/serving_h100.json
    [--models=ultra,hstu] [--histories=4096] [--candidates=16384] [--micro_batches=256,2048] [--implementation=triton] [--cached=triton] [--seconds=0.5]

What --record holds of the same commit and device stays, beside what is measured anew: a grid may be measured in several calls.

The configuration gives the sizes of the encoder; `ultra` is its stack, `hstu` ten plain causal layers of the same widths. Parameters and requests are random.
A latency is that of a call from NumPy to NumPy, and of the functions of `ultra_hstu.serving` as they are called in service.

    encode        the history alone: `encode_history`
    cached        `score`, the history encoded already
    one_batch     no cache: history and all candidates in one forward pass
    recompute     no cache: history and one micro-batch in one forward pass, which all micro-batches would repeat
    one_by_one    `score` with the cache and a micro-batch of 1, on 64 candidates
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import config_flags
from rich.table import Table

from experiments import command
from scripts.bench.turns import one_by_one
from ultra_hstu import flops, provenance, report, serving, workdir
from ultra_hstu.config import Config, RankConfig, from_config_dict
from ultra_hstu.ranking.batch import RankEvents, RankGather
from ultra_hstu.ranking.form import EVERYTHING, Sizes
from ultra_hstu.ranking.model import Ranker

FLAGS = flags.FLAGS

MODELS: dict[str, dict[str, Any]] = {
    "ultra": {},
    "hstu": {
        "window": (),
        "full_rows": (),
        "prefix": (),
        "truncate_after": None,
        "truncate_length": None,
        "layers": 10,
    },
}
ONE_BY_ONE = 64
PLACE = ("model", "what", "history", "candidates", "micro_batch")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement."""

    model: str
    what: str
    history: int
    candidates: int
    micro_batch: int
    tflop: float
    call: Callable[[], Any]


def main(_: list[str]) -> None:
    config = from_config_dict(FLAGS.config)
    histories, candidates, micro_batches = (
        sorted(map(int, given))
        for given in (FLAGS.histories, FLAGS.candidates, FLAGS.micro_batches)
    )
    unknown = set(FLAGS.models) - set(MODELS)
    if unknown:
        raise ValueError(f"--models={sorted(unknown)[0]!r} must be of {', '.join(MODELS)}")
    result: dict[str, Any] = {
        "config": config.name,
        **provenance.provenance(),
        "implementation": FLAGS.implementation or config.model.implementation,
        "cached": FLAGS.cached or "platform's",
        "kind": FLAGS.kind,
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }
    result["cells"] = before(FLAGS.record, result)
    console = report.make_console()
    longest, options = (
        dict(longest=max(histories), targets=max(candidates)),
        (FLAGS.cached, FLAGS.kind, FLAGS.jobs, FLAGS.seconds),
    )
    tasks = []
    for history in histories:
        for name in FLAGS.models:
            ranking = ranking_config(config, MODELS[name] | implementation(), **longest)
            tasks.append((prepare, (name, ranking, history, candidates, micro_batches, *options)))
    started = time.perf_counter()
    for measured in one_by_one(tasks, processes=FLAGS.processes):
        if isinstance(measured, Exception):
            raise measured
        for new in measured:
            result["cells"] = [
                old for old in result["cells"] if any(old[key] != new[key] for key in PLACE)
            ] + [new]
            console.print(described(new))
        console.print(f"{time.perf_counter() - started:.0f} s")
        if FLAGS.record:
            workdir.write_json(Path(FLAGS.record), result)
    console.print(summary(result["cells"]))


def prepare(
    model: str,
    config: Config,
    history: int,
    candidates: list[int],
    micro_batches: list[int],
    cached: str | None,
    kind: Any,
    jobs: int,
    seconds: float,
) -> Callable[[], list[dict[str, Any]]]:
    """Compiles all cells of one model and length. What it returns times them, one after another."""
    cells = list(Bench(model, config, cached, kind).cells([history], candidates, micro_batches))
    with ThreadPoolExecutor(jobs) as pool:  # compilers run side by side
        errors = list(pool.map(attempt, cells))

    def measure() -> list[dict[str, Any]]:
        return [
            {key: getattr(cell, key) for key in (*PLACE, "tflop")}
            | ({"error": error} if error else latency(cell, seconds))
            for cell, error in zip(cells, errors, strict=True)
        ]

    return measure


def described(cell: dict[str, Any]) -> str:
    place = f"{cell['model']:>6} {cell['what']:>10}  history {cell['history']:>6}  candidates {cell['candidates']:>6}"
    value = (
        cell.get("error")
        or f"{cell['p50_ms']:9.3f} ms  {cell['candidates_per_s']:12,.0f} candidates/s"
    )
    return f"{place}  micro-batch {cell['micro_batch']:>6}  {value}"


def before(record: str | None, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of a record made under the same conditions."""
    if not record or not Path(record).exists():
        return []
    found = json.loads(Path(record).read_text())
    same = all(
        found.get(key) == result[key]
        for key in ("config", "device", "commit", "implementation", "cached", "kind", "xla_flags")
    )
    return found["cells"] if same else []


def implementation() -> dict[str, Any]:
    return {"implementation": FLAGS.implementation} if FLAGS.implementation else {}


def ranking_config(config: Config, model: dict[str, Any], *, longest: int, targets: int) -> Config:
    """The ranking model with the encoder of a configuration: one task, one signal."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, max_history=longest, batch_tokens=None),
        model=dataclasses.replace(config.model, **model),
        rank=RankConfig(
            tasks=("is_click",),
            signals=("is_click",),
            targets=targets,
            head_width=config.model.width,
        ),
    )


class Bench:
    """The measurements of one model."""

    def __init__(self, name: str, config: Config, cached: str | None, kind: Any, seed: int = 0):
        self.name, self.config, self.cached, self.kind = name, config, cached, kind
        items = config.data.synthetic.items
        self.sizes = Sizes(
            items=items,
            signals=(3,),
            features=(),
            contextual=(),
            kinds=("binary",),
            timestamps=True,
        )
        self.rng = np.random.default_rng(seed)
        self.model = Ranker(config, self.sizes, rngs=nnx.Rngs(seed))
        self.frozen = serving.FrozenRanker(self.model)
        self.graphdef, self.params = nnx.split(self.model)[0], self.frozen.params
        self.full = jax.jit(self._full, static_argnames="count")

    def cells(
        self, histories: list[int], candidates: list[int], micro_batches: list[int]
    ) -> Iterator[Cell]:
        for history in histories:
            user = self.history(history)
            cache = self.encoded(user)()
            encode = self.tflop(history, 0)
            yield self.cell("encode", history, 0, 0, encode, self.encoded(user))
            for count in candidates:
                asked = self.candidates(count)
                once = self.tflop(history, count)
                for step in sorted({min(step, count) for step in micro_batches}):
                    yield self.cell(
                        "cached",
                        history,
                        count,
                        step,
                        once - encode,
                        self.scored(cache, asked, step),
                    )
                yield self.cell(
                    "one_batch", history, count, count, once, self.passed(user, asked, count)
                )
            for step in micro_batches:
                # As many candidates as the micro-batch holds: the whole would be so many such passes, one after another.
                asked = self.candidates(step)
                yield self.cell(
                    "recompute",
                    history,
                    step,
                    step,
                    self.tflop(history, step),
                    self.passed(user, asked, step),
                )
            some = self.candidates(ONE_BY_ONE)
            yield self.cell(
                "one_by_one",
                history,
                ONE_BY_ONE,
                1,
                self.tflop(history, ONE_BY_ONE) - encode,
                self.scored(cache, some, 1),
            )

    def cell(
        self, what: str, history: int, count: int, step: int, tflop: float, call: Callable[[], Any]
    ) -> Cell:
        return Cell(self.name, what, history, count, step, tflop, call)

    def tflop(self, history: int, count: int) -> float:
        """Of a full pass; without candidates of the history alone, whose last layer `encode_history` does only in part."""
        return flops.count(self.config, history, targets=count).inference / 1e12

    def encoded(self, user: serving.History) -> Callable[[], serving.Cache]:
        return lambda: serving.encode_history(self.frozen, user, kind=self.kind)

    def scored(
        self, cache: serving.Cache, asked: serving.Candidates, step: int
    ) -> Callable[[], Any]:
        return lambda: serving.score(
            self.frozen, cache, asked, micro_batch=step, implementation=self.cached
        )

    def passed(
        self, user: serving.History, asked: serving.Candidates, count: int
    ) -> Callable[[], Any]:
        return lambda: np.asarray(self.full(self.params, user, asked, count=count))

    def history(self, count: int) -> serving.History:
        times = np.sort(self.rng.integers(0, 10**7, count))
        signals = self.rng.integers(1, 3, (count, 1))
        events = serving.Events.of(
            [self.rng.integers(1, self.sizes.items + 1, count)], [times], [signals]
        )
        return serving.History(
            {EVERYTHING: events}, np.zeros((1, 0), np.int32), np.array([10**7], np.int32)
        )

    def candidates(self, count: int) -> serving.Candidates:
        return serving.Candidates.of([self.rng.integers(1, self.sizes.items + 1, count)], 10**7)

    def _full(
        self, params: Any, user: serving.History, asked: serving.Candidates, *, count: int
    ) -> jax.Array:
        """Logits of the candidates as the targets of one sequence."""
        model: Ranker = nnx.merge(self.graphdef, params)
        events: serving.Events = user.channels[EVERYTHING]
        length = events.item_E.shape[0]
        both = lambda *parts: jnp.concatenate([jnp.asarray(part, jnp.int32) for part in parts])  # noqa: E731
        data = RankEvents(
            item_E=both(events.item_E, asked.item_C),
            time_E=both(events.time_E, asked.time_C),
            signal_ES=both(events.signal_ES, np.zeros((count, 1))),
            feature_EF=both(events.feature_EF, asked.feature_CF),
            label_EK=jnp.zeros((length + count, 1)),
            weight_EK=jnp.zeros((length + count, 1)),
            context_UC=user.context_BC,
            index={},
        )
        options: dict[str, Any] = dict(targets=count, contextual=0, interleaved=False)
        gather = RankGather(rows=(length + count,), channels=(EVERYTHING,), **options)
        columns = {
            "user": 0,
            "target": length,
            "count": count,
            f"start/{EVERYTHING}": 0,
            f"stop/{EVERYTHING}": length,
        }
        batch = gather(
            data, {name: jnp.full(1, value, jnp.int32) for name, value in columns.items()}
        )
        return model.head(model.encode(batch))


def attempt(cell: Cell) -> str | None:
    """Compiles and runs a cell once. An error is part of the result: another cell may still run."""
    try:
        jax.block_until_ready(jax.tree.leaves(cell.call()))
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:1000]


def latency(cell: Cell, seconds: float) -> dict[str, Any]:
    """Of single calls, one after another."""
    samples: list[float] = []
    while sum(samples) < seconds and len(samples) < 300 or len(samples) < 5:
        started = time.perf_counter()
        jax.block_until_ready(jax.tree.leaves(cell.call()))
        samples.append(time.perf_counter() - started)
    median = statistics.median(samples)
    return {
        "p50_ms": 1e3 * median,
        "p99_ms": 1e3 * float(np.quantile(samples, 0.99, method="higher")),
        "samples": len(samples),
        "candidates_per_s": cell.candidates / median,
        "TFLOP_a_second": cell.tflop / median,
    }


def summary(cells: list[dict[str, Any]]) -> Table:
    """Candidates a second of the cached micro-batches, and how many times those without a cache that is."""
    out = Table(
        "model",
        "history",
        "candidates",
        "micro-batch",
        "cached, M/s",
        "x recompute",
        "x one batch",
        "x, encoding counted",
    )
    found = {
        (c["model"], c["history"], c["what"], c["candidates"], c["micro_batch"]): c
        for c in cells
        if "error" not in c
    }
    for (model, history, what, count, step), cell in found.items():
        if what != "cached":
            continue
        again, once = (
            found.get((model, history, "recompute", step, step)),
            found.get((model, history, "one_batch", count, count)),
        )
        encode = found.get((model, history, "encode", 0, 0))
        whole = count / (cell["p50_ms"] + encode["p50_ms"]) * 1e3 if encode else None
        ratio = lambda rate, other: (
            f"{rate / other['candidates_per_s']:.2f}" if other and rate else ""
        )  # noqa: E731
        rate = cell["candidates_per_s"]
        counts = (str(history), str(count), str(step), f"{rate / 1e6:.3f}")
        out.add_row(model, *counts, ratio(rate, again), ratio(rate, once), ratio(whole, once))
    return out


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config",
        None,
        "a file of experiments/configs, for the sizes of the encoder",
        lock_config=True,
    )
    flags.DEFINE_list("models", list(MODELS), "which models")
    flags.DEFINE_list("histories", ["256", "1024", "4096", "16384"], "events of the history")
    flags.DEFINE_list("candidates", ["64", "1024", "16384"], "candidates of a request")
    flags.DEFINE_list(
        "micro_batches", ["64", "256", "1024", "4096"], "candidates that are worked on at one time"
    )
    flags.DEFINE_string(
        "implementation",
        None,
        "of attention over whole sequences; that of the configuration by default",
    )
    flags.DEFINE_string(
        "cached", None, "of attention to the cache: triton or xla; that of the platform by default"
    )
    flags.DEFINE_string("kind", "same", "how keys and values are kept")
    flags.DEFINE_float("seconds", 0.5, "time to measure a cell for")
    flags.DEFINE_integer(
        "jobs", 8, "programs that are compiled at one time, for each model and history"
    )
    flags.DEFINE_bool(
        "processes",
        True,
        "a process for each model and history: all compile side by side, then measure one after another",
    )
    flags.DEFINE_string("record", None, "JSON file for the result")
    flags.mark_flag_as_required("config")
    command.run(main)
