"""Reads text files that people and publishers write; errors name file, line and value.

UTF-8 with or without a byte-order mark, or latin-1; any line ends; blank lines at the end count for
nothing. A name that ends in .gz is unpacked while it is read.
"""

import codecs
import csv
import dataclasses
import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

MAX_ID = 2**63 - 1
MAX_ID_LENGTH = 256  # characters; requests have the same limit
BLANKS = " \t"  # around fields, they count for nothing
CONTROL = "[\\x00-\\x1f\\x7f]"  # characters that no id holds
_BLOCK = 1 << 20
INTEGER = re.compile(r"-?[0-9]{1,256}")
_NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "Parquet",
}


class Line(NamedTuple):
    """A line of a file; numbers count from 1."""

    path: Path
    number: int
    text: str

    def error(self, problem: str, value: str | int | None = None, remedy: str = "") -> ValueError:
        """The error for a bad line; `value` is what is bad in it, the whole line if not given."""
        bad = self.text if value is None else value
        shown = repr(bad if isinstance(bad, int) or len(bad) <= 200 else bad[:200] + "...")
        return ValueError(f"{self.path}, line {self.number}: {problem}: {shown}{remedy}")

    def integer(
        self, text: str, name: str, low: int | float = 0, high: int | float = MAX_ID
    ) -> int:
        """`text` as an integer in low..high. Raises ValueError for anything else."""
        if not INTEGER.fullmatch(text.strip(BLANKS)):
            raise self._unlike(f"{name} must be a whole number", text)
        value = int(text)
        if not low <= value <= high:
            raise self.error(f"{name} must lie in {low:g}..{high:.12g}", text)
        return value

    def integers(
        self, separator: str, name: str, low: int = 0, high: int = MAX_ID
    ) -> Int64[np.ndarray, " n"]:
        """The integers of the line, checked as by `integer`. Fast when all is well.

        Args:
            separator: what stands between them, a regular expression.
        """
        text = self.text.strip(BLANKS)
        fields = re.split(separator, text)
        if re.fullmatch(rf"[0-9]{{1,18}}(?:{separator}[0-9]{{1,18}})*", text):
            values = np.array([int(field) for field in fields], np.int64)
            if low <= values.min() and values.max() <= high:
                return values
        return np.array([self.integer(field, name, low, high) for field in fields], np.int64)

    def number_in(self, text: str, name: str, low: int | float, high: int | float) -> float:
        """`text` as a number in low..high. Raises ValueError for anything else."""
        problem = f"{name} must be a number in {low:g}..{high:g}"
        if not _NUMBER.fullmatch(text.strip(BLANKS)):
            raise self._unlike(problem, text)
        if not low <= (value := float(text)) <= high:
            raise self.error(problem, text)
        return value

    def identifier(self, text: str, name: str) -> str:
        """`text`, without the blanks around it, as an id. Raises ValueError for what is none."""
        text = text.strip(BLANKS)
        if not text:
            raise self.error(f"{name} is empty")
        if len(text) > MAX_ID_LENGTH:
            problem = f"{name} has {len(text)} characters, and may have {MAX_ID_LENGTH}"
            raise self.error(problem, text)
        if re.search(CONTROL, text):
            raise self.error(f"{name} holds a control character", text)
        return text

    def _unlike(self, problem: str, text: str) -> ValueError:
        header = self.number == 1 and re.search("[A-Za-z]", text)
        remedy = ". If line 1 is a header, delete it: this file has none"
        return self.error(problem, text, remedy if header else "")


@dataclasses.dataclass(frozen=True)
class TextFile:
    """What a look through a whole file has shown.

    Attributes:
        encoding: "utf-8-sig", or "latin-1" where the file is not UTF-8.
        end: bytes in front of the line ends at its end.
        newline: whether there are any.
        blank_lines: whether there are more than one.
    """

    path: Path
    encoding: str
    end: int
    newline: bool
    blank_lines: bool


