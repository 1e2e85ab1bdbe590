"""The tables and the figure of retrieval on MovieLens: metrics beside others', and speed."""

import statistics

from experiments.record import Json
from scripts.tables.records import (
    evaluation,
    figure,
    load,
    markdown,
    mean_and_deviation,
    short,
)
from ultra_hstu.criteria import Metrics

METRICS = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "hr@200", "mrr")
HEADER = ("model", "condition", "hidden", "time", "seeds", *(name.upper() for name in METRICS))
CURVES = {"ml1m_sasrec": "tab:grey", "ml1m_hstu": "tab:blue", "ml1m_hstu_large": "tab:red"}
MODELS = {
    "ml1m_sasrec": "SASRec",
    "ml1m_hstu": "HSTU",
    "ml1m_ultra": "ULTRA-HSTU",
    "ml1m_hstu_large": "HSTU-large",
}

# METRICS of the reference implementation, quoted from its README (04/15/2024; ties in arbitrary
# order), and from a run of it on the true order of the same data (one seed, last of 101 epochs), of
# which no record was kept.
TRUE_ORDER = "public PyTorch code, true order [q]"
REFERENCE: dict[str, dict[str, tuple[float, ...]]] = {
    "published table [q]": {
        "ml1m_sasrec": (0.2853, 0.1603, 0.5474, 0.2185, 0.7528),
        "ml1m_hstu": (0.3097, 0.1720, 0.5754, 0.2307, 0.7716),
        "ml1m_hstu_large": (0.3294, 0.1893, 0.5935, 0.2481, 0.7839),
    },
    TRUE_ORDER: {
        "ml1m_sasrec": (0.2925, 0.1670, 0.5568, 0.2255, 0.7556, 0.1439),
        "ml1m_hstu": (0.3252, 0.1868, 0.5815, 0.2434, 0.7685, 0.1590),
        "ml1m_hstu_large": (0.3581, 0.2132, 0.6108, 0.2694, 0.7894, 0.1833),
    },
}
PUBLIC = evaluation({})  # The public code does as records did from the beginning.
# Quoted from runs of the public PyTorch code at its best on the same kinds of machine: forward,
# loss, backward and optimizer alone.
WHOLE_RUN = "public PyTorch code: the steps of 101 epochs, no evaluation"
ONE_STEP = "public PyTorch code: one training step, batch 128"
REFERENCE_SPEED = [
    ["HSTU", "1 x NVIDIA H200", WHOLE_RUN, "83 s", "[q]"],
    ["HSTU", "2 CPU cores", ONE_STEP, "751 ms", "[q]"],
]
QUOTED = (
    "[q] Quoted from the public PyTorch code's README, or from runs of that code: no record here "
    "holds these numbers."
)
VARIANTS = {  # file suffix -> what it was
    "published": "ours, `published`",
    "published_all": "ours, `published`",
    "random_ties": "ours, `published`, ties at random",
    "validated": "ours, `validated`",
    "validated_full": "ours, `validated`, full softmax",
    "validated_full_all": "ours, `validated`, full softmax",
    "temporal": "ours, `temporal`",
}


def ml1m_table() -> str:
    """One line a model and condition; ours with mean and standard deviation over seeds."""
    rows, notes = [], []
    for config, model in MODELS.items():
        for source, values in REFERENCE.items():
            if config in values:
                cells = [short(value) for value in values[config]]
                told = [PUBLIC[name] for name in ("hidden", "time")]
                rows.append([model, source, *told, "", *cells, *[""] * (len(METRICS) - len(cells))])
        for suffix, label in VARIANTS.items():
            record = load(f"{config}_{suffix}")
            if not record:
                continue
            seeds = str(len(record["runs"]))
            if note := record.get("note"):
                notes += [] if note in notes else [note]
                seeds += f" [{notes.index(note) + 1}]"
            told = [evaluation(record["runs"][0])[name] for name in ("hidden", "time")]
            epochs = {"best": "", "last": ", last epoch"} if suffix == "published" else {"best": ""}
            for which, words in epochs.items():
                runs = [run[which] for run in record["runs"]]
                cells = [mean_and_deviation([run[name] for run in runs]) for name in METRICS]
                rows.append([model, label + words, *told, seeds, *cells])
    return markdown(
        HEADER,
        baseline_rows("ml1m_baselines") + rows,
        *(f"[{number}] {note}" for number, note in enumerate(notes, start=1)),
        QUOTED,
        *ties_note(),
    )


