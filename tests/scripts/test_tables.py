"""Tables of runs, from records as `experiments.train --record` writes them."""

import json

import pytest

from scripts import search
from scripts.tables import (
    features,
    layer,
    make,
    movielens,
    overview,
    records,
    retrieval,
    runs,
    sampling,
)
from scripts.tables import ranking as ranking_tables


def run(ne, auc=0.7, task="correct"):
    return {
        "best": {"ne": ne, f"ne/{task}": ne, f"auc/{task}": auc, f"log_loss/{task}": 0.5},
        "seconds": 100.0,
    }


def record(runs, inference, **more):
    flops = {"inference": inference, "training": 3 * inference}
    best = {
        "ne": 1.0,
        "ne/correct": 1.0,
        "auc/correct": 0.5,
        "gauc/correct": 0.5,
        "log_loss/correct": 0.69,
    }
    return {
        "device": "1 x GPU",
        "runs": runs,
        "flops": flops,
        "baselines": {"base rate": best, "item and user": best},
    } | more


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return lambda name, value: (tmp_path / f"{name}.json").write_text(json.dumps(value))


def cells(table):
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]
    ]


@pytest.mark.parametrize(
    "table",
    [
        ranking_tables.ranking_table,
        ranking_tables.ablation_table,
        ranking_tables.softmax_table,
        ranking_tables.generative_table,
        sampling.sparsity_table,
        sampling.sampled_ranking_table,
        retrieval.sets_table,
        movielens.tables()["ml1m_temporal"],
        movielens.compared_table,
        movielens.search_table,
        movielens.exact_times_table,
        runs.runs_table,
        runs.published_sets_table,
        retrieval.evaluation_table,
        overview.overview_table,
        overview.walkthrough,
        features.item_features_table,
    ],
)
def test_without_records_nothing_is_claimed(table, results):
    assert table() == records.NOT_MEASURED


def test_ranking(results):
    results("assistments_rank_hstu", record([run(0.9), run(0.91)], 4e9))
    results("assistments_rank_ultra", record([run(0.88)], 2e9))
    rows = cells(ranking_tables.ranking_table().replace("|  |", "| - |"))
    assert rows[0][:3] == ["ASSISTments 2017", "correct", "base rate"] and rows[0][4:8] == [
        "1.0000",
        ".5000",
        ".5000",
        ".6900",
    ]
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
        "target",
    ]
    assert rows[3][2:5] == ["ULTRA-HSTU", "1", ".8800"] and rows[3][8] == "2 (50 %)"
    assert [row[2] for row in rows].count("base rate") == 1


def variant(runs, inference):
    return {
        "runs": [run | {"epochs": 4} for run in runs],
        "inference_gflop": inference,
        "training_gflop": 3 * inference,
    }


def test_runs_of_both_positions_stand_in_for_a_configurations_own(results):
    """Those that count as it does, with the operations of another record."""
    runs = [
        run(ne) | {"config": "ml1m_rank_hstu", "positions": positions, "seed": 1}
        for ne, positions in ((0.76, "backwards"), (0.9, "forwards"))
    ]
    results("rank_positions", {"device": "1 x GPU", "runs": runs})
    assert ranking_tables.ranking_table() == records.NOT_MEASURED
    counted = {"ml1m_rank_hstu": {"inference_gflop": 0.2, "training_gflop": 0.3}}
    results("rank_flops", {"counted": counted, "baselines": {"ml-1m": {}}})
    (row,) = cells(ranking_tables.ranking_table())
    assert row[:5] == ["MovieLens-1M", "correct", "HSTU", "1", ".7600"] and row[8] == "0.2"
    assert cells(ranking_tables.softmax_table())[0][:3] == row[:1] + ["production", "HSTU (-rab)"]


def test_generative_training_shows_the_best_on_the_way(results):
    curve = [{"gflop": 100.0 * (i + 1), "ne": ne} for i, ne in enumerate((0.9, 0.95, 0.8, 0.7))]
    found = {"trained_gflop": 400.0, "epochs": 4, "epoch_requests": 7}
    found["runs"] = [{"best": {"ne": 0.75}, "curve": curve}]
    results("generative_assistments", {"variants": {"requests_one": found}})
    (row,) = cells(ranking_tables.generative_table())
    assert row[1:] == ["requests one", "1", "0", "4 x 7", ".9000", ".9000", ".7500"]


