"""Metrics of the ranking task against their definitions, written out pair by pair."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultra_hstu.ranking.metrics import (
    auc,
    base_rate,
    grouped_auc,
    log_loss,
    mse,
    normalized_entropy,
    ranking_metrics,
)

ENTRY = st.tuples(
    st.sampled_from([-30.0, -1.5, -0.25, 0.0, 0.25, 2.0, 40.0]),  # few values: many ties
    st.sampled_from([0, 1]),
    st.sampled_from([0.0, 1.0, 1.0, 0.5, 3.0]),
    st.integers(0, 3),
)
ENTRIES = st.lists(ENTRY, min_size=1, max_size=24)


def columns(entries):
    logit, label, weight, group = zip(*entries, strict=True)
    return (
        np.array(logit, np.float32),
        np.array(label, np.float32),
        np.array(weight, np.float32),
        np.array(group, np.int32),
    )


def same(actual, expected):
    assert (math.isnan(actual) and expected is None) or (
        expected is not None and actual == pytest.approx(expected, rel=1e-9)
    ), (
        actual,
        expected,
    )


# --- definitions ---


def probability(logit):
    return 1 / (1 + math.exp(-logit))


def mean_loss(entries):
    total = sum(weight for *_, weight, _ in entries)
    if not total:
        return None
    losses = [
        weight * -math.log(probability(logit if label else -logit))
        for logit, label, weight, _ in entries
        if weight
    ]
    return sum(losses) / total


def pairs(entries):
    won = compared = 0.0
    for one, label, weight, _ in entries:
        for zero, other_label, other_weight, _ in entries:
            if label == 1 and other_label == 0:
                compared += weight * other_weight
                won += weight * other_weight * (1.0 if one > zero else 0.5 if one == zero else 0.0)
    return won / compared if compared else None


def entropy(entries):
    total = sum(weight for *_, weight, _ in entries)
    rate = sum(weight * label for _, label, weight, _ in entries) / total if total else 0
    return -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if 0 < rate < 1 else None


@given(ENTRIES)
def test_definitions(entries):
    logit, label, weight, group = columns(entries)
    same(log_loss(logit, label, weight), mean_loss(entries))
    expected = entropy(entries)
    same(
        normalized_entropy(logit, label, weight),
        None if expected is None else mean_loss(entries) / expected,
    )
    same(auc(logit, label, weight), pairs(entries))
    total = sum(weight.tolist())
    squares = [w * (x - y) ** 2 for x, y, w, _ in entries]
    same(mse(logit, label, weight), sum(squares) / total if total else None)
    same(base_rate(label, weight), sum(w * y for _, y, w, _ in entries) / total if total else None)
    numerator = denominator = 0.0
    for g in range(4):
        own = [entry for entry in entries if entry[3] == g]
        if (value := pairs(own)) is not None:
            numerator += value * sum(entry[2] for entry in own)
            denominator += sum(entry[2] for entry in own)
    same(grouped_auc(logit, label, weight, group), numerator / denominator if denominator else None)


@given(ENTRIES, st.randoms(use_true_random=False))
def test_order_and_what_has_no_weight_do_not_matter(entries, random):
    logit, label, weight, group = columns(entries)
    expected = [
        auc(logit, label, weight),
        grouped_auc(logit, label, weight, group),
        normalized_entropy(logit, label, weight),
    ]
    mixed = [*entries, (math.nan, 7, 0.0, 1), (math.inf, math.nan, 0.0, 99)]
    random.shuffle(mixed)
    logit, label, weight, group = columns(mixed)
    actual = [
        auc(logit, label, weight),
        grouped_auc(logit, label, weight, group),
        normalized_entropy(logit, label, weight),
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_known_values():
    ones = np.ones(4, np.float32)
    label = np.array([0, 0, 1, 1])
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), label, ones) == 0.75
    assert auc(np.zeros(4), label, ones) == 0.5
    assert (
        log_loss(np.zeros(4), label, ones) == pytest.approx(math.log(2))
        and normalized_entropy(np.zeros(4), label, ones) == 1.0
    )
    rate = np.log(np.full(8, 0.25 / 0.75))  # always predicting the base rate
    assert normalized_entropy(rate, np.array([1, 0, 0, 0] * 2), np.ones(8)) == pytest.approx(
        1.0, rel=1e-12
    )
    # Two users, each in perfect order, the second on a lower level: AUC sees the levels, grouped
    # AUC does not.
    logit, label, group = (
        np.array([5.0, 4.0, 1.0, 0.0]),
        np.array([1, 0, 1, 0]),
        np.array(["a", "a", "b", "b"]),
    )
    assert auc(logit, label, ones) == 0.75 and grouped_auc(logit, label, ones, group) == 1.0
    # The third user has one class and is left out, however many impressions it has.
    more = (
        np.concatenate([logit, np.zeros(50)]),
        np.concatenate([label, np.ones(50)]),
        np.ones(54),
        np.array(["a", "a", "b", "b"] + ["c"] * 50),
    )
    assert grouped_auc(*more) == 1.0


def test_sure_and_wrong_is_infinite_and_nan_is_never_good():
    label, ones = np.array([0, 1, 1]), np.ones(3)
    assert log_loss(np.array([-np.inf, np.inf, np.inf]), label, ones) == 0.0
    assert log_loss(np.array([-np.inf, np.inf, -np.inf]), label, ones) == np.inf
    assert log_loss(np.array([-800.0, 800.0, -800.0]), label, ones) == pytest.approx(800 / 3)
    broken = np.array([0.0, np.nan, 1.0])
    for metric in (log_loss, normalized_entropy, auc, mse):
        assert math.isnan(metric(broken, label, ones)), metric.__name__
    assert math.isnan(grouped_auc(broken, label, ones, np.zeros(3, int)))


def test_labels_and_weights_are_checked():
    logit, weight = np.zeros(3), np.ones(3)
    for metric in (log_loss, normalized_entropy, auc):
        with pytest.raises(ValueError, match=r"labels must be 0 or 1, not 0.5: a regression"):
            metric(logit, np.array([0, 0.5, 1]), weight)
        with pytest.raises(ValueError, match="labels must be 0 or 1, not nan"):
            metric(logit, np.array([0, np.nan, 1]), weight)
        with pytest.raises(ValueError, match="weights must be at least 0, not -1"):
            metric(logit, np.array([0, 1, 1]), np.array([1.0, -1.0, 1.0]))
    assert mse(logit, np.array([0, 0.5, 1]), weight) == pytest.approx(1.25 / 3)
    with pytest.raises(ValueError, match="task 'like': labels must be 0 or 1, not 2"):
        ranking_metrics(
            np.zeros((2, 1)),
            np.array([[0.0], [2.0]]),
            np.ones((2, 1)),
            np.zeros(2, int),
            {"like": "binary"},
        )
    with pytest.raises(ValueError, match="for each of the 2 columns"):
        ranking_metrics(
            np.zeros((2, 2)),
            np.zeros((2, 2)),
            np.ones((2, 2)),
            np.zeros(2, int),
            {"like": "binary"},
        )
    with pytest.raises(ValueError, match="must say 'binary' or 'regression'"):
        ranking_metrics(
            np.zeros((2, 1)),
            np.zeros((2, 1)),
            np.ones((2, 1)),
            np.zeros(2, int),
            {"like": "ordinal"},
        )


def test_all_tasks_together():
    rng = np.random.default_rng(0)
    logit, user = rng.normal(size=(50, 4)), rng.integers(0, 5, 50)
    label = np.stack(
        [rng.integers(0, 2, 50), rng.integers(0, 2, 50), np.ones(50), rng.normal(size=50)], axis=1
    )
    weight = rng.integers(0, 2, (50, 4)).astype(np.float32)
    label = np.where(weight > 0, label, np.nan)
    tasks = {"click": "binary", "like": "binary", "shown": "binary", "share": "regression"}
    metrics = ranking_metrics(logit, label, weight, user, tasks)
    assert metrics["ne"] == np.mean(
        [metrics["ne/click"], metrics["ne/like"]]
    )  # "shown" has one class
    assert (
        math.isnan(metrics["ne/shown"])
        and math.isnan(metrics["auc/shown"])
        and metrics["base_rate/shown"] == 1
    )
    used = weight[:, 1] > 0
    assert metrics["gauc/like"] == grouped_auc(
        logit[used, 1], label[used, 1], np.ones(used.sum()), user[used]
    )
    assert (
        metrics["mse"]
        == metrics["mse/share"]
        == pytest.approx(np.mean((logit - label)[weight[:, 3] > 0, 3] ** 2))
    )
    assert set(metrics) == {"ne", "mse", "mse/share"} | {
        f"{name}/{task}"
        for name in ("ne", "auc", "gauc", "log_loss", "base_rate")
        for task in ("click", "like", "shown")
    }
    broken = np.where(np.arange(50)[:, None] == np.argmax(weight[:, 0]), np.nan, logit)
    assert math.isnan(
        ranking_metrics(broken, label, weight, user, tasks)["ne"]
    )  # not left out as a task of one class is
    nothing = ranking_metrics(logit, label, np.zeros_like(weight), user, tasks)
    assert all(math.isnan(value) for value in nothing.values())