def ml100k_table() -> str:
    """HSTU and what needs no model on MovieLens-100K, under both values of `eval.hide`."""
    rows = baseline_rows("ml100k_baselines")
    for told, metrics in ml100k_run("all"):
        cells = [short(metrics[name]) for name in METRICS]
        rows.append(["HSTU", "ours, `validated`", told["hidden"], told["time"], "1", *cells])
    return markdown(HEADER, rows)


def ml100k_run(*others: str) -> list[tuple[dict[str, str], Metrics]]:
    """What `eval` said and the test metrics, of one run as it was trained and evaluated again."""
    found = []
    if record := load("ml100k_hstu_validated"):
        (run,) = record["runs"]
        found.append((evaluation(run), run["best"]))
    for name in others:
        if record := load(f"ml100k_hstu_validated_{name}"):
            found.append((evaluation(record), record["tables"]["float32"]["metrics"]))
    return found


def baseline_rows(name: str) -> list[list[str]]:
    """One line a baseline and value of `eval.hide`; none without the record."""
    record = load(name)
    return [
        [
            baseline,
            f"no model, `{record['protocol']}`",
            evaluation(run)["hidden"],
            "",
            "",
            *(short(metrics[metric]) for metric in METRICS),
        ]
        for run in record.get("runs", [])
        for baseline, metrics in run["baselines"].items()
    ]


def evaluation_table() -> str:
    """One run of MovieLens-100K, its test items ranked under each choice of `eval`."""
    rows = [
        [f"`{told['hide']}`", f"`{told['time']}`", *(short(metrics[name]) for name in METRICS)]
        for told, metrics in ml100k_run("all", "last", "served")
    ]
    header = ["`eval.hide`", "`eval.time`", *(name.upper() for name in METRICS)]
    return markdown(header, rows)


def ties_note() -> list[str]:
    """What ties at random cost, beside the true order."""
    moved = []
    for config, model in MODELS.items():
        records = [load(f"{config}_{suffix}") for suffix in ("published", "random_ties")]
        if all(records):
            stable, random = (
                statistics.mean(run["best"]["hr@10"] for run in one["runs"]) for one in records
            )
            moved.append(f"{short(stable - random)} ({model})")
    return [f"Ties at random lower HR@10 by {' and '.join(moved)}."] if moved else []


def speed_table() -> str:
    """Seconds of whole runs that had the device to themselves, and parts of a run.

    Evaluation every epoch is counted, compilation is not.
    """
    rows = []
    for config, model in MODELS.items():
        record = load(f"{config}_published")
        if record and not record.get("shared_device"):
            seconds = sorted(run["seconds"] for run in record["runs"])
            what = f"{record['runs'][0]['epochs']} epochs, evaluation each"
            value = f"{seconds[len(seconds) // 2]:.1f} s"
            rows.append([model, record["device"], what, value, record["commit"]])
        for device in ("h200", "cpu"):
            step = load(f"step_{config}_{device}")
            if not step:
                continue
            place = step["device"] if device != "cpu" else f"{step['host_cores']} CPU cores"
            values = {
                "one training step, batch 128": "{device_feed[step_ms_median]:.0f} ms",
                "the same, data streamed": "{streamed_feed[step_ms_median]:.0f} ms",
                "share of it waiting for data": "{streamed_feed[input_wait_share]:.2%}",
                "ranking all test users": "{evaluation[seconds]:.1f} s, "
                "{evaluation[peak_MiB]:.0f} MiB",
            }
            for what, value in values.items():
                shown = value.format(**step).replace("%", " %")
                rows.append([model, place, what, shown, step["commit"]])
    header = ["model", "device", "what", "value", "commit"]
    return markdown(header, rows + REFERENCE_SPEED, QUOTED)


def ml1m_figure() -> None:
    """HR@10 over epochs, first seed of each model, beside the reference's last epoch."""
    with figure("ml1m", 7, 3.8) as drawn:
        axis = drawn.subplots()
        dotted: Json = {"linestyle": ":", "linewidth": 1}
        for config, colour in CURVES.items():
            if record := load(f"{config}_published"):
                history = record["runs"][0]["history"]
                epochs = [point["epoch"] for point in history]
                rates = [point["hr@10"] for point in history]
                axis.plot(epochs, rates, color=colour, label=MODELS[config])
                axis.axhline(REFERENCE[TRUE_ORDER][config][0], color=colour, **dotted)
        axis.plot([], [], color="black", label="public PyTorch code, last epoch (quoted)", **dotted)
        title = "MovieLens-1M, test users, published protocol, true order"
        axis.set(xlabel="epoch", ylabel="HR@10", title=title)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="lower right")
