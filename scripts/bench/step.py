"""Times whole training steps and an evaluation of one configuration.

python -m scripts.bench.step --config=ml1m_hstu [--config.data.raw_dir=PATH]
    [--full] [--record=experiments/results/NAME.json]

A step is batch assembly, forward, loss, backward and optimizer. Times are wall clock over compiled
calls of `train.steps_per_call` steps, minimum and median over repetitions, once with the data on
the device and once streamed from host threads; the share of it that the device waited for data
stands beside them. Peak memory is the process's own high-water mark after one evaluation of all
test users, before any training.

With --full the step is measured alone, on one batch of full histories with random items that is
made on the device: rate of useful operations, share of the GPU's peak (MFU), memory, and where the
time goes by kernel. A record has a key for each such workload, and keeps those of other runs.
"""

import functools
import itertools
import math
import resource
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from absl import flags
from jaxtyping import PyTree

from experiments import command
from experiments.record import Json, Record
from kernels import timing
from scripts.bench.program import Program, temporaries
from scripts.bench.terminal import show
from ultra_hstu import flops, report, tasks
from ultra_hstu.config import Config, from_config_dict
from ultra_hstu.data.feed import STREAM_AHEAD, Group
from ultra_hstu.fields import changed
from ultra_hstu.step import run_steps
from ultra_hstu.task import Task

FLAGS = flags.FLAGS
WARM = STREAM_AHEAD + 2  # calls in front of those that are timed
FEEDS = {"device": "device_feed", "stream": "streamed_feed"}


def main(_: list[str]) -> None:
    config = from_config_dict(FLAGS.config)
    if FLAGS.full:
        record = Record(FLAGS.record, grows=True)
        with jax.default_matmul_precision(config.train.matmul_precision):
            record.add(**{config.name: measure_full_batches(config, FLAGS.seconds)})
        return
    record = Record(FLAGS.record, config=config.name, eval=config.evaluation)
    with jax.default_matmul_precision(config.train.matmul_precision):
        found = {"evaluation": time_evaluation(tasks.load(config))}
        for placement, name in FEEDS.items():
            placed = changed(config, data={"placement": placement})
            found[name] = time_steps(placed, FLAGS.repeats)
    for part, values in found.items():
        show({name: {part: value} for name, value in values.items()}, (part,), config.name)
    record.add(**found)


def measure_full_batches(config: Config, duration: float) -> Json:
    """The step on full histories; in its FLOPs, what is computed twice counts once."""
    items, data = config.data.synthetic.items, config.data
    counted = flops.count(config, data.max_history, items=items)
    program = Program(config, items, jax.devices()).compile()
    samples, loss = program.sample(5, duration / 5)
    seconds = statistics.median(samples)
    rate = (counted.training - counted.recomputed) * data.batch_users / seconds
    profile = program.profile()
    for table in profile.tables(f"a step of {config.name}"):
        report.make_console().print(table)
    statistics_of_memory = program.devices[0].memory_stats() or {}
    found: Json = {
        "step_ms": 1e3 * seconds,
        "samples_ms": [1e3 * sample for sample in samples],
        "events_a_second": data.batch_users * data.max_history / seconds,
        "TFLOP_a_second": rate / 1e12,
        "MFU": timing.mfu(rate, len(program.devices)),
        "temporary_GiB": program.memory and program.memory.temp_size_in_bytes / 2**30,
        "peak_GiB": statistics_of_memory.get("peak_bytes_in_use", math.nan) / 2**30,
        "loss": loss,
    }
    show({name: {"": value} for name, value in found.items()}, ("",), config.name)
    return found | {"profile": profile.to_json()}


def time_steps(config: Config, repeats: int) -> Json:
    """Milliseconds a step, and the share of the time in which the next batches were awaited."""
    steps = Timed(tasks.load(config))
    steps.turn(repeats)
    return steps.result()


class Timed:
    """Training calls of a task, one after another, each of them timed."""

    def __init__(self, task: Task):
        config = task.config
        self.size = config.train.steps_per_call
        self.loader = task.loader(
            "train", batch_users=config.data.batch_users, steps_per_call=self.size
        )
        self.state = jax.jit(task.recipe.init, static_argnums=0)(config.train.seed)
        self.groups = self._groups()
        self.seconds: list[float] = []  # of each call, its wait included
        self.waited: list[float] = []
        self.computed: list[float] = []  # seconds of the host's cores a step, of each turn
        self.running: PyTree = ()  # the history of the call before
        group = next(self.groups)
        step = jax.jit(functools.partial(run_steps, task.recipe), donate_argnums=0)
        self.program = step.lower(self.state, group.feed, jnp.int32(self.size)).compile()

    def _groups(self) -> Iterator[Group]:
        for epoch in itertools.count():
            for group in self.loader.groups(self.loader.plan(seed=0, epoch=epoch)):
                if group.steps == self.size:
                    yield group

    def call(self) -> None:
        """Starts a call and waits for the one before, as training does."""
        started = time.perf_counter()
        group = next(self.groups)
        arrived = time.perf_counter()
        idle = all(leaf.is_ready() for leaf in jax.tree.leaves(self.running))
        self.state, history = self.program(self.state, group.feed, jnp.int32(self.size))
        jax.block_until_ready(self.running)
        self.running = history
        self.waited.append(idle * (arrived - started))  # else the device had work
        self.seconds.append(time.perf_counter() - started)

    def turn(self, calls: int) -> None:
        """So many calls, of which the first are left out: what waits for them was packed before."""
        kept, before = len(self.seconds), time.process_time()
        for _ in range(calls + WARM):
            self.call()
        jax.block_until_ready(self.running)
        self.computed.append((time.process_time() - before) / (calls + WARM) / self.size)
        del self.seconds[kept : kept + WARM], self.waited[kept : kept + WARM]

    def result(self) -> Json:
        """Of all calls that were timed."""
        seconds, waited = self.seconds, self.waited
        per_step = [1e3 * one / self.size for one in seconds]
        rows = self.loader.gather.rows
        return {
            "rows": sum(rows) if isinstance(rows, tuple) else rows,
            "step_ms_median": statistics.median(per_step),
            "step_ms_min": min(per_step),
            "input_wait_share": sum(waited) / sum(seconds),
            "host_ms": 1e3 * statistics.median(self.computed),
            "temp_MiB": temporaries(self.program) / 2**20,
        }


def time_evaluation(task: Task) -> dict[str, float]:
    """Seconds to rank every test user, and the process's peak memory in MiB then.

    For ranking: seconds to predict the targets of every test request.
    """
    params = jax.jit(task.recipe.init, static_argnums=0)(0).params
    measure = task.evaluator("test")
    measure.compile(params)
    measure(params)
    started = time.perf_counter()
    measure(params)
    seconds = time.perf_counter() - started
    return {
        "users": len(measure.plan.examples.lengths),
        "seconds": seconds,
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    command.define_config()
    flags.DEFINE_integer("repeats", 8, "compiled calls that are timed")
    flags.DEFINE_bool("full", False, "one batch of full histories, with a breakdown by kernel")
    flags.DEFINE_float("seconds", 2.0, "time to measure full batches for")
    command.define_record()
    command.run(main)
