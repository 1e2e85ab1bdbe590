"""The benchmark of context parallelism on CPU devices, and what becomes of its records."""

import functools
import json

import numpy as np
import pytest

from scripts.bench import batches, context_parallel_longest, load_balance_ranks
from scripts.bench import context_parallel as bench
from scripts.bench.context_parallel_balance import balance
from scripts.bench.context_parallel_case import Case
from scripts.bench.context_parallel_longest import GIB, USERS, longest
from scripts.bench.turns import one_by_one
from scripts.tables import context_parallel as context_parallel_tables
from scripts.tables import records, sampling
from ultra_hstu.config import ModelConfig
from ultra_hstu.parallel.collectives import collectives


def measured(cases):
    tasks = [functools.partial(bench.prepare_step, case, 1, 0.001) for case in cases.values()]
    return bench.with_speed_up(dict(zip(cases, one_by_one(tasks, processes=False), strict=True)))


def test_steps():
    cases = bench.step_cases(2, 4, 32, small=True)
    assert list(cases["causal"]) == [
        "one device",
        "ring",
        "gather",
        "ulysses",
        "data",
        "ring, 2 x batch",
    ]
    some = {name: cases["semi_local"][name] for name in ("one device", "halo")}
    found = measured(some)
    one, halo = found["one device"], found["halo"]
    assert halo["first_loss"] == pytest.approx(one["first_loss"], rel=1e-5)
    assert one["bytes_sent_a_step"] == 0 < halo["bytes_sent_a_step"] and halo["bytes_a_device"] > 0
    assert halo["speed_up"] == pytest.approx(one["step_ms"] / halo["step_ms"])


def test_a_case_that_fails_is_part_of_the_result():
    cases = {
        "one device": Case("causal", 1, 16, small=True),
        "too many": Case("causal", 1, 15, context=2, small=True),
    }
    found = measured(cases)
    assert "15 rows" in found["too many"]["error"] and found["one device"]["speed_up"] == 1


@pytest.mark.parametrize("guess", [16, 3072, 100_000])
def test_longest(guess):
    """The last length that fits, and that one step more does not."""

    def measure(case):
        return 3 * 10**9 + 25_600_000 * case.length + case.length // 1000 * 10**6

    found = longest(Case("causal", USERS, guess), 80 * GIB, 16, measure)
    assert (
        found["bytes"]
        <= 80 * GIB
        < found["bytes_of_one_step_more"]
        == measure(Case("causal", USERS, found["longest"] + 16))
    )
    assert found["longest"] % 16 == 0 and found["compiles"] <= 5
    with pytest.raises(ValueError, match="no longest length of .* after 8 compilations"):
        longest(Case("causal", USERS, guess), 80 * GIB, 16, lambda case: GIB)


def test_training():
    found = context_parallel_longest.prepare_training(
        Case("semi_local", 1, 64, context=2, strategy="halo", small=True), 4
    )()
    assert found["losses"][-1] < found["losses"][0] and len(found["step_ms"]) == 4


def test_reshard():
    found = bench.measure_reshard(2, 1024, 8, seconds=0.001)["ways"]
    for place in ("slices", "blocks"):
        few, many = found[place]["all_to_all"], found[place]["all_gather"]
        assert (
            few["bytes_sent"] < many["bytes_sent"]
            and few["temporary_bytes"] < many["temporary_bytes"]
        )


def test_batches():
    """Users of one's own are a part of the rows, and less moves than by an all-gather."""
    config = batches.cases(8, 32, width=16)["narrow"]
    found = batches.measure(config, batches.interactions(8, 32), rounds=1, calls=1)
    replicated, gathered, exchanged = (found[way] for way in batches.WAYS)
    assert replicated["bytes_sent"] == 0 < exchanged["bytes_sent"] < gathered["bytes_sent"]
    assert exchanged["temporary_bytes"] < gathered["temporary_bytes"]
    assert exchanged["packed_rows"] == gathered["packed_rows"] < replicated["packed_rows"] / 2
    assert all(one["batches_a_second"] > 0 for one in found.values())


def test_ranks():
    """One rank is the slowest and the mean."""
    model = ModelConfig(width=8, layers=1, heads=1, qk_width=8, v_width=8, relative_bias=False)
    found = load_balance_ranks.measure(model, np.arange(1, 20), timed_steps=2)
    assert list(found) == ["plain", "balanced"]
    for one in found.values():
        assert len(one["alone"]) == 2 and one["slowest_over_mean"] == 1 and one["together"] > 0


def test_balance():
    found = balance()["busiest_over_mean"]
    assert all(
        values["balanced"] <= 1.05 for name, values in found.items() if name.endswith("causal")
    )
    assert found["zipf/causal"]["contiguous"] > 1.2


def test_collectives_of_a_gpu_program():
    """As XLA writes them for GPUs: asynchronous, operands before results."""
    group = "replica_groups={{0,1}}"
    program = f"""
  %a = ((f32[64,8]{{1,0}}), f32[64,8]{{1,0}}) all-to-all-start(%x), {group}
  %b = ((bf16[64]{{0}}), bf16[64]{{0}}) all-reduce-start(%x), {group}, to_apply=%add
  %c = ((f32[64,8]{{1,0}}), f32[32,8]{{1,0}}) reduce-scatter-start(%x), {group}, dimensions={{0}}
  %d = ((f32[32,8]{{1,0}}), f32[64,8]{{1,0}}) all-gather-start(%x), {group}, dimensions={{0}}
  %e = ((bf16[16]{{0}}), bf16[16]{{0}}) collective-permute-start(%x), \
source_target_pairs={{{{0,1}}}}
"""
    assert [one.bytes for one in collectives(program, 2)] == [
        64 * 8 * 2,
        64 * 2,
        32 * 8 * 4,
        32 * 8 * 4,
        32,
    ]


