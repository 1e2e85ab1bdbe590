"""Writes the tables and figures of the README and the docs from the files under experiments/results, and nothing else: no number is typed by hand.

python -m scripts.tables.make [--check]

A table stands in its page between `<!-- table NAME -->` and `<!-- end NAME -->`. `--check` changes nothing and fails if a table is not current.
"""

import sys
from collections.abc import Callable
from typing import Any

import matplotlib
from absl import app, flags

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from scripts.bench import load_balance as bench_load_balance
from scripts.tables import serve as serve_tables
from scripts.tables.attention import attention_figure, attention_table, gpu_tests_table
from scripts.tables.context_parallel import (
    balance_table,
    context_parallel_figure,
    longest_table,
    reshard_table,
    steps_table,
)
from scripts.tables.ranking import ablation_table, ranking_table
from scripts.tables.serving import (
    cache_precision_table,
    host_tables_table,
    micro_batches_table,
    operations_table,
    serving_figure,
    serving_table,
)
from scripts.tables.tables import (
    FIGURES,
    NOT_MEASURED,
    ROOT,
    load,
    markdown,
    mean_and_deviation,
    short,
)

METRICS = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "hr@200", "mrr")
CURVES = {
    "ml1m_sasrec": "tab:grey",
    "ml1m_hstu": "tab:blue",
    "ml1m_hstu_large": "tab:red",
}  # colours in the figure
MODELS = {
    "ml1m_sasrec": "SASRec",
    "ml1m_hstu": "HSTU",
    "ml1m_ultra": "ULTRA-HSTU",
    "ml1m_hstu_large": "HSTU-large",
}

# Published by the reference implementation (its README, 04/15/2024; ties in arbitrary order) and measured with it on the true order of
# the same data, one seed, last of 101 epochs. These are other people's numbers, so they stand here and not under results.
REFERENCE = {
    "published table": {
        "ml1m_sasrec": {
            "hr@10": 0.2853,
            "ndcg@10": 0.1603,
            "hr@50": 0.5474,
            "ndcg@50": 0.2185,
            "hr@200": 0.7528,
        },
        "ml1m_hstu": {
            "hr@10": 0.3097,
            "ndcg@10": 0.1720,
            "hr@50": 0.5754,
            "ndcg@50": 0.2307,
            "hr@200": 0.7716,
        },
        "ml1m_hstu_large": {
            "hr@10": 0.3294,
            "ndcg@10": 0.1893,
            "hr@50": 0.5935,
            "ndcg@50": 0.2481,
            "hr@200": 0.7839,
        },
    },
    "public PyTorch code, true order": {
        "ml1m_sasrec": {
            "hr@10": 0.2925,
            "ndcg@10": 0.1670,
            "hr@50": 0.5568,
            "ndcg@50": 0.2255,
            "hr@200": 0.7556,
            "mrr": 0.1439,
        },
        "ml1m_hstu": {
            "hr@10": 0.3252,
            "ndcg@10": 0.1868,
            "hr@50": 0.5815,
            "ndcg@50": 0.2434,
            "hr@200": 0.7685,
            "mrr": 0.1590,
        },
        "ml1m_hstu_large": {
            "hr@10": 0.3581,
            "ndcg@10": 0.2132,
            "hr@50": 0.6108,
            "ndcg@50": 0.2694,
            "hr@200": 0.7894,
            "mrr": 0.1833,
        },
    },
}
REFERENCE_SPEED = [  # the public PyTorch code at its best, timed on the same kinds of machine: forward, loss, backward, optimizer, nothing else
    [
        "HSTU",
        "1 x NVIDIA H200",
        "public PyTorch code: the steps of 101 epochs, no evaluation",
        "83 s",
    ],
    ["HSTU", "2 CPU cores", "public PyTorch code: one training step, batch 128", "751 ms"],
]
VARIANTS = {  # file suffix -> what it was
    "published": "ours, `published`",
    "random_ties": "ours, `published`, ties at random",
    "validated": "ours, `validated`",
    "temporal": "ours, `temporal`",
}
SUBSEQUENCES = {  # file suffix -> what the runs were trained on
    "sl_whole": "whole histories",
    "sl_recent": "alpha 1.6, newest events",
    "sl_random": "alpha 1.6, random events",
    "sl_weighted": "alpha 1.6, recency-weighted events",
}
LONG_ULTRA = {  # variants of scripts.bench.long
    "ultra": "`long_ultra`",
    "plain_causal": "plain causal attention, no truncation",
    "no_truncation": "no truncation",
    "no_window": "no window",
    "keeps_activations": '`remat="none"`',
    "fp8": '`projection="fp8"`',
}


