"""Trains one configuration.

python -m experiments.train --config=experiments/configs/ml1m_hstu.py --workdir=runs/ml1m_hstu
    [--config.data.raw_dir=PATH] [--seeds=42,43,44] [--record=experiments/results/NAME.json]
    [--distributed | --coordinator=HOST:PORT --processes=N --process=I]

Started again with the same arguments it goes on where it was. Any field can be overridden: --config.train.epochs=10. Many processes:
docs/context_parallel.md.
"""

import dataclasses
import logging
import statistics
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from experiments import command
from ultra_hstu import provenance, report, tasks, workdir
from ultra_hstu.config import from_config_dict
from ultra_hstu.parallel import processes
from ultra_hstu.train import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a file of experiments/configs", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; made if it does not exist")
_SEEDS = flags.DEFINE_list(
    "seeds",
    [],
    "several seeds, each in WORKDIR/seed_N, with mean and standard deviation at the end",
)
_RECORD = flags.DEFINE_string(
    "record",
    None,
    "also write the result with device, versions, commit, command and date to this JSON file",
)
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
flags.mark_flags_as_required(["config", "workdir"])

HISTORY = (
    "epoch",
    "step",
    "loss",
    "grad_norm",
    "seconds",
)  # what a record keeps of every epoch, beside the curves of its criteria


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
        logging.getLogger("ultra_hstu").setLevel(logging.ERROR)  # a warning is told once
    console = report.make_console(quiet=not first)
    config = from_config_dict(_CONFIG.value)
    try:
        seeds = [int(seed) for seed in _SEEDS.value]
    except ValueError:
        raise ValueError(
            f"--seeds={','.join(_SEEDS.value)} must be whole numbers, such as --seeds=42,43,44"
        ) from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={','.join(_SEEDS.value)} names a seed twice")
    processes.require_same(
        "command", {"--seeds": seeds, "--record": _RECORD.value, "version of jax": jax.__version__}
    )
    if _RECORD.value and first:
        Path(_RECORD.value).parent.mkdir(parents=True, exist_ok=True)
    root = Path(str(_WORKDIR.value))
    task = tasks.load(config)
    criteria = task.criteria
    results = []
    for seed in seeds or [config.train.seed]:
        seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        folder = root / f"seed_{seed}" if seeds else root
        result = train(seeded, folder, console=console, task=task)
        history = [
            {name: record[name] for name in (*HISTORY, *criteria.curves) if name in record}
            for record in (report.read_metrics(workdir.Workdir(folder).metrics) if first else [])
        ]
        results.append(result | {"history": history})
    rows = {f"{config.name}, seed {result['seed']}": result["best"] for result in results}
    if len(results) > 1:
        rows |= {
            "mean": summary(results, statistics.mean),
            "standard deviation": summary(results, statistics.stdev),
        }
    without_model = task.baselines("test")
    console.print(
        report.metrics_table(
            f"{config.name}: test, protocol {config.train.protocol}", rows | without_model, criteria
        )
    )
    paths = workdir.Workdir(folder)
    console.print(
        f"checkpoints   {paths.checkpoints}\nmetrics       {paths.metrics}\nTensorBoard   {paths.tensorboard}\ncurves        {paths.curves}"
    )
    if _RECORD.value and first:
        record: dict[str, Any] = {
            "config": config.name,
            **provenance.provenance(),
            "runs": results,
            "baselines": without_model,
        }
        # Of a sample: for ranking, a request with up to rank.targets targets.
        record["flops"] = {
            "training": task.flops("train").training,
            "inference": task.flops("test").inference,
        }
        if len(results) > 1:
            record |= {
                "mean": summary(results, statistics.mean),
                "stdev": summary(results, statistics.stdev),
            }
        workdir.write_json(Path(_RECORD.value), record)


def summary(results: list[dict[str, Any]], statistic: Any) -> dict[str, float]:
    return {
        name: statistic([result["best"][name] for result in results]) for name in results[0]["best"]
    }


if __name__ == "__main__":
    command.run(main)
