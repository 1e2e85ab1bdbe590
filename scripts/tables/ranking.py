"""The tables of ranking runs: models beside what needs no model, and pieces taken away."""

import statistics

from experiments.record import Json
from scripts.tables.records import (
    cells,
    evaluated,
    evaluation,
    load,
    markdown,
    mean_and_deviation,
    measured,
    origin,
    short,
)

RANKING = {  # records of experiments.train --record: data and model
    f"{prefix}_rank_{suffix}": (data, model)
    for prefix, data in (
        ("assistments", "ASSISTments 2017"),
        ("ml1m", "MovieLens-1M"),
        ("kuairand", "KuaiRand"),
    )
    for suffix, model in (
        ("din", "DIN"),
        ("hstu", "HSTU"),
        ("hstu_bias", "HSTU, relative bias"),
        ("ultra", "ULTRA-HSTU"),
    )
}
SOURCES = {"assistments": "assistments-2017", "ml1m": "ml-1m"}  # by the prefix of configurations
BASELINES = ("base rate", "item and user")
METRICS = ("ne", "auc", "gauc", "log_loss")
# Records of scripts.ablation, by configuration.
ABLATIONS = {
    "assistments_rank_ultra": "ablation_assistments",
    "ml1m_rank_ultra": "ablation_ml1m",
}
SMALL_ABLATIONS = {"the same, small": "ablation_assistments_small"}


def ranking_record(config: str) -> Json:
    """The record of a configuration's own runs, or its part of an ablation; empty without both."""
    if record := load(config):
        return record
    if record := of_positions(config):
        return record
    prefix, _, model = config.rpartition("_")
    ablation = load(ABLATIONS.get(f"{prefix}_ultra", ""))
    variant = {"ultra": "ultra", "hstu": "baseline"}.get(model, "")
    found = ablation.get("variants", {}).get(variant)
    if not found:
        return {}
    return {
        "device": ablation["device"],
        "runs": found["runs"],
        "flops": {name: 1e9 * found[f"{name}_gflop"] for name in ("inference", "training")},
        "baselines": ablation.get("baselines", {}),
    }


def of_positions(config: str) -> Json:
    """The runs of `rank_positions` that counted positions as the configuration does."""
    record, counted = load("rank_positions"), load("rank_flops")
    runs = [
        run
        for run in record.get("runs", [])
        if (run["config"], run["positions"]) == (config, "backwards")
    ]
    if not runs or config not in counted.get("counted", {}):
        return {}
    of_request = counted["counted"][config]
    return {
        "device": record["device"],
        "shared_device": True,  # it says so in its note
        "runs": runs,
        "flops": {name: 1e9 * of_request[f"{name}_gflop"] for name in ("inference", "training")},
        "baselines": counted["baselines"].get(SOURCES[config.partition("_")[0]], {}),
    }


def ranking_table() -> str:
    """One line a model and task, beside what needs no model; mean and deviation over seeds."""
    header = [
        "data",
        "task",
        "model",
        "seeds",
        *(name.replace("_", " ").upper() for name in METRICS),
    ]
    rows: list[list[str]] = []
    shown = set()  # data whose baselines stand in the table
    for config, (data, model) in RANKING.items():
        record = ranking_record(config)
        if not record:
            continue
        runs = [run["best"] for run in record["runs"]]
        tasks = [name.removeprefix("ne/") for name in runs[0] if name.startswith("ne/")]
        known = [name for name in BASELINES if name in record["baselines"] and data not in shown]
        shown |= {data} if known else set()
        time = evaluation(record["runs"][0])["time"]
        for name in known:
            for task in tasks:
                values = metric_cells([record["baselines"][name]], task)
                rows.append([data, task, name, "", *values, "", "", ""])
        inference = record["flops"]["inference"]
        flops = f"{inference / 1e9:.3g}"
        vanilla = ranking_record(f"{config.partition('_rank_')[0]}_rank_hstu")
        if model != "HSTU" and vanilla:
            flops += f" ({100 * inference / vanilla['flops']['inference']:.0f} %)"
        seconds = "device shared"
        if not record.get("shared_device"):
            seconds = f"{statistics.median(run['seconds'] for run in record['runs']):.0f}"
        last = [flops, f"{seconds} ({record['device']})", time]
        for task in tasks:
            rows.append([data, task, model, str(len(runs)), *metric_cells(runs, task), *last])
    header += ["inference GFLOP a request (of HSTU's)", "seconds a run", "time"]
    return markdown(header, rows)


