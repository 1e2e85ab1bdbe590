"""The tables and the figure of context parallelism: longest sequences, steps by strategy, the first exchange, balance."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from scripts.tables.tables import FIGURES, NOT_MEASURED, load, markdown

GIB = 2**30
PUBLISHED = {
    1: 3072,
    2: 4096,
    4: 7168,
    8: 16384,
}  # arXiv 2508.04711, one H100 of 80 GB a shard, no rematerialisation
VARIANTS = {
    "causal/none": "full causal, `ring`",
    "semi_local/none": "semi-local, `halo`",
    "causal/selective": "full causal, `ring`, `model.remat=selective`",
    "semi_local/selective": "semi-local, `halo`, `model.remat=selective`",
}
STRATEGY = {"causal": "ring", "semi_local": "halo"}
MASKS = {"semi_local": "semi-local", "causal": "full causal"}


def steps_record() -> dict[str, Any] | None:
    """Of whatever GPU was measured."""
    return next(
        (record for name in ("h200", "h100") if (record := load(f"context_parallel_steps_{name}"))),
        None,
    )


def origin(record: dict[str, Any]) -> str:
    return f"{record['device']}, commit {record['commit']}, {record['date'][:10]}."


def longest_table() -> str:
    record = load("context_parallel_longest")
    contexts = list(PUBLISHED)
    header = ["", *(f"{c}" for c in contexts), "8 over 1"]
    rows = [
        [
            "published (arXiv 2508.04711)",
            *(f"{PUBLISHED[c]:,}" for c in contexts),
            f"{PUBLISHED[8] / PUBLISHED[1]:.1f}",
        ]
    ]
    if record is None:
        return markdown(header, [*rows, ["ours", *[NOT_MEASURED] * 4, ""]])
    for variant, label in VARIANTS.items():
        found = record["variants"].get(variant)
        if found:
            lengths = {c: found[str(c)]["longest"] for c in contexts if str(c) in found}
            ratio = f"{lengths[8] / lengths[1]:.2f}" if {1, 8} <= lengths.keys() else ""
            rows.append(
                [label, *(f"{lengths[c]:,}" if c in lengths else "" for c in contexts), ratio]
            )
    notes = [
        f"Events of each of {record['users']} histories of a group, by the group's devices; {record['budget_GiB']:.0f} GiB a device, by the compiler's count of a "
        f"whole training step, compiled for {record['compiled_for']}. Commit {record['commit']}, {record['date'][:10]}."
    ]
    for run in record.get("confirmed", {}).get("runs", []):
        if "error" in run:
            notes.append(f"A confirmation failed: {run['error'].splitlines()[0]}")
            continue
        case, peak = run["case"], run["bytes_peak"]
        measured = (
            f"{peak / GIB:.1f} GiB at most, {run['bytes_predicted'] / GIB:.1f} by the compiler"
            if peak
            else "memory not reported"
        )
        notes.append(
            f"Trained on {case['context']} x {record['confirmed']['device'].split(' x ')[-1]}: {MASKS[case['mask']]}, {case['length']:,} events: {measured}."
        )
    return "\n\n".join(
        [
            markdown(header, rows),
            *notes,
            "![Speed-up by strategy, and longest sequence over devices](figures/context_parallel.png)",
        ]
    )


def steps_table() -> str:
    record = steps_record()
    if record is None or "steps" not in record:
        return f"Steps by strategy: {NOT_MEASURED}."
    rows = []
    for mask, cases in record["steps"].items():
        for name, found in cases.items():
            if "error" in found:
                rows.append([MASKS[mask], _case(name), *["-"] * 5, "failed"])
                continue
            rows.append(
                [
                    MASKS[mask],
                    _case(name),
                    f"{found['users']} x {found['length']:,}",
                    f"{found['step_ms']:.1f}",
                    f"{found['tokens_a_second'] / 1e6:.2f}",
                    f"{found['bytes_sent_a_step'] / 1e6:,.0f}",
                    f"{found['bytes_a_device'] / GIB:.1f}",
                    f"{found['speed_up']:.2f}" if "speed_up" in found else "",
                ]
            )
    header = [
        "mask",
        "devices share",
        "batch",
        "ms a step",
        "million tokens a second",
        "MB a device sends",
        "GiB a device",
        "speed-up",
    ]
    notes = [
        f"Speed-up: tokens a second over those of one device. {record['devices']} of {origin(record)}"
    ]
    if long := record.get("long"):
        case, peak = long["case"], long["bytes_peak"]
        steady = sorted(long["step_ms"][1:])[len(long["step_ms"][1:]) // 2]
        notes.append(
            f"One history of {case['length']:,} events, semi-local, on {case['context']} devices: {steady:.0f} ms a step"
            + (f", {peak / GIB:.1f} GiB of a device" if peak else "")
            + f", loss {long['losses'][0]:.2f} before and {long['losses'][-1]:.2f} after {len(long['losses']) - 1} steps."
        )
    return "\n\n".join([markdown(header, rows), *notes, *record.get("notes", [])])


def _case(name: str) -> str:
    kind, _, more = name.partition(", ")
    label = {"one device": "nothing: one device", "data": "the users (`data`)"}.get(
        kind, f"rows, `{kind}`"
    )
    return f"{label}, {more}" if more else label


def reshard_table() -> str:
    record = steps_record()
    if record is None or "reshard" not in record:
        return f"The first exchange: {NOT_MEASURED}."
    found = record["reshard"]
    rows = []
    for place, ways in found["ways"].items():
        base = ways["all_gather"]
        for way, values in ways.items():
            rate, memory = values["batches_a_second"], values["temporary_bytes"]
            rows.append(
                [
                    place,
                    way.replace("_", "-"),
                    f"{rate:,.0f}",
                    f"{rate / base['batches_a_second']:.2f}",
                    f"{memory / 2**20:,.0f}",
                    f"{values['bytes_sent'] / 1e6:,.1f}",
                ]
            )
    header = [
        "rows lie in",
        "by",
        "batches a second",
        "of all-gather's",
        "temporary MiB a device",
        "MB a device sends",
    ]
    return "\n\n".join(
        [
            markdown(header, rows),
            f"{found['rows']:,} rows of width {found['width']} over {found['devices']} devices; {origin(record)}",
        ]
    )


def balance_table() -> str:
    record = load("context_parallel_balance")
    if record is None:
        return f"Balance: {NOT_MEASURED}."
    layouts = ("contiguous", "striped", "balanced")
    rows = []
    for key, values in record["busiest_over_mean"].items():
        lengths, mask = key.split("/")
        rows.append(
            [
                lengths,
                MASKS[mask],
                *(f"{values[layout]:.3f}" if layout in values else "" for layout in layouts),
            ]
        )
    note = f"{record['rows']:,} rows over {record['shards']} shards, blocks of {record['block']} rows, the worst of {record['draws']} draws of lengths."
    return "\n\n".join([markdown(["lengths", "mask", *layouts], rows), note])


def context_parallel_figure() -> None:
    """Speed-up by strategy, and the longest sequence over shards."""
    steps, longest = steps_record(), load("context_parallel_longest")
    if longest is None and (steps is None or "steps" not in steps):
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    _draw_steps(axes[0], steps)
    _draw_longest(axes[1], longest)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURES / "context_parallel.png", dpi=130)
    plt.close(figure)


def _draw_steps(axis: Any, record: dict[str, Any] | None) -> None:
    if record is None or "steps" not in record:
        axis.set_axis_off()
        axis.text(0.5, 0.5, f"steps: {NOT_MEASURED}", ha="center")
        return
    colours = {"semi_local": "tab:red", "causal": "tab:blue"}
    bars = [
        (name, mask, found["speed_up"])
        for mask, cases in record["steps"].items()
        for name, found in cases.items()
        if "speed_up" in found and name != "one device"
    ]
    for place, (_, mask, value) in enumerate(reversed(bars)):
        axis.barh(place, value, color=colours[mask], height=0.7)
        axis.text(
            value - 0.02, place, f"{value:.2f}", va="center", ha="right", color="white", fontsize=8
        )
    axis.set_yticks(range(len(bars)), [name for name, _, _ in reversed(bars)], fontsize=8)
    axis.axvline(record["devices"], color="black", linestyle=":", linewidth=1)
    for mask, colour in colours.items():
        axis.barh(0, 0, color=colour, label=MASKS[mask])
    axis.set(xlabel="tokens a second, over one device", xlim=(0, record["devices"] * 1.1))
    axis.set_title(
        f"training step, {record['devices']} x {record['device'].split(' x ')[-1]}", fontsize=10
    )
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _draw_longest(axis: Any, record: dict[str, Any] | None) -> None:
    contexts = list(PUBLISHED)
    axis.plot(
        contexts,
        [PUBLISHED[c] for c in contexts],
        color="tab:grey",
        marker="s",
        markersize=4,
        label="published (arXiv 2508.04711)",
    )
    looks = {"causal": "tab:blue", "semi_local": "tab:red"}
    for variant, found in (record or {"variants": {}})["variants"].items():
        mask, remat = variant.split("/")
        points = sorted((int(context), values["longest"]) for context, values in found.items())
        label = f"{MASKS[mask]}, {STRATEGY[mask]}" + (", remat" if remat != "none" else "")
        axis.plot(
            *zip(*points, strict=True),
            color=looks[mask],
            marker="o" if mask == "causal" else "x",
            markersize=5,
            linestyle="--" if remat != "none" else "-",
            label=label,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    ticks = [2**n for n in range(11, 18)]
    axis.set_yticks(ticks, [f"{n // 1024}k" for n in ticks])
    axis.set_xticks(contexts, [str(c) for c in contexts])
    axis.minorticks_off()
    axis.set(xlabel="devices that share the rows", ylabel="events of each history")
    axis.set_title(
        f"longest sequence in {record['budget_GiB']:.0f} GiB a device"
        if record
        else "longest sequence",
        fontsize=10,
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=7)
