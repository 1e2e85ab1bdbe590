"""Results on the terminal."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from experiments.record import Json
from ultra_hstu import report


def show(rows: Mapping[str, Json], columns: Sequence[str], what: str = "") -> None:
    """One line a row: its name and these of its values, blank where there is none.

    Args:
      what: heads the column of the names.
    """
    table = Table(what, *columns)
    for name, values in rows.items():
        table.add_row(name, *(_cell(values.get(column, "")) for column in columns))
    report.make_console().print(table)


def _cell(value: float | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:80]
