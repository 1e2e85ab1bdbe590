"""The registry of tasks: the one that a configuration asks for, on its data."""

from collections.abc import Mapping

from rich.console import Console

from kernels import hstu_attention, norm_linear
from ultra_hstu import progress
from ultra_hstu.checkpoint import load_params
from ultra_hstu.config import Config
from ultra_hstu.data import item_features, shards, signals, sources, synthetic_long, windows
from ultra_hstu.data.interactions import ARRAYS, Interactions, load_interactions
from ultra_hstu.feature_config import TITLE
from ultra_hstu.fields import changed
from ultra_hstu.initial import like_of
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.retrieval.task import RetrievalTask
from ultra_hstu.step import Params
from ultra_hstu.table_config import TableConfig
from ultra_hstu.task import Task
from ultra_hstu.vocabulary import Vocabulary, carried
from ultra_hstu.workdir import Workdir

QUIET = Console(quiet=True)
TASKS: dict[str, type[Task]] = {"retrieval": RetrievalTask, "ranking": RankingTask}


def check(config: Config) -> None:
    """Raises ValueError for a source, a protocol or an implementation that is not there.

    NotImplementedError for what does not go with `data.placement`. Reads nothing.
    """
    shards.check(config)
    if config.data.source != ARRAYS:
        sources.check(config.data.source)
    if config.train.protocol not in (known := _asked_for(config).PROTOCOLS):
        names = ", ".join(map(repr, known))
        raise ValueError(f"train.protocol={config.train.protocol!r} is not allowed: use {names}")
    named = {
        "implementation": hstu_attention.implementations(),
        "layer_implementation": norm_linear.implementations(),
    }
    for field, able in named.items():
        chosen = getattr(config.model, field)
        if chosen is not None and chosen not in able:
            listed = ", ".join(map(repr, able))
            raise ValueError(f"model.{field}={chosen!r} is not allowed: use {listed} or None")


def check_names(config: Config) -> None:
    """Raises ValueError for what a publisher's source does not have; reads nothing.

    That is names of actions and of features of users, and times.
    """
    data = config.data
    if data.source in (ARRAYS, sources.TABLE):
        return  # their columns are known once their files are opened
    if (public := sources.PUBLIC.get(data.source)) is not None:
        actions = (*public.table.actions, *public.table.features, *data.table.tasks)
        signals.check_names(config, actions, public.table.features)
        described, timed = public.users is not None, public.timed
        item_features.check_names(config.features, (*public.table.item_features, TITLE))
    else:
        long = data.source == sources.SYNTHETIC_LONG
        if long:
            signals.check_names(config, synthetic_long.ACTIONS, synthetic_long.FEATURES)
        else:
            signals.check_names(config, sources.SYNTHETIC_ACTIONS)
        item_features.check_names(config.features, ())
        described, timed = False, not long
        if data.table != TableConfig():
            raise ValueError(f"data.table does nothing under data.source={data.source!r}")
        if data.raw_dir is not None:
            raise ValueError(
                f"data.raw_dir={data.raw_dir!r} must be None: {data.source} is generated"
            )
    if config.rank.contextual and not described:
        raise ValueError(
            f"rank.contextual={config.rank.contextual}: {data.source} has no features of users"
        )
    need_times = {
        "data.ties": (data.ties, ("random",), "use 'stable'"),
        "train.protocol": (config.train.protocol, ("temporal",), "use 'validated'"),
        "eval.time": (config.eval.time, ("last", "request"), "use 'target'"),
    }
    for field, (value, needs, remedy) in need_times.items():
        if not timed and value in needs:
            raise ValueError(f"{field}={value!r} needs times, and {data.source} has none: {remedy}")


def of(config: Config, interactions: Interactions) -> Task:
    """The task on data that is in memory: ranking where `rank.tasks` names some, else retrieval."""
    check(config)
    if config.train.protocol == "windows":
        return of_window(config, interactions, _window(config, interactions))
    return _asked_for(config).of(config, interactions)


def _window(config: Config, interactions: Interactions) -> windows.Window:
    """The window of a configuration, the newest one if it names none."""
    known, number = windows.windows(interactions, config.windows), config.windows.number
    if number is not None and number >= len(known):
        raise ValueError(
            f"there is no window {number} in the data, whose newest is {len(known) - 1}, "
            f"{known[-1].words}: its model has nothing yet to be evaluated on"
        )
    return known[-1 if number is None else number]


def of_window(
    config: Config, interactions: Interactions, window: windows.Window, *, roomy: bool = False
) -> Task:
    """The task on a window: the data as it was at its end.

    Args:
      roomy: as of a `Task`.
    """
    known = windows.until(interactions, window.end)
    config = changed(config, windows={"number": window.number})
    return _asked_for(config).of(config, known, since=window.start, roomy=roomy)


def _asked_for(config: Config) -> type[Task]:
    return TASKS["ranking" if config.rank.tasks else "retrieval"]


def load(config: Config, console: Console | None = None) -> Task:
    """Reads the data, and prepares it the first time.

    Args:
      console: where it is said what is read; None: nowhere.

    Raises:
      ValueError: bad data, or a configuration that does not suit it.
    """
    return of(config, _read(config, console))


def _read(config: Config, console: Console | None) -> Interactions:
    check(config)
    check_names(config)
    source = config.data.source
    with progress.waiting(console or QUIET, "data", f"reading {source}") as came:
        on_disk = config.data.placement == "shards"
        interactions = (shards.load if on_disk else load_interactions)(config.data)
        came(f"{source}: {progress.counts(interactions)}")
    return interactions


def of_run(
    folder: Workdir,
    raw_dir: str | None = None,
    evaluation: Mapping[str, str] | None = None,
    console: Console | None = None,
    *,
    ahead: bool = False,
) -> Task:
    """The task of a run, as one device computes it.

    Args:
      raw_dir: where the raw data is now, if not where the run found it.
      evaluation: fields of `eval` that replace the run's own.
      console: as in `load`.
      ahead: of a model of a window, the task on the next one, which it is evaluated on.

    Raises:
      ValueError: no run, values that its task does not take, or data that is not what it was
        trained on.
    """
    config = changed(folder.read_for_one_device(raw_dir), eval=dict(evaluation or {}))
    config.validate()
    interactions = _read(config, console)
    folder.check_data(as_known(config, interactions))
    if ahead and config.windows.number is not None:
        config = changed(config, windows={"number": config.windows.number + 1})
    return of(config, interactions)


def as_known(config: Config, interactions: Interactions) -> Interactions:
    """The data that a run was trained on; of a window, as it was at its end."""
    if config.train.protocol != "windows":
        return interactions
    return windows.until(interactions, _window(config, interactions).end)


def params_of_run(folder: Workdir, task: Task) -> tuple[int, Params]:
    """(step, parameters) of a run as `load_params`, on the vocabulary of a task.

    The task may be that of a later window.
    """
    if task.config.train.protocol != "windows":
        return load_params(folder, task.recipe)
    old = Vocabulary.load(folder)
    step, params = load_params(folder, task.sized(old))
    tables = task.vocabulary.tables(old)
    return step, carried(params, like_of(task).params, tables, item_std=task.item_std)
