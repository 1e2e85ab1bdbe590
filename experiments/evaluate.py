"""Evaluates the best checkpoint of a run on its test (or validation) part.

python -m experiments.evaluate --workdir=runs/ml1m_hstu [--split=validation] [--raw_dir=PATH]
    [--config.eval.hide=all] [--config.eval.repeats=rank] [--config.eval.time=last]
    [--tables=float32,int8,int4] [--record=experiments/results/NAME.json]

What is hidden and what time is told to the model (docs/evaluation.md) may differ from the run's own
configuration. `--tables` evaluates on the item table as each kind of serving table gives it back,
and says how many bytes go to the device.
"""

import jax
import numpy as np
from absl import flags
from jaxtyping import Float

from experiments import command
from experiments.record import Record
from ultra_hstu import progress, quantization, report, tasks
from ultra_hstu.serving import load_params
from ultra_hstu.workdir import Workdir

_WORKDIR, _RAW_DIR = command.define_run()
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "which part of the data")
_TABLES = flags.DEFINE_list(
    "tables",
    ["float32"],
    f"what the item table is served from: {', '.join(quantization.KINDS)}, or several of them",
)
_EVAL = command.define_eval()
_RECORD = command.define_record()


def main(_: list[str]) -> None:
    folder, working = Workdir(_WORKDIR.value), command.progress_console(stderr=True)
    given = {name: flag.value for name, flag in _EVAL.items() if flag.value is not None}
    task = tasks.of_run(folder, _RAW_DIR.value, given, working)
    config, console = task.config, report.make_console()
    with progress.waiting(working, "model", "reading the checkpoint") as came:
        step, params = load_params(folder, task.recipe)
        came(f"{progress.model(config, params, [])}, of step {step}")
    with jax.default_matmul_precision(config.train.matmul_precision):
        measure, metrics = task.evaluator(_SPLIT.value), {}
        for kind in _TABLES.value:
            with progress.waiting(working, "evaluate", f"compiling and scoring, {kind} table"):
                metrics[kind] = measure(quantization.unpacked(quantization.packed(params, kind)))
        with progress.waiting(working, "evaluate", "measuring what needs no model"):
            others = task.baselines(_SPLIT.value)
    rows = {
        f"{config.name}, step {step}{'' if kind == 'float32' else f', {kind} table'}": values
        for kind, values in metrics.items()
    }
    title = f"{_SPLIT.value}, {report.conditions(config)}"
    console.print(
        report.metrics_table(title, rows | others, measure.criteria, measure.criteria.details)
    )
    table_ID = quantization.item_table(params)
    tables = {kind: served(table_ID, kind, config.data.max_history) for kind in metrics}
    for kind, table in tables.items():
        console.print(
            f"{kind:>8} table: {table['bytes']} bytes, {table['row_bytes']} a row, "
            f"{table['history_bytes']} for a whole history"
        )
    Record(
        _RECORD.value,
        config=config.name,
        split=_SPLIT.value,
        protocol=config.train.protocol,
        eval=config.evaluation,
        step=step,
    ).add(
        tables={
            kind: {"metrics": values, "table": tables[kind]} for kind, values in metrics.items()
        },
        baselines=others,
    )


def served(table_ID: Float[np.ndarray, "I D"], kind: str, max_history: int) -> dict[str, float]:
    """Bytes of a table of this kind, of a row, and of a request's history; and its error.

    The rows of a whole history go to the device for a request.
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