def ml1m_table() -> str:
    """One line a model and condition; ours with mean and standard deviation over seeds."""
    rows, notes = [], []
    for config, model in MODELS.items():
        for source, values in REFERENCE.items():
            if config in values:
                rows.append(
                    [model, source, "", *(short(values[config].get(name)) for name in METRICS)]
                )
        for suffix, label in VARIANTS.items():
            record = load(f"{config}_{suffix}")
            if not record:
                continue
            mark = ""
            if note := record.get("note"):
                notes += [] if note in notes else [note]
                mark = f" [{notes.index(note) + 1}]"
            for which, words in (
                (("best", ""), ("last", ", last epoch"))
                if suffix == "published"
                else (("best", ""),)
            ):
                runs = [run[which] for run in record["runs"]]
                cells = [mean_and_deviation([run[name] for run in runs]) for name in METRICS]
                rows.append([model, label + words, str(len(runs)) + mark, *cells])
    return "\n\n".join(
        [
            markdown(["model", "condition", "seeds", *(name.upper() for name in METRICS)], rows),
            *(f"[{number}] {note}" for number, note in enumerate(notes, start=1)),
        ]
    )


def speed_table() -> str:
    """Seconds of a whole run that had the device to itself (evaluation every epoch included, compilation not), and of a training step."""
    rows = []
    for config, model in MODELS.items():
        record = load(f"{config}_published")
        if record and not record.get("shared_device"):
            seconds = sorted(run["seconds"] for run in record["runs"])
            rows.append(
                [
                    model,
                    record["device"],
                    f"{record['runs'][0]['epochs']} epochs, evaluation each",
                    f"{seconds[len(seconds) // 2]:.1f} s",
                ]
            )
        for device in ("h200", "cpu"):
            step = load(f"step_{config}_{device}")
            if step:
                place = step["device"] if device != "cpu" else f"{step['host_cores']} CPU cores"
                rows.append(
                    [
                        model,
                        place,
                        "one training step, batch 128",
                        f"{step['device_feed']['step_ms_median']:.0f} ms",
                    ]
                )
                rows.append(
                    [
                        model,
                        place,
                        "the same, data streamed",
                        f"{step['streamed_feed']['step_ms_median']:.0f} ms",
                    ]
                )
                rows.append(
                    [
                        model,
                        place,
                        "share of it waiting for data",
                        f"{100 * step['streamed_feed']['input_wait_share']:.2f} %",
                    ]
                )
                rows.append(
                    [
                        model,
                        place,
                        "ranking all test users",
                        f"{step['evaluation']['seconds']:.1f} s, {step['evaluation']['peak_MiB']:.0f} MiB",
                    ]
                )
    return markdown(["model", "device", "what", "value"], rows + REFERENCE_SPEED)


def stochastic_length_table() -> str:
    """HSTU on MovieLens-100K, trained on whole histories and on parts of them."""
    rows = []
    for suffix, label in SUBSEQUENCES.items():
        record = load(f"ml100k_hstu_{suffix}")
        if record:
            runs = [run["best"] for run in record["runs"]]
            flops = f"{record['flops']['training'] / 1e6:.1f}" if "flops" in record else ""
            rows.append(
                [
                    label,
                    str(len(runs)),
                    *(mean_and_deviation([run[name] for run in runs]) for name in METRICS),
                    flops,
                ]
            )
    return markdown(
        ["trained on", "seeds", *(name.upper() for name in METRICS), "training MFLOP a sample"],
        rows,
    )


