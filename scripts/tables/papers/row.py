"""A row of docs/papers.md: a claim of a paper, where it is in the code, and what was measured.

A cell names its record and the fields that it shows. Without them it says "not measured", with the
command that the docstring of a script has for this record, or the study that trains it. So a row is
filled as soon as its record is there.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from experiments.record import Json
from scripts.studies import STUDIES
from scripts.tables.papers.commands import COMMANDS
from scripts.tables.records import ROOT, load, markdown

Value = Callable[[Json], float | str]
Key = str | Mapping[str, object]

HEADER = ["", "claim or algorithm", "published [q]", "here", "where", "what deviates, and why"]
METRIC = re.compile(r"\b0(\.\d{4})\b")  # written without its zero
# A command of a docstring, with the lines that go on behind it.
COMMAND = re.compile(r"^ *(python -m .*(?:\n {4,}(?!python )[\[\-].*)*)", re.MULTILINE)


class Missing(KeyError):
    """A record lacks a field; `depth` of its keys are there."""

    def __init__(self, path: tuple[Key, ...], depth: int):
        super().__init__(f"the record has no {path[depth]!r} of {path}")
        self.depth = depth


def field(*path: Key) -> Value:
    """The value behind these keys. A mapping stands for the item of a list that has its values."""

    def value(record: Json) -> float | str:
        return _at(record, path)

    return value


def ratio(above: Value, below: Value) -> Value:
    def value(record: Json) -> float | str:
        first, second = above(record), below(record)
        if isinstance(first, str) or isinstance(second, str):
            raise TypeError(f"{first!r} over {second!r}: a ratio is of numbers")
        return first / second

    return value


def less(above: Value, below: Value) -> Value:
    """By what share the first is less than the second."""
    of = ratio(above, below)
    return lambda record: 1 - float(of(record))


def _at(record: Json, path: tuple[Key, ...]) -> float | str:
    found: Any = record
    for depth, key in enumerate(path):
        if not isinstance(key, str):
            suit = [one for one in found if key.items() <= one.items()]
        else:
            suit = [found[key]] if isinstance(found, dict) and key in found else []
        if not suit:
            raise Missing(path, depth)
        found = suit[0]
    return found


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a record says: `text.format(*values)`.

    Attributes:
      command: of a record that no docstring of a script names and no study trains: its module, in
        scripts/ or experiments/, and flags.
    """

    record: str
    text: str
    values: tuple[Value, ...] = ()
    command: str = ""

    def __str__(self) -> str:
        record = load(self.record)
        try:
            shown = self.text.format(*(value(record) for value in self.values)) if record else ""
        except Missing:
            shown = ""
        if shown:
            return f"{METRIC.sub(r'\1', shown)} (`{self.record}`)"
        own = command(self.record) or _runnable(self.command)
        return f"not measured: `{own}`" if own else f"not measured (`{self.record}`)"


def mean_ne(record: str, text: str) -> Cell:
    """The mean NE over seeds of a ranking run."""
    return Cell(record, text, (field("mean", "ne"),))


@dataclasses.dataclass(frozen=True)
class Row:
    """A claim or an algorithm of a paper.

    Attributes:
      claim: its number in the paper, or a short name; a paper has it once.
      where: files of the repository, `path` or `path:Name` of what stands in it.
      published: quoted from the paper.
      here: measured; a string is "not done" with the reason, or what can be said without measuring.
    """

    claim: str
    what: str
    where: tuple[str, ...] = ()
    published: str = ""
    here: tuple[Cell, ...] | str = ""
    deviates: str = ""

    def cells(self) -> list[str]:
        # One command may fill several cells.
        said = [self.here] if isinstance(self.here, str) else map(str, self.here)
        here = "; ".join(dict.fromkeys(said))
        places = ", ".join(map(link, self.where))
        return [self.claim, self.what, self.published, here, places, self.deviates]


def link(where: str) -> str:
    path, _, name = where.partition(":")
    return f"[`{name or path}`](../{path})"


def table(rows: tuple[Row, ...]) -> str:
    return markdown(HEADER, [row.cells() for row in rows])


def names(path: str) -> set[str]:
    """What a Python file defines: `name`, and `Class.name`."""
    found: set[str] = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        found |= set(_named(node))
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for part in node.body for name in _named(part)}
    return found


def _named(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]


def _runnable(command: str) -> str:
    """The command, if its module is there."""
    path = f"{command.split(' ')[0].replace('.', '/')}.py"
    folders = [name for name in ("scripts", "experiments") if (ROOT / name / path).is_file()]
    return f"python -m {folders[0]}.{command}" if folders else ""


def command(record: str) -> str:
    """The command that writes a record, empty where none is known."""
    return _commands().get(record) or _runnable(COMMANDS.get(record, ""))


@functools.cache
def _commands() -> dict[str, str]:
    """The command that writes each record, without what may be left out."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        for command in COMMAND.findall(ast.get_docstring(ast.parse(path.read_text())) or ""):
            words = " ".join(
                re.sub(r"\[--(?!record)[^\]]*\]", "", command).replace("\\\n", "").split()
            )
            for record in re.findall(r"results/(\w+)\.json", words):
                found.setdefault(record, words.replace("[", "").replace("]", ""))
    for study, runs in STUDIES.items():
        for run in runs():
            command = _runnable(f"study --study={study} --workdir=runs/study")
            found.setdefault(run.name, command)
    return found
