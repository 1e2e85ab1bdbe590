"""Tables of retrieval: what others report, smaller sets, choices of evaluation, and speed."""

import statistics

from scripts.tables.records import (
    evaluation,
    load,
    markdown,
    mean_and_deviation,
    short,
)
from ultra_hstu.criteria import Metrics

METRICS = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "hr@200", "ndcg@200", "mrr")
MODELS = {
    "ml1m_sasrec": "SASRec",
    "ml1m_hstu": "HSTU",
    "ml1m_hstu_mol": "HSTU + MoL",
    "ml1m_ultra": "ULTRA-HSTU",
    "ml1m_ultra_60": "ULTRA-HSTU, 60 % of HSTU's operations",
    "ml1m_hstu_large": "HSTU-large",
    "ml1m_hstu_large_mol": "HSTU-large + MoL",
    "ml1m_best": "best",
    "ml1m_best_mol": "best + MoL",
}


def _of(*values: float) -> Metrics:
    """Metrics by name, in the order of METRICS, as far as they are known."""
    return dict(zip(METRICS, values, strict=False))


# METRICS that others report of a configuration under a condition, by their source: the README of
# the public PyTorch code (04/15/2024; ties in arbitrary order); a run of that code on the true
# order of the same data (one seed, last of 101 epochs), of which no record was kept; the HSTU
# tutorial of RecTools; the README of bailuding/rails (arXiv 2407.15462).
TRUE_ORDER, RECTOOLS, README = "public PyTorch code, true order", "RecTools", "public table"
PUBLIC: dict[str, dict[str, dict[str, Metrics]]] = {
    "validated": {
        "ml1m_hstu": {
            RECTOOLS: {"hr@10": 0.3226, "ndcg@10": 0.1880, "hr@50": 0.5894, "hr@200": 0.7856}
        },
        "ml1m_hstu_large": {
            RECTOOLS: {"hr@10": 0.3642, "ndcg@10": 0.2164, "hr@50": 0.6194, "hr@200": 0.8031}
        },
    },
    "random_ties": {
        "ml1m_sasrec": {README: _of(0.2853, 0.1603, 0.5474, 0.2185, 0.7528, 0.2498)},
        "ml1m_hstu": {README: _of(0.3097, 0.1720, 0.5754, 0.2307, 0.7716, 0.2606)},
        "ml1m_hstu_large": {README: _of(0.3294, 0.1893, 0.5935, 0.2481, 0.7839, 0.2771)},
        "ml1m_hstu_large_mol": {"public table of MoL": _of(0.3412, 0.1979)},
    },
    "published": {
        "ml1m_sasrec": {TRUE_ORDER: _of(0.2925, 0.1670, 0.5568, 0.2255, 0.7556, 0.2558, 0.1439)},
        "ml1m_hstu": {TRUE_ORDER: _of(0.3252, 0.1868, 0.5815, 0.2434, 0.7685, 0.2719, 0.1590)},
        "ml1m_hstu_large": {
            TRUE_ORDER: _of(0.3581, 0.2132, 0.6108, 0.2694, 0.7894, 0.2964, 0.1833)
        },
    },
}
# Quoted from runs of the public PyTorch code at its best on the same kinds of machine: forward,
# loss, backward and optimizer alone.
WHOLE_RUN = "public PyTorch code: the steps of 101 epochs, no evaluation"
ONE_STEP = "public PyTorch code: one training step, batch 128"
REFERENCE_SPEED = [
    ["HSTU", "1 x NVIDIA H200", WHOLE_RUN, "83 s", "[q]"],
    ["HSTU", "2 CPU cores", ONE_STEP, "751 ms", "[q]"],
]
QUOTED = "[q] Quoted from others' pages, or from runs of their code: no record here holds them."
# Other sets, by what the names of their configurations begin with.
SETS = {"ml100k": "MovieLens-100K", "latest": "latest-small", "beauty": "Amazon Beauty"}
KINDS = {"sasrec": "SASRec", "hstu": "HSTU", "best": "best"}


def sets_table() -> str:
    """What each model reaches on smaller sets, beside what needs none."""
    rows = []
    for data, title in SETS.items():
        for protocol in ("validated", "published"):
            rows += [
                [title, f"`{protocol}`", *row, ""]
                for row in baseline_rows(f"{data}_baselines", protocol)
            ]
            for kind, model in KINDS.items():
                if record := load(f"{data}_{kind}_{protocol}"):
                    runs = [run["best"] for run in record["runs"]]
                    told = evaluation(record["runs"][0])
                    cells = [mean_and_deviation([run[name] for run in runs]) for name in METRICS]
                    seconds = statistics.median(run["seconds"] for run in record["runs"])
                    shared = ", shared" if record.get("shared_device") else ""
                    took = f"{seconds:.0f} ({record['device']}{shared})"
                    row = [model, "ours", told["hidden"], told["time"], str(len(runs)), *cells]
                    rows.append([title, f"`{protocol}`", *row, took])
    header = ("data", "protocol", "model", "", "hidden", "time", "seeds", *map(str.upper, METRICS))
    return markdown([*header, "seconds a seed"], rows)


def ml100k_run(*others: str) -> list[tuple[dict[str, str], Metrics]]:
    """What `eval` said and the test metrics of one seed, as it was trained and evaluated again."""
    found = []
    if record := load("ml100k_hstu_validated"):
        run = record["runs"][0]
        found.append((evaluation(run), run["best"]))
    for name in others:
        if record := load(f"ml100k_hstu_validated_{name}"):
            found.append((evaluation(record), record["tables"]["float32"]["metrics"]))
    return found


def baseline_rows(name: str, protocol: str) -> list[list[str]]:
    """One line a baseline and value of `eval.hide`; none without the record of this protocol."""
    record = load(name)
    return [
        [
            baseline,
            "no model",
            evaluation(run)["hidden"],
            "",
            "",
            *(short(metrics[metric]) for metric in METRICS),
        ]
        for run in (record["runs"] if record.get("protocol") == protocol else [])
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
