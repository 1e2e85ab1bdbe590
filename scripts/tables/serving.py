"""The tables and the figure of serving: cached scoring, smaller caches, item tables on the host."""

from experiments import configs
from experiments.record import Json
from scripts.bench import serving as bench_serving
from scripts.tables.records import (
    NOT_MEASURED,
    cells,
    evaluated,
    figure,
    load,
    markdown,
    measured,
    short,
)
from ultra_hstu import flops

RECORD = "serving_h100"
MODELS = {"hstu": "HSTU", "ultra": "ULTRA-HSTU"}
PRECISION = {  # records of scripts.bench.cache_precision
    "cache_precision_assistments": "ASSISTments 2017",
    "cache_precision_ml100k": "MovieLens-100K",
}
KINDS = {"same": "the model's dtype", "bfloat16": "bfloat16", "int8": "int8", "fp8": "fp8 (e4m3)"}
LINES = {
    "cached": ("cached", "tab:green"),
    "one_batch": ("one batch, no cache", "tab:orange"),
    "recompute": ("history anew for each micro-batch", "tab:red"),
    "one_by_one": ("cached, one candidate at a time", "tab:grey"),
}

Cells = dict[tuple[str, int, str, int, int], Json]


def by_place(record: Json) -> Cells:
    """The cells that were measured."""
    return {
        (
            cell["model"],
            cell["history"],
            cell["what"],
            cell["candidates"],
            cell["micro_batch"],
        ): cell
        for cell in record["cells"]
        if "error" not in cell
    }


def times(cell: Json, other: Json | None, empty: str = "") -> str:
    return empty if other is None else f"{cell['candidates_per_s'] / other['candidates_per_s']:.1f}"


@measured(RECORD)
def serving_table(record: Json) -> str:
    """The fastest micro-batch of each model, history and number of candidates.

    Its rate stands beside those of other ways.
    """
    places = by_place(record)
    fastest: dict[tuple[int, int, str], tuple[int, Json]] = {}
    for (model, history, what, count, step), cell in places.items():
        best = fastest.get((history, count, model))
        if what == "cached" and (
            best is None or cell["candidates_per_s"] > best[1]["candidates_per_s"]
        ):
            fastest[history, count, model] = (step, cell)
    rows = []
    for (history, count, model), (step, cell) in sorted(fastest.items(), key=lambda item: item[0]):
        encode = places.get((model, history, "encode", 0, 0))
        others = (("recompute", step, step), ("one_batch", count, count), ("one_by_one", 64, 1))
        rows.append(
            [
                MODELS[model],
                f"{history:,}",
                f"{count:,}",
                f"{step:,}",
                *cells(cell, "{p50_ms:.2f} / {p99_ms:.2f}"),
                *cells(cell, "{candidates_per_s:,.0f}"),
                "" if encode is None else f"{encode['p50_ms']:.2f}",
                " / ".join(times(cell, places.get((model, history, *way)), "-") for way in others),
            ]
        )
    header = ["model", "history", "candidates", "micro-batch", "p50 / p99, ms", "candidates/s"]
    header += ["encoding, ms", "x history anew / one batch / one by one"]
    whole = ", ".join(
        f"{name} {longest['tflop']:.3f} TFLOP in {longest['p50_ms']:.1f} ms"
        for model, name in MODELS.items()
        if (longest := places.get((model, 16384, "encode", 0, 0)))
    )
    return markdown(
        header,
        rows,
        *([f"A history of 16,384 events: {whole}."] if whole else []),
        "{device}, attention `{implementation}`, to the cache `{cached}`, commit {commit}.".format(
            **record
        ),
        *record.get("notes", []),
        "![Candidates a second](figures/serving.png)",
    )


@measured(RECORD)
def micro_batches_table(record: Json) -> str:
    """What micro-batches do to the most candidates, for each model and history.

    Candidates a second, and how many times those with the history encoded anew.
    """
    places = by_place(record)
    most = max(key[3] for key in places if key[2] == "cached")
    cached = [key for key in places if key[2:4] == ("cached", most)]
    steps = sorted({key[4] for key in cached})
    rows = []
    for history, model in sorted({(key[1], key[0]) for key in cached}):
        row = [MODELS[model], f"{history:,}"]
        for step in steps:
            found = places.get((model, history, "cached", most, step))
            again = places.get((model, history, "recompute", step, step))
            text = "" if found is None else f"{found['candidates_per_s']:,.0f}"
            row.append(f"{text} ({times(found, again)})" if found and again else text)
        rows.append(row)
    return markdown(["model", "history", *(f"micro-batches of {step:,}" for step in steps)], rows)


