"""The tables and the figure of the scaling curve, of its floor, and of HSTU's synthetic streams."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from experiments.record import Json
from scripts.scaling import grid
from scripts.scaling.fits import Curve, Estimate, Ratio, compare, estimate, exponent, power, slope
from scripts.scaling.stream import CUTS
from scripts.tables.records import (
    NOT_MEASURED,
    load,
    markdown,
    mean_and_deviation,
    measured,
    origin,
    picture,
    short,
    themed,
)

SETS = {"synthetic_long": "synthetic, long", "assistments": "ASSISTments 2017"}
MODELS = {
    "hstu": "HSTU",
    "ultra": "ULTRA-HSTU",
    "semi_local": "semi-local attention",
    "semi_local_truncation": "semi-local attention, truncation",
    "truncation": "truncation",
    "merged": "merged input",
    "mixture": "mixture of transducers",
}
COMPUTE = ("training", "inference")
# Efficiency and ratio of exponents of arXiv 2602.16986, in training and at inference.
PAPER_FITS = {
    "ultra": (("5.3", "21.4"), ("2.08", "4.59")),
    "semi_local": (("2.7", "5.1"), ("1.39", "1.69")),
    "semi_local_truncation": (("", "3.4"), ("", "1.8")),
}
# What its pieces save of operations.
PAPER_SAVED = {
    "truncation": ("-3 %", "-38 %"),
    "merged": ("-32.5 %", "-63.5 %"),
    "mixture": ("", "-53 %"),
}
# HR@10 and HR@50 of arXiv 2402.17152, table 2, by the record of ours.
STREAM = {
    "stream_transformer": ("Transformer (SASRec)", ".0442", ".2025"),
    "stream_hstu_softmax": ("HSTU, no bias, softmax", ".0617", ".2496"),
    "stream_hstu": ("HSTU, no bias", ".0893", ".3170"),
}
LEAST = 3  # amounts of compute that a fit needs
COLOURS = {"hstu": "tab:blue", "ultra": "tab:orange"}


def runs_of(record: Json, data: str, model: str) -> list[Json]:
    """The runs of a record that are finished."""
    runs = record.get("runs", {}).values()
    return [run for run in runs if (run["data"], run["model"]) == (data, model)]


def longest(record: Json, data: str, model: str) -> list[Json]:
    """The runs of the greatest length and the middle depth."""
    cell = (grid.SETS[data].lengths[-1], grid.SETS[data].layers[1])
    runs = runs_of(record, data, model)
    return [run for run in runs if (run["length"], run["layers"]) == cell]


def curve(runs: Sequence[Json], compute: str) -> Curve | None:
    """NE of runs over what a request computes; None for fewer than `LEAST` amounts."""
    points = [(run[compute], run["result"]["best"]["ne"]) for run in runs]
    return Curve.of(points) if len({amount for amount, _ in points}) >= LEAST else None


def selections(data: str, model: str) -> dict[str, Callable[[Json], bool]]:
    """Which runs of a data set are fitted together, in words."""
    _, middle, _ = grid.SETS[data].layers
    most = grid.SETS[data].lengths[-1]
    over_length = {f"over length, {middle} layers": lambda run: run["layers"] == middle}
    if model not in grid.WHOLE:
        return over_length
    over_depth = {f"over depth, {most:,} events": lambda run: run["length"] == most}
    return {"all": lambda run: True} | over_length | over_depth


def gflop(operations: float) -> str:
    """In three digits, without a power of ten."""
    value = operations / 1e9
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


@measured("scaling_h200")
def fits_table(record: Json) -> str:
    """Scaling efficiencies and ratios of exponents, beside the paper's."""
    rows, reasons = [], []
    for data, title in SETS.items():
        for model, published in PAPER_FITS.items():
            for words, chosen in selections(data, model).items():
                cells = []
                for fit, of_paper in zip((slope, exponent), published, strict=True):
                    for compute, paper in zip(COMPUTE, of_paper, strict=True):
                        ours, theirs = (
                            curve(list(filter(chosen, runs_of(record, data, one))), compute)
                            for one in (model, "hstu")
                        )
                        if ours is None or theirs is None:
                            cells.append("not measured")
                            continue
                        ratio = compare(ours, theirs, fit)
                        cells.append(ratio_text(ratio) + (f", paper {paper}" if paper else ""))
                        if ratio.reason:
                            of = f"{title}, {MODELS[model]}, {words}, {fit.__name__}, {compute}"
                            reasons.append(f"{of}: {ratio.reason}.")
                if set(cells) != {"not measured"}:
                    rows.append([title, MODELS[model], words, *cells])
    header = ["data", "against HSTU", "runs", "efficiency, training", "efficiency, inference"]
    header += ["exponents, training", "exponents, inference"]
    note = f"In brackets 95 % intervals. {origin(record)}"
    return markdown(header, rows, *(["No ratio: " + " ".join(reasons)] if reasons else []), note)