def examine(path: Path) -> TextFile:
    """Looks through a file, a block at a time.

    MovieLens 100k and 1m are latin-1, later releases and most copies UTF-8. A latin-1 text with an
    accented letter is practically never valid UTF-8, so trying UTF-8 first reads both right.

    Raises:
        ValueError: a file that is not text: compressed, UTF-16, with NUL bytes, or marked as UTF-8
            without being that.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    encoding, tail, end, size = "utf-8-sig", b"", 0, 0
    with open_binary(path) as file:
        while block := file.read(_BLOCK):
            if not size:
                _require_text(path, block)
            if b"\0" in block:
                raise ValueError(f"{path} holds NUL bytes: it is no text, or not in UTF-8")
            if encoding != "latin-1":
                try:
                    decoder.decode(block)
                except UnicodeDecodeError as error:
                    encoding = _latin(path, error)
            if content := block.rstrip(b"\r\n"):
                end = size + len(content)
            size, tail = size + len(block), (tail + block)[-2:]
    if encoding != "latin-1":
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            encoding = _latin(path, error)
    newline = b"\r\n" if tail == b"\r\n" else tail[-1:]
    return TextFile(path, encoding, end, size > end, size > end + len(newline))


def open_binary(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """The bytes of a file, unpacked where its name ends in .gz."""
    return gzip.GzipFile(path) if path.suffix == ".gz" else open(path, "rb")


def stored(folder: Path, name: str) -> Path | None:
    """A file of a folder, which may be packed or unpacked there; None: it is not there."""
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    return next((path for path in (folder / name, folder / other) if path.is_file()), None)


def _require_text(path: Path, start: bytes) -> None:
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is a {name} file: unpack it to text first")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is in UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")


def _latin(path: Path, error: UnicodeDecodeError) -> str:
    with open_binary(path) as file:
        if file.read(3) == codecs.BOM_UTF8:
            raise ValueError(
                f"{path} is marked as UTF-8 but is not ({error.reason}): save it as UTF-8"
            ) from None
    return "latin-1"


def lines(file: Path | TextFile) -> Iterator[Line]:
    """The lines of a file, up to the last that is not blank.

    Raises:
        ValueError: a file without any, and as `examine`.
    """
    file = examine(file) if isinstance(file, Path) else file
    empty = True
    for line in _lines(file):
        empty = False
        yield line
    if empty:
        raise ValueError(f"{file.path} is empty")


def _lines(file: TextFile) -> Iterator[Line]:
    blank: list[Line] = []
    with io.TextIOWrapper(open_binary(file.path), encoding=file.encoding) as texts:
        for number, text in enumerate(texts, 1):
            line = Line(file.path, number, text.removesuffix("\n"))
            if not line.text.strip(BLANKS):
                blank.append(line)
                continue
            yield from blank
            yield line
            blank.clear()


def records(file: Path | TextFile) -> Iterator[tuple[Line, list[str]]]:
    """The records of a comma-separated file, and the line on which each begins.

    Fields may stand in quotes, where quotes are doubled and line breaks are legal. Blanks around
    fields are dropped.

    Raises:
        ValueError: names file and line of a record that cannot be parsed; and as `lines`.
    """
    begun: list[Line] = []

    def read() -> Iterator[str]:
        for line in lines(file):
            begun.append(line)
            yield line.text + "\n"

    reader = csv.reader(read(), strict=True, skipinitialspace=True)
    while True:
        begun.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"the record that begins here cannot be read ({error})"
            remedy = ". Quotes enclose a whole field, and those inside it are doubled"
            raise begun[0].error(problem, remedy=remedy) from None
        yield begun[0], [field.strip(BLANKS) for field in fields]


def listed(path: Path) -> list[Line]:
    """The ids of a file with one on each line, without blanks around them; blank lines, and a file
    without any ids, are legal.

    Raises:
        ValueError: names file and line of what is no id; and as `examine`.
    """
    found = [line for line in _lines(examine(path)) if line.text.strip(BLANKS)]
    return [line._replace(text=line.identifier(line.text, "the id")) for line in found]
