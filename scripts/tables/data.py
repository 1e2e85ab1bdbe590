"""The table of how long own files take to prepare."""

from experiments.record import Json
from scripts.tables.records import cells, markdown, measured, origin


@measured("prepare")
def prepare_table(record: Json) -> str:
    """One line a kind of file: from the file to what a run reads, in a process of its own."""
    templates = ("{file_MiB:,.0f}", "{events:,}", "{users:,}", "{seconds:.1f}", "{peak_MiB:,.0f}")
    rows = [[kind, *cells(found, *templates)] for kind, found in record["files"].items()]
    header = ["file", "MiB", "events", "users", "seconds", "most memory, MiB"]
    return markdown(header, rows, f"{record['host_cores']} cores, {origin(record)}")