@measured("ml100k_rank_hstu")
def evaluation_table(trained: Json) -> str:
    """One run of MovieLens-100K, its test events predicted under each choice of `eval.time`."""
    records = [load(f"ml100k_rank_hstu_{name}") for name in ("request", "last")]
    found = [(trained["runs"][0], trained["runs"][0]["best"])] + [
        (record, record["tables"]["float32"]["metrics"]) for record in records if record
    ]
    task = "rating_at_least_4"
    rows = [
        [f"`{evaluation(record)['time']}`", *metric_cells([metrics], task), short(metrics["mse"])]
        for record, metrics in found
    ]
    names = [name.replace("_", " ").upper() for name in METRICS]
    return markdown(["`eval.time`", *names, "squared error of stars"], rows)


def ablation_table() -> str:
    """One line a variant of a configuration, as scripts.ablation names them.

    Each variant has one piece changed; its NE stands against that of the whole.
    """
    rows, notes = [], []
    for config, name in (ABLATIONS | SMALL_ABLATIONS).items():
        record = load(name)
        if not record:
            continue
        whole = record["variants"].get("ultra")
        for variant, found in record["variants"].items():
            runs = [run["best"] for run in found["runs"]]
            entropies = [run["ne"] for run in runs]
            difference = ""
            if whole is not None and found is not whole:
                entropy = statistics.mean(run["best"]["ne"] for run in whole["runs"])
                difference = f"{statistics.mean(entropies) - entropy:+.4f}"
            areas = [
                statistics.mean(value for key, value in run.items() if key.startswith("auc/"))
                for run in runs
            ]
            seconds = ""
            if not record.get("shared_device"):
                each = [run["seconds"] / run["epochs"] for run in found["runs"]]
                seconds = f"{statistics.median(each):.1f}"
            rows.append(
                [
                    config,
                    variant.replace("_", " "),
                    str(len(runs)),
                    mean_and_deviation(entropies),
                    difference,
                    mean_and_deviation(areas),
                    *cells(found, "{inference_gflop:.3g}", "{training_gflop:.3g}"),
                    seconds,
                ]
            )
        notes += [record["note"]] if "note" in record else []
        runs = [run for found in record["variants"].values() for run in found["runs"]]
        notes += [f"{config}: evaluated with {evaluated(runs[0], 'time')}."] if runs else []
    header = ["config", "variant", "seeds", "NE", "difference", "AUC"]
    header += ["inference GFLOP", "training GFLOP", "seconds an epoch"]
    return markdown(header, rows, *notes)


@measured("signal_effects")
def signal_effects_table(record: Json) -> str:
    """One line for what is read: the lowest NE, and what training reaches."""
    known, found, rows = record["known"], record["variants"], []
    whole = found["ultra"]["mean"]["ne"]
    for variant, runs in found.items():
        missing = variant.removeprefix("without_")
        lowest = known["whole"] if variant == "ultra" else known["without"].get(missing, 1.0)
        rises = ["", ""]
        if variant != "ultra":
            rises = [f"+{short(lowest - known['whole'])}", f"{runs['mean']['ne'] - whole:+.4f}"]
        measured_ne = mean_and_deviation([run["best"]["ne"] for run in runs["runs"]])
        names = {"ultra": "all signals", "without_any": "no signal"}
        name = names.get(variant, f"without `{missing}`")
        rows.append([name, short(lowest), rises[0], measured_ne, rises[1]])
    seeds = len(found["ultra"]["runs"])
    return markdown(
        ["read", "lowest NE", "rise", "measured NE", "rise"],
        rows,
        "{users} users of {events} events".format(**record) + f", {seeds} seeds, {origin(record)}",
    )


