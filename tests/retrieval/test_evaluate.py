"""Evaluation against plain loops: a user at a time, all items scored, some hidden, ranked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.retrieval.test_data_split import make
from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.retrieval.batch import HistoryGather


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tasks.load(with_(small_config(tmp_path_factory.mktemp("data")), train__eval_users=7))


@pytest.fixture(scope="module")
def params(task):
    return task.recipe.init(5).params


def ranks_by_hand(task, params, examples, hidden, time="target"):
    """The rank of every target, from scores of single histories without any padding.

    hidden: of each example, the items that are left out.
    """
    model = task.recipe.model(params)
    table = np.asarray(model.item_table[...])
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-6)
    events, ranks = jax.device_put(task.events), []

    @jax.jit
    def encode(start, stop):
        asks = stop if time == "target" else stop - 1
        told = dataclasses.replace(events, time_E=events.time_E.at[stop].set(events.time_E[asks]))
        rows = task.config.data.max_history
        return model.encode(HistoryGather(rows)(told, {"start": start, "stop": stop}))[-1]

    for start, stop, seen in zip(examples.start, examples.stop, hidden, strict=True):
        scores = unit @ np.asarray(
            encode(jnp.array([start], jnp.int32), jnp.array([stop], jnp.int32))
        )
        target = task.interactions.items[stop]
        better = [
            item
            for item in range(1, len(table))
            if item not in seen and item != target and scores[item] > scores[target]
        ]
        ranks.append(2501 if target in seen else len(better) + 1)
    return np.array(ranks)


def hidden_by_hand(task, hide):
    """Items of the newest events of each test user, or of all before the target."""
    examples, interactions = task.splits.test, task.interactions
    first = examples.start if hide == "window" else interactions.offsets[examples.user]
    spans = zip(first, examples.stop, strict=True)
    return [set(interactions.items[start:stop].tolist()) for start, stop in spans]


def test_ranks_against_loops(task, params):
    examples = task.splits.test
    assert (
        len(examples) == 60 and (examples.lengths == 10).all()
    )  # 11 events before the target, of which the newest 10 are kept
    np.testing.assert_array_equal(
        task.evaluator("test").predict(params),
        ranks_by_hand(task, params, examples, hidden_by_hand(task, "window")),
    )


@pytest.mark.parametrize(
    "fields",
    [
        dict(eval__hide="all", eval__time="last"),
        dict(eval__hide="all", data__layout="padded", data__placement="stream"),
        dict(eval__repeats="rank", eval__time="last", data__placement="stream"),
    ],
)
def test_what_is_hidden_and_told_against_loops(task, params, fields):
    """Histories of 11 events, of which the model reads 4: most hidden items are older."""
    config = with_(task.config, data__max_history=4, **fields)
    short, evaluation = tasks.of(config, task.interactions), config.eval
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 50 * leaf if "time_table" in str(path) else leaf,
        short.recipe.init(5).params,
    )
    hidden, examples = hidden_by_hand(short, evaluation.hide), short.splits.test
    left_out = [set() for _ in hidden] if evaluation.repeats == "rank" else hidden
    evaluator = short.evaluator("test")
    metrics, ranks = evaluator(params), evaluator.predict(params)
    want = ranks_by_hand(short, params, examples, left_out, evaluation.time)
    np.testing.assert_array_equal(ranks, want)
    usual = ranks_by_hand(short, params, examples, hidden_by_hand(short, "window"))
    assert (ranks != usual).any()
    targets = task.interactions.items[examples.stop].tolist()
    met = [target in items for target, items in zip(targets, hidden, strict=True)]
    assert metrics["repeats"] == np.mean(met) > 0
    found = metrics["hr@200"]  # of a catalogue of 120 items: every target that is ranked
    assert found == pytest.approx(1 if evaluation.repeats == "rank" else 1 - np.mean(met))


def in_order(items):
    """Users of the same number of events."""
    data = make(*([*range(len(user))] for user in items))
    return dataclasses.replace(
        data,
        items=np.concatenate(items).astype(np.int32),
        catalog=Catalog.from_ids(np.arange(int(np.max(items)))),
    )


def test_a_target_that_alone_was_never_met_is_first(task):
    """Everything else was met, half of it before the window."""
    rng = np.random.default_rng(0)
    data = in_order([[*(1 + rng.permutation(12)), 13] for _ in range(20)])
    config = with_(task.config, data__max_history=6)
    window, every = (
        tasks.of(with_(config, eval__hide=hide), data).baselines("test")["popularity"]
        for hide in ("window", "all")
    )
    assert every["hr@1"] == 1 and window["hr@1"] == 0
    assert every["repeats"] == window["repeats"] == 0


def test_repeated_targets_are_counted_and_can_be_ranked(task):
    """Each user goes to and fro between two items."""
    data = in_order([[1 + n % 12, 1 + (n + 7) % 12] * 3 + [1 + n % 12] for n in range(24)])
    hidden, ranked = (
        tasks.of(with_(task.config, eval__repeats=repeats), data).baselines("test")["popularity"]
        for repeats in ("hide", "rank")
    )
    assert hidden["repeats"] == ranked["repeats"] == 1
    assert hidden["hr@200"] == 0 and ranked["hr@50"] == 1


def test_times_that_are_not_there_cannot_be_told(task):
    config = with_(task.config, eval__time="last")
    untimed = dataclasses.replace(task.interactions, timestamps=None)
    with pytest.raises(
        ValueError, match="eval.time='last' needs times, and the source 'synthetic'"
    ):
        tasks.of(config, untimed)


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
