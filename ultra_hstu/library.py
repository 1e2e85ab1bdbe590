"""Training on data that a program has in memory."""

from pathlib import Path
from typing import Any

from rich.console import Console

from ultra_hstu import tasks
from ultra_hstu.config import Config
from ultra_hstu.data.interactions import ARRAYS, Interactions, ordered
from ultra_hstu.fields import changed
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir


def fit(
    config: Config,
    interactions: Interactions,
    workdir: Path | str,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains a run on these events, or goes on training it.

    The folder keeps a copy of the events, so that every command works on the run:
    `ultra-hstu evaluate --workdir=...`, `recommend`, `serve`, `export`.

    Args:
      config: what to train. `data.source` and `data.raw_dir` are set to that copy.
      workdir: folder of the run; made if it does not exist.
      console: where progress is shown; None: standard output.

    Returns:
      The result, as `result.json` holds it: "best" has the metrics of the best epoch on the test
      events.

    Raises:
      ValueError: a configuration that cannot work or does not suit the data, or a folder of
        another run.
      FloatingPointError, OSError, Interrupted: as `ultra_hstu.train.train`.
    """
    copy = Workdir(workdir).interactions
    config = changed(config, data={"source": ARRAYS, "raw_dir": str(copy)})
    config.validate()
    events = ordered(interactions, ties=config.data.ties, seed=config.data.ties_seed)
    return train(config, workdir, console=console, task=tasks.of(config, events))
