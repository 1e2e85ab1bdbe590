"""Training: epochs of compiled multi-step calls, evaluation, checkpoints, exact resume.

A step is a pure function of (state, batch, key), the key a function of (seed, step) and the batch
of (seed, epoch, number in the epoch). So the position is three integers, and a run that was killed
and started again computes the same numbers as one that was not.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from ultra_hstu import progress, starts, tasks, windows
from ultra_hstu.config import Config
from ultra_hstu.parallel import make_mesh, processes
from ultra_hstu.run import Run
from ultra_hstu.task import Task
from ultra_hstu.trackers import Tracker
from ultra_hstu.workdir import Workdir


def train(
    config: Config,
    workdir: Path | str,
    *,
    console: Console | None = None,
    task: Task | None = None,
    overwrite: bool = False,
    trackers: Sequence[Tracker] = (),
    profile: bool = False,
    split: str = "test",
) -> dict[str, Any]:
    """Trains, or goes on training, the run in `workdir`; its result, as `result.json` holds it.

    Args:
      task: the loaded data of this configuration, where several runs share it.
      overwrite: start anew, and remove the run that is in `workdir`.
      trackers: what else receives the metrics of every epoch.
      profile: trace some steps, and print what they spend their time on (`ultra_hstu.profiling`).
      split: the items that the best epoch is measured on. "validation": a trial of a search over
        recipes, which must not look at the test items.

    Raises:
      ValueError: bad configuration or data, a folder that belongs to another run, a profile of a
        run that has no steps left, or a trial under a protocol without validation items.
      FloatingPointError: a loss that is not finite, with step, learning rate and gradient norm.
      OSError: a checkpoint that could not be written.
      Interrupted: after SIGTERM or SIGINT while it trained, once the state is saved.
    """
    config.validate()
    tasks.check(config)
    if split not in ("test", "validation"):
        raise ValueError(f"{split=} is not allowed: use 'test' or 'validation'")
    if split == "validation" and config.train.protocol in ("published", "windows"):
        raise ValueError(
            f"train.protocol={config.train.protocol!r} has no validation items to measure a trial "
            "on: use another one, or split='test'"
        )
    console = (console or Console()) if processes.is_first() else Console(quiet=True)
    folder = Workdir(workdir)
    config = _claim(folder, config, overwrite)
    with starts.recorded(folder) as start:
        task = tasks.load(config, console) if task is None else task.with_config(config)
        processes.require_same(
            "data set", task.interactions.fingerprint() if processes.several() else {}
        )
        with jax.default_matmul_precision(config.train.matmul_precision):
            if config.train.protocol == "windows":
                if profile:
                    raise ValueError(
                        "--profile traces the steps of one run: use another train.protocol than "
                        "'windows'"
                    )
                result = windows.train_windows(task, folder, console, trackers)
                start |= {name: one for name, one in result.items() if name == "init_from"}
                return result
            with progress.waiting(console, "start", "making the model, trying out a checkpoint"):
                processes.broadcast(lambda: folder.claim_data(task.interactions))
                task.vocabulary.save(folder)
                run = Run(task, folder, console, trackers)
                run.measured_on = split
                if run.position.init_from:
                    start["init_from"] = run.position.init_from
            try:
                return run.to_the_end(profile=profile and processes.is_first())
            finally:
                run.checkpoints.let_go()
                if run.log is not None:
                    run.log.close()


def _claim(folder: Workdir, config: Config, overwrite: bool) -> Config:
    """Claims the folder for all processes, one of which writes; the configuration with its groups.

    Raises ValueError as `Workdir.claim`.
    """
    settings = dataclasses.asdict(config)
    for name in ("raw_dir", "data_dir"):  # a host may have them elsewhere
        settings["data"].pop(name)
    processes.require_same("configuration", settings)
    if processes.several() and config.parallel.data * config.parallel.context == 1:
        raise ValueError(
            "parallel.data=1 x parallel.context=1 is a run of one device, but "
            f"{jax.process_count()} processes with {jax.device_count()} devices are "
            "to share it: set --config.parallel.data and --config.parallel.context"
        )

    def claim() -> int:
        with_groups = folder.with_groups(config, overwrite=overwrite)
        if config.parallel.data * config.parallel.context > 1:
            # Raises before the folder is this run's.
            make_mesh(config.parallel.data, config.parallel.context)
        folder.claim(with_groups, overwrite=overwrite)
        return with_groups.parallel.batch_groups

    groups = processes.broadcast(claim)
    seen = processes.all_gather(folder.config.exists())
    if not all(seen):
        folder.release()
        raise ValueError(
            f"process {seen.index(False)} does not see {folder.config}, which process 0 has "
            "written: all processes must share --workdir"
        )
    return config.in_groups(groups)
