"""The configuration `everything` at a small size, on files of MovieLens-1M with 40 users.

--config=tests/ranking/small_everything.py:FOLDER
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from experiments import configs
from tests.data import data_files
from ultra_hstu import tasks
from ultra_hstu.config import Config, ParallelConfig
from ultra_hstu.fields import changed
from ultra_hstu.step import run_steps

USERS, ITEMS, HISTORY = 40, 60, 16


def write_ratings(folder: Path) -> Path:
    """Users of 8 to 40 ratings."""
    rng = np.random.default_rng(0)
    ratings = [
        f"{user}::{item}::{stars}::{10**9 + 10 * n}"
        for user in range(1, USERS + 1)
        for n, (item, stars) in enumerate(rng.integers(1, (ITEMS, 6), (rng.integers(8, 41), 2)))
    ]
    movies = [f"{item}::Film {item} (1999)::Drama" for item in range(1, ITEMS + 1)]
    users = [f"{u}::{'FM'[u % 2]}::{25}::{u % 5}::1" for u in range(1, USERS + 1)]
    return data_files.ml1m(folder, ratings, movies, users)


def everything(folder: Path, **parallel: int) -> Config:
    """All its pieces at small sizes, on one device or a mesh, in 8 groups."""
    config = configs.named("everything")
    channels = {
        name: changed(one, max_history=HISTORY // (2 if one.signal else 1), layers=2)
        for name, one in config.model.channels.items()
    }
    return changed(
        config,
        data={"raw_dir": str(folder / "raw"), "data_dir": str(folder / "data")}
        | {"max_history": HISTORY, "batch_users": 16, "batch_tokens": 512, "recalibrate_every": 2},
        model={"width": 16, "layers": 2, "qk_width": 8, "v_width": 8, "dtype": "float32"}
        | {"window": (3,), "full_rows": (2,), "truncate_after": 1, "truncate_length": 5}
        | {"chunk_rows": 10, "channels": channels, "implementation": "reference"},
        rank={"targets": 3, "head_width": 8},
        train={"epochs": 2, "eval_users": 8, "steps_per_call": 2},
        parallel=changed(ParallelConfig(groups=8, fsdp=config.parallel.fsdp), **parallel),
    )


def first_steps(
    config: Config, compiled: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Losses and gradient norms of the first steps. `compiled` is called before they run."""
    task = tasks.load(config)
    loader = task.loader("train", batch_users=config.data.batch_users, steps_per_call=3)
    group = next(iter(loader.groups(loader.plan(seed=1))))
    quick = {"xla_backend_optimization_level": 0}  # half the time to compile
    steps = jax.jit(functools.partial(run_steps, task.recipe), compiler_options=quick)
    given = task.recipe.start(0), group.feed, np.int32(group.steps)
    program = steps.lower(*given).compile()
    compiled()
    _, history = program(*given)
    return {name: np.asarray(one)[: group.steps].tolist() for name, one in history.items()}


def get_config(folder: str) -> Config:
    return everything(Path(folder))