def test_ablation(results):
    variants = {
        "baseline": variant([run(0.9)], 4.0),
        "ultra": variant([run(0.88), run(0.9)], 2.0),
        "full_attention": variant([run(0.885)], 2.5),
    }
    whole = {"config": "assistments_rank_ultra", "device": "1 x GPU", "variants": variants}
    results("ablation_assistments", whole)
    rows = cells(ranking_tables.ablation_table().replace("|  |", "| - |"))
    assert rows[0][1:5] == ["baseline", "1", ".9000", "+0.0100"]
    assert rows[1] == [
        "assistments_rank_ultra",
        "ultra",
        "2",
        ".8900 ± .0141",
        "-",
        ".7000 ± .0000",
        "2",
        "6",
        "25.0",
    ]
    assert rows[2][1:5] == ["full attention", "1", ".8850", "-0.0050"] and rows[2][6:8] == [
        "2.5",
        "7.5",
    ]
    # Where a configuration has no record of its own, its part of the ablation is shown; what was
    # not trained is no claim.
    rows = cells(ranking_tables.ranking_table().replace("|  |", "| - |"))
    assert (
        rows[0][2:5] == ["HSTU", "1", ".9000"]
        and rows[1][2:5] == ["ULTRA-HSTU", "2", ".8900 ± .0141"]
        and rows[1][8] == "2 (50 %)"
    )
    assert len(rows) == 2, "what has no record is absent"
    del variants["ultra"]
    results("ablation_assistments", whole)
    assert cells(ranking_tables.ablation_table().replace("|  |", "| - |"))[0][4] == "-"
    assert [row[2] for row in cells(ranking_tables.ranking_table())] == ["HSTU"]


def test_tables_of_retrieval_name_what_was_hidden_and_told(results):
    """Records from before that was a choice: the newest events, the target's time."""
    metrics = dict.fromkeys(retrieval.METRICS, 0.25)
    old = {"best": metrics, "last": metrics}

    def told(hide, repeats, time):
        return {"eval": {"hide": hide, "repeats": repeats, "time": time}}

    results("ml1m_hstu_published", {"runs": [old]})
    results("ml1m_hstu_validated", {"runs": [old | told("all", "hide", "last")]})
    results("ml1m_hstu_temporal", {"runs": [old | told("all", "rank", "target")]})
    tables = movielens.tables().items()
    rows = {
        (name, *row[:2]): row[2:4] for name, table in tables for row in cells(table()) if row[1:]
    }
    public = f"{retrieval.TRUE_ORDER} [q]"
    assert rows["ml1m_published", "HSTU", public] == ["window", "target"]
    assert rows["ml1m_published", "HSTU", "ours, last epoch"] == ["window", "target"]
    assert rows["ml1m_validated", "HSTU", f"{retrieval.RECTOOLS} [q]"] == ["all", "target"]
    assert rows["ml1m_validated", "HSTU", "ours"] == ["all", "last"]
    assert rows["ml1m_temporal", "HSTU", "ours"] == ["nothing", "target"]

    assert retrieval.evaluation_table() == records.NOT_MEASURED
    results("ml100k_hstu_validated", {"runs": [old]})
    served = told("all", "hide", "last") | {"tables": {"float32": {"metrics": metrics}}}
    results("ml100k_hstu_validated_served", served)
    assert [row[:3] for row in cells(retrieval.evaluation_table())] == [
        ["`window`", "`target`", ".2500"],
        ["`all`", "`last`", ".2500"],
    ]

    table = {"row_bytes": 1, "history_bytes": 1, "bytes": 1, "rms_error_over_rms_value": 0.0}
    kinds = {"tables": {"int8": {"table": table, "metrics": metrics}}}
    results("int4_tables", kinds | told("all", "rank", "last"))
    want = "Evaluated with `eval.hide=all`, `eval.repeats=rank`, `eval.time=last`."
    assert sampling.int4_table().endswith(want)


def test_baselines_stand_under_both_values_of_what_is_hidden(results):
    metrics = dict.fromkeys(retrieval.METRICS, 0.25)
    runs = [
        {"eval": {"hide": hide}, "baselines": {"random": metrics}} for hide in ("window", "all")
    ]
    results("ml100k_baselines", {"protocol": "validated", "runs": runs})
    assert [row[:5] for row in cells(retrieval.sets_table())] == [
        ["MovieLens-100K", "`validated`", "random", "no model", hidden]
        for hidden in ("window", "all")
    ]


