"""Scores candidates with a cached history, beside doing without a cache and one by one.

python -m scripts.bench.serving --config=long_ultra
    --record=experiments/results/serving_h200.json [--models=ultra,hstu] [--histories=4096]
    [--candidates=16384] [--micro_batches=256,2048] [--implementation=triton] [--cached=triton]
    [--seconds=0.5]

What --record holds of the same commit and device stays, beside what is measured anew: a grid may be
measured in several calls.

The configuration gives the sizes of the encoder; `ultra` is its stack, `hstu` ten plain causal
layers of the same widths. Parameters and requests are random. A latency is that of a call from
NumPy to NumPy, by the functions of `ultra_hstu.serving` as they are called in service.

    encode        the history alone: `encode_history`
    append        one event more, the history without it encoded already: `append`
    cached        `score`, the history encoded already
    one_batch     no cache: history and all candidates in one forward pass
    recompute     no cache: history and one micro-batch in one forward pass; all micro-batches
                  would repeat it
    one_by_one    `score` with the cache and a micro-batch of 1, on 64 candidates
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.typing import ArrayLike

from experiments import command
from experiments.record import Json, Record, read
from scripts.bench.terminal import show
from scripts.bench.turns import one_by_one
from ultra_hstu import flops, report, serving
from ultra_hstu.config import Config, RankConfig, from_config_dict
from ultra_hstu.fields import changed
from ultra_hstu.nn.key_values import CacheDtype
from ultra_hstu.ranking.batch import RankEvents, RankGather
from ultra_hstu.ranking.form import EVERYTHING, Sizes
from ultra_hstu.ranking.model import Ranker

FLAGS = flags.FLAGS

MODELS: dict[str, Json] = {
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
CONDITIONS = ("config", "device", "commit", "implementation", "cached", "kind", "xla_flags")


@dataclasses.dataclass(frozen=True)
class GridCell:
    """One measurement."""

    model: str
    what: str
    history: int
    candidates: int
    micro_batch: int
    tflop: float
    call: Callable[[], jax.Array | np.ndarray | serving.Cache]


def main(_: list[str]) -> None:
    config = from_config_dict(FLAGS.config)
    histories, candidates, micro_batches = (
        sorted(map(int, given))
        for given in (FLAGS.histories, FLAGS.candidates, FLAGS.micro_batches)
    )
    if unknown := sorted(set(FLAGS.models) - set(MODELS)):
        raise ValueError(f"--models={unknown[0]!r} must be of {', '.join(MODELS)}")
    record = Record(
        FLAGS.record,
        config=config.name,
        implementation=FLAGS.implementation or config.model.implementation,
        cached=FLAGS.cached or "platform's",
        kind=FLAGS.kind,
    )
    cells = {place(cell): cell for cell in before(FLAGS.record, record.values)}
    named = {"implementation": FLAGS.implementation} if FLAGS.implementation else {}
    tasks = []
    for history in histories:
        for name in FLAGS.models:
            ranking = ranking_config(
                config, MODELS[name] | named, longest=max(histories), targets=max(candidates)
            )
            task = functools.partial(prepare, name, ranking, history, candidates, micro_batches)
            options = {"cached": FLAGS.cached, "kind": FLAGS.kind}
            tasks.append(functools.partial(task, **options, jobs=FLAGS.jobs, seconds=FLAGS.seconds))
    console, started = report.make_console(), time.perf_counter()
    for measured in one_by_one(tasks, processes=FLAGS.processes):
        if isinstance(measured, Exception):
            raise measured
        cells |= {place(cell): cell for cell in measured}
        console.print(f"{time.perf_counter() - started:.0f} s")
        record.add(cells=list(cells.values()))
        show(
            {", ".join(map(str, place(cell))): cell for cell in measured},
            ("p50_ms", "p99_ms", "candidates_per_s", "TFLOP_a_second", "error"),
            ", ".join(PLACE),
        )


def place(cell: Json) -> tuple[str | int, ...]:
    return tuple(cell[key] for key in PLACE)


def prepare(
    model: str,
    config: Config,
    history: int,
    candidates: list[int],
    micro_batches: list[int],
    *,
    cached: str | None,
    kind: CacheDtype,
    jobs: int,
    seconds: float,
) -> Callable[[], list[Json]]:
    """Compiles all cells of one model and length; what it returns times them, one by one."""
    cells = list(Bench(model, config, cached, kind).cells([history], candidates, micro_batches))
    with ThreadPoolExecutor(jobs) as pool:  # compilers run side by side
        errors = list(pool.map(attempt, cells))

    def measure() -> list[Json]:
        return [
            {key: getattr(cell, key) for key in (*PLACE, "tflop")}
            | ({"error": error} if error else latency(cell, seconds))
            for cell, error in zip(cells, errors, strict=True)
        ]

    return measure


def before(path: str | None, conditions: Json) -> list[Json]:
    """The cells of a record made under the same conditions."""
    found = read(path)
    same = found and all(found.get(key) == conditions[key] for key in CONDITIONS)
    return found["cells"] if same else []


def ranking_config(config: Config, model: Json, *, longest: int, targets: int) -> Config:
    """The ranking model with the encoder of a configuration: one task, one signal."""
    return changed(
        config,
        data={"max_history": longest, "batch_tokens": None},
        model=model,
        rank=RankConfig(
            tasks=("is_click",),
            signals=("is_click",),
            targets=targets,
            head_width=config.model.width,
            positions="forwards",  # so that caches can grow
        ),
    )


class Bench:
    """The measurements of one model."""

    def __init__(
        self, name: str, config: Config, cached: str | None, kind: CacheDtype, seed: int = 0
    ):
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
        self.compiled = serving.CompiledRanker(self.model)
        self.graphdef, self.params = nnx.split(self.model)[0], self.compiled.params
        self.full = jax.jit(self._full, static_argnames="count")

    def cells(
        self, histories: list[int], candidates: list[int], micro_batches: list[int]
    ) -> Iterator[GridCell]:
        for history in histories:
            user = self.history(history)
            cell = functools.partial(GridCell, self.name, history=history)
            cache = self.encoded(user)()
            encode, each = (x / 1e12 for x in flops.cached(self.config, history))
            scored = functools.partial(self.scored, cache)
            passed = functools.partial(self.passed, user)
            alone = functools.partial(cell, candidates=0, micro_batch=0)
            yield alone("encode", tflop=encode, call=self.encoded(user))
            step_tflop = encode - flops.cached(self.config, history - 1)[0] / 1e12
            yield alone("append", tflop=step_tflop, call=self.appended(user))
            for count in candidates:
                batch, once = self.candidates(count), self.tflop(history, count)
                of_all = functools.partial(cell, candidates=count)
                for step in sorted({min(step, count) for step in micro_batches}):
                    call = scored(batch, step)
                    yield of_all("cached", micro_batch=step, tflop=count * each, call=call)
                call = passed(batch, count)
                yield of_all("one_batch", micro_batch=count, tflop=once, call=call)
            for step in micro_batches:
                # As many candidates as the micro-batch holds: the whole would be so many such
                # passes, one after another.
                call = passed(self.candidates(step), step)
                pass_tflop = self.tflop(history, step)
                yield cell(
                    "recompute", candidates=step, micro_batch=step, tflop=pass_tflop, call=call
                )
            call = scored(self.candidates(ONE_BY_ONE), 1)
            tflop = ONE_BY_ONE * each
            yield cell("one_by_one", candidates=ONE_BY_ONE, micro_batch=1, tflop=tflop, call=call)

    def tflop(self, history: int, count: int) -> float:
        """Operations of a full pass."""
        return flops.count(self.config, history, targets=count).inference / 1e12

    def encoded(self, user: serving.UserHistory) -> Callable[[], serving.Cache]:
        return lambda: serving.encode_history(self.compiled, user, kind=self.kind)

    def appended(self, user: serving.UserHistory) -> Callable[[], serving.Cache]:
        """The last event of a history, added to a cache of those before it."""
        events, count = user.channels[EVERYTHING], len(user.channels[EVERYTHING].item_E)
        one_B = np.array([1])
        before, last = (
            dataclasses.replace(user, channels={EVERYTHING: events.take(rows, one_B * len(rows))})
            for rows in (np.arange(count - 1), np.array([count - 1]))
        )
        cache = self.encoded(before)()
        return lambda: serving.append(self.compiled, cache, last, implementation=self.cached)

    def scored(
        self, cache: serving.Cache, candidates: serving.Candidates, step: int
    ) -> Callable[[], np.ndarray]:
        return lambda: serving.score(
            self.compiled, cache, candidates, micro_batch=step, implementation=self.cached
        )

    def passed(
        self, user: serving.UserHistory, candidates: serving.Candidates, count: int
    ) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(self.full(self.params, user, candidates, count=count))

    def history(self, count: int) -> serving.UserHistory:
        times = np.sort(self.rng.integers(0, 10**7, count))
        signals = self.rng.integers(1, 3, (count, 1))
        events = serving.UserEvents.of(
            [self.rng.integers(1, self.sizes.items + 1, count)], [times], [signals]
        )
        return serving.UserHistory(
            {EVERYTHING: events}, np.zeros((1, 0), np.int32), np.array([10**7], np.int32)
        )

    def candidates(self, count: int) -> serving.Candidates:
        return serving.Candidates.of([self.rng.integers(1, self.sizes.items + 1, count)], 10**7)

    def _full(
        self,
        params: nnx.State,
        user: serving.UserHistory,
        candidates: serving.Candidates,
        *,
        count: int,
    ) -> jax.Array:
        """Logits of the candidates as the targets of one sequence."""
        model: Ranker = nnx.merge(self.graphdef, params)
        events: serving.UserEvents = user.channels[EVERYTHING]
        length = events.item_E.shape[0]

        def both(*parts: ArrayLike) -> jax.Array:
            return jnp.concatenate([jnp.asarray(part, jnp.int32) for part in parts])

        data = RankEvents(
            item_E=both(events.item_E, candidates.item_C),
            time_E=both(events.time_E, candidates.time_C),
            signal_ES=both(events.signal_ES, np.zeros((count, 1))),
            feature_EF=both(events.feature_EF, candidates.feature_CF),
            label_EK=jnp.zeros((length + count, 1)),
            weight_EK=jnp.zeros((length + count, 1)),
            context_UC=user.context_BC,
            index={},
        )
        gather = RankGather(
            rows=(length + count,),
            channels=(EVERYTHING,),
            targets=count,
            contextual=0,
            interleaved=False,
            backwards=False,
        )
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


def attempt(cell: GridCell) -> str | None:
    """Compiles and runs a cell once. An error is part of the result: another cell may still run."""
    try:
        jax.block_until_ready(jax.tree.leaves(cell.call()))
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:1000]


def latency(cell: GridCell, seconds: float) -> Json:
    """Latency of single calls, one after another."""
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


if __name__ == "__main__":
    command.define_config(what="the sizes of the encoder")
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
        "a process for each model and history: all compile side by side, then measure in turn",
    )
    command.define_record()
    command.run(main)
