"""The tables and the figure of stochastic length, load balance and item tables of few bits."""

from collections.abc import Iterable

import numpy as np

from experiments.record import Json
from scripts import studies
from scripts.tables.records import (
    evaluated,
    evaluation,
    figure,
    load,
    markdown,
    mean_and_deviation,
    measured,
    origin,
    short,
)
from scripts.tables.retrieval import METRICS

SUBSEQUENCES = {  # file suffix -> what the runs were trained on
    "sl_whole": "whole histories",
    "sl_recent": "alpha 1.6, newest events",
    "sl_random": "alpha 1.6, random events",
    "sl_weighted": "alpha 1.6, recency-weighted events",
}
POLICIES = {"plain": ("stochastic length", "tab:grey"), "balanced": ("load-balanced", "tab:blue")}
RANKS = ("load_balance_ranks_h200", "load_balance_ranks_cpu")


def stochastic_length_table() -> str:
    """HSTU on MovieLens-100K, trained on whole histories and on parts of them."""
    rows = []
    for suffix, label in SUBSEQUENCES.items():
        record = load(f"ml100k_hstu_{suffix}")
        if record:
            runs = [run["best"] for run in record["runs"]]
            cells = [mean_and_deviation([run[name] for run in runs]) for name in METRICS]
            flops = f"{record['flops']['training'] / 1e6:.1f}" if "flops" in record else ""
            told = [evaluation(record["runs"][0])[name] for name in ("hidden", "time")]
            rows.append([label, *told, *cells, flops])
    metrics = [name.upper() for name in METRICS]
    header = ["trained on", "hidden", "time", *metrics, "training MFLOP a sample"]
    return markdown(header, rows)


# Sparsity and s2 in %, for N from 1,024 to 8,192: HSTU's table 14, histories of 60 days.
PUBLISHED_SPARSITY = {
    1.6: ((71.5, 89.4), (75.8, 92.3), (79.4, 94.7), (83.8, 97.3)),
    1.7: ((57.3, 77.6), (60.6, 79.8), (67.3, 86.6), (74.5, 93.3)),
    1.8: ((37.5, 56.2), (42.6, 62.1), (51.9, 74.2), (62.6, 85.5)),
    1.9: ((15.0, 25.2), (17.7, 29.0), (29.6, 47.5), (57.8, 80.9)),
    2.0: ((1.2, 1.7), (2.5, 3.5), (18.9, 30.8), (57.6, 80.6)),
}
HISTORIES = {"assistments-2017": "ASSISTments 2017", "ml-1m": "MovieLens-1M"}


@measured("stochastic_length")
def sparsity_table(record: Json) -> str:
    """The paper's grid beside the same count on histories of its lengths, then real ones."""
    rows, real, ages = [], [], []
    for name, found in record["sets"].items():
        for alpha in record["alphas"]:
            cells_N = [cell for cell in found["grid"] if cell["alpha"] == alpha]
            shares = [(100 * cell["sparsity"], 100 * cell["s2"]) for cell in cells_N]
            if name.startswith("synthetic"):
                published = PUBLISHED_SPARSITY[alpha]
                rows.append([f"{alpha}", "published [q]", *_pairs(published)])
                rows.append([f"{alpha}", "counted", *_pairs(shares)])
            elif alpha < 2:
                kept = [
                    (100 * cell["dropped_events"], 100 * cell["dropped_pairs"]) for cell in cells_N
                ]
                real.append([HISTORIES.get(name, name), f"{alpha}", *_pairs(kept)])
        ages += [
            [HISTORIES.get(name, name), kind, *(f"{age.get(unit, 0):.2f}" if unit in age else ""
                                                for unit in ("events", "time"))]
            for kind, age in found.get("age", {}).items()
        ]  # fmt: skip
    lengths = [f"N = {length:,}" for length in record["lengths"]]
    told = (
        "Sparsity / s2, in %. [q] Quoted from table 14 of the paper. Counted: "
        f"{record['sets'][next(iter(record['sets']))]['histories']:,} lengths drawn from a normal "
        "law with the mean and deviation that the published line of alpha 2 says at N = 8,192."
    )
    heads = markdown(["data", "alpha", *lengths], real, "Events / pairs that are dropped, in %.")
    kinds = markdown(["data", "events that stay", "mean age by events", "by time"], ages)
    return markdown(["alpha", "", *lengths], rows, told, heads, kinds)


def _pairs(values: Iterable[tuple[float, float]]) -> list[str]:
    return [f"{first:.1f} / {second:.1f}" for first, second in values]


def sampled_ranking_table() -> str:
    """What stochastic length costs in NE, beside the operations that it saves."""
    rows = []
    for run in studies.stochastic_length():
        record = load(run.name)
        if not record:
            continue
        cut = run.overrides["data.stochastic_length"]
        entropies = [one["best"]["ne"] for one in record["runs"]]
        rows.append(
            [
                run.config.partition("_")[0],
                f"{run.overrides['data.max_history']:,}",
                "whole" if cut is None else f"{cut}",
                "" if cut is None else str(run.overrides["data.subsequence"]),
                str(len(entropies)),
                mean_and_deviation(entropies),
                f"{record['flops']['training'] / 1e9:.3g}",
            ]
        )
    header = ["data", "N", "alpha", "events that stay", "seeds", "NE", "training GFLOP a request"]
    return markdown(header, rows)


