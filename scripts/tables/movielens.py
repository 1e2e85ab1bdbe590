"""The reproduction on MovieLens-1M: a table a condition, beside public numbers, and trials."""

import functools
import itertools
import math
import statistics
from collections.abc import Callable

import matplotlib

from experiments.record import Json
from scripts import search
from scripts.tables.records import (
    NOT_MEASURED,
    evaluation,
    load,
    markdown,
    mean_and_deviation,
    measured,
    picture,
    short,
    themed,
)
from scripts.tables.retrieval import (
    METRICS,
    MODELS,
    PUBLIC,
    QUOTED,
    RECTOOLS,
    TRUE_ORDER,
    baseline_rows,
    ties_note,
)
from ultra_hstu.criteria import Metrics

COLOURS = {"ml1m_sasrec": "tab:grey", "ml1m_hstu": "tab:blue", "ml1m_hstu_large": "tab:red"}
HEADER = ("model", "", "hidden", "time", "seeds", *(name.upper() for name in METRICS))
# By condition, what follows a configuration's name in that of a record, and what it was.
VARIANTS: dict[str, dict[str, str]] = {
    "validated": {
        "validated": "ours",
        "validated_full": "ours, full softmax",
        "validated_all": "ours",
        "validated_full_all": "ours, full softmax",
    },
    "random_ties": {"random_ties": "ours"},
    "published": {"published": "ours", "published_all": "ours"},
    "temporal": {"temporal": "ours"},
}


def condition_table(condition: str) -> str:
    """One line a model and source; ours with mean and standard deviation over seeds."""
    rows = baseline_rows("ml1m_baselines", condition)
    for config, model in MODELS.items():
        for source, values in PUBLIC.get(condition, {}).get(config, {}).items():
            cells = [short(values.get(name)) for name in METRICS]
            hidden = "all" if source == RECTOOLS else "window"
            rows.append([model, f"{source} [q]", hidden, "target", "", *cells])
        for suffix, label in VARIANTS[condition].items():
            record = load(f"{config}_{suffix}")
            if not record:
                continue
            told = evaluation(record["runs"][0])
            eval_of = [told["hidden"], told["time"]]
            epochs = {"best": "", "last": ", last epoch"} if suffix == "published" else {"best": ""}
            for which, words in epochs.items():
                runs = [run[which] for run in record["runs"]]
                cells = [mean_and_deviation([run[name] for run in runs]) for name in METRICS]
                rows.append([model, label + words, *eval_of, str(len(runs)), *cells])
    quoted = [QUOTED] if any("[q]" in row[1] for row in rows) else []
    notes = ties_note() if condition == "random_ties" else []
    return markdown(HEADER, rows, *quoted, *notes)


def tables() -> dict[str, Callable[[], str]]:
    """The table of each condition, by its name on the page."""
    return {f"ml1m_{name}": functools.partial(condition_table, name) for name in VARIANTS}


# What is compared: a condition, a configuration and a public number of it, and records of ours.
COMPARED: dict[tuple[str, str], tuple[str, ...]] = {
    ("validated", "ml1m_hstu"): ("ml1m_hstu_validated_all", "ml1m_hstu_validated"),
    ("validated", "ml1m_hstu_large"): (
        "ml1m_hstu_large_validated_all",
        "ml1m_hstu_large_validated_full_all",
        "ml1m_best_validated_all",
        "ml1m_best_mol_validated_all",
        "ml1m_hstu_large_validated",
        "ml1m_hstu_large_validated_full",
        "ml1m_best_validated",
    ),
    ("random_ties", "ml1m_sasrec"): ("ml1m_sasrec_random_ties",),
    ("random_ties", "ml1m_hstu"): ("ml1m_hstu_random_ties",),
    ("random_ties", "ml1m_hstu_large"): ("ml1m_hstu_large_random_ties", "ml1m_best_random_ties"),
    ("random_ties", "ml1m_hstu_large_mol"): (
        "ml1m_hstu_large_mol_random_ties",
        "ml1m_best_mol_random_ties",
    ),
    ("published", "ml1m_sasrec"): ("ml1m_sasrec_published",),
    ("published", "ml1m_hstu"): ("ml1m_hstu_published",),
    ("published", "ml1m_hstu_large"): ("ml1m_hstu_large_published",),
}


def compared_table() -> str:
    """Ours beside every public number of the same condition: ahead, short, or neither."""
    rows = []
    for (condition, config), names in COMPARED.items():
        for source, public in PUBLIC[condition][config].items():
            for name in names:
                if record := load(name):
                    # Theirs are those of the last epoch, and so are ours beside them.
                    which = "last" if "true order" in source else "best"
                    cells = [
                        verdict([run[which][metric] for run in record["runs"]], public[metric])
                        for metric in ("hr@10", "ndcg@10", "hr@50", "hr@200")
                        if metric in public
                    ]
                    cells += [""] * (4 - len(cells))
                    hidden = evaluation(record["runs"][0])["hidden"]
                    rows.append([f"`{condition}`", source, f"`{name}`", hidden, *cells])
    header = ("condition", "beside [q]", "record", "hidden", "HR@10", "NDCG@10", "HR@50", "HR@200")
    note = (
        "Ours less theirs; ahead or short: by more than two standard errors of the mean over our "
        "seeds. Of theirs one number is known, whose own error is not counted."
    )
    return markdown(header, rows, note)


