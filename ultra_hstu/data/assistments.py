"""ASSISTments 2017: what learners answered, problem after problem."""

import itertools

import numpy as np

from ultra_hstu.data.builder import InteractionsBuilder, SourceConfig
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.download import Download
from ultra_hstu.data.events import RawEvents
from ultra_hstu.data.text import lines

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


class Assistments(InteractionsBuilder):
    """Five disjoint folds, here joined; four lines a learner, each of integers separated by commas.

    1. the learner, and a second number that is not used (the published files give another id of the
      learner)
    2. the problem of every step: the items. A problem that comes again is another attempt and stays
    3. the skill of every step (a problem may belong to several)
    4. 1 where the answer was right, 0 where it was wrong

    Steps are in order of time, without times.
    """

    TICKS = 0
    ACTIONS = {"correct": np.int32, "skill": np.int32}
    BUILDER_CONFIGS = [
        SourceConfig(
            name="assistments-2017",
            description="ASSISTments 2017: learners, problems, skills, right or wrong",
            files=tuple(f"fold{k}.csv" for k in range(1, 6)),
            downloads=tuple(
                Download(
                    f"{_URL}assist2017_pid_test{k}.csv",
                    f"sha256:{_SHA256[k - 1]}",
                    name=f"fold{k}.csv",
                )
                for k in range(1, 6)
            ),
        )
    ]

    def read(self) -> tuple[RawEvents, Catalog]:
        learners: dict[int, str] = {}
        columns: dict[str, list[np.ndarray]] = {"problem": [], "skill": [], "correct": []}
        bounds = {"problem": (1, 2**63 - 1), "skill": (1, 2**31 - 1), "correct": (0, 1)}
        for name in self.builder_config.files:
            path = self.raw_dir / name
            of_file = list(lines(path))
            of_file[0].integers(",", "learner")  # a header, say, is named before its consequences
            if len(of_file) % 4:
                raise of_file[-1].error(
                    f"the file ends within a learner: {len(of_file)} lines, not 4 each"
                )
            for head, *steps in itertools.batched(of_file, 4):
                ids = head.integers(",", "learner")
                if len(ids) != 2:
                    raise head.error("expected two numbers, the learner's first")
                learner = int(ids[0])
                if learner in learners:
                    raise head.error(f"learner {learner} was given in {learners[learner]} already")
                learners[learner] = f"{path}, line {head.number}"
                for line, (column, (low, high)) in zip(steps, bounds.items(), strict=True):
                    values = line.integers(",", column, low, high)
                    problems = len(values if column == "problem" else columns["problem"][-1])
                    if len(values) != problems:
                        raise line.error(f"{len(values)} values for {problems} problems")
                    columns[column].append(values)
        lengths = [len(steps) for steps in columns["problem"]]
        users = np.repeat(np.array(list(learners), np.int64), lengths)
        problem, skill, correct = (np.concatenate(parts) for parts in columns.values())
        actions = {"correct": correct.astype(np.int32), "skill": skill.astype(np.int32)}
        return RawEvents(users, problem, None, actions), Catalog.from_ids(np.unique(problem))