def load_balance_table() -> str:
    """Spread of the load over ranks, and step times, under plain and load-balanced stochastic length."""
    record = load("load_balance_cpu")
    if not record:
        return NOT_MEASURED
    rows = []
    for name, values in record["sets"].items():
        for policy in ("plain", "balanced"):
            loads = [values["load"][ranks][policy] for ranks in ("8", "64")]
            step = values["step"][policy]
            kept = f"{100 * values['kept_share_of_events'][policy]:.0f} %"
            load_cells = [
                f"{load['max_over_mean']:.2f} / {load['std_over_mean']:.2f}" for load in loads
            ]
            mean_load = f"{loads[0]['mean'] / values['load']['8']['plain']['mean']:.2f}"
            rows.append(
                [
                    name,
                    policy,
                    f"{values['gamma']:.2f}",
                    kept,
                    mean_load,
                    *load_cells,
                    str(step["rows"]),
                ]
                + [f"{1e3 * step[key]:.0f}" for key in ("slowest", "slowest_predicted", "mean")]
            )
    header = [
        "lengths",
        "draws",
        "gamma",
        "events kept",
        "load / plain",
        "8 ranks: max / mean, std / mean",
        "64 ranks",
    ]
    return markdown(
        [*header, "rows of the buffer", "slowest of 8, ms", "predicted", "mean of 8, ms"], rows
    )


def int4_table() -> str:
    """The metrics of a trained run, served from each kind of item table."""
    record = load("int4_tables")
    if not record:
        return NOT_MEASURED
    names = ("hr@10", "ndcg@10", "hr@50", "hr@200", "mrr")
    rows = []
    for kind, values in record["tables"].items():
        table = values["table"]
        sizes = [str(table[size]) for size in ("row_bytes", "history_bytes", "bytes")]
        rows.append(
            [
                kind,
                *sizes,
                f"{100 * table['rms_error_over_rms_value']:.1f} %",
                *(short(values["metrics"][name]) for name in names),
            ]
        )
    header = [
        "item table",
        "bytes a row",
        "of a request's history",
        "of all",
        "RMS error / RMS value",
        *(name.upper() for name in names),
    ]
    return markdown(header, rows)


def remark(record: dict[str, Any]) -> str:
    return f"; {record['note']}" if "note" in record else ""


def long_ultra_table() -> str:
    """A training step of long_ultra, and of the same model with pieces off."""
    record = load("long_ultra_h200")
    if not record:
        return NOT_MEASURED
    rows = []
    for name, found in record["variants"].items():
        if "step_ms" in found:
            memory, encoder = (
                f"{found['temporary_GiB']:.1f}",
                f"{found['encoder_inference_TFLOP_a_sample']:.3f}",
            )
            cells = [
                memory,
                encoder,
                f"{found['training_TFLOP_a_sample']:.2f}",
                f"{found['TFLOP_a_second']:.0f}",
            ]
            rows.append(
                [
                    LONG_ULTRA.get(name, name),
                    f"{found['step_ms']:.0f}",
                    f"{found['events_a_second'] / 1e6:.2f}",
                    *cells,
                ]
            )
    header = [
        "",
        "step, ms",
        "million events/s",
        "temporaries, GiB",
        "encoder, forward: TFLOP a sample",
        "training: TFLOP a sample",
        "TFLOP/s",
    ]
    return (
        markdown(header, rows)
        + f"\n\n{record['device']}, commit {record['commit']}, attention `{record['implementation']}`{remark(record)}."
    )


def layer_memory_table() -> str:
    """Bytes a token and layer that each way of keeping and recomputing holds."""
    record = load("layer_h200")
    if not record:
        return NOT_MEASURED
    cell = lambda found, key: f"{found[key]:.2f}" if key in found else ""  # noqa: E731
    rows = [
        [name, f"{found['bytes_a_token']:.0f}", cell(found, "ms")]
        for name, found in record["modes"].items()
    ]
    depths = " and ".join(map(str, record["depths"]))
    return (
        markdown(
            ["model.remat", "bytes a token and layer", "forward and backward, ms a layer"], rows
        )
        + f"\n\n{record['device']}, commit {record['commit']}, {record['rows']:,} tokens, {depths} layers{remark(record)}."
    )


