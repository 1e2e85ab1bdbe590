"""Times whole training steps and an evaluation of one configuration, and says what the device waited for.

python -m scripts.bench.step --config=ml1m_hstu [--config.data.raw_dir=PATH] [--record=experiments/results/NAME.json]

A step is batch assembly, forward, loss, backward and optimizer. Times are wall clock over compiled calls of `train.steps_per_call` steps,
minimum and median over repetitions, once with the data on the device and once streamed from host threads. Peak memory is the process's
own high-water mark after one evaluation of all test users, before any training.
"""

import dataclasses
import functools
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags
from rich.progress import track
from rich.table import Table

from experiments import command
from ultra_hstu import provenance, report, tasks, workdir
from ultra_hstu.config import Config, from_config_dict
from ultra_hstu.task import Task
from ultra_hstu.train import run_steps

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a file of experiments/configs", lock_config=True
)
_REPEATS = flags.DEFINE_integer("repeats", 8, "compiled calls that are timed")
_RECORD = flags.DEFINE_string("record", None, "JSON file for the result")

FEEDS = {"device": "device_feed", "stream": "streamed_feed"}


def main(_: list[str]) -> None:
    config = from_config_dict(_CONFIG.value)
    result: dict[str, Any] = {"config": config.name, **provenance.provenance()}
    with jax.default_matmul_precision(config.train.matmul_precision):
        result["evaluation"] = time_evaluation(tasks.load(config))
        for placement in ("device", "stream"):
            placed = dataclasses.replace(
                config, data=dataclasses.replace(config.data, placement=placement)
            )
            result[FEEDS[placement]] = time_steps(placed, _REPEATS.value)
    table = Table("what", "value", title=config.name)
    for part in ("evaluation", *FEEDS.values()):
        for name, value in result[part].items():
            table.add_row(f"{part}: {name}", f"{value:.4g}")
    report.make_console().print(table)
    if _RECORD.value:
        workdir.write_json(Path(_RECORD.value), result)


def time_steps(config: Config, repeats: int) -> dict[str, float]:
    """Milliseconds a step, and the share of the time in which the next batches were not there yet."""
    task = tasks.load(config)
    size = config.train.steps_per_call
    loader = task.loader("train", batch_users=config.data.batch_users, steps_per_call=size)
    state = jax.jit(task.recipe.init, static_argnums=0)(config.train.seed)
    step = jax.jit(functools.partial(run_steps, task.recipe), donate_argnums=0)

    def groups() -> Any:
        epoch = 0
        while True:
            yield from (
                group
                for group in loader.groups(loader.plan(seed=0, epoch=epoch))
                if group.steps == size
            )
            epoch += 1

    memory = step.lower(state, next(groups()).feed, jnp.int32(size)).compile().memory_analysis()
    ready = groups()
    waited, times = 0.0, []
    for number in track(
        range(repeats + 2),
        f"{config.data.placement:>8}",
        console=report.make_console(),
        transient=True,
    ):
        started = time.perf_counter()
        group = next(ready)
        arrived = time.perf_counter()
        state, history = step(state, group.feed, jnp.int32(size))
        jax.block_until_ready(history)
        if number >= 2:  # the first call compiles, the second warms the caches
            waited += arrived - started
            times.append(time.perf_counter() - started)
    per_step = [1e3 * seconds / size for seconds in times]
    return {
        "rows": sum(rows) if isinstance(rows := loader.gather.rows, tuple) else rows,
        "step_ms_median": statistics.median(per_step),
        "step_ms_min": min(per_step),
        "input_wait_share": waited / sum(times),
        "temp_MiB": memory.temp_size_in_bytes / 2**20 if memory else float("nan"),
    }


def time_evaluation(task: Task) -> dict[str, float]:
    """Seconds to rank every test user (ranking: to predict the targets of every test request), and the process's peak memory in MiB then."""
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
    flags.mark_flag_as_required("config")
    command.run(main)
