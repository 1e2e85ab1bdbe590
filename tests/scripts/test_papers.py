"""docs/papers.md: every claim has a row, and a row says what is there and what was measured."""

import json
import re

import pytest

from scripts.tables import records
from scripts.tables.papers import PAPERS
from scripts.tables.papers.row import Cell, Missing, Row, field, less, names, ratio, table

ROOT = records.ROOT
# What the papers number, and their algorithms.
CLAIMS = {
    "hstu": """equations 1-3; relative bias; equation 4; subsequences; table 1; generative training;
        algorithm 1; M-FALCON, throughput; ragged attention; figure 5; activation memory;
        embedding memory; appendix C; table 2; table 3; tables 14, 15; stochastic length, quality;
        table 13; table 16; table 4, ML-1M; table 4, ML-20M; table 4, Books; table 4, others;
        table 12, hyperparameters; table 5, E and C; table 5, log perplexity; table 6; table 7;
        figure 7, scaling; training throughput; linear layers; figures 4, 6, 10, 12, 13""",
    "ultra_hstu": """equations 1-5; semi-local attention; semi-local attention, efficiency;
        merged input; heterogeneous actions; algorithm 1; stochastic length; attention truncation;
        table 9; mixture of transducers; table 8; BF16; FP8 GEMM; FP8 and INT4 together; fusion 1;
        fusion 2; fusion 3; table 11; attention kernel, H100; attention kernel, MI300x;
        selective rematerialisation; fully jagged; headline; systems; table 1; table 2; table 3;
        table 5; deployment; tables 4, 6, 7, 10""",
    "context_parallel": """all-to-all of jagged batches; all-gather, then split;
        balanced pairs of chunks; reorder kernels; asynchronous offsets; attention over shards;
        partial sums; longest sequence; scaling factor, data parallel; scaling factor, context 2;
        re-layout in training""",
    "mini_sequences": """blocks of the MLP; vocabulary head; tail and mean; with rematerialisation;
        longest sequence; equal throughput; MsT with Ulysses; peak memory;
        gradients and optimizer state; fine-tuning; tables of images; chunk size""",
}
ROWS = [(paper, row) for paper, rows in PAPERS.items() for row in rows]


@pytest.mark.parametrize("paper", CLAIMS)
def test_every_claim_has_one_row(paper):
    claims = [" ".join(claim.split()) for claim in CLAIMS[paper].split(";")]
    assert sorted(row.claim for row in PAPERS[paper]) == sorted(claims)


def test_a_row_names_what_is_there():
    for paper, row in ROWS:
        for where in row.where:
            path, _, name = where.partition(":")
            assert (ROOT / path).exists(), f"{paper}, {row.claim}: no {path}"
            assert not name or name in names(path), f"{paper}, {row.claim}: no {name} in {path}"


def test_a_row_is_measured_or_says_why_not():
    for paper, row in ROWS:
        assert row.here, f"{paper}, {row.claim}: say what is measured, or 'not done: WHY'"
        assert row.where or str(row.here).startswith("not done: "), f"{paper}, {row.claim}"


def test_a_cell_has_a_command(tmp_path, monkeypatch):
    """Without any record, every cell says which command writes its own."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    for paper, row in ROWS:
        for cell in row.here if isinstance(row.here, tuple) else ():
            assert str(cell).startswith("not measured: `python -m "), (
                f"{paper}, {row.claim}: {cell}"
            )


def test_records_fill_their_cells():
    """Of a record that is there, what it measures has the names that the row gives it.

    A sweep that goes on later lacks parts, but not all of them.
    """
    filled = 0
    for _, row in ROWS:
        for cell in row.here if isinstance(row.here, tuple) else ():
            if not (record := records.load(cell.record)):
                continue
            try:
                filled += bool(cell.text.format(*(value(record) for value in cell.values)))
            except Missing as missing:
                assert missing.depth > 0, f"{row.claim}: {missing}"
    assert filled > 40


def test_no_number_of_ours_is_typed():
    """What a cell says in words holds no measured number: `text` has fields for them."""
    for paper, row in ROWS:
        for cell in row.here if isinstance(row.here, tuple) else ():
            words = re.sub(r"{.*?}|`.*?`|alpha 1\.\d|HR@10|\d[\d,]*,\d{3}", "", cell.text)
            assert not re.search(r"\d*\.\d|\d\d", words), f"{paper}, {row.claim}: {cell.text}"


def test_a_row_is_filled_as_soon_as_its_record_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    two = (field("steps", {"of": "b"}, "ms"), ratio(field("whole"), field("half")))
    cell = Cell("load_balance_cpu", "{:.0f} ms, {:.1f}x", two)
    assert str(cell).startswith("not measured: `python -m scripts.bench.load_balance --record=")
    found = {"steps": [{"of": "a", "ms": 1}, {"of": "b", "ms": 31.2}], "whole": 3.0, "half": 2.0}
    (tmp_path / "load_balance_cpu.json").write_text(json.dumps(found))
    assert str(cell) == "31 ms, 1.5x (`load_balance_cpu`)"
    (tmp_path / "load_balance_cpu.json").write_text(json.dumps(found | {"steps": []}))
    assert str(cell).startswith("not measured: ")
    with pytest.raises(Missing, match="the record has no 'all'"):
        field("steps", "all")(found)
    assert less(field("half"), field("whole"))(found) == pytest.approx(1 / 3)
    trained = Cell("assistments_rank_din", "{}")
    assert str(trained).startswith("not measured: `python -m scripts.study --study=ranking_models")
    own = Cell("none", "{}", (), "bench.long --config=long_ultra")
    assert str(own) == "not measured: `python -m scripts.bench.long --config=long_ultra`"
    row = Row("a", "b", ("kernels/mask.py:AttentionMask",), here=(own, own), deviates="c")
    assert table((row,)).splitlines()[-1] == (
        f"| a | b |  | {own} | [`AttentionMask`](../kernels/mask.py) | c |"
    )
