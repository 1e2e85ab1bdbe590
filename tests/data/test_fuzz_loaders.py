"""Every loader on official files that were changed as files get changed: what it reads is what a
slow definition reads, or an error names the file."""

import gzip
import re
import resource
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import slow_readers
from tests.data.official_files import OFFICIAL, official, read
from ultra_hstu.data.catalog import Catalog

Change = Callable[[bytes, int, int], bytes]  # a file and two numbers give another file
BYTES = [b'"', b"'", b",", b":", b"\t", b"\n", b"\r", b" ", b"0", b"9", b"-", b".", b"e", b"x"]
BYTES += [b"\xff", b"\xc3", b"\0", b"0x1", b"::", b'""', b"\\", b"|", b"_", b"+", b"nan", b"\xef"]
WORDS = [b"", b"0", b"-5", b"007", b"1e3", b"0x1F", b"1_0", b"3.0", b"inf", b"9" * 19, b"9" * 256]
WORDS += [b"9" * 5000, b"A" * 256, b"A" * 257, b"a b", b'"7"', b'"a""b"', b'"7"8', b"1650000000"]
WORDS += [b"1650000000123", b"1650000000123456", b"4294967295", b"-2147483648", b"999999000"]
WORDS += [b"4294967296", b"\xe9", "é".encode(), b"userId", b"\x01"]
SEPARATOR = re.compile(rb"::|[,\t|\n]")


def of_lines(change: Callable[[list[bytes], int, int], list[bytes]]) -> Change:
    def changed(data: bytes, i: int, j: int) -> bytes:
        lines = data.split(b"\n")
        return b"\n".join(change(lines, i % len(lines), j))

    return changed


def of_fields(change: Callable[[list[bytes], int, int], list[bytes]]) -> Change:
    """Changes the fields of one line, and in a third of the cases of all lines."""

    def changed(lines: list[bytes], i: int, j: int) -> list[bytes]:
        def one(line: bytes) -> bytes:
            between = (SEPARATOR.findall(line) or [b","])[0]
            return between.join(change(line.split(between), j // 3, i)) if line else line

        return [one(line) if j % 3 == 0 or at == i else line for at, line in enumerate(lines)]

    return of_lines(changed)


def swapped(fields: list[bytes], i: int, j: int) -> list[bytes]:
    i, j = i % len(fields), j % len(fields)
    fields = list(fields)
    fields[i], fields[j] = fields[j], fields[i]
    return fields


def put(fields: list[bytes], i: int, field: Callable[[bytes], bytes]) -> list[bytes]:
    i %= len(fields)
    return [*fields[:i], field(fields[i]), *fields[i + 1 :]]


CHANGES: dict[str, Change] = {
    "byte put in": lambda d, i, j: d[: i % len(d)] + BYTES[j % len(BYTES)] + d[i % len(d) :],
    "byte replaced": lambda d, i, j: d[: i % len(d)] + BYTES[j % len(BYTES)] + d[i % len(d) + 1 :],
    "bytes lost": lambda d, i, j: d[: i % len(d)] + d[i % len(d) + 1 + j % 20 :],
    "cut": lambda d, i, j: d[: i % len(d)],
    "no newline": lambda d, i, j: d.rstrip(b"\n"),
    "CRLF": lambda d, i, j: d.replace(b"\n", b"\r\n"),
    "CR": lambda d, i, j: d.replace(b"\n", b"\r"),
    "byte-order mark": lambda d, i, j: b"\xef\xbb\xbf" + d,
    "blank last lines": lambda d, i, j: d + [b"\n", b"\r\n", b" \n", b"\n\t\n\n"][j % 4],
    "UTF-16": lambda d, i, j: d.decode("latin-1").encode(["utf-16", "utf-16-le"][j % 2]),
    "latin-1": lambda d, i, j: d.decode("utf-8", "replace").encode("latin-1", "replace"),
    "gzip": lambda d, i, j: gzip.compress(d, mtime=0),
    "empty": lambda d, i, j: [b"", b"\n", b" \n"][j % 3],
    "line lost": of_lines(lambda lines, i, j: lines[:i] + lines[i + 1 :]),
    "line twice": of_lines(lambda lines, i, j: lines[:i] + 2 * lines[i : i + 1] + lines[i + 1 :]),
    "blank line": of_lines(lambda lines, i, j: [*lines[:i], b"", *lines[i:]]),
    "header": of_lines(lambda lines, i, j: [b"user,item,rating,timestamp", *lines]),
    "line put first": of_lines(lambda lines, i, j: [lines[i], *lines[:i], *lines[i + 1 :]]),
    "columns swapped": of_fields(swapped),
    "field replaced": of_fields(lambda f, i, j: put(f, i, lambda _: WORDS[j % len(WORDS)])),
    "blanks": of_fields(lambda f, i, j: put(f, i, lambda one: b" " + one + b"\t "[j % 3 :])),
    "quoted": of_fields(lambda f, i, j: put(f, i, lambda one: b'"' + one + b'"')),
    "finer time": of_fields(lambda f, i, j: put(f, -1, lambda one: one + b"000" * (1 + j % 3))),
    "coarser time": lambda d, i, j: re.sub(rb"(16500\d{5})\d{3}", rb"\1", d),
}
NUMBER = st.integers(0, 2**12)


@pytest.mark.parametrize("source", OFFICIAL)
def test_the_official_files_are_read(tmp_path, source):
    folder = official(source, tmp_path)
    assert read(source, folder) == slow_readers.read(source, folder)


@pytest.mark.parametrize("source", OFFICIAL)
@settings(max_examples=80, deadline=timedelta(seconds=20))
@given(
    st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), NUMBER, NUMBER), min_size=1, max_size=2),
    st.integers(0, 9),
)
def test_changed_files(source, changes, which):
    with tempfile.TemporaryDirectory() as name:
        folder = official(source, Path(name) / "raw")
        file = folder / sorted(OFFICIAL[source])[which % len(OFFICIAL[source])]
        data = file.read_bytes()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for change, i, j in changes:
            data = CHANGES[change](data or b"\n", i, j)
        file.write_bytes(data)
        try:
            expected = slow_readers.read(source, folder)
        except slow_readers.Bad:
            expected = None
        try:
            found = read(source, folder)
        except ValueError as error:
            assert expected is None, error
            assert str(folder) in str(error) and len(str(error)) < 1000
        else:
            assert found == expected
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 256 * 2**10, f"{grown} KiB"


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    path = tmp_path_factory.mktemp("catalogue") / "catalog.npz"
    titles = ["A", "東京", "x" * 300, ""]
    Catalog.from_ids(np.array(["b", "0a", "ü" * 40, "zz"]), titles).save(path)
    return path, path.read_bytes(), Catalog.load(path)


@settings(max_examples=300, deadline=timedelta(seconds=20))
@given(st.sampled_from(["bit", "cut", "byte put in", "bytes lost"]), NUMBER, NUMBER)
def test_a_damaged_catalogue(catalogue, damage, i, j):
    path, data, whole = catalogue
    if damage == "bit":
        i %= len(data)
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << j % 8]) + data[i + 1 :])
    else:
        path.write_bytes(CHANGES[damage](data, i, j))
    try:
        found = Catalog.load(path)
    except ValueError as error:
        assert str(path) in str(error) and "train in a new folder" in str(error)
    else:  # what was hit says nothing: a date, say
        assert found.raw_ids.tolist() == whole.raw_ids.tolist() and found.titles == whole.titles
