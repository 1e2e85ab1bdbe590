"""Evaluates the best checkpoint of a run on its test (or validation) part.

python -m experiments.evaluate --workdir=runs/ml1m_hstu [--split=validation] [--raw_dir=PATH]
    [--config.eval.hide=all] [--config.eval.repeats=rank] [--config.eval.time=last]
    [--tables=float32,int8,int4] [--record=experiments/results/NAME.json]

What is hidden and what time is told to the model (docs/evaluation.md) may differ from the run's own
configuration. The folder of `train --seeds` is evaluated run by run, with mean and standard
deviation. `--tables` evaluates on the item table as each kind of serving table gives it back,
and says how many bytes go to the device.
"""

import math

import jax
import numpy as np
from absl import flags
from jaxtyping import Float

from experiments import command
from experiments.record import Json, Record
from ultra_hstu import progress, quantization, report, tasks
from ultra_hstu.criteria import WARMTH, Metrics, by_warmth, mean_and_deviation
from ultra_hstu.evaluate import Evaluator
from ultra_hstu.serving.recommend import require_dense
from ultra_hstu.workdir import Workdir, require_same

_WORKDIR, _RAW_DIR = command.define_run("folder of a trained run, or of the runs of several seeds")
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "which part of the data")
_TABLES = flags.DEFINE_list(
    "tables",
    ["float32"],
    f"what the item table is served from: {', '.join(quantization.KINDS)}, or several of them",
)
_EVAL = command.define_eval()
_RECORD = command.define_record()


def main(_: list[str]) -> None:
    parent, working = Workdir(_WORKDIR.value), command.progress_console(stderr=True)
    seeds = {} if parent.config.exists() else parent.seeds
    runs = list(seeds.values()) or [parent]
    given = {name: flag.value for name, flag in _EVAL.items() if flag.value is not None}
    task = tasks.of_run(runs[0], _RAW_DIR.value, given, working, ahead=True)
    require_same(runs)
    config, console, kinds = task.config, report.make_console(), _TABLES.value
    steps, found = [], []  # of every run: its step, and its metrics by kind of table
    with jax.default_matmul_precision(config.train.matmul_precision):
        measure: Evaluator | None = None
        for folder in runs:
            with progress.waiting(working, "model", f"reading {folder.checkpoints}") as came:
                if task.config.windows.number is None:  # else `of_run` has looked at more
                    folder.check_data(task.interactions)
                step, params = tasks.params_of_run(folder, task)
                came(f"{progress.model(config, params, [])}, of step {step}")
                answering, params = task.folded(params)
                measure = measure or answering.evaluator(_SPLIT.value)
            metrics = {}
            for kind in kinds:
                if config.features.series or config.loss.similarity == "mol":
                    require_dense(kind, config)
                with progress.waiting(working, "evaluate", f"compiling and scoring, {kind} table"):
                    metrics[kind] = measure(
                        quantization.unpacked(quantization.packed(params, kind))
                    )
            steps.append(step)
            found.append(metrics)
        with progress.waiting(working, "evaluate", "measuring what needs no model"):
            others = task.baselines(_SPLIT.value)
    rows: dict[str, Metrics] = {}
    tables: dict[str, Json] = {}
    item_table_ID = quantization.item_table(params)
    for kind in kinds:
        of_kind, suffix = [metrics[kind] for metrics in found], ""
        if kind != "float32":
            suffix = f", {kind} table"
        for number, (step, of_run) in enumerate(zip(steps, of_kind, strict=True)):
            seed = f", seed {list(seeds)[number]}" if seeds else ""
            rows[f"{config.name}{seed}, step {step}{suffix}"] = of_run
        tables[kind] = {"metrics": of_kind[0]}
        if len(runs) > 1:
            mean, deviation = mean_and_deviation(of_kind)
            rows |= {f"mean{suffix}": mean, f"standard deviation{suffix}": deviation}
            by_seed = dict(zip(map(str, seeds), of_kind, strict=True))
            tables[kind] = {"metrics": mean, "stdev": deviation, "seeds": by_seed}
        tables[kind]["table"] = served(item_table_ID, kind, config.data.max_history)
    assert measure is not None  # there is a run
    title = f"{_SPLIT.value}, {report.conditions(config)}"
    console.print(
        report.metrics_table(title, rows | others, measure.criteria, measure.criteria.details)
    )
    parts = by_warmth(measure.criteria)
    title = f"{_SPLIT.value}, by training events of the target's item\n{_parts()}"
    console.print(report.metrics_table(title, rows, parts, parts.details))
    for kind, values in tables.items():
        table = values["table"]
        console.print(
            f"item table in {kind}: {table['bytes']:,} bytes, {table['row_bytes']:,} an item, "
            f"{table['history_bytes']:,} for a history of {config.data.max_history} events"
        )
    Record(
        _RECORD.value,
        config=config.name,
        split=_SPLIT.value,
        protocol=config.train.protocol,
        eval=config.evaluation,
        step=steps if seeds else steps[0],
    ).add(tables=tables, baselines=others)


def _parts() -> str:
    """The parts that are told apart, in words."""
    return ", ".join(
        f"{name}: {low} or more" if math.isinf(high) else f"{name}: {low} to {high}"
        for name, low, high in WARMTH
    )


def served(table_ID: Float[np.ndarray, "I D"], kind: str, max_history: int) -> dict[str, float]:
    """Bytes of a table of this kind, of an entry, and of a request's history; and its error.

    The entries of a full history go to the device for a request.
    """
    table = quantization.quantize(table_ID, kind)
    history = np.arange(max_history) % len(table_ID)
    error_ID = np.asarray(quantization.dense(table)) - table_ID
    return {
        "bytes": table.nbytes,
        "row_bytes": table.nbytes // len(table_ID),
        "history_bytes": quantization.take(table, history).nbytes,
        "rms_error_over_rms_value": float(np.sqrt(np.mean(error_ID**2) / np.mean(table_ID**2))),
    }


if __name__ == "__main__":
    command.run(main)
