"""A ranking run small enough for tests.

Learners answer problems right or wrong, by their ability and the problem's difficulty.
"""

import numpy as np

from tests.data.data_files import write
from ultra_hstu.config import Config, DataConfig, ModelConfig, RankConfig, TrainConfig

USERS, PROBLEMS = 25, 12


def write_answers(folder, seed=0):
    """ASSISTments files: 25 learners of 3 to 40 steps, 5 a fold."""
    rng = np.random.default_rng(seed)
    ability, difficulty = rng.normal(size=USERS), 2 * rng.normal(size=PROBLEMS)
    lines: list[list[str]] = [[] for _ in range(5)]
    for user in range(USERS):
        problem = rng.integers(0, PROBLEMS, rng.integers(3, 41))
        correct = rng.random(len(problem)) < 1 / (1 + np.exp(difficulty[problem] - ability[user]))
        columns = (problem + 1, problem % 3 + 1, correct.astype(int))
        lines[user % 5] += [
            f"{user + 1},0",
            *(",".join(map(str, column.tolist())) for column in columns),
        ]
    for k, part in enumerate(lines, start=1):
        write(folder / f"fold{k}.csv", part)
    return folder


def rank_config(folder, **train) -> Config:
    """HSTU with a layer of width 8 on the answers, which `folder / "raw"` holds."""
    return Config(
        name="small_rank",
        data=DataConfig(
            source="assistments-2017",
            raw_dir=str(folder / "raw"),
            data_dir=str(folder / "data"),
            max_history=12,
            batch_users=8,
        ),
        model=ModelConfig(
            width=8,
            layers=1,
            heads=2,
            qk_width=4,
            v_width=4,
            relative_bias=False,
            preset="production",
        ),
        rank=RankConfig(
            tasks=("correct",),
            signals=("correct",),
            features=("skill",),
            targets=4,
            head_width=8,
            validation_fraction=0.2,
            test_fraction=0.2,
        ),
        train=TrainConfig(
            **{"epochs": 3, "eval_users": 3, "steps_per_call": 4, "protocol": "chronological"}
            | train
        ),
    )