@measured("load_balance_cpu")
def load_balance_table(record: Json) -> str:
    """Spread of the load over devices, then step times, of plain and balanced draws."""
    spread, times = [], []
    for name, values in record["sets"].items():
        for policy in POLICIES:
            loads = [values["load"][devices][policy] for devices in ("8", "64")]
            step = values["step"][policy]
            spread.append(
                [
                    name,
                    policy,
                    f"{values['gamma']:.2f}",
                    f"{100 * values['kept_share_of_events'][policy]:.0f} %",
                    _whole(values, policy),
                    f"{loads[0]['mean'] / values['load']['8']['plain']['mean']:.2f}",
                    *(
                        f"{load['max_over_mean']:.2f} / {load['std_over_mean']:.2f}"
                        for load in loads
                    ),
                ]
            )
            keys = ("slowest", "slowest_predicted", "mean")
            milliseconds = [f"{1e3 * step[key]:.0f}" for key in keys]
            times.append([name, policy, str(step["rows"]), *milliseconds])
    header = ["lengths", "draws", "gamma", "events kept", "longest sixth whole / by the law"]
    header += ["load / plain"]
    header += ["8 devices: max / mean, std / mean", "64 devices"]
    timed = ["slowest of 8, ms", "predicted", "mean of 8, ms"]
    steps = markdown(["lengths", "draws", "rows of the buffer", *timed], times)
    return markdown(header, spread, steps, origin(record))


def load_balance_ranks_table() -> str:
    """Seconds of ranks that compute at one time, by policy."""
    rows, notes = [], []
    for record in filter(None, map(load, RANKS)):
        for name, policies in record["sets"].items():
            base = policies["plain"]["slowest"]
            for policy, found in policies.items():
                rows.append(
                    [
                        f"{record['ranks']} {record['platform'].upper()}s",
                        name,
                        policy,
                        f"{1e3 * found['slowest']:.1f}",
                        f"{found['slowest'] / base:.2f}",
                        f"{1e3 * found['mean']:.1f}",
                        f"{found['slowest_over_mean']:.2f}",
                        # a wall clock, which other work lengthens
                        f"{1e3 * found['together']:.1f}" if record["machine"] == "alone" else "",
                    ]
                )
        notes.append(f"The machine {record['machine']}: {origin(record)}")
    header = ["ranks", "lengths", "draws", "slowest rank, ms", "of plain", "mean rank, ms"]
    header += ["slowest / mean", "step with summed gradients, ms"]
    return markdown(header, rows, *notes)


def _whole(values: Json, policy: str) -> str:
    shares = values["longest_sixth_whole"]
    return f"{100 * shares[policy]:.1f} % / {100 * shares['law']:.1f} %"


def load_balance_figure() -> None:
    """Left: how the loads of 64 devices spread. Right: the step time of each of 8 devices.

    Devices are sorted by time in every step; then the mean over steps is taken.
    """
    record = load("load_balance_cpu")
    if not record:
        return
    with figure("load_balance", 9, 5.6) as drawn:
        axes = drawn.subplots(len(record["sets"]), 2, squeeze=False)
        for (left, right), (name, values) in zip(axes, record["sets"].items(), strict=True):
            for number, (policy, (words, colour)) in enumerate(POLICIES.items()):
                row = values["load"]["64"][policy]
                histogram = row["histogram"]
                counts = np.array(histogram["counts"])
                left.stairs(
                    counts / (counts.sum() + histogram["beyond"]),
                    np.array(histogram["edges"]),
                    color=colour,
                    fill=not number,
                    alpha=0.5 + 0.5 * number,
                    label=f"{words}: max / mean {row['max_over_mean']:.2f}",
                )
                seconds_R = np.sort(values["step"][policy]["seconds"], axis=1).mean(0)
                right.bar(
                    np.arange(len(seconds_R)) + 0.4 * number - 0.2,
                    seconds_R,
                    0.4,
                    color=colour,
                    label=f"{words}: slowest {seconds_R[-1]:.2f} s",
                )
            left.set(title=f"{name}, 64 devices", xlabel="load of a device / mean", xlim=(0, 4))
            left.set_ylabel("share of devices and steps")
            right.set(title=f"{name}, 8 devices, mean of steps", xlabel="device, by time")
            right.set_ylabel("processor seconds")
            for axis, place in ((left, "upper right"), (right, "upper left")):
                axis.set_ylim(0, 1.35 * axis.get_ylim()[1])  # space for the legend
                axis.legend(frameon=False, loc=place)


@measured("int4_tables")
def int4_table(record: Json) -> str:
    """The metrics of a trained run, served from each kind of item table."""
    names = ("hr@10", "ndcg@10", "mrr")
    rows = []
    for kind, values in record["tables"].items():
        table = values["table"]
        sizes = [str(table[size]) for size in ("row_bytes", "history_bytes", "bytes")]
        error = f"{100 * table['rms_error_over_rms_value']:.1f} %"
        rows.append([kind, *sizes, error, *(short(values["metrics"][name]) for name in names)])
    header = ["item table", "bytes an entry", "of a request's history", "of all"]
    header += ["RMS error / RMS value", *(name.upper() for name in names)]
    told = f"Evaluated with {evaluated(record, 'hide', 'repeats', 'time')}."
    return markdown(header, rows, told)
