"""Retrieval with signals: an action is part of its item's token, for that row and later ones."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from tests.ranking import rank_data
from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.train import train

DATA = rank_data.interactions((12, 9, 10))


def task_of(data=DATA, signals=("rating", "is_click")):
    config = with_(small_config("unused"), rank__signals=signals, model__relative_bias=False)
    return tasks.of(config, data)


def outputs(task, params, placement):
    task = tasks.of(with_(task.config, data__placement=placement), task.interactions)
    loader = task.loader("test", batch_users=4, steps_per_call=1)
    batch = next(iter(loader.groups(loader.plan(shuffle=False)))).feed.batch(0)
    return np.asarray(
        jax.jit(lambda params, batch: task.recipe.model(params).encode(batch))(params, batch)
    ), batch


@pytest.mark.parametrize("placement", ["device", "stream"])
def test_a_signal_reaches_its_row_and_later_ones(placement):
    task = task_of()
    params = task.recipe.init(0).params
    before, batch = outputs(task, params, placement)
    assert np.asarray(batch.signal_TS).shape == (len(before), 2)
    actions = DATA.actions | {"rating": DATA.actions["rating"].copy()}
    actions["rating"][15] = (
        6 - actions["rating"][15] or 1
    )  # the fourth event of the second user, whose history begins at row 10
    actions["rating"][15] += actions["rating"][15] == DATA.actions["rating"][15]
    after, _ = outputs(task_of(dataclasses.replace(DATA, actions=actions)), params, placement)
    changed = np.flatnonzero((before != after).any(axis=1))
    assert changed.tolist() == list(range(13, 18))


def test_without_signals_nothing_is_embedded_or_moved():
    task = task_of(signals=())
    assert task.events.signal_ES is None
    params = task.recipe.init(0).params
    assert "signals" not in params["embedding"]


def test_unknown_signals_are_refused():
    with pytest.raises(
        ValueError, match="unknown signal 'loved': this source has is_click, rating"
    ):
        task_of(signals=("loved",))


def test_recommendations_take_actions(tmp_path):
    config = with_(small_config("unused", epochs=1), rank__signals=("rating",))
    train(config, tmp_path, console=Console(quiet=True), task=tasks.of(config, DATA))
    model = RecommendationModel(str(tmp_path))
    scores = [
        [answer.score for answer in model.recommend([3, 4, 5], actions=actions)]
        for actions in (None, {"rating": [1, 1, 1]}, {"rating": [5, 1, 5]})
    ]
    assert scores[0] != scores[1] != scores[2]
    with pytest.raises(ValueError, match="3 items but 2 values of 'rating': give one an item"):
        model.recommend([3, 4, 5], actions={"rating": [1, 2]})
    with pytest.raises(ValueError, match="unknown signal 'rating': this source has is_click"):
        model.recommend([3, 4, 5], actions={"is_click": [1, 0, 1]})
