"""The attention benchmark, at a size that CPU can do; and what becomes of its record."""

import json

import pytest

from experiments.record import Record
from kernels.hstu_attention.workloads import WORKLOADS, Workload
from kernels.mask import AttentionMask
from scripts.bench import attention as bench_attention
from scripts.tables import attention as attention_tables
from scripts.tables import records

RIVAL = """
import json, sys, time
request = json.load(sys.stdin)
names = [w["name"] for w in request["workloads"]]
print("a line of somebody else's")
print("RECORD", json.dumps({"versions": {"torch": "9"}, "seen": request["workloads"][0]["window"]}))
for name in names:
    cell = {"workload": name, "implementation": "meta_triton", "pass": "backward", "ms": 2.0}
    print("RECORD", json.dumps(cell), flush=True)
time.sleep(TAKES)
"""


@pytest.fixture
def tiny(monkeypatch):
    semi_local = Workload(
        "tiny",
        (40, 20),
        2,
        8,
        8,
        AttentionMask(window=10, full_rows=5),
        max_length=64,
        dtype="float32",
    )
    window = Workload(
        "window",
        (40, 20),
        2,
        8,
        8,
        AttentionMask(window=10),
        max_length=64,
        capacity=70,
        dtype="float32",
    )
    biased = Workload(
        "biased", (30, 20), 1, 8, 8, max_length=64, capacity=56, dtype="float32", bias=True
    )
    for w in (semi_local, window, biased):
        monkeypatch.setitem(WORKLOADS, w.name, w)
    monkeypatch.setattr(bench_attention, "matmul_tflops", lambda: 2.0)
    return window


def test_writes_what_it_measured(tiny, tmp_path, capsys):
    output = tmp_path / "attention.json"
    workloads = {name: WORKLOADS[name] for name in ("tiny", "biased")}
    bench_attention.run(["xla", "mosaic"], workloads, Record(output))
    result = json.loads(output.read_text())
    measured = [r for r in result["records"] if "ms" in r]
    assert [(r["workload"], r["implementation"], r["pass"]) for r in measured] == [
        (name, "xla", which) for name in ("tiny", "biased") for which in ("forward", "backward")
    ]
    for record in measured:
        assert record["error"] < 1e-5
        assert record["of_matmul"] == pytest.approx(record["tflops"] / 2.0)
        assert record["peak_mib"] > 0
    refused = [
        (r["implementation"], r["pass"], r["reason"]) for r in result["records"] if "reason" in r
    ]
    assert [r[:2] for r in refused] == [("mosaic", "forward")] * 2
    assert "float32" in refused[0][2] and "float32" in capsys.readouterr().out
    assert {"device", "versions", "commit", "command", "date"} <= result.keys()


def test_a_wrong_result_shows(tiny):
    arrays = tiny.arrays()
    want = bench_attention.expected(tiny, arrays)
    run = bench_attention.passes(tiny, "reference")["both"]
    got = run(
        bench_attention.make_plan(tiny.mask, tiny.offsets(), tiny.rows),
        *(arrays[name] for name in "qkvg"),
    )
    assert bench_attention.error(got, want) < 1e-5
    for name in got:
        assert bench_attention.error(got | {name: got[name] * 1.01}, want) == pytest.approx(
            0.01, rel=1e-2
        )


@pytest.mark.parametrize("takes", [0, 60])
def test_rivals_answer_in_a_process_of_their_own(tiny, tmp_path, monkeypatch, takes):
    """What they say counts, also when they do not end in time."""
    script = tmp_path / "attention_rivals.py"
    script.write_text(RIVAL.replace("TAKES", str(takes)))
    monkeypatch.setattr(bench_attention, "__file__", str(tmp_path / "attention.py"))
    versions, records = bench_attention.rivals(
        tmp_path, [WORKLOADS["tiny"], WORKLOADS["biased"], tiny], 2.0, seconds=3.0
    )
    assert versions.pop("incomplete", None) == ("ended early: TimeoutExpired" if takes else None)
    assert versions == {"versions": {"torch": "9"}, "seen": 10}, (
        "what they cannot do is not asked for"
    )
    assert [r["workload"] for r in records] == ["window"]
    assert records[0]["tflops"] == pytest.approx(tiny.backward_flops / 2e-3 / 1e12)


def test_lengths_share_a_number_of_rows():
    assert {bench_attention.of_length(int(n)).rows for n in bench_attention.LENGTHS.split(",")} == {
        65536
    }


def test_the_tables_take_a_record(tmp_path, monkeypatch):
    """One of every kind of entry: measured, refused, a rival's, a length of the figure."""
    rates = [
        {
            "workload": "tiny",
            "implementation": "mosaic",
            "pass": "forward",
            "tflops": 700.4,
            "error": 0.002,
        },
        {
            "workload": "tiny",
            "implementation": "mosaic",
            "pass": "backward",
            "tflops": 500.6,
            "error": 0.002,
        },
        {
            "workload": "tiny",
            "implementation": "xla",
            "pass": "forward",
            "tflops": 3.21,
            "error": 0.002,
        },
        {
            "workload": "tiny",
            "implementation": "mosaic_fp8",
            "pass": "forward",
            "tflops": 800.0,
            "error": 0.05,
        },
        {
            "workload": "tiny",
            "implementation": "mosaic_fp8",
            "pass": "backward",
            "reason": "has no gradient",
        },
        {
            "workload": "tiny",
            "implementation": "meta_triton",
            "pass": "forward",
            "tflops": 350.0,
            "error": 0.01,
        },
        {
            "workload": "length_1024",
            "implementation": "meta_triton",
            "pass": "forward",
            "tflops": 300.0,
            "error": 0.01,
        },
    ]
    record = {
        "device": "1 x NVIDIA H100",
        "commit": "abc1234",
        "date": "2026-01-02T03",
        "matmul_tflops": 780.0,
        "records": rates,
    }
    record["rivals"] = {"revision": "fedcba"}
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "FIGURES", tmp_path)
    assert attention_tables.attention_table() == "not measured yet"
    (tmp_path / "attention_h100.json").write_text(json.dumps(record))
    text = attention_tables.attention_table()
    assert (
        "| `tiny` | - | 700 / 501 | - | 3.2 / - | 350 / - | - | - |" in text
        and "at fedcba, in the same run" in text
    )
    assert "`tiny` 800, error 5.0 %" in text and "length_" not in text
    attention_tables.attention_figure()
    assert (tmp_path / "attention.png").stat().st_size > 10_000
