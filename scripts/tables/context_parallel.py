"""The tables and the figure of context parallelism: longest sequences, steps, exchange, balance."""

from matplotlib.axes import Axes

from experiments.record import Json
from scripts.tables.records import (
    NOT_MEASURED,
    cells,
    figure,
    first,
    load,
    markdown,
    measured,
    of_commit,
    origin,
)

GIB = 2**30
# Quoted from arXiv 2508.04711: one H100 of 80 GB a shard, no rematerialisation.
PUBLISHED = {1: 3072, 2: 4096, 4: 7168, 8: 16384}
PUBLISHED_BY = "quoted from arXiv 2508.04711"
VARIANTS = {
    "causal/none": "full causal, `ring`",
    "semi_local/none": "semi-local, `halo`",
    "causal/selective": "full causal, `ring`, `model.remat=selective`",
    "semi_local/selective": "semi-local, `halo`, `model.remat=selective`",
}
MASKS = {"semi_local": "semi-local", "causal": "full causal"}
COLOURS = {"semi_local": "tab:red", "causal": "tab:blue"}
STEPS = ("context_parallel_steps_h200", "context_parallel_steps_h100")  # whatever was measured
BATCHES = ("batches_h200", "batches_cpu")
FIGURE = "![Speed-up by strategy, and longest sequence over devices](figures/context_parallel.png)"


@measured("context_parallel_longest")
def longest_table(record: Json) -> str:
    header = ["", *map(str, PUBLISHED), "8 over 1"]
    published = [f"{length:,}" for length in PUBLISHED.values()]
    rows = [[PUBLISHED_BY, *published, f"{PUBLISHED[8] / PUBLISHED[1]:.1f}"]]
    for variant, label in VARIANTS.items():
        found = record["variants"].get(variant, {})
        lengths = {int(context): values["longest"] for context, values in found.items()}
        if lengths:
            known = [f"{lengths[c]:,}" if c in lengths else "" for c in PUBLISHED]
            ratio = f"{lengths[8] / lengths[1]:.2f}" if {1, 8} <= lengths.keys() else ""
            rows.append([label, *known, ratio])
    notes = cells(
        record | {"origin": of_commit(record)},
        "Events of each of {users} histories of a group, by the group's devices; {budget_GiB:.0f} "
        "GiB a device, by the compiler's count of a whole training step, compiled for "
        "{compiled_for}; {origin}, {date:.10}.",
    )
    confirmed = record.get("confirmed", {"runs": []})
    for run in confirmed["runs"]:
        if "error" in run:
            notes.append(f"A confirmation failed: {run['error'].splitlines()[0]}")
            continue
        case, peak = run["case"], run["bytes_peak"]
        memory = "memory not reported"
        if peak:
            predicted = f"{run['bytes_predicted'] / GIB:.1f} by the compiler"
            memory = f"{peak / GIB:.1f} GiB at most, {predicted}"
        device = confirmed["device"].split(" x ")[-1]
        notes.append(
            f"Trained on {case['context']} x {device}: {MASKS[case['mask']]}, "
            f"{case['length']:,} events: {memory}."
        )
    return markdown(header, rows, *notes, FIGURE)


@measured(*STEPS, part="steps")
def steps_table(record: Json) -> str:
    rows = []
    for mask, cases in record["steps"].items():
        for name, found in cases.items():
            values = ["-"] * 5 + ["failed"]
            if "error" not in found:
                values = [
                    *cells(found, "{users} x {length:,}", "{step_ms:.1f}"),
                    f"{found['tokens_a_second'] / 1e6:.2f}",
                    f"{found['bytes_sent_a_step'] / 1e6:,.0f}",
                    f"{found['bytes_a_device'] / GIB:.1f}",
                    *(cells(found, "{speed_up:.2f}") if "speed_up" in found else [""]),
                ]
            rows.append([MASKS[mask], _case(name), *values])
    header = ["mask", "devices share", "batch", "ms a step", "million tokens a second"]
    header += ["MB a device sends", "GiB a device", "speed-up"]
    notes = [
        f"Speed-up: tokens a second over those of one device. {record['devices']} of "
        f"{origin(record)}"
    ]
    if long := record.get("long"):
        case, losses, times = long["case"], long["losses"], sorted(long["step_ms"][1:])
        peak = f", {long['bytes_peak'] / GIB:.1f} GiB of a device" if long["bytes_peak"] else ""
        notes.append(
            f"One history of {case['length']:,} events, semi-local, on {case['context']} devices: "
            f"{times[len(times) // 2]:.0f} ms a step{peak}, loss {losses[0]:.2f} before and "
            f"{losses[-1]:.2f} after {len(losses) - 1} steps."
        )
    return markdown(header, rows, *notes, *record.get("notes", []))


def _case(name: str) -> str:
    kind, comma, more = name.partition(", ")
    others = {"one device": "nothing: one device", "data": "the users (`data`)"}
    return others.get(kind, f"rows, `{kind}`") + comma + more


@measured(*STEPS, part="reshard")
def reshard_table(record: Json) -> str:
    found = record["reshard"]
    rows = []
    for place, ways in found["ways"].items():
        base = ways["all_gather"]["batches_a_second"]
        for way, values in ways.items():
            rate = values["batches_a_second"]
            rows.append(
                [
                    place,
                    way.replace("_", "-"),
                    f"{rate:,.0f}",
                    f"{rate / base:.2f}",
                    f"{values['temporary_bytes'] / 2**20:,.0f}",
                    f"{values['bytes_sent'] / 1e6:,.1f}",
                ]
            )
    header = ["rows lie in", "by", "batches a second", "of all-gather's"]
    header += ["temporary MiB a device", "MB a device sends"]
    size = cells(found, "{rows:,} rows of width {width} over {devices} devices")[0]
    return markdown(header, rows, f"{size}; {origin(record)}")


