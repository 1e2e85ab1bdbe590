"""Trains one configuration.

python -m experiments.train --config=ml1m_hstu --workdir=runs/ml1m_hstu
    [--config.data.raw_dir=PATH] [--seeds=42,43,44] [--overwrite] [--init_from=RUN]
    [--record=experiments/results/NAME.json] [--profile] [--split=validation] [--nobaselines]
    [--distributed | --coordinator=HOST:PORT --processes=N --process=I]

`experiments/configs` holds the configurations; a file of your own works as well. Any field can be
overridden: --config.train.epochs=10; --show prints what comes of it (docs/configuration.md has all
fields). Started again with the same arguments it goes on where it was.
Many processes: docs/many_processes.md.
"""

import logging
import runpy
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags

from experiments import command
from experiments.record import Json, Record
from ultra_hstu import paths, progress, report, tasks
from ultra_hstu.criteria import Criteria, Metrics, display_name, mean_and_deviation
from ultra_hstu.fields import changed
from ultra_hstu.parallel import make_mesh, processes
from ultra_hstu.trackers import Tracker
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir

_CONFIG = command.define_config()
_WORKDIR = command.as_path(
    flags.DEFINE_string("workdir", None, "folder of the run; made if it does not exist")
)
_INIT_FROM = command.as_path(
    flags.DEFINE_string(
        "init_from", None, "folder of a run whose parameters this one starts from: train.init_from"
    )
)
_SHOW = flags.DEFINE_bool(
    "show", False, "print the configuration, with what differs from the defaults, and do no more"
)
_SEEDS = flags.DEFINE_list(
    "seeds",
    [],
    "several seeds, each in WORKDIR/seed_N, with mean and standard deviation at the end",
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "start over, and remove the run in WORKDIR; without it that run goes on"
)
_TRACKERS = flags.DEFINE_multi_string(
    "tracker",
    [],
    "FILE.py:NAME, whose NAME() makes a tracker of metrics (docs/library.md); may come again",
)
_PROFILE = flags.DEFINE_bool(
    "profile", False, "trace some steps into WORKDIR/profile, and print where their time goes"
)
_SPLIT = flags.DEFINE_enum(
    "split",
    "test",
    ["test", "validation"],
    "what the best epoch is measured on; validation: a trial, which leaves the test items alone",
)
_BASELINES = flags.DEFINE_bool(
    "baselines", True, "also measure what needs no model; of 100,000,000 events that takes minutes"
)
_RECORD = command.define_record()
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "one of the processes of a SLURM step, a Kubernetes job or mpirun, which JAX finds",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "without a cluster: HOST:PORT where process 0 listens, the same in all processes",
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "without a cluster: how many processes there are"
)
_PROCESS = flags.DEFINE_integer("process", None, "without a cluster: which of them this is, from 0")
_CONNECT_SECONDS = flags.DEFINE_integer(
    "connect_seconds", 60, "how long to wait for the other processes to start"
)

# What a record keeps of every epoch, beside the curves of its criteria.
HISTORY = ("epoch", "step", "loss", "grad_norm", "seconds")

log = logging.getLogger("experiments.train")


