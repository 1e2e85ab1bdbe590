"""The tables and the figure of runs over windows: a model that continues, and one trained anew."""

import statistics

from experiments.record import Json
from scripts.tables.records import (
    NOT_MEASURED,
    cells,
    evaluated,
    figure,
    load,
    markdown,
    mean_and_deviation,
    measured,
    origin,
    short,
)
from ultra_hstu.criteria import display_name

RECORDS = {  # record -> what was measured
    "windows_ml1m": "MovieLens-1M, by month",
    "windows_ml1m_event": "MovieLens-1M, by events",
    "windows_synthetic": "synthetic stream",
}
ARMS = {"anew": ("trained anew", "tab:grey"), "continued": ("continued", "tab:blue")}


def compared_table() -> str:
    """What either model reaches over all windows, and how far they lie apart."""
    rows, notes = [], []
    for name, title in RECORDS.items():
        if not (record := load(name)):
            continue
        windows = record["windows"]["anew"]
        judged = [row for row in windows if row["targets"]]
        for metric, found in record["metrics"].items():
            apart = found["difference"] / found["standard_error"]
            rows.append(
                [
                    title,
                    display_name(metric),
                    str(len(judged)),
                    f"{found['targets']:,}",
                    *(mean_and_deviation(found[arm]) for arm in ARMS),
                    f"{found['difference']:+.4f} ({apart:+.1f} standard errors)",
                    f"{100 * record['share_of_steps']:.1f} %",
                ]
            )
        told = evaluated(record, *record["eval"])
        notes.append(f"{title}: {len(record['seeds'])} seeds, {told}. {origin(record)}")
    header = ["data", "metric", "windows", "targets", *(words for words, _ in ARMS.values())]
    return markdown([*header, "difference", "steps for the newest window"], rows, *notes)


def windows_table() -> str:
    """Every window of MovieLens-1M: its events, and both models before they have learned it."""
    record = load("windows_ml1m")
    if not record:
        return NOT_MEASURED
    metric = next(iter(record["metrics"]))
    rows = []
    for anew, continued in zip(*(record["windows"][arm] for arm in ARMS), strict=True):
        values = [short(one[metric]) if one["targets"] else "" for one in (anew, continued)]
        counts = [anew[name] for name in ("events", "users", "new_users", "new_items", "targets")]
        steps = [f"{one['steps']:,}" for one in (anew, continued)]
        period = anew["period"].partition(" ")[0]
        rows.append([period, *(f"{count:,}" for count in counts), *values, *steps])
    name = display_name(metric)
    header = ["from", "events", "users", "new users", "new items", "targets"]
    arms = [words for words, _ in ARMS.values()]
    return markdown(
        [*header, *(f"{name}, {arm}" for arm in arms), *(f"steps, {arm}" for arm in arms)], rows
    )


def draw() -> None:
    """Both models over windows, a panel a record."""
    found = {title: record for name, title in RECORDS.items() if (record := load(name))}
    if not found:
        return
    with figure("windows", 5 * len(found), 3.6) as drawn:
        for axis, (title, record) in zip(
            drawn.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
        ):
            metric = next(iter(record["metrics"]))
            for arm, (words, color) in ARMS.items():
                rows = [row for row in record["windows"][arm] if row["targets"]]
                axis.plot(
                    [row["window"] for row in rows],
                    [row[metric] for row in rows],
                    color=color,
                    marker="o",
                    markersize=3,
                    label=words,
                )
            steps = statistics.mean(
                row["steps"] for row in record["windows"]["continued"] if row["window"]
            )
            axis.set(
                title=f"{title}: {display_name(metric)} before a window is learned",
                xlabel=f"window, {steps:.0f} steps each where the model continues",
            )
            axis.title.set_fontsize(9)
            axis.grid(alpha=0.3)
            axis.set_ylim(bottom=0)
            axis.legend(frameon=False)


@measured("serve_swap_cpu")
def swap_table(record: Json) -> str:
    """What became of the requests while a newer model took the place of another."""
    found = record["swap"]
    rows = [
        [
            words,
            f"{found[part]['per_second']:.0f}",
            *cells(found[part], "{p50_ms:.0f}", "{p99_ms:.0f}"),
        ]
        for part, words in (
            ("before", "the older model alone"),
            ("during", "while the newer one is loaded and compiled"),
            ("after", "the newer model"),
        )
    ]
    header = ["", "requests a second", "median, ms", "99th percentile, ms"]
    answered = ", ".join(f"{count:,} by `{name}`" for name, count in found["by_version"].items())
    note = (
        f"{found['requests']:,} requests over {record['connections']} connections, {answered}; "
        f"{found['lost']} lost, {found['wrong']} answered by another model than they name; "
        f"{found['seconds_until_the_newer_answers']:.0f} s until the newer model answered. "
        f"Two seeds of `{record['config']}`, {record['replicas']} replica, {origin(record)}"
    )
    return markdown(header, rows, note)