def verdict(values: list[float], public: float) -> str:
    """The difference to a public number, and whether it is more than seeds make."""
    difference = statistics.mean(values) - public
    shown = f"{difference:+.4f}".replace("0.", ".")
    if len(values) < 3:
        return f"{shown}, too few seeds"
    error = statistics.stdev(values) / math.sqrt(len(values))
    if abs(difference) <= 2 * error:
        return f"{shown}, equal"
    return f"{shown}, {'ahead' if difference > 0 else 'short'}"


def search_table() -> str:
    """Every recipe that was tried, the best first, by the validation items."""
    record = load("ml1m_best_search") or unfinished_search()
    return tried_table(record) if record else NOT_MEASURED


def unfinished_search() -> Json:
    """What a search has tried by now, as its record will say it; empty before the first trial."""
    changes: dict[str, search.Changes] = {search.BASE: {}} | search.candidates()
    names = {name: search.trial(name, of).name for name, of in changes.items()}
    found = {name: record for name in names if (record := load(names[name]))}
    if search.BASE not in found:
        return {}
    tried = search.summary(found, changes)
    left: Json = {"left": len(changes) - len(found), "chosen": None, "failed": {}}
    return {"config": search.BASE, "device": found[search.BASE]["device"], "tried": tried} | left


def tried_table(record: Json) -> str:
    base = next(row for row in record["tried"] if row["name"] == record["config"])
    rows = []
    for row in record["tried"]:
        gain = row["mean"]["ndcg@10"] - base["mean"]["ndcg@10"]
        mean = [short(row["mean"][name]) for name in ("hr@10", "ndcg@10", "hr@50", "hr@200")]
        mean[1] += f" ± {short(row['stdev'])}"
        epochs = statistics.mean(row["epochs"])
        name = "HSTU-large, full softmax" if row is base else row["name"]
        chosen = " (chosen)" if row["name"] == record["chosen"] else ""
        seconds = f"{statistics.mean(row['seconds']):.0f}"
        rows.append(
            [name + chosen, *mean, f"{gain:+.4f}".replace("0.", "."), f"{epochs:.0f}", seconds]
        )
    header = ("recipe", "HR@10", "NDCG@10", "HR@50", "HR@200", "gain", "epochs", "seconds")
    seeds = len(base["seeds"])
    note = f"{len(rows)} were tried, {seeds} seeds each, on validation items; {record['device']}."
    more = [f"Not trained: {', '.join(record['failed'])}."] if record["failed"] else []
    if left := record.get("left"):
        more.append(f"{left} candidates have not been tried yet: nothing is chosen.")
    return markdown(header, rows, note, *more)


@measured("ml1m_exact_times")
def exact_times_table(record: Json) -> str:
    """With the bias of times and without, on all users and on those whose times are exact."""
    users = {"all": "all users", "exact": f"{record['exact_users']:,} users with exact times"}
    rows = []
    for arm, what in (("times", "HSTU"), ("no_times", "HSTU without the bias of times")):
        found = record["arms"][arm]
        for part, words in users.items():
            runs: list[Metrics] = [run[part] for run in found["runs"].values()]
            cells = [mean_and_deviation([run[name] for run in runs]) for name in METRICS]
            rows.append([what, words, str(len(runs)), *cells])
    header = ("model", "measured on", "seeds", *(name.upper() for name in METRICS))
    return markdown(header, rows, f"`{record['protocol']}`, {record['device']}.")


# Seconds of the steps of 101 epochs with the public PyTorch code on an H200, without evaluation:
# quoted from runs of that code, milliseconds of a step times 4,848 steps.
PUBLIC_SECONDS = {"ml1m_sasrec": 47.0, "ml1m_hstu": 83.0, "ml1m_hstu_large": 256.0}


def seconds_picture() -> str:
    return picture("ml1m", "HR@10 over seconds of training, ours and the public code")


def seconds_figure() -> None:
    """HR@10 over seconds of training on one H200, every seed, beside the public code's end."""
    for drawn in themed("ml1m", 8, 4.5):
        axis, ink = drawn.subplots(), matplotlib.rcParams["text.color"]
        for config, colour in COLOURS.items():
            record = load(f"{config}_published")
            shared = ", GPU shared" if record.get("shared_device") else ""
            for number, run in enumerate(record.get("runs", [])):
                seconds = itertools.accumulate(point["seconds"] for point in run["history"])
                rates = [point["hr@10"] for point in run["history"]]
                axis.plot(
                    list(seconds),
                    rates,
                    color=colour,
                    linestyle="--" if shared else "-",
                    linewidth=1.2,
                    label=f"{MODELS[config]}{shared}" if number == 0 else None,
                )
            if record:
                public = PUBLIC["published"][config][TRUE_ORDER]["hr@10"]
                axis.plot(PUBLIC_SECONDS[config], public, "*", color=colour, markersize=13)
        label = "public PyTorch code, 101 epochs, steps alone (quoted)"
        axis.plot([], [], "*", color=ink, markersize=10, linestyle="", label=label)
        axis.set_xscale("log")
        ticks = (0.1, 1, 10, 100)
        axis.set_xticks(ticks, [f"{tick:g} s" for tick in ticks])
        axis.set(
            xlabel="training and evaluation, without compilation",
            ylabel="HR@10",
            title="MovieLens-1M, test users, protocol published, one H200",
        )
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="lower right", fontsize=9)
