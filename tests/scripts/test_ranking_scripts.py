"""Scripts of ranking: training at equal operations, how sparse histories get, counts."""

import json

import numpy as np
import pytest
from rich.console import Console

from experiments.record import Record
from scripts import generative, ranking_counts, stochastic_length
from scripts.studies import StudyRun
from tests.ranking import rank_data
from ultra_hstu import sampling
from ultra_hstu.config import SyntheticConfig
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.fields import changed
from ultra_hstu.ranking.task import RankingTask


def test_generative_training_at_equal_operations(tmp_path, monkeypatch):
    """Every variant's epochs cost about the same; the record has the curve of each run."""
    config = rank_data.config(
        tmp_path, rank=dict(input="interleaved"), model=dict(layers=1), train=dict(epochs=40)
    )
    config = changed(config, train={"protocol": "chronological"})
    data = rank_data.interactions((12, 15, 20))
    found = generative.variants(config, data, None)
    spent = {name: one["cost"]["trained_gflop"] for name, one in found.items()}
    assert list(spent) == ["impressions", "requests", "requests_one", "generative"]
    np.testing.assert_allclose(list(spent.values()), spent["requests"], rtol=0.1)
    assert found["generative"]["config"].train.epochs > found["requests"]["config"].train.epochs
    few = generative.variants(config, data, 3 * found["generative"]["cost"]["epoch_gflop"])
    assert few["generative"]["config"].train.epochs == 3

    def trained(config, folder, **_):
        folder.mkdir(parents=True)
        lines = [{"epoch": one, "step": one, "ne": 1 - 0.1 * one} for one in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
        return {"seed": config.train.seed, "best": {"ne": 0.8 - 0.1 * config.train.seed}}

    monkeypatch.setattr(generative, "train", trained)
    chosen, record = {"generative": few["generative"]}, Record(tmp_path / "record.json")
    generative.run(chosen, data, [1, 2], tmp_path / "runs", record, Console(quiet=True))
    made = json.loads((tmp_path / "record.json").read_text())["variants"]["generative"]
    assert made["mean"]["ne"] == pytest.approx(0.65) and made["epochs"] == 3
    curve = made["runs"][1]["curve"]
    assert [point["ne"] for point in curve] == [0.9, 0.8, 0.7]
    assert curve[-1]["gflop"] == pytest.approx(few["generative"]["cost"]["trained_gflop"])


def test_the_best_possible_likes_follow_bayes_rule(tmp_path):
    """Against a loop over requests; better than rates, and no better than knowing all tastes."""
    made = SyntheticConfig(users=60, length=40, items=30, categories=3)
    config = rank_data.config(
        tmp_path,
        data=dict(source="synthetic", max_history=20, synthetic=made),
        rank=dict(tasks=("is_like",), signals=("is_like",), features=()),
    )
    data = load_interactions(config.data)
    task = RankingTask.of(config, data)
    found, evaluator = generative.best_possible(task), task.evaluator("test")
    logits = []
    for event, user in zip(evaluator.event_P, evaluator.user_P, strict=True):
        stop = event - (event - task.parts.test[user]) % 3
        before = np.arange(max(40 * user, stop - 20), stop)
        same = before[(data.items[before] - data.items[event]) % 3 == 0]
        odds = np.prod(np.where(data.actions["is_like"][same] == 1, 4.0, 0.25))
        like = 0.8 * odds / (1 + odds) + 0.2 / (1 + odds)
        logits.append(np.log(like / (1 - like)))
    wanted = evaluator.metrics(np.array(logits, np.float32)[:, None])
    assert found["ne"] == pytest.approx(wanted["ne"], rel=1e-5)
    assert 0.65 < found["ne"] < task.baselines("test")["item and user"]["ne"]


def test_sparsity_is_exact_and_the_papers():
    """Expectations against draws; where all histories are N long, what the paper shows."""
    length_U = np.random.default_rng(0).integers(1, 900, 50)
    kept_U, square_U = stochastic_length.expected(length_U, 600, 1.5)
    uniform_SU, length_SU = np.broadcast_arrays(
        (np.arange(2000)[:, None] + 0.5) / 2000, np.minimum(length_U, 600)
    )
    drawn_SU = sampling.stochastic_length(length_SU, 600, 1.5, uniform_SU)
    np.testing.assert_allclose(kept_U, drawn_SU.mean(0), rtol=5e-3)
    np.testing.assert_allclose(square_U, (drawn_SU.astype(float) ** 2).mean(0), rtol=2e-2)
    cells = {(one["alpha"], one["N"]): one for one in stochastic_length.grid(np.full(9, 1024))}
    assert round(100 * cells[1.8, 1024]["sparsity"], 1) == 37.5
    assert round(100 * cells[1.8, 1024]["s2"], 1) == 56.2
    assert cells[2.0, 1024]["sparsity"] == 0 and cells[2.0, 2048]["sparsity"] == 0.5


def test_weights_keep_as_old_events_as_chance_does():
    found = stochastic_length.ages(rank_data.interactions((300, 5)), 200, 1.6)
    assert found["recent"]["events"] < 0.5
    assert 0.8 < found["weighted"]["events"] < 1.2 and 0.8 < found["random"]["time"] < 1.2


def test_operations_are_counted_by_run_and_baselines_by_source(tmp_path):
    """On generated data; what the record holds of other runs stays."""
    small = {
        "data.synthetic.users": 40,
        "data.synthetic.length": 24,
        "data.data_dir": str(tmp_path),
    }
    runs = [
        StudyRun("whole", "synthetic_rank_hstu", small),
        StudyRun("short", "synthetic_rank_hstu", {**small, "data.max_history": 8}),
    ]
    path = tmp_path / "record.json"
    for run in runs:
        ranking_counts.count([run], Record(path, grows=True), tmp_path / "nothing")
    record = json.loads(path.read_text())
    assert list(record["counted"]) == ["whole", "short"]
    whole, short = record["counted"].values()
    assert whole["training_gflop"] > short["training_gflop"] and list(record["baselines"]) == [
        "synthetic"
    ]
    with pytest.raises(ValueError, match="unknown config field data.max_histories: did you"):
        count = [StudyRun("none", "synthetic_rank_hstu", {"data.max_histories": 1})]
        ranking_counts.count(count, Record(path, grows=True), None)
