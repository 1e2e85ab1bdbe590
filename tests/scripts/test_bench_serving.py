"""The benchmarks of serving, small and on a CPU: they time what they say they time."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx

from experiments import configs
from scripts.bench import cache_precision, host_requests
from scripts.bench import host_tables as bench_host_tables
from scripts.bench import serving as bench_serving
from scripts.tables import records
from scripts.tables import serving as serving_tables
from tests.serving.small_serving import built
from tests.small_run import with_
from ultra_hstu import flops, serving
from ultra_hstu.ranking.form import Sizes
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.serving import compiled

SMALL = dict(
    width=32,
    heads=2,
    qk_width=16,
    v_width=16,
    dtype="float32",
    implementation="reference",
    window=(16,),
    full_rows=(16,),
)


@pytest.fixture
def cells():
    config = configs.named("long_ultra")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **SMALL))
    changes = bench_serving.MODELS["ultra"] | dict(layers=2, truncate_after=1, truncate_length=24)
    bench = bench_serving.Bench(
        "ultra", bench_serving.ranking_config(config, changes, longest=60, targets=40), None, "same"
    )
    return bench, {cell.what: cell for cell in bench.cells([60], [40], [16])}


def test_scores_with_and_without_a_cache(cells):
    """The two ways that are compared say the same of 40 candidates."""
    bench, cells = cells
    assert set(cells) == {"encode", "append", "cached", "one_batch", "recompute", "one_by_one"}
    user, asked = bench.history(60), bench.candidates(40)
    grown = serving.score(bench.compiled, bench.appended(user)(), asked)
    cache = bench.encoded(user)()
    cached, whole = bench.scored(cache, asked, 16)(), bench.passed(user, asked, 40)()
    np.testing.assert_allclose(cached, whole, atol=1e-5 * np.abs(whole).max())
    np.testing.assert_allclose(grown, whole, atol=1e-5 * np.abs(whole).max())
    assert cells["cached"].call().shape == (40, 1)
    encode, each = flops.cached(bench.config, 60)
    assert encode + 2 * each == pytest.approx(flops.count(bench.config, 60, targets=2).inference)
    assert cells["cached"].tflop == pytest.approx(40 * each / 1e12)
    # So many candidates are no few rows: their pass has a whole last layer.
    assert cells["encode"].tflop + cells["cached"].tflop < cells["one_batch"].tflop
    measured = bench_serving.latency(cells["cached"], 0.0)
    assert measured["samples"] == 5 and measured["candidates_per_s"] == pytest.approx(
        40 / measured["p50_ms"] * 1e3
    )
    assert (
        bench_serving.attempt(dataclasses.replace(cells["cached"], call=lambda: 1 / 0))
        == "ZeroDivisionError: division by zero"
    )


def test_bytes_of_item_tables():
    found = {
        kind: bench_host_tables.measure(kind, 300, 64, 128, 1)
        for kind in ("int4", "int8", "bfloat16")
    }
    assert [values["bytes"] for values in found.values()] == [
        128 * (32 + 4),
        128 * (64 + 8),
        128 * 128,
    ]
    assert all(values["transfer_ms"] > 0 for values in found.values())


def test_requests_from_host_memory(monkeypatch):
    """The bytes that are counted are those that travel; the loop answers what it is given."""
    config = configs.named("long_ultra")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **SMALL))
    changes = dict(layers=1, truncate_after=None, truncate_length=None)
    config = bench_serving.ranking_config(config, changes, longest=300, targets=40)
    model = Ranker(config, Sizes(900, (3,), (), (), ("binary",), timestamps=True), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    requests = [host_requests.draw(rng, 900, 300, 40) for _ in range(2)]
    sent, filled = [], compiled._filled
    monkeypatch.setattr(
        compiled, "_filled", lambda table, rows: sent.append(rows) or filled(table, rows)
    )
    ranker = serving.CompiledRanker(model, host_table="int4")
    found = host_requests.measure(ranker, requests, workers=2, seconds=0.0)
    assert found["requests"] == 2 and found["requests_per_s"] > 0
    counted = host_requests.transfer("int4", 32, [request.items for request in requests])
    each = sum(leaf.nbytes for rows in sent for leaf in jax.tree.leaves(rows)) / 4
    assert counted["item_bytes"] == each and counted["row_bytes"] == 16 + 4


def test_metrics_under_a_small_cache(monkeypatch):
    """The exact cache gives the metrics of the evaluation, the small one nearly so."""
    monkeypatch.setattr(cache_precision, "FLAGS", flags.FlagValues())
    flags.DEFINE_integer("top_k", 3, "", flag_values=cache_precision.FLAGS)
    flags.DEFINE_integer("requests", 100, "", flag_values=cache_precision.FLAGS)
    cache_precision.FLAGS(["test"])
    task, ranker, params = built("merged")
    task = task.with_config(with_(task.config, train__eval_users=8))
    model, evaluator = serving.CompiledRanker(ranker), task.evaluator("test")
    requests = list(cache_precision.request_batches(task, model))
    same, answers = cache_precision.measure(task, model, evaluator, requests, "same", None)
    small, _ = cache_precision.measure(task, model, evaluator, requests, "int8", answers)
    np.testing.assert_allclose(answers.logit_PK, evaluator.predict(params), atol=1e-5)
    in_blocks = list(cache_precision.request_batches(task, model, drop_blocks=True))
    assert [len(one.now_B) for one, _, _ in in_blocks] == [len(one.now_B) for one, _, _ in requests]
    for (one, _, _), (whole, _, _) in zip(in_blocks, requests, strict=True):
        events, every = one.channels["events"].lengths, whole.channels["events"].lengths
        assert (events <= every).all() and (events > every - 12 // 8).all()
    assert same["metrics"]["ne"] == pytest.approx(evaluator(params)["ne"], rel=1e-5)
    assert same["bytes_a_row_and_layer"] == 2 * 4 * (4 + 4) and small[
        "bytes_a_row_and_layer"
    ] == 2 * (4 + 4 + 8)
    assert (
        0 < small["rms_logit_error"] < 0.05
        and 0.5 < small["answers_that_stay"] <= 1
        and 0 <= small["hr@3"] <= 1
    )


def test_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "FIGURES", tmp_path)
    for table in (
        serving_tables.serving_table,
        serving_tables.micro_batches_table,
        serving_tables.cache_precision_table,
        serving_tables.host_tables_table,
    ):
        assert "not measured yet" in table()

    def cell(what, step, p50, count=1024, history=4096):
        rate = count / p50 * 1e3
        return dict(
            model="ultra",
            what=what,
            history=history,
            candidates=count,
            micro_batch=step,
            tflop=0.5,
            p50_ms=p50,
            p99_ms=2 * p50,
            candidates_per_s=rate,
            TFLOP_a_second=3.0,
        )

    assert bench_serving.before(str(tmp_path / "none.json"), {}) == []
    cells = [
        cell("encode", 0, 2.0, 0),
        cell("cached", 64, 8.0),
        cell("cached", 256, 4.0),
        cell("one_batch", 1024, 6.0),
        cell("recompute", 256, 3.0, 256),
        cell("one_by_one", 1, 64.0, 64),
        {"error": "x"},
    ]
    record = {
        "device": "1 x GPU",
        "implementation": "a",
        "cached": "b",
        "commit": "c",
        "cells": cells,
    }
    (tmp_path / "serving_h200.json").write_text(json.dumps(record))
    conditions = {
        key: record.get(key)
        for key in ("config", "device", "commit", "implementation", "cached", "kind", "xla_flags")
    }
    assert bench_serving.before(str(tmp_path / "serving_h200.json"), conditions) == cells
    assert (
        bench_serving.before(str(tmp_path / "serving_h200.json"), conditions | {"commit": "d"})
        == []
    )
    row = [
        text.strip()
        for text in serving_tables.serving_table().splitlines()[2].strip("|").split("|")
    ]
    assert row == [
        "ULTRA-HSTU",
        "4,096",
        "1,024",
        "256",
        "4.00 / 8.00",
        "256,000",
        "2.00",
        "3.0 / 1.5 / 256.0",
    ]
    row = [
        text.strip()
        for text in serving_tables.micro_batches_table().splitlines()[2].strip("|").split("|")
    ]
    assert row == ["ULTRA-HSTU", "4,096", "128,000", "256,000 (3.0)"]
    serving_tables.serving_figure()
    assert (tmp_path / "serving.png").stat().st_size > 5000
