"""Tables of ranking runs, from records as `experiments.train --record` writes them."""

import json

import pytest

from scripts import make_tables


def run(ne, auc=0.7, task="correct"):
    return {"best": {"ne": ne, f"ne/{task}": ne, f"auc/{task}": auc, f"log_loss/{task}": 0.5}, "seconds": 100.0}


def record(runs, inference, **more):
    flops = {"inference": inference, "training": 3 * inference}
    best = {"ne": 1.0, "ne/correct": 1.0, "auc/correct": 0.5, "gauc/correct": 0.5, "log_loss/correct": 0.69}
    return {"device": "1 x GPU", "runs": runs, "flops": flops, "baselines": {"base rate": best, "item and user": best}} | more


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(make_tables, "RESULTS", tmp_path)
    return lambda name, value: (tmp_path / f"{name}.json").write_text(json.dumps(value))


def cells(table):
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]


def test_without_records_nothing_is_claimed(results):
    assert {row[3] for row in cells(make_tables.ranking_table().replace("|  |", "| - |"))} == {"not measured yet"}
    assert "not measured yet" in make_tables.ablation_table()
    for table in (make_tables.ranking_table(), make_tables.ablation_table()):
        assert not any(
            character.isdigit()
            for line in table.splitlines()[2:]
            for character in line.replace("2017", "").replace("-1M", "").replace("ml1m", "")
        )


def test_ranking(results):
    results("assistments_rank_hstu", record([run(0.9), run(0.91)], 4e9))
    results("assistments_rank_ultra", record([run(0.88)], 2e9))
    rows = cells(make_tables.ranking_table().replace("|  |", "| - |"))
    assert rows[0][:3] == ["ASSISTments 2017", "correct", "base rate"] and rows[0][4:8] == ["1.0000", ".5000", ".5000", ".6900"]
    assert rows[2] == [
        "ASSISTments 2017",
        "correct",
        "HSTU",
        "2",
        ".9050 ± .0071",
        ".7000 ± .0000",
        "-",
        ".5000 ± .0000",
        "4",
        "100 (1 x GPU)",
    ]
    assert rows[3][2:5] == ["ULTRA-HSTU", "1", ".8800"] and rows[3][8] == "2 (50 %)"
    assert [row[2] for row in rows].count("base rate") == 1


def test_ablation(results):
    variants = [
        {"name": "all", "change": "", "runs": [run(0.88), run(0.9)], "flops": {"inference": 2e9, "training": 7e9}},
        {"name": "no window", "change": "model.window=()", "runs": [run(0.885)], "flops": {"inference": 2.5e9, "training": 8e9}},
    ]
    results("ablation_assistments_rank_ultra", {"config": "assistments_rank_ultra", "variants": variants})
    rows = cells(make_tables.ablation_table().replace("|  |", "| - |"))
    assert rows[0] == ["assistments_rank_ultra", "all", "-", "2", ".8900 ± .0141", "+0.0000", ".7000 ± .0000", "2", "7", "100"]
    assert rows[1][1:6] == ["no window", "`model.window=()`", "1", ".8850", "-0.0050"] and rows[1][7:9] == ["2.5", "8"]
