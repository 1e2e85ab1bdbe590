"""ASSISTments 2017: what learners answered, problem after problem."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from ultra_hstu.data.download import Download
from ultra_hstu.data.public import PublicSet, SetFile
from ultra_hstu.data.table.source import Record, RecordFile
from ultra_hstu.data.text import Line, lines
from ultra_hstu.table_config import TableConfig

_URL = (
    "https://raw.githubusercontent.com/arghosh/AKT/01b7e8d7d7c862cabc9467108e3e7f2555653a88/"
    "data/assist2017_pid/"
)
_SHA256 = (
    "32d1580467edb4b87ec9773fada2e3439c820c0640d5e618a80f49b2a9bcd582",
    "c40e2eb18e3079cedc92af1a0a9eeceebd3a5d43fc9da4df8f16009e96197857",
    "504ce41c75545f2f43ea1a6c228ef032596a0d8bd3819fa013aab4c558d2c2a4",
    "fe758a0e545eb51594e5ee8cee01ae1898d7f3a8ef5f87c86df4bacfa6ea8800",
    "7659d973bf2517105070b573444d39e7899323fee28cf93bf3c921363eaedc5c",
)


_FOLDS = tuple(f"fold{k}.csv" for k in range(1, 6))
_STEPS = {"problem": (1, 2**63 - 1), "skill": (1, 2**31 - 1), "correct": (0, 1)}
_TYPES = {"user": pa.int64(), "problem": pa.int64(), "skill": pa.int32(), "correct": pa.int32()}


def _answers(path: Path) -> Iterator[tuple[Line, Record]]:
    """Four lines a learner, each of integers separated by commas.

    1. the learner, and a second number that is not used (the published files give another id of the
      learner)
    2. the problem of every step: the items. A problem that comes again is another attempt and stays
    3. the skill of every step (a problem may belong to several)
    4. 1 where the answer was right, 0 where it was wrong

    Steps are in order of time, without times.
    """
    learners = _known(path)
    of_file = list(lines(path))
    of_file[0].integers(",", "learner")  # a header, say, is named before its consequences
    if len(of_file) % 4:
        raise of_file[-1].error(f"the file ends within a learner: {len(of_file)} lines, not 4 each")
    for first, *steps in itertools.batched(of_file, 4):
        ids = first.integers(",", "learner")
        if len(ids) != 2:
            raise first.error("expected two numbers, the learner's first")
        learner = int(ids[0])
        if learner in learners:
            raise first.error(f"learner {learner} was given in {learners[learner]} already")
        learners[learner] = f"{path}, line {first.number}"
        columns: list[list[int]] = []
        for line, (name, (low, high)) in zip(steps, _STEPS.items(), strict=True):
            columns.append(line.integers(",", name, low, high).tolist())
            if len(columns[-1]) != len(columns[0]):
                raise line.error(f"{len(columns[-1])} values for {len(columns[0])} problems")
        for problem, skill, correct in zip(*columns, strict=True):
            yield (
                first,
                {"user": learner, "problem": problem, "skill": skill, "correct": correct},
            )


def _known(path: Path) -> dict[int, str]:
    """Where the learners of the folds before this one are: the folds are disjoint."""
    before = itertools.takewhile(lambda name: name != path.name, _FOLDS)
    return {
        int(line.integers(",", "learner")[0]): f"{path.with_name(name)}, line {line.number}"
        for name in before
        for line in itertools.islice(lines(path.with_name(name)), 0, None, 4)
    }


# Five disjoint folds, here joined.
ASSISTMENTS = PublicSet(
    name="assistments-2017",
    about="ASSISTments 2017: problems that learners solved or not; the skill of each",
    events=tuple(SetFile(name, lambda path: RecordFile(path, _TYPES, _answers)) for name in _FOLDS),
    table=TableConfig(
        user="user",
        item="problem",
        time_unit="none",
        actions=("correct",),
        features=("skill",),
        repeats="keep",
        catalog="counted",
    ),
    downloads=tuple(
        Download(f"{_URL}assist2017_pid_test{k}.csv", f"sha256:{_SHA256[k - 1]}", name=name)
        for k, name in enumerate(_FOLDS, 1)
    ),
)