@measured("scaling_h200")
def power_law_table(record: Json) -> str:
    """The exponents of either model's own power law, and what it spans."""
    lowest, rows = load("scaling_counts").get("lowest"), []
    for data, title in SETS.items():
        for model in grid.WHOLE:
            for compute in COMPUTE:
                if (found := curve(runs_of(record, data, model), compute)) is None:
                    continue
                cells = [estimate_text(estimate(found, exponent)), f"{found.decades:.1f}", ""]
                if data == "synthetic_long" and lowest is not None and found.ne.min() > lowest:
                    above = Curve(found.compute, found.ne - lowest)
                    cells[-1] = estimate_text(estimate(above, exponent))
                rows.append([title, MODELS[model], compute, *cells])
    header = ["data", "model", "compute", "exponent", "decades", "exponent above the lowest NE"]
    return markdown(header, rows, origin(record))


@measured("scaling_h200")
def runs_table(record: Json) -> str:
    """NE of both models at every length and depth, beside the best possible."""
    rows = []
    for data, title in SETS.items():
        for length in grid.SETS[data].lengths:
            for layers in grid.SETS[data].layers:
                of_models, best = [], ""
                for model in grid.WHOLE:
                    found = [
                        run
                        for run in runs_of(record, data, model)
                        if (run["length"], run["layers"]) == (length, layers)
                    ]
                    if not found:
                        of_models += ["", "", ""]
                        continue
                    ne = [run["result"]["best"]["ne"] for run in found]
                    cost = [gflop(found[0][compute]) for compute in COMPUTE]
                    of_models += [mean_and_deviation(ne), *cost]
                    best = short(found[0].get("best_possible")) or best
                if any(of_models):
                    rows.append([title, f"{length:,}", str(layers), best, *of_models])
    each = ["NE, {}", "{}: GFLOP a request, training", "inference"]
    header = ["data", "events", "layers", "best possible NE on these events"]
    header += [one.format(MODELS[model]) for model in grid.WHOLE for one in each]
    return markdown(header, rows, origin(record))


@measured("scaling_counts", part="floor")
def floor_table(record: Json) -> str:
    """The best possible NE by length: exact, no measurement."""
    lengths = {f"{int(length):,}": value for length, value in record["floor"].items()}
    header, row = ["events", *lengths, "all"], ["NE", *map(short, lengths.values())]
    return markdown(header, [[*row, short(record["lowest"])]])


@measured("scaling_counts", part="runs")
def pieces_table(record: Json) -> str:
    """What each piece alone saves of a request's operations, and its NE where it is measured."""
    rows, trained = [], load("scaling_h200")
    for data, title in SETS.items():
        at = {model: found[0] for model in MODELS if (found := longest(record, data, model))}
        for model, run in at.items():
            saved = [f"{100 * (run[one] / at['hstu'][one] - 1):+.1f} %" for one in COMPUTE]
            cost = [gflop(run[one]) for one in COMPUTE]
            paper = PAPER_SAVED.get(model, ("", ""))
            ne = [one["result"]["best"]["ne"] for one in longest(trained, data, model)]
            rows.append(
                [
                    title,
                    MODELS[model],
                    *cost,
                    *(saved if run is not at["hstu"] else ["", ""]),
                    *paper,
                    mean_and_deviation(ne) if ne else "not measured",
                ]
            )
    header = ["data", "model", "GFLOP a request, training", "inference", "of HSTU's, training"]
    header += ["inference", "paper, training", "inference", "NE"]
    runs = record["runs"].values()
    minutes = sum(run["seconds"] for run in runs) / 60
    note = f"The grid has {len(runs)} runs, predicted to take {minutes:.0f} minutes of one H200."
    return markdown(header, rows, note)


