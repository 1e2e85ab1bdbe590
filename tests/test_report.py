"""Curves: whole epochs, the best one marked, baselines, and what was measured."""

import json

import numpy as np

from ultra_hstu.criteria import RETRIEVAL, by_warmth, ranking
from ultra_hstu.report import best_epoch, draw_curves, metrics_table


def test_curves_name_what_they_show(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.pyplot.close", drawn.append)
    file = tmp_path / "metrics.jsonl"
    records = [
        {"step": n, "epoch": n, "loss": 3.0 - n, "ndcg@10": value, "hr@10": 2 * value}
        for n, value in enumerate((0.1, 0.3, 0.2), start=1)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    baselines = {"popularity": {"hr@10": 0.25, "ndcg@10": 0.15}}
    title = "run: validation, protocol validated"
    draw_curves({"run": file}, tmp_path / "curves.png", title=title, baselines=baselines)
    (figure,) = drawn
    loss, hits, gains = figure.axes
    for axis in figure.axes:
        assert (axis.get_xticks() == np.round(axis.get_xticks())).all()
    assert figure.get_suptitle() == title
    shown = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert shown == [[], ["epoch 2: 0.6000"], ["epoch 2: 0.3000"]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["run", "popularity (no model)", "best epoch, by NDCG@10"]
    assert [len(axis.lines) for axis in (loss, hits, gains)] == [1, 3, 3]


def test_the_best_epoch_is_that_of_the_metric_that_decides():
    records = [{"epoch": 1, "ndcg@10": 0.2, "ne": 0.9}, {"epoch": 2, "ndcg@10": 0.1, "ne": 0.8}]
    assert best_epoch(records, RETRIEVAL) == 1
    assert best_epoch(records, ranking({"like": "binary"})) == 2
    assert best_epoch([{"epoch": 1, "loss": 2.0}], RETRIEVAL) is None


def test_a_table_says_what_repeats_and_ne_are():
    for share in (0.0, 0.25):
        table = metrics_table("test", {"model": {"hr@10": 0.5, "repeats": share}})
        assert ("the user has met before" in str(table.caption)) == (share > 0)
    table = metrics_table("test", {"model": {"ne": 0.9}}, ranking({"like": "binary"}))
    assert "low is good" in str(table.caption)


def test_counts_have_no_decimals():
    parts = by_warmth(RETRIEVAL)
    table = metrics_table("test", {"model": {"users/cold": 1397.0}}, parts, parts.details)
    assert list(table.columns[-1].cells) == ["", "1,397", ""]