def operations_table() -> str:
    """What a cache can save, by operation counts of the models that scripts.bench.serving times."""
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


def serving_figure() -> None:
    """Candidates a second over the micro-batch, most candidates of the record.

    Each model and history has a panel.
    """
    record = load(RECORD)
    if not record:
        return
    places = by_place(record)
    count = max(key[3] for key in places if key[2] == "cached")
    steps = sorted({key[4] for key in places if key[2:4] == ("cached", count)})
    models, histories = sorted({key[0] for key in places}), sorted({key[1] for key in places})
    with figure("serving", 2.7 * len(histories), 2.5 * len(models) + 0.5) as drawn:
        axes = drawn.subplots(len(models), len(histories), sharex=True, sharey=True, squeeze=False)
        panels = [(model, history) for model in models for history in histories]
        for axis, (model, history) in zip(axes.flat, panels, strict=True):
            for what, (label, colour) in LINES.items():
                rates = {
                    key[4]: cell["candidates_per_s"]
                    for key, cell in sorted(places.items())
                    if key[:3] == (model, history, what)
                    and (what in ("recompute", "one_by_one") or key[3] == count)
                }
                if what in ("one_batch", "one_by_one"):
                    for rate in rates.values():
                        axis.axhline(rate, color=colour, linestyle="--", linewidth=1, label=label)
                elif rates:
                    values = list(rates.values())
                    axis.plot(
                        list(rates), values, color=colour, marker="o", markersize=3, label=label
                    )
            axis.set(xscale="log", yscale="log")
            axis.set_title(f"{MODELS[model]}, history {history:,}", fontsize=10)
            axis.set_xticks(steps, [str(step) for step in steps])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        drawn.supxlabel("micro-batch", fontsize=10)
        drawn.supylabel(f"candidates a second, of {count:,}", fontsize=10)
        handles = axes[0][0].get_legend_handles_labels()
        drawn.legend(*handles, frameon=False, loc="outside upper center", ncols=4, fontsize=8)


def cache_precision_table() -> str:
    """One line a run and kind of cache."""
    rows, notes = [], []
    for name, data in PRECISION.items():
        record = load(name)
        if not record:
            rows.append([data, NOT_MEASURED, *[""] * 6])
            continue
        exact = record["kinds"]["same"]
        hit = next((key for key in exact if key.startswith("hr@")), "")
        for kind, found in record["kinds"].items():
            entropy, stay = found["metrics"]["ne"], found.get("answers_that_stay")
            error = found.get("rms_logit_error")
            rows.append(
                [
                    data,
                    KINDS[kind],
                    f"{found['bytes_a_row_and_layer']:.0f}",
                    f"{entropy:.5f}",
                    "" if kind == "same" else f"{entropy - exact['metrics']['ne']:+.0e}",
                    "" if error is None else f"{error:.1e}",
                    short(found.get(hit)),
                    "" if stay is None else f"{100 * stay:.1f} %",
                ]
            )
        notes += [record["note"]] if "note" in record else []
        notes.append(f"{data}: evaluated with {evaluated(record, 'time')}.")
    header = ["data", "keys and values", "bytes a row and layer", "NE", "difference"]
    header += ["RMS error of a logit", "HR@10 of all items", "top 10 that stay"]
    return markdown(header, rows, *notes)


@measured("host_tables_h100")
def host_tables_table(record: Json) -> str:
    """One line a kind of item table."""
    times = ("{gather_ms:.2f}", "{transfer_ms:.2f}", "{unpack_ms:.2f}")
    rows = [
        [kind, str(found["row_bytes"]), f"{found['bytes'] / 2**20:.1f}", *cells(found, *times)]
        for kind, found in record["tables"].items()
    ]
    header = ["item table", "bytes a row", "MiB of a request", "gathered on the host, ms"]
    return markdown(
        [*header, "to the device, ms", "unpacked there, ms"],
        rows,
        "{device}, {rows:,} rows of width {width} from {items:,} items.".format(**record),
        *record.get("notes", []),
    )