def stream_table() -> str:
    """HSTU's study: what can be reached, what is published, and what we measure."""
    bound = load("stream_bound")
    if not bound:
        return NOT_MEASURED
    rows = [
        [
            "who knows how a record is drawn",
            "",
            *(short(bound["history_hidden"][f"hr@{k}"]) for k in CUTS),
            "",
            "",
        ]
    ]
    notes = []
    for name, (words, *published) in STREAM.items():
        record = load(name)
        best = [run["best"] for run in record.get("runs", [])]
        notes += [f"{words}: {origin(record)}"] if record else []
        found = [mean_and_deviation([one[f"hr@{k}"] for one in best]) if best else "" for k in CUTS]
        rows.append([words, str(len(best) or ""), *found, *published])
    header = ["", "seeds", "HR@10", "HR@50", "HR@10, published", "HR@50, published"]
    notes = notes or ["The models are not measured yet."]
    return markdown(
        header, rows, " ".join(["Published: quoted from arXiv 2402.17152, table 2.", *notes])
    )


def generated_table() -> str:
    """How long it takes to generate the data, and the memory."""
    record = load("generate_cpu")
    rows = [
        [name, f"{one['users']:,}", f"{one['events']:,}"]
        + [
            f"{one[field]:.0f}"
            for field in ("cpu_seconds", "peak_MiB", "load_seconds", "load_peak_MiB")
        ]
        for name, one in record.get("sources", {}).items()
    ]
    header = ["data", "users", "events", "CPU seconds to prepare", "most memory, MiB"]
    header += ["seconds to read", "most memory, MiB"]
    return markdown(header, rows, *([origin(record)] if record else []))


def scaling_picture() -> str:
    """The figure, for a light and a dark page."""
    if not load("scaling_h200").get("runs"):
        return NOT_MEASURED
    return picture("scaling", "NE against operations of HSTU and ULTRA-HSTU")


def scaling_figure() -> None:
    """NE against operations of a request, both models with their power laws."""
    record = load("scaling_h200")
    if not record.get("runs"):
        return
    for drawn in themed("scaling", 10, 7.6):
        axes = drawn.subplots(len(SETS), len(COMPUTE), squeeze=False)
        for row, data in zip(axes, SETS, strict=True):
            for axis, compute in zip(row, COMPUTE, strict=True):
                _draw(axis, record, data, compute)
        shown = {
            label: handle
            for axis in axes.flat
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        drawn.legend(
            shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False
        )


def _draw(axis: Axes, record: Json, data: str, compute: str) -> None:
    told = []
    for model in grid.WHOLE:
        runs = runs_of(record, data, model)
        for layers, marker in zip(grid.SETS[data].layers, "os^", strict=True):
            some = [run for run in runs if run["layers"] == layers]
            axis.plot(
                [run[compute] for run in some],
                [run["result"]["best"]["ne"] for run in some],
                marker,
                color=COLOURS[model],
                label=f"{MODELS[model]}, {layers} layers",
                markersize=5,
            )
        if (found := curve(runs, compute)) is not None:
            alpha, beta = power(found)
            ends = np.geomspace(found.compute.min(), found.compute.max(), 50)
            label = f"{MODELS[model]}, power law"
            axis.plot(ends, alpha * ends**-beta, "-", color=COLOURS[model], label=label)
            told.append(f"{MODELS[model]}: exponent {beta:.3g}")
    for run in runs_of(record, data, "hstu"):
        if "best_possible" in run:
            axis.axhline(run["best_possible"], color="grey", linewidth=0.6, linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel=f"operations of a request, {compute}", ylabel="NE")
    axis.yaxis.set_major_formatter("{x:.3f}")
    axis.yaxis.set_minor_formatter("{x:.3f}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    dotted = "; dotted: the best possible at each length" * (data == "synthetic_long")
    axis.set_title(SETS[data] + dotted, fontsize=10)
    axis.text(0.02, 0.04, "\n".join(told), va="bottom", fontsize=8, transform=axis.transAxes)


def estimate_text(found: Estimate) -> str:
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"


def ratio_text(found: Ratio) -> str:
    return (
        "none"
        if found.ratio is None
        else f"{found.ratio.value:.3g} [{found.ratio.low:.3g}, {found.ratio.high:.3g}]"
    )
