"""The registry of tasks: the one that a configuration asks for, on its data."""

from collections.abc import Mapping

from rich.console import Console

from kernels.hstu_attention.api import implementations
from ultra_hstu import progress
from ultra_hstu.config import Config
from ultra_hstu.data import shards, signals, sources
from ultra_hstu.data.interactions import ARRAYS, Interactions, load_interactions
from ultra_hstu.fields import changed
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.retrieval.task import RetrievalTask
from ultra_hstu.task import Task
from ultra_hstu.workdir import Workdir

QUIET = Console(quiet=True)
TASKS: dict[str, type[Task]] = {"retrieval": RetrievalTask, "ranking": RankingTask}


def check(config: Config) -> None:
    """Raises ValueError for a source, a protocol or an implementation that is not there.

    Reads nothing.
    """
    if config.data.source != ARRAYS:
        sources.check(config.data.source)
    if config.train.protocol not in (known := _asked_for(config).PROTOCOLS):
        names = ", ".join(map(repr, known))
        raise ValueError(f"train.protocol={config.train.protocol!r} is not allowed: use {names}")
    chosen, able = config.model.implementation, implementations()
    if chosen is not None and chosen not in able:
        listed = ", ".join(map(repr, able))
        raise ValueError(f"model.implementation={chosen!r} is not allowed: use {listed} or None")


def check_names(config: Config) -> None:
    """Raises ValueError for what a publisher's source does not have; reads nothing.

    That is names of actions and of features of users, and times.
    """
    data = config.data
    if data.source in (ARRAYS, sources.TABLE):
        return  # their columns are known once their files are opened
    builder = sources.builder_of(data.source)
    variant = builder.builder_configs[data.source]
    signals.check_names(config, builder.ACTIONS)
    if config.rank.contextual and not variant.context_files:
        raise ValueError(
            f"rank.contextual={config.rank.contextual}: {data.source} has no features of users"
        )
    if not variant.files and data.raw_dir is not None:
        raise ValueError(f"data.raw_dir={data.raw_dir!r} must be None: {data.source} is generated")
    timed = {
        "data.ties": (data.ties, ("random",), "use 'stable'"),
        "train.protocol": (config.train.protocol, ("temporal",), "use 'validated'"),
        "eval.time": (config.eval.time, ("last", "request"), "use 'target'"),
    }
    for field, (value, needs, remedy) in timed.items():
        if not builder.TICKS and value in needs:
            raise ValueError(f"{field}={value!r} needs times, and {data.source} has none: {remedy}")


def of(config: Config, interactions: Interactions) -> Task:
    """The task on data that is in memory: ranking where `rank.tasks` names some, else retrieval."""
    check(config)
    return _asked_for(config).of(config, interactions)


def _asked_for(config: Config) -> type[Task]:
    return TASKS["ranking" if config.rank.tasks else "retrieval"]


def load(config: Config, console: Console | None = None) -> Task:
    """Reads the data, and prepares it the first time.

    Args:
      console: where it is said what is read; None: nowhere.

    Raises:
      ValueError: bad data, or a configuration that does not suit it.
    """
    check(config)
    check_names(config)
    source = config.data.source
    with progress.waiting(console or QUIET, "data", f"reading {source}") as came:
        on_disk = config.data.placement == "shards"
        interactions = (shards.load if on_disk else load_interactions)(config.data)
        came(f"{source}: {progress.counts(interactions)}")
    return of(config, interactions)


def of_run(
    folder: Workdir,
    raw_dir: str | None = None,
    evaluation: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> Task:
    """The task of a run, as one device computes it.

    Args:
      raw_dir: where the raw data is now, if not where the run found it.
      evaluation: fields of `eval` that replace the run's own.
      console: as in `load`.

    Raises:
      ValueError: no run, values that its task does not take, or data that is not what it was
        trained on.
    """
    config = changed(folder.read_for_one_device(raw_dir), eval=dict(evaluation or {}))
    config.validate()
    task = load(config, console)
    folder.check_data(task.interactions)
    return task
