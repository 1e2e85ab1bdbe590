"""The tables and the figure of serving, from the records of scripts.bench.serving, scripts.bench.host_tables and scripts.bench.cache_precision."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from experiments import configs  # noqa: E402
from scripts.bench import serving as bench_serving
from scripts.tables.tables import FIGURES, NOT_MEASURED, load, markdown, short
from ultra_hstu import flops  # noqa: E402

MODELS = {"hstu": "HSTU", "ultra": "ULTRA-HSTU"}
PRECISION = {  # records of scripts.bench.cache_precision
    "cache_precision_assistments": "ASSISTments 2017",
    "cache_precision_ml100k": "MovieLens-100K",
}
KINDS = {"same": "the model's dtype", "bfloat16": "bfloat16", "int8": "int8", "fp8": "fp8 (e4m3)"}
COLOURS = {
    "cached": "tab:green",
    "one_batch": "tab:orange",
    "recompute": "tab:red",
    "one_by_one": "tab:grey",
}
WORDS = {
    "cached": "cached",
    "one_batch": "one batch, no cache",
    "recompute": "history anew for each micro-batch",
    "one_by_one": "cached, one candidate at a time",
}

Cells = dict[tuple[str, int, str, int, int], dict[str, Any]]


def serving_table() -> str:
    """For each model, history and number of candidates: the fastest micro-batch, and how many times that is what does without a cache."""
    record = load("serving_h100")
    if not record:
        return NOT_MEASURED
    cells, rows = by_place(record), []
    for model, history, count in sorted(
        {(key[0], key[1], key[3]) for key in cells if key[2] == "cached"},
        key=lambda key: (key[1], key[2], key[0]),
    ):
        steps = {
            key[4]: cell
            for key, cell in cells.items()
            if key[:4] == (model, history, "cached", count)
        }
        step, cell = max(steps.items(), key=lambda item: item[1]["candidates_per_s"])
        encode, once = (
            cells.get((model, history, "encode", 0, 0)),
            cells.get((model, history, "one_batch", count, count)),
        )
        again, alone = (
            cells.get((model, history, "recompute", step, step)),
            cells.get((model, history, "one_by_one", 64, 1)),
        )
        rows.append(
            [MODELS[model], f"{history:,}", f"{count:,}", f"{step:,}", f"{cell['p50_ms']:.2f} / {cell['p99_ms']:.2f}", f"{cell['candidates_per_s']:,.0f}",
             f"{cell['TFLOP_a_second']:.0f}", "" if encode is None else f"{encode['p50_ms']:.2f}", times(cell, again), times(cell, once), times(cell, alone)]
        )  # fmt: skip
    header = [
        "model",
        "history",
        "candidates",
        "micro-batch",
        "p50 / p99, ms",
        "candidates/s",
        "TFLOP/s",
        "encoding, ms",
    ]
    table = markdown([*header, "x history anew", "x one batch", "x one by one"], rows)
    whole = ", ".join(
        f"{MODELS[model]} {cells[model, 16384, 'encode', 0, 0]['tflop']:.3f} TFLOP in {cells[model, 16384, 'encode', 0, 0]['p50_ms']:.1f} ms"
        for model in MODELS
        if (model, 16384, "encode", 0, 0) in cells
    )
    where = f"{record['device']}, attention `{record['implementation']}`, to the cache `{record['cached']}`, commit {record['commit']}."
    parts = [
        table,
        *([f"A history of 16,384 events: {whole}."] if whole else []),
        where,
        *record.get("notes", []),
    ]
    parts.append("![Candidates a second](figures/serving.png)")
    return "\n\n".join(parts)


def micro_batches_table() -> str:
    """For each model and history, what micro-batches do to the most candidates: candidates a second, and how many times those with the history anew."""
    record = load("serving_h100")
    if not record:
        return NOT_MEASURED
    cells = by_place(record)
    most = max(key[3] for key in cells if key[2] == "cached")
    cached = {key: cell for key, cell in cells.items() if key[2] == "cached" and key[3] == most}
    steps, rows = sorted({key[4] for key in cached}), []
    for model, history in sorted({key[:2] for key in cached}, key=lambda key: (key[1], key[0])):
        row = [MODELS[model], f"{history:,}"]
        for step in steps:
            cell, again = (
                cached.get((model, history, "cached", most, step)),
                cells.get((model, history, "recompute", step, step)),
            )
            row.append(
                ""
                if cell is None
                else f"{cell['candidates_per_s']:,.0f}"
                + (f" ({times(cell, again)})" if again else "")
            )
        rows.append(row)
    return markdown(["model", "history", *(f"micro-batches of {step:,}" for step in steps)], rows)


def operations_table() -> str:
    """What a cache can save, from operation counts of the models that scripts.bench.serving times: no time in it."""
    rows = []
    config = configs.named("long_ultra")
    for history in (4096, 16384):
        for name, model in MODELS.items():
            ranking = bench_serving.ranking_config(
                config, bench_serving.MODELS[name], longest=history, targets=1
            )
            encode = flops.count(ranking, history, targets=0).inference
            each = flops.count(ranking, history, targets=1).inference - encode
            saved = [f"{1 + encode / (step * each):.1f}" for step in (64, 256, 1024, 16384)]
            rows.append(
                [model, f"{history:,}", f"{encode / 1e12:.3f}", f"{each / 1e6:.0f}", *saved]
            )
    header = ["model", "history", "TFLOP of the history", "MFLOP a candidate"]
    return markdown([*header, "x for 64", "x for 256", "x for 1,024", "x for 16,384"], rows)


def times(cell: dict[str, Any], other: dict[str, Any] | None) -> str:
    return "" if other is None else f"{cell['candidates_per_s'] / other['candidates_per_s']:.1f}"


def by_place(record: dict[str, Any]) -> Cells:
    """The cells that were measured."""
    names = ("model", "history", "what", "candidates", "micro_batch")
    return {
        tuple(cell[name] for name in names): cell for cell in record["cells"] if "error" not in cell
    }


def serving_figure() -> None:
    """Candidates a second over the micro-batch, most candidates of the record, a panel a model and history."""
    record = load("serving_h100")
    if not record:
        return
    cells = by_place(record)
    count = max(key[3] for key in cells if key[2] == "cached")
    steps = sorted({key[4] for key in cells if key[2] == "cached" and key[3] == count})
    models, histories = sorted({key[0] for key in cells}), sorted({key[1] for key in cells})
    panels, shape = (
        [(model, history) for model in models for history in histories],
        (len(models), len(histories)),
    )
    size = (2.7 * shape[1], 2.5 * shape[0] + 0.5)
    figure, axes = plt.subplots(
        *shape, figsize=size, sharex=True, sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, (model, history) in zip(axes.flat, panels, strict=True):
        for what, colour in COLOURS.items():
            points = sorted(
                (key[4], cell["candidates_per_s"])
                for key, cell in cells.items()
                if key[:3] == (model, history, what)
                and (what in ("recompute", "one_by_one") or key[3] == count)
            )
            if what in ("one_batch", "one_by_one"):
                for _, rate in points:
                    axis.axhline(rate, color=colour, linestyle="--", linewidth=1, label=WORDS[what])
            else:
                axis.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker="o",
                    markersize=3,
                    label=WORDS[what],
                ) if points else None
        axis.set(xscale="log", yscale="log")
        axis.set_title(f"{MODELS[model]}, history {history:,}", fontsize=10)
        axis.set_xticks(steps, [str(step) for step in steps])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("micro-batch", fontsize=10)
    figure.supylabel(f"candidates a second, of {count:,}", fontsize=10)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        frameon=False,
        loc="outside upper center",
        ncols=4,
        fontsize=8,
    )
    figure.savefig(FIGURES / "serving.png", dpi=130)
    plt.close(figure)


def cache_precision_table() -> str:
    """One line a run and kind of cache."""
    rows, notes = [], []
    for name, data in PRECISION.items():
        record = load(name)
        if not record:
            rows.append([data, NOT_MEASURED, *[""] * 6])
            continue
        exact = record["kinds"]["same"]["metrics"]
        hit = next((key for key in record["kinds"]["same"] if key.startswith("hr@")), None)
        for kind, found in record["kinds"].items():
            metrics = found["metrics"]
            difference = "" if kind == "same" else f"{metrics['ne'] - exact['ne']:+.0e}"
            error = f"{found['rms_logit_error']:.1e}" if "rms_logit_error" in found else ""
            stay = (
                f"{100 * found['answers_that_stay']:.1f} %" if "answers_that_stay" in found else ""
            )
            size = f"{found['bytes_a_row_and_layer']:.0f}"
            rows.append(
                [
                    data,
                    KINDS[kind],
                    size,
                    f"{metrics['ne']:.5f}",
                    difference,
                    error,
                    short(found[hit]) if hit else "",
                    stay,
                ]
            )
        notes += [record["note"]] if "note" in record else []
    header = [
        "data",
        "keys and values",
        "bytes a row and layer",
        "NE",
        "difference",
        "RMS error of a logit",
        "HR@10 of all items",
        "top 10 that stay",
    ]
    return "\n\n".join([markdown(header, rows), *notes])


def host_tables_table() -> str:
    """One line a kind of item table."""
    record = load("host_tables_h100")
    if not record:
        return NOT_MEASURED
    rows = [
        [
            kind,
            str(found["row_bytes"]),
            f"{found['bytes'] / 2**20:.1f}",
            *(f"{found[name]:.2f}" for name in ("gather_ms", "transfer_ms", "unpack_ms")),
        ]
        for kind, found in record["tables"].items()
    ]
    header = [
        "item table",
        "bytes a row",
        "MiB of a request",
        "gathered on the host, ms",
        "to the device, ms",
        "unpacked there, ms",
    ]
    where = f"{record['device']}, {record['rows']:,} rows of width {record['width']} from {record['items']:,} items."
    return "\n\n".join([markdown(header, rows), where, *record.get("notes", [])])
