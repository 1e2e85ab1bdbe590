"""Shows what events hold, before anything is trained: columns, counts, lengths, times, and what a
run would cost.

python -m experiments.inspect --data=events.parquet [--config.data.table.user=NAME ...]
    [--picture=inspect.png]
python -m experiments.inspect --config.data.source=ml-1m [--data=FOLDER]

Own events are in --data, and a public set in a folder with its publisher's files; without --data
that is downloaded. The data is prepared as training does, so that training with the same settings
starts at once. --record adds the lengths of histories to a file that has those of other sets.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import rich.box
from absl import flags
from jaxtyping import Bool, Int64
from rich.table import Table

from experiments import command
from experiments.record import Json, Record
from ultra_hstu import entry_updates, progress, report, tasks
from ultra_hstu.config import Config
from ultra_hstu.data import sources
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.table import prepared
from ultra_hstu.data.table.columns import Reading
from ultra_hstu.data.table.source import TableSource
from ultra_hstu.fields import changed

_CONFIG = command.define_config(default="table")
_DATA = flags.DEFINE_string(
    "data", None, "a file, a folder or a pattern; of a public set the folder of its files"
)
_PICTURE = flags.DEFINE_string(
    "picture", "inspect.png", "where the picture is written; empty: none"
)
_RECORD = flags.DEFINE_string("record", None, "a JSON file that lengths of histories are added to")
_SHOWN = 30  # columns
PERCENT = (0, 10, 50, 90, 99, 100)


def main(_: list[str]) -> None:
    config = command.resolved(_CONFIG.value)
    if _DATA.value is not None:
        config = changed(config, data={"raw_dir": _DATA.value})
    source = config.data.source
    sources.check(source)
    if source in sources.GENERATED:
        raise ValueError(f"data.source={source!r} is generated: name own events, or a public set")
    if source == sources.TABLE and _DATA.value is None:
        raise ValueError("--data must name a file, a folder or a pattern of events")
    console, data = report.make_console(), config.data
    working = command.progress_console(stderr=True)
    opened, name = prepared.open_source(data), _DATA.value or source
    console.print(columns_table(opened.events))
    with progress.waiting(working, "data", f"reading {name}") as came:
        interactions = prepared.load(data)
        came(progress.counts(interactions))
    reading = prepared.read_reading(prepared.prepare(data, opened))
    console.print(counts_table(interactions, reading))
    console.print(lengths_table(interactions))
    found = summary(interactions)
    said = ", ".join(f"{key} {value:,}" for key, value in found.items())
    console.print(f"histories: {said}", highlight=False, soft_wrap=True)
    record = Record(_RECORD.value, grows=True)
    record.add(sets=record.values.get("sets", {}) | {source if opened.public else name: found})
    with progress.waiting(working, "cost", "planning an epoch, counting its operations"):
        cost = cost_line(config, interactions)
    console.print(cost, highlight=False, soft_wrap=True)
    if _PICTURE.value:
        with progress.waiting(working, "picture", "drawing"):
            draw(interactions, Path(_PICTURE.value), name)
        console.print(f"picture   {_PICTURE.value}", highlight=False)


def columns_table(files: Sequence[TableSource]) -> Table:
    """The columns of the first file, with their types and a value of each."""
    first, more = files[0], f" (and {len(files) - 1} more files)" if len(files) > 1 else ""
    table = Table("column", "type", "first value", title=f"{first}{more}", box=rich.box.SIMPLE)
    names = list(first.types)
    kinds = {n: first.types[n] for n in names[:_SHOWN] if not pa.types.is_nested(first.types[n])}
    batch = next(iter(first.batches(kinds)), None)
    values = batch.slice(0, 1).to_pylist()[0] if batch is not None and len(batch) else {}
    for name in names[:_SHOWN]:
        table.add_row(name[:40], str(first.types[name]), str(values.get(name, ""))[:40])
    if len(names) > _SHOWN:
        table.add_row(f"... {len(names)} columns in all", "", "")
    return table


def counts_table(interactions: Interactions, reading: Reading) -> Table:
    table = Table("", "count", "share", title="events", box=rich.box.SIMPLE, show_header=False)

    def row(name: str, count: int, of: int | None = None) -> None:
        table.add_row(name, f"{count:,}", "" if not of else f"{count / of:.1%}")

    kept, users, items = interactions.num_events, interactions.num_users, interactions.num_items
    row("in the files", reading.events)
    for reason, count in reading.dropped.items():
        row(f"dropped: {reason}", count, reading.events)
    row("kept", kept, reading.events)
    row("users", users)
    row("items", items)
    row("of an item that its user has before", int(repeated(interactions).sum()), kept)
    if (times := interactions.timestamps) is not None:
        tied = (np.diff(times) == 0) & ~ends(interactions)[:-1]
        row("at the time of the user's event before", int(tied.sum()), kept)
    busiest = np.sort(np.bincount(interactions.items)[1:])[::-1]
    row("of the most frequent 1 % of items", int(busiest[: max(1, items // 100)].sum()), kept)
    return table


def ends(interactions: Interactions) -> Bool[np.ndarray, " E"]:
    """The last event of every user."""
    last_E = np.zeros(interactions.num_events, bool)
    last_E[interactions.offsets[1:] - 1] = True
    return last_E


def repeated(interactions: Interactions) -> Bool[np.ndarray, " E"]:
    """Events of an item that their user has before."""
    user_E = np.repeat(np.arange(interactions.num_users), interactions.lengths)
    key_E = user_E * (interactions.num_items + 1) + interactions.items
    order = np.argsort(key_E, kind="stable")
    again_E = np.zeros(len(key_E), bool)
    again_E[order[1:]] = np.diff(key_E[order]) == 0
    return again_E


def summary(interactions: Interactions) -> Json:
    """Counts, and the lengths of histories: what tells long ones from short ones."""
    lengths = interactions.lengths
    return {
        "users": interactions.num_users,
        "items": interactions.num_items,
        "events": interactions.num_events,
        "mean": round(float(lengths.mean()), 1),
        "median": round(float(np.median(lengths)), 1),
        "99 %": round(float(np.percentile(lengths, 99)), 1),
        "longest": int(lengths.max()),
    }


def lengths_table(interactions: Interactions) -> Table:
    """Quantiles of events a user and an item, and of the days that a user is there."""
    table = Table("", *(f"{p} %" for p in PERCENT), title="quantiles", box=rich.box.SIMPLE)

    def row(name: str, values: Int64[np.ndarray, " n"] | np.ndarray, digits: int = 0) -> None:
        table.add_row(name, *(f"{v:,.{digits}f}" for v in np.percentile(values, PERCENT)))

    row("events a user", interactions.lengths)
    row("events an item", np.bincount(interactions.items)[1:])
    if (times := interactions.timestamps) is not None:
        days = (times[interactions.offsets[1:] - 1] - times[interactions.offsets[:-1]]) / 86_400
        row("days from a user's first event to the last", days, 1)
    return table


def cost_line(config: Config, interactions: Interactions) -> str:
    """What training with this configuration computes and holds."""
    task = tasks.of(config, interactions)
    loader = task.loader(
        "train",
        batch_users=config.data.batch_users,
        steps_per_call=config.train.steps_per_call,
    )
    steps = len(loader.plan())
    state = jax.eval_shape(lambda: task.recipe.init(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    rest, _ = entry_updates.split(state.params, task.recipe.by_entries)
    # Tables that are updated entry by entry have no gradients of their size.
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, rest)))
    examples = len(next(iter(task.columns("train").values())))
    per_epoch = task.flops("train").training * examples
    cut = float((interactions.lengths > config.data.max_history + 1).mean())
    return (
        f"a run of {config.name}: {steps:,} steps an epoch, {per_epoch / 1e9:,.0f} GFLOP; "
        f"{parameters:,} parameters, {held / 2**20:,.0f} MiB with gradients and "
        f"optimizer; {cut:.1%} of users have more than data.max_history="
        f"{config.data.max_history} events, and the newest count"
    )


def draw(interactions: Interactions, picture: Path, name: str) -> None:
    """Events a user, events an item, and events over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = interactions.timestamps is not None
    figure, axes = plt.subplots(1, 2 + timed, figsize=(5 * (2 + timed), 3.8), layout="constrained")
    lengths = interactions.lengths
    low, high = int(lengths.min()), int(lengths.max())
    wide = high > 10 * low
    bins = np.unique((np.geomspace if wide else np.linspace)(low, high + 1, 40).astype(int))
    axes[0].hist(lengths, bins=bins - 0.5, color="#4477aa")
    median = float(np.median(lengths))
    axes[0].axvline(median, color="black", linewidth=1)
    axes[0].text(median, axes[0].get_ylim()[1], f" median {median:g}", va="top")
    axes[0].set(title="How long are histories?", xlabel="events of a user", ylabel="users")
    if wide:
        axes[0].set_xscale("log")
        steps = [step * 10**power for power in range(10) for step in (1, 2, 5)]
        axes[0].set_xticks(ticks := [step for step in steps if low <= step <= high], ticks)
        axes[0].minorticks_off()
    count = np.sort(np.bincount(interactions.items)[1:])[::-1]
    share = np.cumsum(count) / count.sum()
    axes[1].plot(np.arange(1, len(count) + 1) / len(count), share, color="#4477aa")
    tenth = share[max(len(count) // 10 - 1, 0)]
    axes[1].plot([0.1], [tenth], "o", color="black")
    axes[1].text(
        0.13,
        max(tenth - 0.03, 0.15),
        f"the top 10 % of items\nhave {100 * tenth:.0f} % of events",
        va="top",
    )
    axes[1].set(
        title="Do few items have most events?",
        xlabel="share of items, most frequent first",
        ylabel="share of events",
        ylim=(0, 1.02),
    )
    if interactions.timestamps is not None:
        counts, edges = np.histogram(interactions.timestamps, bins=60)
        days = edges.astype(np.int64).astype("datetime64[s]")
        axes[2].stairs(counts, days, fill=True, color="#4477aa")
        axes[2].xaxis_date()
        axes[2].set(title="When did events happen?", xlabel="date", ylabel="events")
        axes[2].tick_params(axis="x", rotation=30)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{Path(name).name}: {interactions.num_events:,} events of {interactions.num_users:,} "
        f"users and {interactions.num_items:,} items, as kept"
    )
    figure.savefig(picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    command.run(main)
