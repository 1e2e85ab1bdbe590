"""The programs of a run, compiled before its first step."""

import functools
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from kernels import dispatch
from ultra_hstu import progress
from ultra_hstu.data.feed import Loader
from ultra_hstu.evaluate import Evaluator
from ultra_hstu.parallel import processes
from ultra_hstu.profiling import ProfiledCall
from ultra_hstu.step import TrainState, run_steps
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
    """The training call, compiled for the shapes that all its calls have; the evaluation, too.

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
    with progress.waiting(console, "compile", "compiling") as came:
        with dispatch.record() as choices:
            lowered = call.lower(state, group.feed, np.int32(group.steps))
        model = progress.model(task.config, state.params, choices)
        progress.line(console, "model", f"{model}, {len(plan):,} steps an epoch")
        compiled = lowered.compile()
        if evaluator is not None:
            evaluator.compile(state.params)
        came("training and evaluation")
    processes.barrier()
    if profile is None:
        return compiled
    config = task.config.train
    several = len(plan) * config.epochs - int(state.step) > config.steps_per_call
    return ProfiledCall(compiled, profile, console, warm=int(several))