SOFTMAX_ROWS = {  # end of a record's name: layer, what stands in it
    "research_bias": ("research", "HSTU"),
    "research": ("research", "HSTU (-rab)"),
    "research_softmax": ("research", "HSTU (-rab, softmax)"),
    "bias": ("production", "HSTU"),
    "": ("production", "HSTU (-rab)"),
    "softmax": ("production", "HSTU (-rab, softmax)"),
}


def softmax_table() -> str:
    """The rows of HSTU's table 5 on open data."""
    rows = []
    for prefix, data in (("assistments", "ASSISTments 2017"), ("ml1m", "MovieLens-1M")):
        for end, (layer, words) in SOFTMAX_ROWS.items():
            record = ranking_record("_".join(filter(None, [f"{prefix}_rank_hstu", end])))
            if not record:
                continue
            entropies = [run["best"]["ne"] for run in record["runs"]]
            rows.append([data, layer, words, str(len(entropies)), mean_and_deviation(entropies)])
    published = "Quoted from the paper, table 5 (its own data): .5067, .4980 and .4937 E-NE, "
    published += ".7931, .7860 and .7805 C-NE for softmax, SiLU, SiLU with relative bias."
    return markdown(["data", "layer", "model", "seeds", "NE"], rows, published)


def generative_table() -> str:
    """Each way to train, at equal operations: test NE, and validation NE on the way there."""
    rows, notes = [], []
    for name, data in (("assistments", "ASSISTments 2017"), ("synthetic", "synthetic")):
        record = load(f"generative_{name}")
        if best_possible := record.get("best_possible"):
            notes.append(
                f"The best NE that Bayes' rule reaches there: {short(best_possible['ne'])}."
            )
        for variant, found in record.get("variants", {}).items():
            best = [run["best"]["ne"] for run in found["runs"]]
            budget = found["trained_gflop"]
            on_the_way = [
                mean_and_deviation(
                    [_best_until(run["curve"], share * budget) for run in found["runs"]]
                )
                for share in (1 / 4, 1 / 2)
            ]
            rows.append(
                [
                    data,
                    variant.replace("_", " "),
                    str(len(best)),
                    f"{budget / 1e3:.0f}",
                    f"{found['epochs']} x {found['epoch_requests']}",
                    *on_the_way,
                    mean_and_deviation(best),
                ]
            )
    header = ["data", "training", "seeds", "TFLOP", "epochs x requests"]
    header += ["validation NE at 1/4", "at 1/2", "test NE"]
    return markdown(header, rows, *notes)


def _best_until(curve: list[dict[str, float]], gflop: float) -> float:
    """The best NE of an evaluation within so many operations; of the first where none is."""
    within = [point["ne"] for point in curve if point["gflop"] <= 1.001 * gflop]
    return min(within, default=curve[0]["ne"])


def metric_cells(runs: list[dict[str, float]], task: str) -> list[str]:
    return [
        mean_and_deviation([run[key] for run in runs]) if key in runs[0] else ""
        for key in (f"{name}/{task}" for name in METRICS)
    ]


@measured("rank_positions")
def positions_table(record: Json) -> str:
    """The test metrics of both ways to count positions, for each configuration."""
    rows = []
    for config, (data, model) in RANKING.items():
        for positions in ("backwards", "forwards"):
            best = [
                run["best"]
                for run in record["runs"]
                if (run["config"], run["positions"]) == (config, positions)
            ]
            if best:
                found = [
                    mean_and_deviation([values[name] for values in best]) if name in best[0] else ""
                    for name in ("ne", "mse")
                ]
                rows.append([data, model, positions, str(len(best)), *found])
    header = ["data", "model", "positions", "seeds", "NE", "squared error of stars"]
    told = f"Evaluated with {evaluated(record['runs'][0], 'time')}."
    return markdown(header, rows, told, origin(record))