def seeds_of(*values, **more):
    of_all = ("hr@10", "ndcg@10", "hr@50", "hr@200", "mrr", "ndcg@50", "ndcg@200")
    metrics = [dict.fromkeys(of_all, value) for value in values]
    return [
        {"best": one, "last": one, "seed": seed, "epochs": 5, "seconds": 9.0, "best_epoch": 4}
        | {"protocol": "validated"}
        | more
        for seed, one in enumerate(metrics)
    ]


def test_ours_is_ahead_or_short_by_more_than_seeds_make(results):
    results("ml1m_hstu_validated_all", {"runs": seeds_of(0.4, 0.41, 0.42)})
    (row,) = cells(movielens.compared_table().split("\n\n")[0])
    assert row[:4] == ["`validated`", "RecTools", "`ml1m_hstu_validated_all`", "window"]
    assert [cell.split(", ")[1] for cell in row[4:]] == ["ahead", "ahead", "short", "short"]
    assert movielens.verdict([0.3, 0.31, 0.32], 0.3) == "+.0100, equal"
    assert movielens.verdict([0.3, 0.31], 0.2) == "+.1050, too few seeds"


def test_a_search_shows_all_that_was_tried(results):
    def tried(name, value):
        mean = dict.fromkeys(("hr@10", "ndcg@10", "hr@50", "hr@200"), value)
        row = {"name": name, "mean": mean, "stdev": 0.01, "seeds": [1, 2]}
        return row | {"epochs": [4, 6], "seconds": [8.0, 10.0]}

    found = {"config": "base", "chosen": "wide", "device": "1 x GPU", "failed": {"deep": "x"}}
    results("ml1m_best_search", found | {"tried": [tried("wide", 0.3), tried("base", 0.25)]})
    table, note, failed = movielens.search_table().split("\n\n")
    assert [row[0] for row in cells(table)] == ["wide (chosen)", "HSTU-large, full softmax"]
    assert cells(table)[0][2:] == [".3000 ± .0100", ".3000", ".3000", "+.0500", "5", "9"]
    assert note.startswith("2 were tried, 2 seeds each") and failed == "Not trained: deep."


def test_a_search_that_has_not_ended_chooses_nothing(results):
    def trial(value):
        best = dict.fromkeys(("hr@10", "ndcg@10", "hr@50", "hr@200", "mrr"), value)
        runs = [{"seed": seed, "split": "validation", "best": best} for seed in (42, 43)]
        runs = [one | {"epochs": 5, "seconds": 9.0} for one in runs]
        return {"device": "1 x GPU", "command": "python -m experiments.train", "runs": runs}

    results("search_width_64", trial(0.3))
    assert movielens.search_table() == records.NOT_MEASURED, "a gain over nothing"
    results("search_ml1m_hstu_large", trial(0.25))
    table, note, left = movielens.search_table().split("\n\n")
    assert [row[0] for row in cells(table)] == ["width 64", "HSTU-large, full softmax"]
    assert cells(table)[0][5] == "+.0500" and note.startswith("2 were tried, 2 seeds each")
    assert (
        left
        == f"{len(search.candidates()) - 1} candidates have not been tried yet: nothing is chosen."
    )


def test_figures_for_light_and_dark_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FIGURES", tmp_path)
    for drawn in records.themed("drawn", 1, 1):
        drawn.subplots().plot([0, 1])
    light, dark = ((tmp_path / f"drawn{end}.png").read_bytes() for end in ("", "_dark"))
    assert light[:4] == dark[:4] == b"\x89PNG" and light != dark
    shown = records.picture("drawn", "a line")
    assert "dark)" in shown and "figures/drawn_dark.png" in shown and "figures/drawn.png" in shown


def test_what_was_run(results):
    origin = {"device": "1 x cpu", "commit": "abc", "date": "2026-11-30T10:00"}
    results("x", origin | {"runs": seeds_of(0.1, 0.2), "data": {"sha256": "123456789"}})
    results("ranking", origin | {"runs": [run(0.9) | {"best_epoch": 2}]})
    results("bench", origin | {"runs": [{"baselines": {}}]})
    (row,) = cells(runs.runs_table().split("\n\n")[0])
    assert row == [
        "`x`",
        "`validated`",
        "0, 1",
        "`12345678`",
        "1 x cpu",
        "5",
        "9",
        "abc",
        "2026-11-30",
    ]


