"""The tables of speed: starts, the step by kernel, and where events lie."""

from experiments.record import Json
from scripts.tables.records import NOT_MEASURED, cells, load, markdown, measured, origin

PLACEMENTS = {"device": "`device`", "stream": "`stream`", "shards": "`shards`"}


def noted(record: Json) -> str:
    return f" There, {record['note']}." if "note" in record else ""


def start_table() -> str:
    """Seconds from the command to the first step, on a CPU and on a GPU."""
    rows, notes = [], []
    for name in ("start_cpu", "start_h200"):
        record = load(name)
        for config, starts in record.items():
            if not isinstance(starts, dict) or "later" not in starts:
                continue
            for which, found in starts.items():
                templates = ("{device:.1f}", "{data:.1f}", "{model:.1f}", "{compile:.1f}")
                computed = f"{found['cpu']:.1f}" if "cpu" in found else ""
                rows.append([f"`{config}`", which, *cells(found, *templates), computed])
        if record:
            notes.append(f"{origin(record)}{noted(record)}")
    header = ["", "start", "code and JAX", "data", "step known", "first step", "computed by then"]
    return markdown(header, rows, "Seconds since the command. " + " ".join(notes))


@measured("step_h200")
def step_table(record: Json) -> str:
    """What a step of each workload does, by kind of kernel: milliseconds and share."""
    parts = []
    for workload, found in record.items():
        if not isinstance(found, dict) or "profile" not in found:
            continue
        rows = [
            [kind, f"{one['kernels']:.0f}", f"{one['ms']:.2f}", f"{one['share']:.0%}"]
            for kind, one in found["profile"]["kinds"].items()
        ]
        mfu = "" if found.get("MFU") is None else f", MFU {found['MFU']:.2f}"
        note = f"`{workload}`: {found['step_ms']:.1f} ms a step"
        note += f", {found['TFLOP_a_second']:.0f} TFLOP/s{mfu}, {found['peak_GiB']:.1f} GiB."
        where = origin(found if "device" in found else record)
        notes = f"{note} {where}{noted(found)}"
        parts.append(markdown([f"`{workload}`", "kernels", "ms", "share"], rows, notes))
    return "\n\n".join(parts) if parts else NOT_MEASURED


def streaming_table() -> str:
    """Steps with events on the device, in memory and on the disk, at ML-20M's size."""
    rows, notes = [], []
    for name in ("streaming_cpu", "streaming_h200"):
        record = load(name)
        for placement, found in record.get("placements", {}).items():
            templates = ("{step_ms_min:.2f}", "{of_device:.3f}", "{input_wait_share:.2%}")
            rows.append([record["platform"], PLACEMENTS[placement], *cells(found, *templates)])
        if "data" in record:
            size = "{users:,} users, {events:,} events, {shards_MiB:,.0f} MiB of shards"
            told = size.format(**record["data"])
            notes.append(f"`{record['config']}`, {told}; {origin(record)}{noted(record)}")
    header = [
        "",
        "data.placement",
        "ms a step, fastest call",
        "speed, of `device`",
        "waiting for batches",
    ]
    return markdown(header, rows, " ".join(notes))
