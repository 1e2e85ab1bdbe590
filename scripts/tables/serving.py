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
    of_commit,
    origin,
    short,
)
from ultra_hstu import flops

RECORD = "serving_h200"
MODELS = {"hstu": "HSTU", "ultra": "ULTRA-HSTU"}
PRECISION = {  # records of scripts.bench.cache_precision
    "cache_precision_assistments": "ASSISTments 2017",
    "cache_precision_ml100k": "MovieLens-100K",
}
KINDS = {"same": "the model's dtype", "bfloat16": "bfloat16", "int8": "int8", "fp8": "fp8 (e4m3)"}
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
    named = record["cached"]
    cached = "as the platform has it" if named == "platform's" else f"`{named}`"
    return markdown(
        header,
        rows,
        *([f"A history of 16,384 events: {whole}."] if whole else []),
        f"{record['device']}, attention `{record['implementation']}`, attention to the cache "
        f"{cached}, {of_commit(record)}.",
        *record.get("notes", []),
        "![What a cached history is worth](figures/serving.png)",
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
            encode, each = flops.cached(ranking, history)
            saved = [f"{1 + encode / (step * each):.1f}" for step in (64, 256, 1024, 16384)]
            rows.append(
                [model, f"{history:,}", f"{encode / 1e12:.3f}", f"{each / 1e6:.0f}", *saved]
            )
    header = ["model", "history", "TFLOP of the history", "MFLOP a candidate"]
    return markdown([*header, "x for 64", "x for 256", "x for 1,024", "x for 16,384"], rows)


def serving_figure() -> None:
    """How many times faster a cached history is than one that each micro-batch encodes anew.

    Over the length of the history, a line for each size of micro-batch.
    """
    record = load(RECORD)
    if not record:
        return
    places = by_place(record)
    count = max(key[3] for key in places if key[2] == "cached")
    steps = sorted({key[4] for key in places if key[2:4] == ("cached", count)})
    faster = {
        (model, history, step): cell["candidates_per_s"] / other["candidates_per_s"]
        for (model, history, what, candidates, step), cell in sorted(places.items())
        if (what, candidates) == ("cached", count)
        and (other := places.get((model, history, "recompute", step, step)))
    }
    if not faster:
        return
    models, histories = sorted({key[0] for key in faster}), sorted({key[1] for key in faster})
    with figure("serving", 8, 4) as drawn:
        axes = drawn.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axis, model in zip(axes, models, strict=True):
            for number, step in enumerate(steps):
                line = {key[1]: value for key, value in faster.items() if key[::2] == (model, step)}
                colour = f"C{number}"
                axis.plot(
                    list(line), list(line.values()), color=colour, marker="o", label=f"{step:,}"
                )
            axis.axhline(1, color="black", linestyle=":", linewidth=1)
            axis.set(xscale="log", yscale="log", xlabel="events of the history")
            axis.set_title(MODELS[model], fontsize=10)
            axis.set_xticks(histories, [f"{history:,}" for history in histories])
            ticks = [1, 2, 5, 10, 20]
            axis.set_yticks(ticks, list(map(str, ticks)))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("times as many candidates a second")
        handles = axes[0].get_legend_handles_labels()
        legend: Json = {"title": "candidates of a micro-batch", "title_fontsize": 8, "fontsize": 8}
        drawn.legend(
            *handles, frameon=False, loc="outside lower center", ncols=len(steps), **legend
        )
        low, high = min(faster.values()), max(faster.values())
        title = (
            f"A history that is cached: {low:.1f} to {high:.0f} times as fast as one that is "
            "encoded anew for every micro-batch\n"
        )
        where = f"{record['device'].removeprefix('1 x ')}, {of_commit(record)}"
        drawn.suptitle(f"{title}{count:,} candidates, {where}", fontsize=10)


def cache_precision_table() -> str:
    """One line a run and kind of cache."""
    rows, notes = [], []
    for name, data in PRECISION.items():
        record = load(name)
        if not record:
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


def one_event_table() -> str:
    """A request by a user who is held and has one new event, beside encoding the history anew."""
    rows = []
    if record := load("serve_scores_cpu"):
        for found in record["one_event"]:
            place = [record["device"], record["config"], f"{found['history']:,}"]
            spans = [
                (found[f"{way}_history_ms"], found[f"{way}_ms"]) for way in ("extended", "anew")
            ]
            rows.append([*place, f"{found['candidates']:,}", *one_event(*spans)])
    if record := load(RECORD):
        places = by_place(record)
        for model, history in sorted({key[:2] for key in places if key[2] == "append"}):
            scored = [
                cell["p50_ms"]
                for key, cell in places.items()
                if key[:4] == (model, history, "cached", 1024)
            ]
            if not scored:
                continue
            ways = [places[model, history, way, 0, 0]["p50_ms"] for way in ("append", "encode")]
            spans = [(way, way + min(scored)) for way in ways]
            place = [record["device"], f"{record['config']}, {MODELS[model]}", f"{history:,}"]
            rows.append([*place, "1,024", *one_event(*spans)])
    header = ["device", "model", "history", "candidates", "extended, ms (history alone)"]
    return markdown([*header, "anew, ms (history alone)", "times faster"], rows)


def one_event(extended: tuple[float, float], anew: tuple[float, float]) -> list[str]:
    """Cells of (history, whole request) in milliseconds, and how many times faster the first is."""
    spans = [f"{whole:.2f} ({history:.2f})" for history, whole in (extended, anew)]
    return [*spans, f"{anew[1] / extended[1]:.2f}"]


@measured("drop_blocks")
def drop_blocks_table(record: Json) -> str:
    """What it costs that full histories drop their oldest events in blocks, by seed."""
    rows = []
    for run in record["runs"]:
        exact, blocks = run["kinds"]["same"], run["drop_blocks"]
        row = [run["positions"], str(run["seed"])]
        for metric in ("ne", "mse"):
            row += [f"{exact['metrics'][metric]:.4f}", f"{blocks['metrics'][metric]:.4f}"]
        row.append(f"{short(exact['hr@10'])} / {short(blocks['hr@10'])}")
        rows.append([*row, f"{100 * blocks['answers_that_stay']:.1f} %"])
    header = ["positions", "seed", "NE", "in blocks", "squared error of stars", "in blocks"]
    return markdown(
        [*header, "HR@10 of all items, without / with", "top 10 that stay"],
        rows,
        "`{config}`, {device}, commit {commit}.".format(**record),
    )


def host_requests_table() -> str:
    """Bytes of a long request by kind of item table, and requests a second where they are known."""
    counted, rows, notes = load("host_requests_bytes"), [], []
    loops = {
        name: record
        for name in ("host_requests_h200", "host_requests_cpu")
        if (record := load(name))
    }
    for kind, found in counted.get("tables", {}).items():
        int8 = counted["tables"]["int8"]["item_bytes"]
        row = [kind, *cells(found, "{row_bytes}"), f"{found['item_bytes'] / 2**20:.1f}"]
        row.append(f"{100 * (found['item_bytes'] / int8 - 1):+.0f} %")
        for record in loops.values():
            row += cells(record["tables"][kind], "{requests_per_s:.2f}", "{p50_ms:.0f}")
        rows.append(row)
    if not rows:
        return NOT_MEASURED
    told = "{history:,} events and {candidates:,} candidates of width {width}".format(
        width=counted["model"]["width"], **counted
    )
    header = ["item table", "bytes an entry", "MiB of a request", "beside int8"]
    for record in loops.values():
        header += [f"requests/s on {record['device']}", "p50, ms"]
        size = "{history:,} events, {candidates:,} candidates, {workers} at one time".format(
            **record
        )
        size += ", {layers} layers of width {width}".format(**record["model"])
        shared = "; other programs shared the machine" if record.get("shared_device") else ""
        notes.append(f"Requests/s: {size}, {origin(record)[:-1]}{shared}.")
    return markdown(header, rows, f"Bytes: {told}.", *notes)


@measured("host_tables_h100")
def host_tables_table(record: Json) -> str:
    """One line a kind of item table."""
    times = ("{gather_ms:.2f}", "{transfer_ms:.2f}", "{unpack_ms:.2f}")
    rows = [
        [kind, str(found["row_bytes"]), f"{found['bytes'] / 2**20:.1f}", *cells(found, *times)]
        for kind, found in record["tables"].items()
    ]
    header = ["item table", "bytes an entry", "MiB of a request", "gathered on the host, ms"]
    return markdown(
        [*header, "to the device, ms", "unpacked there, ms"],
        rows,
        "{device}, {rows:,} rows of width {width} from {items:,} items, commit {commit}.".format(
            **record
        ),
        *record.get("notes", []),
    )
