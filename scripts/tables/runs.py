"""What was run, on what, how long: a line a record of training, and generated sets."""

import statistics

from experiments.record import Json, read
from scripts.tables import records
from scripts.tables.records import cells, markdown, measured, origin

MARK = "`{}`"


def runs_table() -> str:
    """Every record of training of retrieval: its data, protocol, seeds, device, time and commit."""
    rows = []
    for path in sorted(records.RESULTS.glob("*.json")):
        record = read(path)
        runs = record.get("runs")
        if not (isinstance(runs, list) and runs and "best_epoch" in runs[0]):
            continue
        if "hr@10" not in runs[0]["best"]:  # ranking
            continue
        seconds = statistics.median(run["seconds"] for run in runs)
        shared = " (shared)" if record.get("shared_device") else ""
        data = record.get("data", {}).get("sha256", "")[:8]
        rows.append(
            [
                MARK.format(path.stem),
                f"`{runs[0]['protocol']}`",
                ", ".join(str(run["seed"]) for run in runs),
                MARK.format(data) if data else "",
                f"{record['device']}{shared}",
                f"{statistics.mean(run['epochs'] for run in runs):.0f}",
                f"{seconds:.0f}",
                record["commit"],
                record["date"][:10],
            ]
        )
    header = (
        "record",
        "protocol",
        "seeds",
        "data",
        "device",
        "epochs",
        "seconds",
        "commit",
        "date",
    )
    note = (
        "Seconds: the median over seeds, without compilation; `shared`: other runs had the device "
        "too, so they are no measure of speed. Data: the beginning of its SHA-256; records from "
        "before that have none. The command of each stands in its record."
    )
    return markdown(header, rows, note)


@measured("published_sets_h200", "published_sets_cpu")
def published_sets_table(record: Json) -> str:
    """MovieLens-20M and Books on generated files of their size: time, memory, steps."""
    rows = [
        [f"`{name}`", *cells(found | {"step_s": found["step_ms_median"] / 1e3}, *COLUMNS.values())]
        for name, found in record["sets"].items()
    ]
    notes = [record["note"]] if "note" in record else []
    return markdown(["configuration", *COLUMNS], rows, *notes, origin(record))


COLUMNS = {
    "events": "{events:,}",
    "users": "{users:,}",
    "items": "{items:,}",
    "file, MiB": "{file_MiB:,.0f}",
    "read and prepared, s": "{read_seconds:.0f}",
    "compiled, s": "{compile_seconds:.0f}",
    "a step of 128 users, s": "{step_s:.2f}",
    "steps an epoch": "{steps_an_epoch:,}",
    "peak of memory, MiB": "{peak_MiB:,.0f}",
}
