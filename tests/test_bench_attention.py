"""The attention benchmark, at a size that CPU can do."""

import json

import pytest

from kernels.hstu_attention.workloads import WORKLOADS, Workload
from kernels.mask import AttentionMask
from scripts import bench_attention


def test_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    tiny = Workload("tiny", (40, 20), 2, 8, 8, AttentionMask(window=10, full_rows=5), max_length=64, dtype="float32")
    monkeypatch.setitem(WORKLOADS, "tiny", tiny)
    monkeypatch.setattr(bench_attention, "matmul_tflops", lambda: 2.0)
    output = tmp_path / "attention.json"
    bench_attention.main(["--implementations", "xla,mosaic", "--workloads", "tiny", "--output", str(output)])
    result = json.loads(output.read_text())
    assert [(r["implementation"], r["pass"]) for r in result["records"]] == [("xla", "forward"), ("xla", "backward")]
    for record in result["records"]:
        assert record["error"] < 1e-5
        assert record["of_matmul"] == pytest.approx(record["tflops"] / 2.0)
    assert "tiny: takes bfloat16 or float16, got float32" in capsys.readouterr().out  # mosaic, refused with its reason
