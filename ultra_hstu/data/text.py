"""Reads text files by lines; errors name file, line and value."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

MAX_ID = 2**63 - 1
MAX_SECONDS = 2**31 - 1  # batches hold times as int32 seconds
_INTEGER = re.compile(r"-?[0-9]+")


class Line(NamedTuple):
    """A line of a file; numbers count from 1."""

    path: Path
    number: int
    text: str

    def error(self, problem: str, value: str | int | None = None) -> ValueError:
        """The error for a bad line; `value` is what is bad in it, the whole line if not given."""
        text = repr(self.text if value is None else value)
        text = text if len(text) <= 200 else text[:200] + "..."
        return ValueError(f"{self.path}, line {self.number}: {problem}: {text}")

    def integer(
        self, text: str, name: str, low: int | float = 0, high: int | float = MAX_ID
    ) -> int:
        """`text` as an integer in low..high. Raises ValueError for anything else."""
        if not _INTEGER.fullmatch(text.strip(" ")):
            raise self.error(f"{name} must be a whole number", text)
        value = int(text)
        if not low <= value <= high:
            raise self.error(f"{name} must lie in {low:g}..{high:.12g}", text)
        return value

    def integers(
        self, separator: str, name: str, low: int = 0, high: int = MAX_ID
    ) -> Int64[np.ndarray, " n"]:
        """The integers of the line, checked as by `integer`. Fast when all is well."""
        fields = self.text.split(separator)
        if re.fullmatch(rf"[0-9]{{1,18}}(?:{separator}[0-9]{{1,18}})*", self.text):
            values = np.array([int(field) for field in fields], np.int64)
            if low <= values.min() and values.max() <= high:
                return values
        return np.array([self.integer(field, name, low, high) for field in fields], np.int64)


def lines(path: Path) -> Iterator[Line]:
    """The lines of a file, decoded as UTF-8, or as latin-1 where a file is not UTF-8.

    MovieLens 100k and 1m are latin-1, later releases and most copies UTF-8. A latin-1 text with an
    accented letter is practically never valid UTF-8, so trying UTF-8 first reads both right.

    Raises:
        ValueError: an empty file.
    """
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path} is empty")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        yield Line(path, number, line.removesuffix("\r"))

