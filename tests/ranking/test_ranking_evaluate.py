"""Evaluation of ranking runs: every event of a split once, in order; training judged by it."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests import commands
from tests.ranking.small_rank import rank_config, write_answers
from tests.small_run import with_
from ultra_hstu import flops, tasks
from ultra_hstu.criteria import RETRIEVAL, display_name, ranking
from ultra_hstu.ranking.evaluate import PRIOR_EVENTS, RequestEvaluator
from ultra_hstu.ranking.recipe import RankRecipe
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.report import draw_curves, metrics_table, read_metrics
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranking")
    write_answers(folder / "raw")
    return folder


@pytest.fixture(scope="module")
def task(folder):
    return tasks.load(rank_config(folder))


def events_of(task, part):
    """(user, event) of a part, by definition: the newest fifth is test, the next one validation."""
    found = []
    for user, (first, last) in enumerate(
        zip(task.interactions.offsets[:-1], task.interactions.offsets[1:], strict=True)
    ):
        fifth = (last - first) // 5
        start, stop = {
            "train": (first, last - 2 * fifth),
            "validation": (last - 2 * fifth, last - fifth),
            "test": (last - fifth, last),
        }[part]
        found += [(user, int(event)) for event in range(start, stop)]
    return found


@dataclasses.dataclass(frozen=True)
class Oracle(RankRecipe):
    """Predicts what the batch says of itself, so that anything out of its place shows."""

    def logits(self, params, batch, key=None):
        return params["sharpness"] * (2 * batch.label_PK - 1) + 0.001 * batch.user_P[:, None]


class OracleTask(RankingTask):
    @property
    def recipe(self):
        return Oracle(self.config, self.sizes)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_every_event_once_and_in_its_place(task, part):
    evaluator = OracleTask.of(task.config, task.interactions).evaluator(part)
    assert sorted(
        zip(evaluator.user_P.tolist(), evaluator.event_P.tolist(), strict=True)
    ) == events_of(task, part)
    logit_PK = evaluator.predict({"sharpness": jnp.float32(5.0)})
    metrics = evaluator({"sharpness": jnp.float32(5.0)})
    correct_P = task.interactions.actions["correct"][evaluator.event_P]
    np.testing.assert_allclose(
        logit_PK[:, 0], 5 * (2.0 * correct_P - 1) + 0.001 * evaluator.user_P, rtol=1e-5
    )
    assert metrics["auc/correct"] == metrics["gauc/correct"] == 1.0 and metrics["ne"] < 0.02


def test_no_batching_changes_a_prediction(task):
    params = task.recipe.init(3).params
    evaluator = task.evaluator("test")
    together = evaluator.predict(params)
    assert len(evaluator.plan) > 8, "several calls, the last one not full"
    assert evaluator._run._cache_size() == 1
    alone = tasks.of(with_(task.config, train__eval_users=1), task.interactions).evaluator("test")
    np.testing.assert_array_equal(alone.event_P, evaluator.event_P)
    np.testing.assert_allclose(alone.predict(params), together, atol=1e-5)
    compiled = task.evaluator("test")
    compiled.compile(params)
    np.testing.assert_array_equal(compiled.predict(params), together)
    assert compiled(params) == evaluator(params)


def test_baselines_by_loops(task):
    train = events_of(task, "train")
    correct, items = task.interactions.actions["correct"], task.interactions.items
    rate = (sum(correct[event] for _, event in train) + 1) / (len(train) + 2)

    def rate_of(same):
        own = [event for user, event in train if same(user, event)]
        return (sum(correct[event] for event in own) + PRIOR_EVENTS * rate) / (
            len(own) + PRIOR_EVENTS
        )

    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    losses = {name: [] for name in ("base rate", "item's rate", "user's rate", "item and user")}
    for user, event in events_of(task, "test"):
        item_rate = rate_of(lambda u, e, event=event: items[e] == items[event])
        user_rate = rate_of(lambda u, e, user=user: u == user)
        both = logit(item_rate) + logit(user_rate) - logit(rate)
        for name, x in zip(
            losses, (logit(rate), logit(item_rate), logit(user_rate), both), strict=True
        ):
            losses[name].append(math.log(1 + math.exp(-x if correct[event] else x)))
    found = task.baselines("test")
    assert {name: values["log_loss/correct"] for name, values in found.items()} == pytest.approx(
        {name: np.mean(values) for name, values in losses.items()}, rel=1e-5
    )
    assert found["base rate"]["auc/correct"] == 0.5 and found["item's rate"]["auc/correct"] > 0.5


def with_answers(task, correct):
    interactions = dataclasses.replace(
        task.interactions, actions=task.interactions.actions | {"correct": correct.astype(np.int32)}
    )
    return tasks.of(task.config, interactions)


def test_what_cannot_be_measured_is_said_before_training(task, tmp_path):
    correct = task.interactions.actions["correct"].copy()
    correct[[event for _, event in events_of(task, "test")]] = 1
    always_right = with_answers(task, correct)
    with pytest.raises(
        ValueError,
        match="the test events give correct no labels of both classes .* NE has no value: "
        "raise rank.test_fraction",
    ):
        train(task.config, tmp_path / "one_class", console=QUIET, task=always_right)
    assert not Workdir(tmp_path / "one_class").metrics.exists()
    nothing = tasks.of(with_(task.config, rank__test_fraction=0.0), task.interactions)
    with pytest.raises(ValueError, match="no user has test events"):
        train(nothing.config, tmp_path / "no_test", console=QUIET, task=nothing)


def test_a_prediction_that_is_not_finite_is_an_error(task):
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, task.recipe.init(0).params)
    evaluator = task.evaluator("validation")
    predictions = len(evaluator.event_P)
    with pytest.raises(
        FloatingPointError, match=f"{predictions} of {predictions} predictions are not finite"
    ):
        evaluator(params)


# --- training ---


def test_the_epoch_with_the_lowest_validation_ne_is_tested_once(task, tmp_path, monkeypatch):
    looked_at = []
    measure = RequestEvaluator.__call__
    monkeypatch.setattr(
        RequestEvaluator,
        "__call__",
        lambda self, params: looked_at.append(len(self.event_P)) or measure(self, params),
    )
    config = with_(task.config, train__epochs=4)
    result = train(config, tmp_path, console=QUIET, task=task.with_config(config))
    records = read_metrics(Workdir(tmp_path).metrics)
    assert [record["split"] for record in records] == ["validation"] * 4
    errors = [record["ne"] for record in records]
    assert result["best_epoch"] == 1 + int(np.argmin(errors)) and result["validation"][
        "ne"
    ] == pytest.approx(min(errors))
    validation, test = (len(events_of(task, part)) for part in ("validation", "test"))
    assert looked_at == [validation] * 5 + [
        test
    ]  # the best epoch's validation metrics once more, then the test events
    assert records[-1]["loss"] < records[0]["loss"]
    assert {"ne", "ne/correct", "auc/correct", "gauc/correct", "log_loss/correct"} <= result[
        "best"
    ].keys()
    assert json.loads(Workdir(tmp_path).result.read_text()) == result
    assert result["eval"] == {"time": "target"}
    assert Workdir(tmp_path).curves.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(
        ValueError,
        match="is a ranking run .*come from a retrieval run; --candidates=",
    ):
        RecommendationModel(str(tmp_path))


def test_patience_waits_for_a_lower_ne(task, tmp_path, monkeypatch):
    scores = iter([0.9, 0.8, 0.85, 0.81, 0.8, 0.7])
    monkeypatch.setattr(RequestEvaluator, "__call__", lambda self, params: {"ne": next(scores)})
    config = with_(task.config, train__epochs=9, train__patience=2)
    result = train(config, tmp_path, console=QUIET, task=task.with_config(config))
    assert (result["epochs"], result["best_epoch"]) == (4, 2)


def test_commands(folder, tmp_path):
    def call(module, *arguments):
        done = commands.run(f"experiments.{module}", f"--workdir={tmp_path / 'run'}", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    record = tmp_path / "record.json"
    shown = call(
        "train",
        f"--config=tests/ranking/small_rank_config.py:{folder}",
        "--config.train.epochs=1",
        f"--record={record}",
    )
    assert "GAUC" in shown and "item's rate" in shown
    written = json.loads(record.read_text())
    assert written["baselines"]["base rate"]["auc/correct"] == 0.5
    assert written["flops"]["training"] > written["flops"]["inference"] > 0
    assert written["eval"] == written["runs"][0]["eval"] == {"time": "target"}
    assert written["runs"][0]["history"][0].keys() >= {"epoch", "loss", "ne", "auc/correct"}
    shown = call("evaluate", "--split=validation")
    assert "BASE RATE" in shown and f"{written['runs'][0]['validation']['ne/correct']:.4f}" in shown


# --- criteria ---


def test_operations_of_a_request(task):
    """Against the requests one by one: 4 targets at a time, up to 12 events before them."""
    samples = []
    for user in range(task.interactions.num_users):
        own = [event for u, event in events_of(task, "test") if u == user]
        first = int(task.interactions.offsets[user])
        samples += [(min(12, own[i] - first), len(own[i : i + 4])) for i in range(0, len(own), 4)]
    each = [
        flops.count(task.config, history, targets=targets).inference for history, targets in samples
    ]
    assert task.flops("test").inference == pytest.approx(np.mean(each))
    train = task.flops("train")
    assert train.training > 2 * train.inference > 0


def test_better():
    ranked = ranking({"rating": "regression", "like": "binary"})
    assert (ranked.selection, ranked.tasks, ranked.curves) == (
        "ne",
        ("rating", "like"),
        ("ne", "auc/like"),
    )
    assert ranked.better(0.5, 0.6) and not ranked.better(0.6, 0.5) and not ranked.better(0.5, 0.5)
    assert (
        RETRIEVAL.better(0.6, 0.5)
        and not RETRIEVAL.better(0.5, 0.6)
        and not RETRIEVAL.better(0.5, 0.5)
    )
    for criteria in (ranked, RETRIEVAL):
        assert (
            criteria.better(0.0, None)
            and not criteria.better(math.nan, None)
            and not criteria.better(math.nan, 0.5)
        )
    assert ranking({"rating": "regression"}).selection == "mse"
    assert (display_name("hr@10"), display_name("log_loss/like")) == ("HR@10", "LOG LOSS like")


def test_a_table_has_a_line_for_each_task(tmp_path):
    criteria = ranking({"like": "binary", "share": "regression"})
    table = metrics_table(
        "title",
        {"model": {"ne/like": 0.75, "auc/like": 0.6, "log_loss/like": 0.5, "mse/share": 0.125}},
        criteria,
    )
    assert [column.header for column in table.columns] == [
        "",
        "NE",
        "AUC",
        "GAUC",
        "LOG LOSS",
        "MSE",
    ]
    assert [list(column.cells) for column in table.columns] == [
        ["model: like", "model: share"],
        ["0.7500", ""],
        ["0.6000", ""],
        ["", ""],
        ["0.5000", ""],
        ["", "0.1250"],
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 1, "epoch": 1, "loss": 1.0, "ne": 0.9}) + "\n")
    draw_curves({"run": metrics}, tmp_path / "curves.png", criteria)
    assert (tmp_path / "curves.png").exists()


def test_the_kind_of_a_task_decides_its_evaluator(task):
    assert isinstance(task, RankingTask) and isinstance(task.evaluator("test"), RequestEvaluator)
