"""Evaluation against plain loops: a user at a time, all items scored, history removed, ranked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.retrieval.batch import HistoryGather


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tasks.load(with_(small_config(tmp_path_factory.mktemp("data")), train__eval_users=7))


@pytest.fixture(scope="module")
def params(task):
    return task.recipe.init(5).params


def ranks_by_hand(task, params, examples):
    """The rank of every target, from scores of single histories without any padding."""
    model = task.recipe.model(params)
    table = np.asarray(model.item_table[...])
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-6)
    events, ranks = jax.device_put(task.events), []
    encode = jax.jit(
        lambda start, stop: model.encode(HistoryGather(10)(events, {"start": start, "stop": stop}))[
            -1
        ]
    )
    for start, stop in zip(examples.start, examples.stop, strict=True):
        scores = unit @ np.asarray(
            encode(jnp.array([start], jnp.int32), jnp.array([stop], jnp.int32))
        )
        seen, target = set(task.interactions.items[start:stop]), task.interactions.items[stop]
        better = [
            item
            for item in range(1, len(table))
            if item not in seen and item != target and scores[item] > scores[target]
        ]
        ranks.append(2501 if target in seen else len(better) + 1)
    return np.array(ranks)


def test_ranks_against_loops(task, params):
    examples = task.splits.test
    assert (
        len(examples) == 60 and (examples.lengths == 10).all()
    )  # 11 events before the target, of which the newest 10 are kept
    np.testing.assert_array_equal(
        task.evaluator("test").predict(params), ranks_by_hand(task, params, examples)
    )


def test_metrics_are_means_over_users(task, params):
    evaluator = task.evaluator("test")
    ranks = evaluator.predict(params)
    metrics = evaluator(params)
    assert metrics["hr@10"] == pytest.approx(np.mean(ranks <= 10))
    assert metrics["ndcg@10"] == pytest.approx(np.mean((ranks <= 10) / np.log2(ranks + 1)))
    assert metrics["mrr"] == pytest.approx(np.mean(1 / ranks))


def test_padded_layout_gives_the_same_ranks(task, params):
    padded = tasks.of(with_(task.config, data__layout="padded"), task.interactions)
    np.testing.assert_array_equal(
        padded.evaluator("test").predict(params), task.evaluator("test").predict(params)
    )


def test_popularity_counts_the_training_events_only(task):
    """Training uses events 1 to 11 of each user's 12: 10 rows and the target of the last row."""
    counts = np.zeros(121)
    for items in task.interactions.items.reshape(60, 12):
        np.add.at(counts, items[:11], 1)
    np.testing.assert_array_equal(task.popularity(), counts)
    metrics = task.baselines("test")["popularity"]
    assert 0 <= metrics["hr@10"] <= metrics["hr@50"] <= 1


def test_popularity_goes_to_the_lower_id_among_equals(task, monkeypatch):
    """However large the counts: with one count for all, an item's rank is its id."""
    monkeypatch.setattr(type(task), "popularity", lambda self: np.full(121, 10**9))
    items, test = task.interactions.items, task.splits.test
    expected = [
        items[stop] - (np.unique(items[start:stop]) < items[stop]).sum()
        for start, stop in zip(test.start, test.stop, strict=True)
        if items[stop] not in items[start:stop]
    ]
    metrics = task.baselines("test")["popularity"]
    assert metrics["hr@50"] == np.sum(np.array(expected) <= 50) / len(test)
    assert metrics["hr@10"] == np.sum(np.array(expected) <= 10) / len(test)


def test_targets_of_training(task):
    """Events 2 to 11 of each user's 12 are predicted in training, one after another."""
    counts = np.zeros(121)
    for items in task.interactions.items.reshape(60, 12):
        np.add.at(counts, items[1:11], 1)
    np.testing.assert_array_equal(task.target_counts(), counts)
    assert task.recipe.target_counts is None
    in_batch = task.with_config(with_(task.config, loss__kind="in_batch"))
    np.testing.assert_array_equal(in_batch.recipe.target_counts, counts)


def test_in_batch_negatives_need_the_counts(task):
    config = with_(task.config, loss__kind="in_batch")
    recipe = dataclasses.replace(task.with_config(config).recipe, target_counts=None)
    loader = task.loader("train", batch_users=8, steps_per_call=1)
    batch = next(iter(loader.groups(loader.plan()))).feed.batch(0)
    with pytest.raises(ValueError, match="needs the counts of the training targets"):
        jax.eval_shape(lambda: recipe.loss(recipe.init(0).params, batch, jax.random.key(0)))


def test_unknown_part(task):
    with pytest.raises(ValueError, match="unknown part 'cut': use train, validation, test"):
        task.examples("cut")


def test_published_has_no_validation_items(task):
    with pytest.raises(ValueError, match="protocol 'published' has no validation items"):
        task.evaluator("validation")


def test_validation_and_test_items_differ(tmp_path):
    task = tasks.load(small_config(tmp_path, protocol="validated"))
    assert (task.splits.validation.stop + 1 == task.splits.test.stop).all()
    assert (task.splits.train.stop + 1 == task.splits.validation.stop).all()