TABLES: dict[str, Callable[[], str]] = {
    "ml1m": ml1m_table,
    "speed": speed_table,
    "attention": attention_table,
    "test_gpu": gpu_tests_table,
    "ranking": ranking_table,
    "ablation": ablation_table,
    "stochastic_length": stochastic_length_table,
    "load_balance": load_balance_table,
    "int4": int4_table,
    "long_ultra": long_ultra_table,
    "layer_memory": layer_memory_table,
    "serving": serving_table,
    "serving_micro_batches": micro_batches_table,
    "serving_operations": operations_table,
    "cache_precision": cache_precision_table,
    "host_tables": host_tables_table,
    "serve_example": lambda: serve_tables.example(serve_tables.RECOMMEND),
    "serve_load": lambda: serve_tables.load_table(serve_tables.RECOMMEND),
    "serve_stages": lambda: serve_tables.stages_table(serve_tables.RECOMMEND),
    "score_example": lambda: serve_tables.example(serve_tables.SCORE),
    "score_load": lambda: serve_tables.load_table(serve_tables.SCORE),
    "score_stages": lambda: serve_tables.stages_table(serve_tables.SCORE),
    "context_longest": longest_table,
    "context_steps": steps_table,
    "context_reshard": reshard_table,
    "context_balance": balance_table,
}
PAGES = {
    "README.md": (
        "ml1m",
        "speed",
        "attention",
        "test_gpu",
        "ranking",
        "ablation",
        "serve_example",
        "score_example",
    ),
    "docs/ultra_hstu.md": ("long_ultra", "layer_memory"),
    "docs/context_parallel.md": (
        "context_steps",
        "context_longest",
        "context_reshard",
        "context_balance",
    ),
    "docs/http_service.md": ("serve_load", "serve_stages", "score_load", "score_stages"),
    "docs/sampling_and_precision.md": ("stochastic_length", "load_balance", "int4"),
    "docs/cached_scoring.md": (
        "serving_operations",
        "serving",
        "serving_micro_batches",
        "cache_precision",
        "host_tables",
    ),
}


def with_tables(text: str, page: str) -> str:
    for name in PAGES[page]:
        start, end = f"<!-- table {name} -->\n", f"\n<!-- end {name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{page} has no '{start.strip()}' ... '{end.strip()}'")
        text = before + start + TABLES[name]() + end + after
    return text


def ml1m_figure() -> None:
    """HR@10 over epochs, first seed of each model, beside the reference's last epoch."""
    figure, axis = plt.subplots(figsize=(7, 3.8), constrained_layout=True)
    for config, colour in CURVES.items():
        model, record = MODELS[config], load(f"{config}_published")
        if record:
            history = record["runs"][0]["history"]
            axis.plot(
                [point["epoch"] for point in history],
                [point["hr@10"] for point in history],
                color=colour,
                label=model,
            )
            axis.axhline(
                REFERENCE["public PyTorch code, true order"][config]["hr@10"],
                color=colour,
                linestyle=":",
                linewidth=1,
            )
    axis.plot(
        [], [], color="black", linestyle=":", linewidth=1, label="public PyTorch code, last epoch"
    )
    axis.set(
        xlabel="epoch",
        ylabel="HR@10",
        title="MovieLens-1M, test users, published protocol, true order",
    )
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(FIGURES / "ml1m.png", dpi=130)
    plt.close(figure)


_CHECK = flags.DEFINE_bool("check", False, "change nothing; fail if a table is not current")


def main(_: list[str]) -> None:
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        current = with_tables(text, page)
        if not _CHECK.value:
            path.write_text(current)
        elif current != text:
            sys.exit(f"{page}: tables are not current; run make tables")
    if not _CHECK.value:
        ml1m_figure()
        if record := load("load_balance_cpu"):
            bench_load_balance.draw(record, FIGURES / "load_balance.png")
        attention_figure()
        serving_figure()
        serve_tables.serve_figure()
        context_parallel_figure()


if __name__ == "__main__":
    app.run(main)
