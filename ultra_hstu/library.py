"""What a program calls: training on data in memory, and answers to single requests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from rich.console import Console

from ultra_hstu import tasks
from ultra_hstu.config import Config
from ultra_hstu.data.interactions import ARRAYS, Interactions, ordered
from ultra_hstu.fields import changed
from ultra_hstu.serving.schema import AboutUser, Response, ScoreResponse
from ultra_hstu.serving.service import Service
from ultra_hstu.trackers import Tracker
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir


def fit(
    config: Config,
    interactions: Interactions,
    workdir: Path | str,
    *,
    console: Console | None = None,
    overwrite: bool = False,
    trackers: Sequence[Tracker] = (),
) -> dict[str, Any]:
    """Trains a run on these events, or goes on training it.

    The folder keeps a copy of the events, so that every command works on the run:
    `ultra-hstu evaluate --workdir=...`, `recommend`, `serve`, `export`.

    Args:
      config: what to train. `data.source` and `data.raw_dir` are set to that copy.
      workdir: folder of the run; made if it does not exist.
      console: where progress is shown; None: standard output.
      overwrite: start anew, and remove the run that is in `workdir`.
      trackers: what else receives the metrics of every epoch.

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
    task = tasks.of(config, events)
    return train(
        config, workdir, console=console, task=task, overwrite=overwrite, trackers=trackers
    )


def respond[R: AboutUser, A: Response | ScoreResponse](
    service: Service[R, A], request: Mapping[str, JsonValue]
) -> A:
    """What HTTP would answer: raw ids in, raw ids and titles out.

    Args:
      service: of `open_service`: a run, or a file of `experiments.export`.
      request: as in `ultra_hstu.serving.schema`, such as {"history": [1193, 914], "k": 5}.

    Raises:
      ValueError: what cannot be answered, with the reason.
    """
    checked = service.request_type.model_validate(request)
    return service.answer([service.prepare(checked)])[0]