def test_users_with_exact_times_stand_beside_all(results):
    parts = {name: {part: seeds_of(0.3)[0]["best"] for part in ("all", "exact")} for name in "12"}
    arms = {name: {"runs": parts} for name in ("times", "no_times")}
    found = {"protocol": "validated", "device": "1 x GPU", "exact_users": 2596, "arms": arms}
    results("ml1m_exact_times", found)
    rows = cells(movielens.exact_times_table().split("\n\n")[0])
    assert [row[1] for row in rows] == ["all users", "2,596 users with exact times"] * 2


def test_the_tables_of_a_layer(results):
    window, record = layer.WINDOW, {"device": "1 x GPU", "commit": "abc", "layers": {}}
    kernel = {"name": "held", "source": "kernels/a.py:f, backward", "calls": 1, "ms": 0.5}
    for mode, kind, ms in (
        ("none", "training", 2.0),
        ("selective", "training", 2.5),
        ("fp8", "training", 1.6),
        ("none", "inference", 0.6),
        ("fp8", "inference", 0.4),
    ):
        case = {"workload": window, "mode": mode, "kind": kind, "ms": ms, "kernels": [kernel]}
        case |= {"TFLOP_a_second": 800 / ms, "MFU": 0.8 / ms, "bytes_a_token": 1000.0}
        record["layers"][f"{window}, {mode}, {kind}"] = case
    record |= {"quoted": {window: {"Meta": 302}}, "quoted_from": {"Meta": "its layer"}}
    results("layer_h200", record | {"matmul_TFLOP_a_second": 750.0})
    assert cells(layer.layer_table())[0] == [window, "400", "0.40", "2.00", "320", "Meta 302"]
    assert [row[1:] for row in cells(layer.layer_precision_table())[:2]] == [
        ["0.60 (1.00x)", "2.00 (1.00x)"],
        ["0.40 (1.50x)", "1.60 (1.25x)"],
    ]
    row = ["ours", "`held`", "`kernels/a.py:f`, backward", "500", "25%"]
    assert cells(layer.layer_kernels_table())[0] == row


def test_the_overview_has_the_lines_that_have_records(results):
    variants = {
        name: {"step_ms": step, "events_a_second": 1000 * 65536 / step}
        for name, step in (("ultra", 31.0), ("plain_causal", 223.0))
    }
    results("long_ultra_h200", {"device": "1 x GPU", "variants": variants})
    results("layer_h200", {"device": "1 x GPU", "layers": {"none": {}}})  # nothing beside it
    (row,) = cells(overview.overview_table())
    assert row[:3] == ["training step, 4 histories of 16,384 events, ms", "31", "223, plain HSTU"]


def test_the_walk_shows_the_last_table_of_what_a_command_printed(results):
    printed = [
        "epoch 1",
        "  c: test, protocol validated",
        "",
        "  HR@10",
        "  0.5",
        "",
        "curves  PATH",
    ]
    steps = [{"command": "ultra-hstu train", "prints": printed}]
    response = {"items": [{"item": 1}, {"item": 2}]}
    serve = {"serve": "ultra-hstu serve", "request": {"k": 2}, "response": response}
    results("walkthrough", {"steps": steps} | serve)
    assert overview.walkthrough().splitlines() == [
        "```console",
        "$ ultra-hstu train",
        "  c: test, protocol validated",
        "  HR@10",
        "  0.5",
        "$ ultra-hstu serve  # and in another terminal:",
        "$ curl -s localhost:8000/recommend -H 'content-type: application/json' -d '{\"k\": 2}'",
        '{"items": [{"item": 1},',
        ' {"item": 2}]}',
        "```",
    ]


def test_a_table_names_its_records_or_the_command_that_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    table = records.measured("layer_h200")(lambda record: f"{record['ms']} ms")
    assert make.with_records(table).startswith(
        "not measured yet: `python -m scripts.bench.layer --record=experiments/results/layer_h200."
    )
    (tmp_path / "layer_h200.json").write_text('{"ms": 3}')
    said = "3 ms\n\nRecord: [`layer_h200`](../experiments/results/layer_h200.json)."
    assert make.with_records(table) == said
    assert make.with_records(lambda: f"`layer_h200`: {table()}") == "`layer_h200`: 3 ms"
    assert make.with_records(lambda: "no record") == "no record"
    both = make.with_records(lambda: table() + str(records.first("none", "layer_h200")["ms"]))
    assert both.startswith("3 ms3\n\nRecord: ")
