"""The benchmark of mini-sequences: its search, what it counts, and what becomes of its records."""

import dataclasses
import json

import jax
import pytest

from scripts.bench.mini_sequences_case import MODES, SequenceCase, bytes_by_part, nearly_longest
from scripts.tables import mini_sequences as tables
from scripts.tables import records

SMALL = SequenceCase("hstu_ffn_full", "both", 64, small=True)


@pytest.mark.parametrize("guess", [8, 3000, 900_000])
@pytest.mark.parametrize("power", [1, 2])
def test_search(guess, power):
    """Memory that grows with the length, or as dense attention's: 97 % of it are found full."""

    def measure(case):
        return {"bytes": 10**9 + int(3000 * case.length**power)}

    budget = 8 * 10**10 if power == 1 else 10**13
    case = dataclasses.replace(SMALL, length=guess)
    found = nearly_longest(case, budget, measure, 8)
    assert 0.97 * budget <= found["held"]["bytes"] <= budget and found["longest"] % 8 == 0
    assert found["held"]["bytes"] == found["compiled"][str(found["longest"])]


def test_steps_too_coarse_and_budgets_too_small():
    measure = lambda case: {"bytes": case.length}  # noqa: E731
    assert nearly_longest(SMALL, 1500, measure, 1000)["longest"] == 1000
    with pytest.raises(ValueError, match="fits into 500 bytes: tried .1000"):
        nearly_longest(SMALL, 500, measure, 1000)


def test_bytes_by_part():
    """On two devices each has half of the tables."""
    two = dataclasses.replace(SMALL, context=2, strategy="ulysses", state_dtype="bfloat16")
    one, half = (bytes_by_part(case.compiled(jax.devices())) for case in (SMALL, two))
    for held in (one, half):
        assert sum(held.values()) == 2 * held["bytes"] and held["parameters"] == held["gradients"]
    assert one["optimizer"] == 2 * one["parameters"] + 8  # two numbers of steps
    assert half["optimizer"] == half["parameters"] + 8
    # Items, padding and one row more for two devices; positions.
    assert one["parameters"] - half["parameters"] == 4 * 32 * ((202 + 64) // 2 - 1)


def test_the_modes_of_a_full_softmax():
    cases = {mode: dataclasses.replace(SMALL, mode=mode) for mode in MODES}
    chunks = {mode: case.config.loss.chunk_rows for mode, case in cases.items()}
    assert chunks == {"nothing": 64, "selective": 64, "mini-sequences": 8, "both": 8}
    assert [case.config.model.chunk_rows for case in cases.values()] == [None, None, 8, 8]
    remat = [case.config.model.remat for case in cases.values()]
    assert remat == ["none", "selective", "none", "selective"]


def test_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    made = [tables.longest_table, tables.held_table, tables.confirmed_table]
    assert {table() for table in made} == {records.NOT_MEASURED}
    held = {"parameters": 2**30, "optimizer": 2**31, "gradients": 2**30, "rest": 2**33, "bytes": 9}
    one = {"longest": 8192, "held": held}
    where = {"device": "8 x cpu", "commit": "abc", "date": "2026-12-01T00:00:00", "users": 64}
    found = {"hstu/nothing/1": one, "hstu/both/1": one | {"longest": 16384}}
    found |= {"hstu/both/8/ring": one}
    record = where | {"budget_GiB": 80.0, "longest": found}
    (tmp_path / "mini_sequences.json").write_text(json.dumps(record))
    rows = tables.longest_table().splitlines()
    assert rows[2] == "| HSTU | 1 | 8,192 |  |  | 16,384 | 2.0 |"
    assert rows[3] == "| HSTU | 8, `ring` |  |  |  | 8,192 |  |"
    assert "| HSTU | nothing | 1.0 | 2.0 | 1.0 | 8.0 | 1024 |" in tables.held_table()
    trained = {"rows": 8192, "bytes_predicted": 2**36, "bytes_peak": None, "rows_a_second": 2e6}
    trained |= {"above": {"rows": 9216, "said": "RESOURCE_EXHAUSTED: Out of memory"}}
    confirmed = {"hstu/both/2/ring": trained, "hstu/both/1": {"error": "gone\nfar"}}
    (tmp_path / "mini_sequences_h200.json").write_text(json.dumps(where | {"confirmed": confirmed}))
    text = tables.confirmed_table()
    assert "| HSTU | both | 2, ring | 8,192 | 64.0 |  | 2,000 | 9,216: RESOURCE" in text
    assert "| HSTU | both | 1 | gone |" in text
