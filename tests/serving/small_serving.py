"""Ranking models small enough for tests of serving, and their requests.

Also what a full forward pass says of these requests.
"""

import contextlib
import dataclasses
import functools

import jax
import jaxtyping
import numpy as np

from tests.ranking import rank_data
from tests.ranking.rank_data import OWN_OPTIONS
from ultra_hstu import tasks
from ultra_hstu.ranking.form import channels
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.serving import from_source

DATA = dataclasses.replace(
    rank_data.interactions((20, 3, 34, 9, 2)),
    contexts={
        "age": np.array([3, 0, 1, 2, 2], np.int32),
        "region": np.array([2, 2, 1, 1, 0], np.int32),
    },
    context_values={"age": ("", "1", "2", "3"), "region": ("", "north", "south")},
)
SEMI_LOCAL = dict(window=(3,), full_rows=(2,))
TRUNCATED = dict(truncate_after=1, truncate_length=5, layers=3)
FORWARDS = dict(positions="forwards")
BIASED = dict(preset="research", relative_bias=True)
# Attention over whole sequences is the dense one, which compiles fast, unless a form says
# otherwise.
FORMS = {
    "merged": dict(model=dict(divide_by="length")),
    "interleaved, biased": dict(rank=dict(input="interleaved", supervise="all"), model=BIASED),
    "biased, truncated": dict(rank=FORWARDS, model=BIASED | TRUNCATED | dict(divide_by="kept")),
    "a mask a layer": dict(
        rank=FORWARDS,
        model=dict(window=(-1, 2, 3), full_rows=(0, 3, 0), prefix=(0, 0, 2), layers=3),
    ),
    "ULTRA": dict(
        rank=FORWARDS, model=SEMI_LOCAL | TRUNCATED | dict(implementation="xla", feed_forward=32)
    ),
    "contextual": dict(
        rank=dict(contextual=("age", "region"), **FORWARDS),
        model=SEMI_LOCAL | TRUNCATED | dict(prefix=(3,), divide_by="length"),
    ),
    "mixture": dict(
        rank=dict(contextual=("age", "region"), input="interleaved"),
        model=dict(window=(3,), channels=OWN_OPTIONS, divide_by="kept", feed_forward=16),
    ),
    "bfloat16, fp8": dict(
        rank=FORWARDS,
        model=dict(dtype="bfloat16", projection="fp8", window=(3,), chunk_rows=24, feed_forward=32),
    ),
}
MAX_HISTORY = 12


@contextlib.contextmanager
def unchecked():
    """Annotations are not checked, as outside of tests: what is wrong must be found by the code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def task_of(form) -> RankingTask:
    sections = FORMS[form]
    rank = dict(targets=7, test_fraction=0.45, validation_fraction=0.1) | sections.get("rank", {})
    model = dict(implementation="reference", layers=2) | sections.get("model", {})
    return tasks.of(
        rank_data.config(data=dict(max_history=MAX_HISTORY), rank=rank, model=model), DATA
    )


@functools.cache
def built(form):
    """A task, and a model whose tables are large enough to matter."""
    task = task_of(form)

    def louder(path, leaf):
        keys = [getattr(part, "key", None) for part in path]
        tables = "embedding" in keys and "position_table" not in keys or "bias" in keys
        return 20 * leaf if tables else leaf

    params = jax.tree_util.tree_map_with_path(louder, task.recipe.init(0).params)
    return task, task.recipe.model(params), params


def requests(task, part="test"):
    """Columns of the seven requests of a part, and the batch of a full forward pass over them."""
    loader = task.loader(part, batch_users=7, steps_per_call=1)
    plan = loader.plan(shuffle=False)
    columns = {name: column[0].copy() for name, column in plan.columns(np.array([0])).items()}
    for name in channels(task.config):
        columns[f"start/{name}"][1] = columns[f"stop/{name}"][1]  # a user without history
    return columns, loader.gather(task.events, columns, np)


@functools.cache
def full_pass(form, part="test"):
    """The requests of a part as a history and candidates, and the logits of one full pass.

    The candidates are the targets of that pass.
    """
    task, model, params = built(form)
    columns, batch = requests(task, part)
    history, candidates = from_source(task.events, columns, model.form)
    logit_PK = np.asarray(jax.jit(task.recipe.logits)(params, batch))
    real_P = np.arange(task.config.rank.targets)[None] < np.asarray(columns["count"])[:, None]
    return history, candidates, logit_PK[real_P.reshape(-1)]