def batches_table() -> str:
    """How a group comes by its batch: the batch by itself, then a training step where measured."""
    rows, notes = [], []
    for record in filter(None, map(load, BATCHES)):
        kinds = {
            **record["batches"],
            **{f"{k}, step": v for k, v in record.get("steps", {}).items()},
        }
        for kind, ways in kinds.items():
            base = ways["replicated"]["batches_a_second"]
            for way, found in ways.items():
                rows.append(
                    [
                        f"{record['devices']} {record['platform'].upper()}s",
                        kind,
                        way,
                        f"{found['batches_a_second']:,.1f}",
                        f"{found['batches_a_second'] / base:.2f}",
                        f"{1e3 * found['processor_seconds']:.1f}",
                        f"{found['put_bytes'] / 1e6:.2f}",
                        f"{found['temporary_bytes'] / 1e6:.2f}",
                        f"{found['bytes_sent'] / 1e6:.2f}",
                    ]
                )
        notes += cells(
            record | {"origin": origin(record)},
            "{rows:,} rows, {users} users of up to {longest:,} events, {processes} processes, the "
            "machine {machine}: {origin}",
        )
    header = ["devices", "batch", "`parallel.batches`", "batches a second", "of replicated"]
    header += ["processor ms, all", "MB put on a device", "MB temporary", "MB a device sends"]
    return markdown(header, rows, *notes)


@measured("context_parallel_balance")
def balance_table(record: Json) -> str:
    layouts = ("contiguous", "striped", "balanced")
    rows = []
    for key, values in record["busiest_over_mean"].items():
        lengths, mask = key.split("/")
        loads = [f"{values[layout]:.3f}" if layout in values else "" for layout in layouts]
        rows.append([lengths, MASKS[mask], *loads])
    note = (
        "{rows:,} rows over {shards} shards, blocks of {block} rows, the worst of {draws} draws "
        "of lengths."
    )
    return markdown(["lengths", "mask", *layouts], rows, *cells(record, note))


def context_parallel_figure() -> None:
    """Speed-up by strategy, and the longest sequence over shards."""
    steps, longest = first(*STEPS), load("context_parallel_longest")
    if longest or "steps" in steps:
        with figure("context_parallel", 11.5, 4.2) as drawn:
            left, right = drawn.subplots(1, 2)
            _draw_steps(left, steps)
            _draw_longest(right, longest)


def _draw_steps(axis: Axes, record: Json) -> None:
    if "steps" not in record:
        axis.set_axis_off()
        axis.text(0.5, 0.5, f"steps: {NOT_MEASURED}", ha="center")
        return
    bars = [
        (name, mask, found["speed_up"])
        for mask, cases in record["steps"].items()
        for name, found in cases.items()
        if "speed_up" in found and name != "one device"
    ][::-1]
    inside: Json = {"va": "center", "ha": "right", "color": "white", "fontsize": 8}
    for place, (_, mask, value) in enumerate(bars):
        axis.barh(place, value, color=COLOURS[mask], height=0.7)
        axis.text(value - 0.06, place, f"{value:.2f}", **inside)
    labels = [f"{MASKS[mask]} mask, {_divided(name)}" for name, mask, _ in bars]
    axis.set_yticks(range(len(bars)), labels, fontsize=8)
    count = record["devices"]
    axis.axvline(count, color="black", linestyle=":", linewidth=1)
    axis.set_ylim(-0.6, len(bars) + 0.1)
    note: Json = {"ha": "right", "va": "center", "fontsize": 8}
    axis.text(count - 0.02, len(bars) - 0.3, f"{count} times by {count} devices", **note)
    axis.set(xlabel="tokens a second, over one device", xlim=(0, count * 1.15))
    device = record["device"].split(" x ")[-1]
    title = f"speed-up of a training step on {count} x {device}\n{of_commit(record)}"
    axis.set_title(title, fontsize=10, pad=12)


def _divided(case: str) -> str:
    """What the devices of a case divide among them."""
    kind, comma, more = case.partition(", ")
    divided = "users divided" if kind == "data" else f"rows divided, {kind}"
    return divided + comma + more.replace("2 x batch", "twice the batch")


def _remat(remat: str) -> str:
    return ", all kept" if remat == "none" else f", {remat} recomputation"


def _draw_longest(axis: Axes, record: Json) -> None:
    published = list(PUBLISHED.values())
    contexts = list(PUBLISHED)
    axis.plot(contexts, published, color="tab:grey", marker="s", markersize=4, label=PUBLISHED_BY)
    for variant, found in sorted(record.get("variants", {}).items()):
        mask, remat = variant.split("/")
        lengths = dict(sorted((int(c), values["longest"]) for c, values in found.items()))
        axis.plot(
            list(lengths),
            list(lengths.values()),
            color=COLOURS[mask],
            marker="o" if mask == "causal" else "x",
            markersize=5,
            linestyle="-" if remat == "none" else "--",
            label=VARIANTS[f"{mask}/none"].replace("`", "") + _remat(remat),
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    ticks = [2**n for n in range(11, 18)]
    axis.set_yticks(ticks, [f"{n // 1024}k" for n in ticks])
    axis.set_xticks(contexts, [str(c) for c in contexts])
    axis.minorticks_off()
    axis.set(xlabel="devices that share the rows", ylabel="events of each history")
    budget = f" in {record['budget_GiB']:.0f} GiB a device\n{of_commit(record)}" if record else ""
    axis.set_title(f"longest history that fits{budget}", fontsize=10, pad=12)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=7)