def test_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "FIGURES", tmp_path)
    every = (
        context_parallel_tables.longest_table,
        context_parallel_tables.steps_table,
        context_parallel_tables.reshard_table,
        context_parallel_tables.batches_table,
        sampling.load_balance_ranks_table,
    )
    for table in (*every, context_parallel_tables.balance_table):
        assert "not measured yet" in table()
    context_parallel_tables.context_parallel_figure()
    assert not list(tmp_path.iterdir())

    origin = {"device": "2 x GPU", "commit": "abc", "date": "2026-01-01T00:00:00", "devices": 2}
    step = {
        "users": 4,
        "length": 1024,
        "step_ms": 10.0,
        "tokens_a_second": 4e5,
        "bytes_sent_a_step": 2e6,
        "bytes_a_device": GIB,
    }
    cases = {
        "one device": step | {"speed_up": 1.0},
        "halo": step | {"speed_up": 1.87},
        "halo, 2 x batch": {"error": "OOM"},
    }
    ways = {
        "all_to_all": {"batches_a_second": 200, "temporary_bytes": 2**20, "bytes_sent": 1e6},
        "all_gather": {"batches_a_second": 100, "temporary_bytes": 2**22, "bytes_sent": 4e6},
    }
    batch = {
        "batches_a_second": 20.0,
        "processor_seconds": 0.005,
        "put_bytes": 4e6,
        "temporary_bytes": 1e6,
        "bytes_sent": 0,
    }
    long = {
        "case": {"length": 131072, "context": 2},
        "bytes_peak": GIB,
        "step_ms": [9.0, 8.0],
        "losses": [9.0, 8.0],
    }
    steps = origin | {
        "steps": {"semi_local": cases},
        "long": long,
        "reshard": {"rows": 10, "width": 8, "devices": 2, "ways": {"slices": ways}},
    }
    (tmp_path / "context_parallel_steps_h100.json").write_text(json.dumps(steps))
    lengths = {str(c): {"longest": 3000 * c} for c in (1, 2, 4, 8)}
    run = {
        "case": {"context": 2, "mask": "causal", "length": 6000},
        "bytes_peak": 70 * GIB,
        "bytes_predicted": 71 * GIB,
    }
    record = origin | {
        "users": USERS,
        "budget_GiB": 80.0,
        "compiled_for": "an H100",
        "variants": {"causal/none": lengths},
    }
    runs = [run, {"error": "OOM\nat"}]
    (tmp_path / "context_parallel_longest.json").write_text(
        json.dumps(record | {"confirmed": origin | {"runs": runs}})
    )

    ways = {"replicated": batch, "exchanged": batch | {"bytes_sent": 3e6}}
    of_batches = origin | {
        "platform": "gpu",
        "rows": 4096,
        "users": 8,
        "longest": 512,
        "processes": 2,
        "machine": "alone",
        "batches": {"wide, stream": ways},
    }
    (tmp_path / "batches_h200.json").write_text(json.dumps(of_batches))
    text = context_parallel_tables.batches_table()
    assert "| 2 GPUs | wide, stream | exchanged | 20.0 | 1.00 | 5.0 | 4.00 | 1.00 | 3.00 |" in text
    assert "2 processes, the machine alone: 2 x GPU" in text
    policies = {
        "plain": {"slowest": 0.2, "mean": 0.1, "slowest_over_mean": 2.0, "together": 0.25},
        "balanced": {"slowest": 0.15, "mean": 0.1, "slowest_over_mean": 1.5, "together": 0.2},
    }
    ranks = origin | {
        "ranks": 2, "platform": "gpu", "machine": "alone", "sets": {"Zipf": policies}
    }  # fmt: skip
    (tmp_path / "load_balance_ranks_h200.json").write_text(json.dumps(ranks))
    assert (
        "| 2 GPUs | Zipf | balanced | 150.0 | 0.75 | 100.0 | 1.50 | 200.0 |"
        in sampling.load_balance_ranks_table()
    )

    text = context_parallel_tables.steps_table()
    assert (
        "| semi-local | rows, `halo` | 4 x 1,024 | 10.0 | 0.40 | 2 | 1.0 | 1.87 |" in text
        and "| failed |" in text
    )
    assert "loss 9.00 before and 8.00 after 1 steps" in text
    assert (
        "| slices | all-to-all | 200 | 2.00 | 1 | 1.0 |" in context_parallel_tables.reshard_table()
    )
    text = context_parallel_tables.longest_table()
    assert "| full causal, `ring` | 3,000 | 6,000 | 12,000 | 24,000 | 8.00 |" in text
    assert (
        "Trained on 2 x GPU: full causal, 6,000 events: 70.0 GiB at most, 71.0 by the compiler."
        in text
        and "A confirmation failed: OOM" in text
    )
    context_parallel_tables.context_parallel_figure()
    assert (tmp_path / "context_parallel.png").stat().st_size > 10_000
