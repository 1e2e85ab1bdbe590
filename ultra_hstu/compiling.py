"""The programs of a run, compiled before its first step."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from ultra_hstu import programs, progress
from ultra_hstu.data.feed import Loader
from ultra_hstu.evaluate import Evaluator
from ultra_hstu.parallel import processes
from ultra_hstu.pieces import pieces
from ultra_hstu.profiling import ProfiledCall
from ultra_hstu.step import HISTORY, TrainState, run_steps
from ultra_hstu.task import Task

Program = jax.stages.Compiled | ProfiledCall  # of a training call


def compile_run(
    task: Task,
    loader: Loader,
    evaluator: Evaluator | None,
    state: TrainState,
    console: Console,
    *,
    profile: Path | None = None,
) -> Program:
    """The training call, compiled for the shapes that all its calls have.

    The evaluation is traced, too; it is compiled while training begins.

    Args:
      evaluator: None: its program was compiled before.
      profile: the folder for a trace of the second call, or of the only one.
    """
    plan = loader.plan()
    group = next(iter(loader.groups(plan)))
    recipe = task.recipe
    out_shardings = None
    if recipe.mesh is not None:
        out_shardings = (recipe.shardings, NamedSharding(recipe.mesh, PartitionSpec()))
    call = jax.jit(
        functools.partial(run_steps, recipe), donate_argnums=0, out_shardings=out_shardings
    )
    arguments = (state, group.feed, np.int32(group.steps))
    results = (state, dict.fromkeys(HISTORY, 0))
    pool = ThreadPoolExecutor(1 if processes.several() else 2)
    with progress.waiting(console, "compile", "compiling") as came:
        training = programs.begin(call, arguments, results, ["run_steps", recipe], pool)
        model = progress.model(task.config, state.params, training.choices)
        progress.line(console, "model", f"{model}, {len(plan):,} steps an epoch")
        if on := pieces(task.config):
            progress.line(console, "pieces", ", ".join(on))
        if evaluator is not None:
            evaluator.begin(state.params, pool)
        pool.shutdown(wait=False)
        compiled = training.program.result()
        if processes.several() and evaluator is not None:
            evaluator.wait()
        came("the training step; the evaluation meanwhile")
    processes.barrier()
    if profile is None:
        return compiled
    config = task.config.train
    several = len(plan) * config.epochs - int(state.step) > config.steps_per_call
    return ProfiledCall(compiled, profile, console, warm=int(several))
