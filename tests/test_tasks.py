"""The registry of tasks: the right one, names looked up before any work, and events placed once."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from tests.ranking import rank_data
from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.data import sources
from ultra_hstu.data.feed import EventStore
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.retrieval.task import RetrievalTask
from ultra_hstu.train import train

RANKING = rank_data.config(
    data=dict(batch_users=4),
    train=dict(epochs=1, protocol="chronological", eval_users=4, steps_per_call=2),
)


def test_the_configuration_decides_the_task(tmp_path):
    assert isinstance(tasks.load(small_config(tmp_path)), RetrievalTask)
    assert isinstance(tasks.of(RANKING, rank_data.interactions()), RankingTask)
    with pytest.raises(ValueError, match="has no rank.tasks: it is a retrieval run"):
        RankingTask.of(small_config(tmp_path), rank_data.interactions())


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(data__source="ml-2m"),
            "data.source='ml-2m' is not allowed: use 'synthetic', 'synthe",
        ),
        (
            dict(train__protocol="test"),
            "train.protocol='test' is not allowed: use 'published', 'validated', 'temporal'",
        ),
    ],
)
def test_unknown_names_are_refused_before_any_work(tmp_path, fields, message):
    config = with_(small_config(tmp_path / "data"), **fields)
    for start in (lambda: tasks.load(config), lambda: train(config, tmp_path / "run")):
        with pytest.raises(ValueError, match=message):
            start()
    assert not list(tmp_path.iterdir())


def test_a_protocol_of_the_other_task_is_refused():
    """Without validation of the configuration, too."""
    config = rank_data.config(train=dict(protocol="published"))
    with pytest.raises(ValueError, match="train.protocol='published' is not .*: use 'chronolog"):
        tasks.of(config, rank_data.interactions())


def test_every_source_has_one_meaning():
    names = [*sources.GENERATED, sources.TABLE, *(one.name for one in sources.SETS)]
    assert len(names) == len(set(names)) == 3 + len(sources.PUBLIC)


@pytest.mark.parametrize(
    ("source", "near"),
    [
        ("ml-1M", "'ml-1m'"),
        ("ml-24m", "'ml-25m'"),
        ("amazon-2014/Bookz", "'amazon-2014/Books'"),
        ("amazon-2014/books", "'amazon-2014/Books'"),
        ("amazon-2018/Movies", "'amazon-2018/Movies_and_TV'"),
        ("amazon-2019/Books", "'amazon-2014/Books', 'amazon-2018/Books', 'amazon-2023/Books'"),
        ("amazon-2023/Appliances/5core", "'amazon-2023/Appliances'"),
        ("kuairand", "'kuairand-1k'"),
        ("yambda", "'yambda-50m'"),
    ],
)
def test_near_names_are_shown(source, near):
    with pytest.raises(
        ValueError, match="use 'synthetic', 'synthetic_long', 'ml-100k'.*/<Category>.*Did you mean"
    ) as e:
        sources.check(source)
    assert near in str(e.value).partition("Did you mean")[2]


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_events_are_placed_once_a_run(kind, tmp_path, monkeypatch):
    """Training, validation, the test and the baselines read one copy; checks place none."""
    placed = []
    on = EventStore.on

    def counted(self, mesh):
        before = set(self._placed)
        data = on(self, mesh)
        placed.extend(set(self._placed) - before)
        return data

    monkeypatch.setattr(EventStore, "on", counted)
    if kind == "ranking":
        config, data = RANKING, rank_data.interactions((20, 9, 14, 12, 8))
    else:
        config = small_config(tmp_path, epochs=1, protocol="validated")
        data = tasks.load(config).interactions
    task = tasks.of(config, data)
    events = [leaf.shape for leaf in jax.tree.leaves(task.store.host)]
    for split in ("validation", "test"):
        task.evaluator(split)
    task.loader("train", batch_users=4, steps_per_call=2).plan()
    assert placed == []
    train(config, tmp_path / "run", console=Console(quiet=True), task=task)
    other = task.with_config(with_(config, train__seed=7))
    other.baselines("test")
    assert placed == [None] and other.store is task.store
    on_device = task.store.on(None)
    assert [leaf.shape for leaf in jax.tree.leaves(on_device)] == events
    live = [id(leaf) for leaf in jax.live_arrays()]
    assert all(live.count(id(leaf)) == 1 for leaf in jax.tree.leaves(on_device))


def test_other_data_is_refused(tmp_path):
    task = tasks.load(small_config(tmp_path))
    other = with_(task.config, data__max_history=5)
    with pytest.raises(ValueError, match="the data was loaded for .*: load it for .*max_history=5"):
        task.with_config(other)
    wider = dataclasses.replace(task.config, name="wider")
    assert task.with_config(wider).interactions is task.interactions
    np.testing.assert_array_equal(task.with_config(wider).events.item_E, task.events.item_E)