def main(_: list[str]) -> None:
    processes.join(
        _COORDINATOR.value,
        _PROCESSES.value,
        _PROCESS.value,
        detect=_DISTRIBUTED.value,
        seconds=_CONNECT_SECONDS.value,
    )
    first = processes.is_first()
    if not first:
        logging.getLogger("ultra_hstu").setLevel(logging.ERROR)  # one process warns for all
    console = report.make_console(quiet=not first)
    config = command.resolved(_CONFIG.value)
    if _INIT_FROM.value is not None:
        source = str(Path(_INIT_FROM.value).absolute())
        if config.train.init_from not in (None, source):
            raise ValueError(
                f"--init_from={source} and --config.train.init_from={config.train.init_from} name "
                "two runs: leave one out"
            )
        config = changed(config, train={"init_from": source})
    tasks.check(config)
    tasks.check_names(config)
    if _SHOW.value:
        console.print("\n".join(command.configuration_lines(config)), markup=False, soft_wrap=True)
        return
    if _WORKDIR.value is None:
        raise ValueError("--workdir is missing: name the folder of the run")
    working = command.progress_console(quiet=not first)
    trackers = [read_tracker(given) for given in _TRACKERS.value] if first else []
    seeds = read_seeds(_SEEDS.value)
    if seeds and "train.seed" in command.given_fields("config"):
        raise ValueError("--config.train.seed has no effect beside --seeds: name the seed there")
    if (mesh := config.parallel).data * mesh.context > 1:
        make_mesh(mesh.data, mesh.context)  # which raises where there are too few devices
    processes.require_same(
        "command", {"--seeds": seeds, "--record": _RECORD.value, "version of jax": jax.__version__}
    )
    record = Record(_RECORD.value if first else None, config=config.name, eval=config.evaluation)
    root, overwrite = Path(_WORKDIR.value), _OVERWRITE.value
    if seeds and Workdir(root).config.exists():
        raise ValueError(f"{root} is the folder of one run: choose another --workdir for --seeds")
    runs = [
        (changed(config, train={"seed": seed}), Workdir(root / f"seed_{seed}" if seeds else root))
        for seed in seeds or [config.train.seed]
    ]
    for seeded, folder in runs:  # before any data is read
        processes.broadcast(lambda: folder.check_owner(seeded, overwrite=overwrite))  # noqa: B023
    task = tasks.load(config, working)
    criteria = task.criteria
    results = []
    for seeded, folder in runs:
        if seeds:
            progress.line(working, "seed", f"{seeded.train.seed}, in {folder.path}")
        result = train(
            seeded,
            folder.path,
            console=working,
            task=task,
            overwrite=overwrite,
            trackers=[make() for make in trackers],
            profile=_PROFILE.value,
            split=_SPLIT.value,
        )
        history = [
            {name: epoch[name] for name in (*HISTORY, *criteria.curves) if name in epoch}
            for epoch in (report.read_metrics(folder.metrics) if first else [])
        ]
        results.append(result | {"history": history})
    rows = {f"{config.name}, seed {result['seed']}": result["best"] for result in results}
    if len(results) > 1:
        mean, deviation = mean_and_deviation([result["best"] for result in results])
        record.values |= {"mean": mean, "stdev": deviation}
        rows |= {"mean": mean, "standard deviation": deviation}
    without_model: dict[str, Metrics] = {}
    if config.train.protocol == "windows":
        for result in results:
            title = f"{config.name}, seed {result['seed']}: each window before it is learned"
            console.print(report.windows_table(title, result["windows"], criteria))
    elif _BASELINES.value:
        with progress.waiting(working, "result", "measuring what needs no model"):
            without_model = task.baselines(_SPLIT.value)
        for result in results if first else ():
            warn_below_floor(result, without_model, criteria)
    title = f"{config.name}: {_SPLIT.value}, {report.conditions(config)}"
    console.print(report.metrics_table(title, rows | without_model, criteria))
    console.print(
        f"checkpoints   {folder.checkpoints}\nmetrics       {folder.metrics}\n"
        f"TensorBoard   {folder.tensorboard}\ncurves        {folder.curves}"
    )
    if _RECORD.value and first:
        # Operations of a sample; for ranking that is a request with up to rank.targets targets.
        flops = {
            "training": task.flops("train").training,
            "inference": task.flops("test").inference,
        }
        record.add(
            data=task.interactions.fingerprint(),
            protocol=config.train.protocol,
            seeds=[result["seed"] for result in results],
            runs=results,
            baselines=without_model,
            flops=flops,
        )


def warn_below_floor(result: Json, baselines: dict[str, Metrics], criteria: Criteria) -> None:
    """Says so where a run ended with less than needs no model, as one that diverged does.

    Events on the disk have no baselines, and so no warning.
    """
    if (floor := baselines.get(criteria.floor)) is None:
        return
    metric = criteria.selection
    for part in ("best", "last"):
        if part in result and not criteria.better(result[part][metric], floor[metric]):
            log.warning(
                "seed %d, %s epoch: %s is %.4f, no better than %.4f of %s. The run has diverged, "
                "or has learnt nothing: lower optim.learning_rate or set optim.clip_norm",
                result["seed"],
                part,
                display_name(metric),
                result[part][metric],
                floor[metric],
                criteria.floor,
            )
            return


def read_tracker(given: str) -> Callable[[], Tracker]:
    """What FILE.py:NAME names. Raises ValueError where there is none, or the file cannot be run."""
    path, _, name = given.rpartition(":")
    file = paths.local(path)
    if not file.is_file():
        raise ValueError(f"--tracker={given}: there is no file {path!r}; give FILE.py:NAME")
    try:
        made = runpy.run_path(str(file)).get(name)
    except Exception as error:
        raise ValueError(f"--tracker={given}: {type(error).__name__}: {error}") from error
    if not callable(made):
        raise ValueError(f"--tracker={given}: {file} has no class or function {name!r}")
    return made


def read_seeds(given: list[str]) -> list[int]:
    """Raises ValueError for what is no whole number, or stands twice."""
    try:
        seeds = [int(seed) for seed in given]
    except ValueError:
        raise ValueError(
            f"--seeds={','.join(given)} must be whole numbers, such as --seeds=42,43,44"
        ) from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={','.join(given)} names a seed twice")
    return seeds


if __name__ == "__main__":
    command.run(main)
