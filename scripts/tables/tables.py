"""What the tables of results share: records, Markdown, and how numbers are written."""

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
FIGURES = ROOT / "docs" / "figures"
NOT_MEASURED = "not measured yet"


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def short(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}".removeprefix("0")


def mean_and_deviation(values: list[float]) -> str:
    mean = short(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {short(statistics.stdev(values))}"


def giga(value: float) -> str:
    return f"{value / 1e9:.3g}"
