"""The registry of tasks: the one that a configuration asks for, on its data."""

from collections.abc import Mapping

from ultra_hstu.config import Config
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.data.sources import builder_of
from ultra_hstu.fields import changed
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.retrieval.task import RetrievalTask
from ultra_hstu.task import Task
from ultra_hstu.workdir import Workdir

TASKS: dict[str, type[Task]] = {"retrieval": RetrievalTask, "ranking": RankingTask}


def check(config: Config) -> None:
    """Raises ValueError for a source or a protocol that is not there; reads nothing."""
    builder_of(config.data.source)
    if config.train.protocol not in (known := _asked_for(config).PROTOCOLS):
        names = ", ".join(map(repr, known))
        raise ValueError(f"train.protocol={config.train.protocol!r} is not allowed: use {names}")


def of(config: Config, interactions: Interactions) -> Task:
    """The task on data that is in memory: ranking where `rank.tasks` names some, else retrieval."""
    check(config)
    return _asked_for(config).of(config, interactions)


def _asked_for(config: Config) -> type[Task]:
    return TASKS["ranking" if config.rank.tasks else "retrieval"]


def load(config: Config) -> Task:
    """Reads the data, and prepares it the first time.

    Raises:
      ValueError: bad data, or a configuration that does not suit it.
    """
    check(config)
    return of(config, load_interactions(config.data))


def of_run(
    folder: Workdir, raw_dir: str | None = None, evaluation: Mapping[str, str] | None = None
) -> Task:
    """The task of a run, as one device computes it.

    Args:
      raw_dir: where the raw data is now, if not where the run found it.
      evaluation: fields of `eval` that replace the run's own.

    Raises:
      ValueError: no run, values that its task does not take, or data that is not what it was
        trained on.
    """
    config = changed(folder.read_for_one_device(raw_dir), eval=dict(evaluation or {}))
    config.validate()
    task = load(config)
    folder.check_data(task.interactions)
    return task
