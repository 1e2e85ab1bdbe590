"""Ranking from raw files to quoted numbers, against plain definitions."""

import random

import numpy as np
import pytest

from tests.data.data_files import ml1m
from tests.ranking.rank_data import config as rank_config
from tests.reference import plain
from ultra_hstu import tasks

SHARES = {"validation_fraction": 0.1, "test_fraction": 0.29}
TASK = "rating_at_least_4"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """20 users of 3 to 40 ratings of 12 movies."""
    draw = random.Random(1)
    lines = []
    for user in range(1, 21):
        for number in range(draw.randrange(3, 41)):
            rating = min(5, max(1, round(draw.gauss(2 + user % 4, 1.5))))
            lines.append(f"{user}::{draw.randrange(1, 13)}::{rating}::{10**9 + 60 * number}")
    draw.shuffle(lines)
    titles = [f"{movie}::Movie {movie}::Drama" for movie in range(1, 13)]
    return ml1m(tmp_path_factory.mktemp("raw"), lines, titles)


@pytest.fixture(scope="module")
def task(raw, tmp_path_factory):
    data = dict(source="ml-1m", raw_dir=str(raw))
    rank = SHARES | dict(tasks=(TASK,), signals=("rating",), features=())
    return tasks.load(rank_config(tmp_path_factory.mktemp("data"), data=data, rank=rank))


def predicted(task, evaluator):
    """The user, movie and time of every event that is predicted."""
    data = task.interactions
    ids = data.catalog.decode(data.items[evaluator.event_P])
    columns = (data.users[evaluator.user_P], ids, data.timestamps[evaluator.event_P])
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("part", ["validation", "test"])
def test_every_event_of_a_part_is_predicted_once(part, task, raw):
    expected = [
        (user, event.item, event.time)
        for user, events in plain.read_histories(raw / "ratings.dat").items()
        for event in plain.chronological(events, *SHARES.values())[part]
    ]
    assert sorted(predicted(task, task.evaluator(part))) == sorted(expected)
    assert len(expected) > 20


@pytest.mark.parametrize("rounded", [False, True])
def test_metrics(task, raw, rounded):
    """NE, AUC, GAUC and log loss; rounded logits tie."""
    evaluator = task.evaluator("test")
    logit_P1 = evaluator.predict(task.recipe.init(0).params) * 8
    if rounded:
        logit_P1 = np.round(logit_P1)
    ratings = {
        (user, event.item, event.time): event.rating
        for user, events in plain.read_histories(raw / "ratings.dat").items()
        for event in events
    }
    predictions = [
        (event[0], logit, int(ratings[event] >= 4))
        for event, logit in zip(predicted(task, evaluator), logit_P1[:, 0].tolist(), strict=True)
    ]
    metrics = evaluator.metrics(logit_P1)
    definitions = {
        "ne": plain.normalized_entropy,
        "auc": plain.auc,
        "gauc": plain.grouped_auc,
        "log_loss": plain.log_loss,
        "base_rate": plain.base_rate,
    }
    for name, definition in definitions.items():
        assert metrics[f"{name}/{TASK}"] == pytest.approx(definition(predictions), rel=1e-9), name
    assert metrics["ne"] == metrics[f"ne/{TASK}"]


def test_one_score_for_all_is_chance(task):
    """AUC and GAUC of a constant are one half, and its NE is no better than 1."""
    evaluator = task.evaluator("test")
    metrics = evaluator.metrics(np.full((len(evaluator.event_P), 1), 0.3, np.float32))
    assert metrics[f"auc/{TASK}"] == metrics[f"gauc/{TASK}"] == 0.5
    assert metrics["ne"] >= 1
