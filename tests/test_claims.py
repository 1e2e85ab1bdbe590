"""Numbers that somebody measured stand in generated blocks, or beside the name of their record.

A paragraph of a page, a docstring or a comment that holds a time, a rate, an amount of memory or a
metric names a record of experiments/results in backticks, or says from whom the number is "quoted
from". What is chosen or computed is no measurement: numbers in backticks or code, below a word of
`LIMITS`, behind an operator, and bytes below 1,000, which layouts have.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
CODE = sorted(
    path
    for folder in ("kernels", "ultra_hstu", "experiments/configs", "scripts")
    for path in (ROOT / folder).rglob("*.py")
)
RECORDS = {path.stem for path in (ROOT / "experiments" / "results").glob("*.json")}
UNITS = "TFLOP/s|ms|us|ns|s|seconds|minutes|hours|KiB|MiB|GiB|KB|MB|GB|bytes"
MEASURED = re.compile(rf"(?:(\S+) )?(?<![\w.,^])(\d[\d,]*(?:\.\d+)?|\.\d+) ?({UNITS})\b(?!\^)")
METRIC = re.compile(r"(?<![\w.])\.\d{3,}\b")  # as metrics are written: HR@10 of .3265
LIMITS = "within most least after below beyond than every - + = * /".split()


def claims(paragraph):
    """What a paragraph measures without saying where."""
    text = " ".join(paragraph.split())
    named = {name.removesuffix(".json") for name in re.findall(r"`([\w.]+)`", text)}
    if named & RECORDS or "quoted from" in text.lower():
        return []
    text = re.sub(r"`[^`]*`", "``", text)
    return METRIC.findall(text) + [
        f"{number} {unit}"
        for before, number, unit in MEASURED.findall(text)
        if before.lower() not in LIMITS
        and not (unit == "bytes" and float(number.replace(",", "")) < 1000)
    ]


def paragraphs_of_page(text):
    text = re.sub(r"<!-- table (\w+) -->.*?<!-- end \1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.split(r"\n\s*\n", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


def paragraphs_of_code(text):
    """Of docstrings, and comments whose lines follow each other."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield from re.split(r"\n\s*\n", ast.get_docstring(node) or "")
    lines, last = [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield " ".join(lines)
                lines = []
            lines.append(token.string.lstrip("# "))
            last = token.start[0]
    yield " ".join(lines)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_name_the_record_of_what_was_measured(path):
    found = {
        paragraph: claims(paragraph)
        for paragraph in paragraphs_of_page(path.read_text())
        if claims(paragraph)
    }
    assert not found


def test_code_names_the_record_of_what_was_measured():
    found = {
        (str(path.relative_to(ROOT)), paragraph): claims(paragraph)
        for path in CODE
        for paragraph in paragraphs_of_code(path.read_text())
        if claims(paragraph)
    }
    assert not found


def test_what_a_claim_is():
    for text in (
        "A step takes 31 ms.",
        "It reaches 684 TFLOP/s",
        "HR@10 moves by .017.",
        "keeps 1,678 bytes a row",
        "8.6 GiB of memory",
        "about 35 minutes on two CPU cores",
        "31.5\nms, as `long_ultra_h100` says",
    ):
        assert claims(text), text
    for text in (
        "A step takes 31 ms (`long_ultra_h200`).",
        "quoted from arXiv 2402.17152: HR@10 of .3097",
        "Requests end within 5 s, bodies of more than 1 MiB are refused.",
        "D / 2 + 4 bytes, 128 bytes a row, 2 D = 2,048 bytes",
        "`--seconds=30 s` of 4 heads and 18 layers; learning rate 0.001",
        "times span 2^31 - 1 s",
    ):
        assert not claims(text), text
