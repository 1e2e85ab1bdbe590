"""The measurement of features beside ids alone: its intervals, what it keeps, its table."""

import json

import numpy as np
import pytest

from experiments.configs import named
from scripts import item_features
from scripts.item_features import TrainedRun, compared, interval, summary, variants
from scripts.tables import features, records


def run(rank, seed=42):
    result = {"best": {"hr@10": 0.5, "hr@10/cold": 0.25, "users/cold": 2.0}, "seed": seed}
    return TrainedRun(result, np.array(rank), np.array([0, 50, 100, 400]), 0.002, 90.0)


def test_an_interval_is_paired():
    rng = np.random.default_rng(0)
    base_U = rng.random(400)
    same = interval(base_U, base_U)
    assert same["ratio_interval"] == [1, 1] and same["difference_interval"] == [0, 0]
    better = interval(1.2 * base_U, base_U)
    np.testing.assert_allclose([better["ratio"], *better["ratio_interval"]], 1.2)


def test_users_are_told_apart_by_their_targets():
    base, found = [run([1, 99, 1, 99])] * 2, [run([1, 1, 99, 99]), run([1, 99, 99, 1])]
    against = compared(found, base)
    assert against["all"]["difference"] == 0 and against["warm"]["difference"] == -0.25
    assert against["cold"]["difference"] == 0.25 and against["new"]["difference"] == 0


def test_variants():
    config = named("ml1m_hstu_features")
    found = variants(config)
    assert list(found) == ["ids", "sum", "words", "series"]
    assert found["words"] == config and found["ids"].features.items == ()
    assert (
        found["series"].features.items == found["sum"].features.items == config.features.items[:2]
    )
    with pytest.raises(ValueError, match="ml1m_hstu has no features.items"):
        variants(named("ml1m_hstu"))


def test_what_a_run_has_found_is_read_again(tmp_path):
    kept = {"result": {"seed": 1}, "ranks": [1, 2], "counts": [3, 4], "inference_gflop": 1.0}
    (tmp_path / "ids_1.json").write_text(json.dumps(kept | {"rows": 2.0}))
    found = item_features.train_one(named("ml1m_hstu_features"), str(tmp_path / "ids_1"))
    assert found.rank_U.tolist() == [1, 2] and found.count_U.tolist() == [3, 4]


def test_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    ids, more = [run([1, 9, 5, 10])], [run([1, 1, 1, 1])]
    found = {"ids": summary(ids), "sum": summary(more) | {"against_ids": compared(more, ids)}}
    origin = {"device": "1 x GPU", "commit": "abc", "date": "2026-11-30"}
    text = json.dumps(origin | {"features": ["genres"], "id_dropout": 0.1, "variants": found})
    (tmp_path / "ml1m_item_features.json").write_text(text)
    rows = [line.split(" | ") for line in features.item_features_table().splitlines()[2:4]]
    assert rows[1][0] == "| MovieLens-1M, genres and year in every token"
    assert rows[1][3] == "1.00 [1.00, 1.00]" and rows[1][6:] == ["2", "90", "2.0 |"]
