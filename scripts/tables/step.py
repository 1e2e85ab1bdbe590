"""The tables of docs/tables_and_rows.md, from the record of scripts.bench.tables."""

from experiments.record import Json
from scripts.tables.records import cells, markdown, measured, origin

RECORD = "step_h200"


@measured(RECORD, part="last_layer")
def last_layer_table(record: Json) -> str:
    """One layer, forward and backward, whole and for the rows that are read."""
    found = record["last_layer"]
    rows = [[name, *cells(values, "{ms:.1f}")] for name, values in found.items()]
    sizes = next(iter(found.values()))
    what = (
        f"D = {sizes['width']:,}, {sizes['heads']} heads of {sizes['head_width']}, "
        f"{sizes['users']} requests of {sizes['length']:,} rows with 16 targets"
    )
    return markdown(["", "forward and backward, ms"], rows, f"{what}; {origin(record)}")


@measured(RECORD, part="sizes")
def sizes_table(record: Json) -> str:
    """The same step over tables of other sizes."""
    rows = [
        [*cells(values, "`{tables}`", "{items:,}", "{ms:.2f}", "{peak_GiB:.1f}")]
        for values in record["sizes"].values()
    ]
    sizes = next(iter(record["sizes"].values()))
    what = (
        f"D = {sizes['width']}, {sizes['layers']} layers, "
        f"{sizes['users'] * sizes['length']:,} rows a step"
    )
    header = ["optim.tables", "entries", "step, ms", "peak of the process so far, GiB"]
    return markdown(header, rows, f"{what}; {origin(record)}")


@measured(RECORD, part="step")
def ranking_step_table(record: Json) -> str:
    """The large training step of ranking."""
    rows = [
        [name, *cells(values, "{ms:.0f}", "{TFLOP_a_second:.0f}", "{MFU:.2f}")]
        + [f"{values['tokens_a_second'] / 1e3:,.0f}"]
        for name, values in record["step"].items()
    ]
    sizes = next(iter(record["step"].values()))
    what = (
        f"{sizes['layers']} layers, D = {sizes['width']:,}, {sizes['users']} x "
        f"{sizes['length']:,} rows, 16 targets a request, a table of {sizes['items']:,} items; "
        "MFU of 989 TFLOP/s, products that are computed"
    )
    header = ["", "step, ms", "TFLOP/s", "MFU", "thousand tokens/s"]
    return markdown(header, rows, f"{what}; {origin(record)}")


@measured(RECORD, part="repeated")
def repeated_table(record: Json) -> str:
    """Equal ids, deduplicated or not."""
    rows = [[name, *cells(values, "{ms:.1f}")] for name, values in record["repeated"].items()]
    sizes = next(iter(record["repeated"].values()))
    what = f"{sizes['ids']:,} ids of a table of {sizes['items']:,} x {sizes['width']}"
    return markdown(["", "ms"], rows, f"{what}; {origin(record)}")
