"""The tables of ranking runs: models beside what needs no model, and each piece of ULTRA-HSTU taken away."""

import statistics
from typing import Any

from scripts.tables.tables import NOT_MEASURED, giga, load, markdown, mean_and_deviation

RANKING = {  # records of experiments.train --record: data and model
    f"{prefix}_rank_{suffix}": (data, model)
    for prefix, data in (
        ("assistments", "ASSISTments 2017"),
        ("ml1m", "MovieLens-1M"),
        ("kuairand", "KuaiRand"),
    )
    for suffix, model in (("hstu", "HSTU"), ("ultra", "ULTRA-HSTU"))
}
RANKING_BASELINES = ("base rate", "item and user")
RANKING_METRICS = ("ne", "auc", "gauc", "log_loss")
ABLATIONS = {
    "assistments_rank_ultra": "ablation_assistments"
}  # configuration -> record of scripts.ablation
SMALL_ABLATIONS = {"the same, small": "ablation_assistments_small"}


def ranking_record(config: str) -> dict[str, Any] | None:
    """The record of a configuration's own runs, or its part of an ablation."""
    if record := load(config):
        return record
    prefix, variant = (
        config.removesuffix("_hstu").removesuffix("_ultra"),
        "ultra" if config.endswith("_ultra") else "baseline",
    )
    ablation = load(ABLATIONS.get(f"{prefix}_ultra", ""))
    if not ablation or variant not in ablation["variants"]:
        return None
    found = ablation["variants"][variant]
    flops = {name: 1e9 * found[f"{name}_gflop"] for name in ("inference", "training")}
    return {
        "device": ablation["device"],
        "runs": found["runs"],
        "flops": flops,
        "baselines": ablation.get("baselines", {}),
    }


def ranking_table() -> str:
    """One line a model and task, beside what needs no model; mean and standard deviation over seeds."""
    header = [
        "data",
        "task",
        "model",
        "seeds",
        *(name.replace("_", " ").upper() for name in RANKING_METRICS),
    ]
    rows: list[list[str]] = []
    for config, (data, model) in RANKING.items():
        record = ranking_record(config)
        if not record:
            rows.append([data, "", model, NOT_MEASURED, *[""] * (len(RANKING_METRICS) + 2)])
            continue
        runs = [run["best"] for run in record["runs"]]
        tasks = [name.removeprefix("ne/") for name in runs[0] if name.startswith("ne/")]
        if not any(row[0] == data and row[2] in RANKING_BASELINES for row in rows):
            known = [name for name in RANKING_BASELINES if name in record["baselines"]]
            rows += [
                [data, task, name, "", *metric_cells([record["baselines"][name]], task), "", ""]
                for name in known
                for task in tasks
            ]
        flops = giga(record["flops"]["inference"])
        vanilla = ranking_record(config.removesuffix("_ultra") + "_hstu")
        if model != "HSTU" and vanilla:
            flops += (
                f" ({100 * record['flops']['inference'] / vanilla['flops']['inference']:.0f} %)"
            )
        alone = f"{statistics.median(run['seconds'] for run in record['runs']):.0f}"
        seconds = (
            f"{'device shared' if record.get('shared_device') else alone} ({record['device']})"
        )
        rows += [
            [data, task, model, str(len(runs)), *metric_cells(runs, task), flops, seconds]
            for task in tasks
        ]
    return markdown([*header, "inference GFLOP a request (of HSTU's)", "seconds a run"], rows)


def ablation_table() -> str:
    """One line a variant of a configuration, each with one piece changed, as scripts.ablation names them; NE against that of the whole."""
    rows, notes = [], []
    for config, name in (ABLATIONS | SMALL_ABLATIONS).items():
        record = load(name)
        if not record:
            rows.append([config, NOT_MEASURED, *[""] * 7])
            continue
        whole = record["variants"].get("ultra")
        for variant, found in record["variants"].items():
            runs = [run["best"] for run in found["runs"]]
            entropies = [run["ne"] for run in runs]
            against = (
                ""
                if whole is None
                else f"{statistics.mean(entropies) - statistics.mean(run['best']['ne'] for run in whole['runs']):+.4f}"
            )
            areas = [
                statistics.mean(value for key, value in run.items() if key.startswith("auc/"))
                for run in runs
            ]
            rows.append(
                [
                    config,
                    variant.replace("_", " "),
                    str(len(runs)),
                    mean_and_deviation(entropies),
                    "" if found is whole else against,
                    mean_and_deviation(areas),
                    f"{found['inference_gflop']:.3g}",
                    f"{found['training_gflop']:.3g}",
                    ""
                    if record.get("shared_device")
                    else f"{statistics.median(run['seconds'] / run['epochs'] for run in found['runs']):.1f}",
                ]
            )
        notes += [record["note"]] if "note" in record else []
    columns = [
        "config",
        "variant",
        "seeds",
        "NE",
        "difference",
        "AUC",
        "inference GFLOP",
        "training GFLOP",
        "seconds an epoch",
    ]
    return "\n\n".join([markdown(columns, rows), *notes])


def metric_cells(runs: list[dict[str, float]], task: str) -> list[str]:
    return [
        mean_and_deviation([run[f"{name}/{task}"] for run in runs])
        if f"{name}/{task}" in runs[0]
        else ""
        for name in RANKING_METRICS
    ]
