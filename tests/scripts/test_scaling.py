"""The scaling curve: fits of made-up curves, the grid, sweeps that go on, tables and the figure."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from experiments.record import Record
from scripts.scaling import fits, grid, run, stream, sweep
from scripts.scaling.fits import Curve, compare, estimate, exponent, slope
from scripts.scaling.sweep import ScalingRun
from scripts.tables import records
from scripts.tables import scaling as tables
from scripts.tables.papers import scaling as claims
from ultra_hstu.config import SyntheticConfig
from ultra_hstu.data import best_prediction
from ultra_hstu.data.synthetic import draw_stream
from ultra_hstu.fields import changed

QUIET = Console(quiet=True)
COMPUTE = np.geomspace(1e9, 1e12, 12)


def made_up(beta, alpha=2.0, noise=0.0, seed=0):
    spread = np.exp(noise * np.random.default_rng(seed).normal(size=len(COMPUTE)))
    return Curve(COMPUTE, alpha * COMPUTE**-beta * spread)


def test_a_power_law_gives_its_exponent_back():
    assert exponent(COMPUTE, made_up(0.03).ne) == pytest.approx(0.03)
    assert fits.power(made_up(0.03)) == pytest.approx((2.0, 0.03))
    assert made_up(0.03).decades == pytest.approx(3)
    found = estimate(made_up(0.03, noise=0.01), exponent)
    assert found.low < 0.03 < found.high < found.low + 0.01
    ratio = compare(made_up(0.06, noise=0.01), made_up(0.03, noise=0.01, seed=1), exponent).ratio
    assert ratio.low < 2 < ratio.high and ratio.value == pytest.approx(2, rel=0.15)


def test_a_line_gives_its_slope_back():
    """A model whose runs cost a fifth has five times the slope."""
    ne = 0.9 - 1e-13 * COMPUTE
    assert slope(COMPUTE, ne) == pytest.approx(1e-13)
    assert fits.line(Curve(COMPUTE, ne)) == pytest.approx((0.9, -1e-13))
    found = compare(Curve(COMPUTE / 5, ne), Curve(COMPUTE, ne), slope)
    assert [found.ratio.value, found.ratio.low, found.ratio.high] == pytest.approx([5, 5, 5])


def test_intervals_cover_what_is_true_as_often_as_they_say():
    """95 % ones of a bootstrap over 12 runs are a little narrow: 85 % at least."""
    truth = [estimate(made_up(0.03, noise=0.02, seed=seed), exponent) for seed in range(40)]
    assert np.mean([one.low < 0.03 < one.high for one in truth]) >= 0.85


def test_a_ratio_that_means_nothing_says_why():
    noise = np.random.default_rng(0).normal(size=len(COMPUTE))
    flat = Curve(COMPUTE, 0.8 + 0.01 * noise)
    for pair, name in (((made_up(0.03), flat), "the baseline"), ((flat, made_up(0.03)), "the mod")):
        found = compare(*pair, exponent)
        assert found.ratio is None and f"NE of {name}" in found.reason
    with pytest.raises(ValueError, match="two amounts of compute, not .3.0, 3.0."):
        Curve.of([(3.0, 0.9), (3.0, 0.8)])
    with pytest.raises(ValueError, match="greater than 0"):
        Curve.of([(3.0, 0.9), (4.0, -0.8)])


def test_the_grid_has_what_a_curve_needs():
    for name, of in grid.SETS.items():
        points = grid.points(name)
        assert len({point.name for point in points}) == len(points)
        for model in grid.WHOLE:
            some = [point for point in points if point.model == model]
            cells = {(point.length, point.layers) for point in some}
            assert len(cells) == len(of.lengths) * len(of.layers) >= 15
            ends = [(length, of.layers[1]) for length in (of.lengths[0], of.lengths[-1])]
            for cell in cells:
                seeds = [p.seed for p in some if (p.length, p.layers) == cell]
                assert len(seeds) == (3 if cell in ends else 1)
        # The first are a curve over length, ends first.
        first = points[: 2 * len(of.lengths)]
        assert {point.layers for point in first} == {of.layers[1]}
        assert [p.length for p in first[:4:2]] == [of.lengths[-1], of.lengths[0]]
    pieces = grid.config_of(grid.Point("synthetic_long", "semi_local_truncation", 16384, 4))
    assert pieces.model.window == (512,)  # two rows an event
    assert (pieces.model.truncate_after, pieces.model.truncate_length) == (2, 4096)


@pytest.fixture
def tiny(monkeypatch):
    """A grid of two runs of each model, on ten users of 80 events."""
    of = grid.SETS["synthetic_long"]
    long = {"users": 10, "length": 80, "categories": 4}
    base = changed(
        of.base,
        data={"synthetic_long": long, "batch_users": 4, "new_users_fraction": 0.2},
        model={"width": 8, "heads": 1, "qk_width": 8, "v_width": 8, "dtype": "float32"},
        rank={"targets": 4, "head_width": 8},
    )
    made = dataclasses.replace(
        of, base=base, lengths=(8, 16), layers=(2, 2, 2), events=400, rows_a_step=80
    )
    monkeypatch.setattr(grid, "SETS", {"synthetic_long": made})
    return made


def test_runs_are_trained_recorded_and_not_trained_again(tiny, tmp_path, monkeypatch):
    data, missing = run.read_sets(["synthetic_long"], None, str(tmp_path / "data"))
    jobs = run.jobs_of(data, str(tmp_path / "data"))
    assert not missing and jobs[0].name == "synthetic_long_hstu_16_2_seed_42"
    ultra = jobs[1]
    assert ultra.about["training"] < jobs[0].about["training"]
    file = tmp_path / "record.json"
    options = dict(
        load=lambda config: run.task_of(data, config), measure=run.measure, console=QUIET
    )
    left = sweep.sweep([ultra], tmp_path / "runs", Record(file), minutes=0.0, **options)
    assert left == [ultra] and not (tmp_path / "runs" / ultra.name).exists()
    assert sweep.sweep([ultra], tmp_path / "runs", Record(file), minutes=None, **options) == []
    entry = json.loads(file.read_text())["runs"][ultra.name]
    settings = tiny.base.data.synthetic_long
    assert entry["floor"] == best_prediction.floor(settings, 16)
    assert entry["result"]["steps"] == ultra.config.train.steps
    assert 0.3 < entry["best_possible"] < entry["result"]["best"]["ne"]
    assert (entry["model"], entry["length"], entry["layers"]) == ("ultra", 16, 2)
    # Another machine, which has the record alone: nothing is trained.
    monkeypatch.setattr(sweep, "train", lambda *_, **__: pytest.fail("trained a second time"))
    record = Record(file, grows=True)
    assert sweep.sweep([ultra], tmp_path / "other", record, minutes=None, **options) == []
    moved = dataclasses.replace(ultra, config=changed(ultra.config, optim={"clip_norm": 3.0}))
    with pytest.raises(ValueError, match=f"{file} holds {ultra.name} of other settings: name ano"):
        sweep.sweep([moved], tmp_path / "runs", record, minutes=None, **options)


def test_a_run_that_fails_leaves_those_before_it(tmp_path, monkeypatch):
    """And those behind it, where it has diverged. A sweep in the same folder is refused meanwhile;
    predictions follow what was measured.
    """
    job = ScalingRun("a", "group", grid.SETS["assistments"].base, 1000.0, {"model": "hstu"})
    jobs = [job, dataclasses.replace(job, name="b"), dataclasses.replace(job, name="c")]
    folder, file = tmp_path / "runs", tmp_path / "record.json"
    trained = []

    def train(config, workdir, **_):
        with pytest.raises(ValueError, match=f"another sweep works in {folder}, or a run"):
            with sweep.claimed(folder):
                pass
        trained.append(workdir.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        if len(trained) == 3:
            raise FloatingPointError("the loss is nan at step 7")
        return {"best": {"ne": 0.9}}

    monkeypatch.setattr(sweep, "train", train)
    options = dict(load=lambda _: None, measure=lambda *_: {}, console=QUIET)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(jobs, folder, Record(file), minutes=None, **options)
    assert list(json.loads(file.read_text())["runs"]) == ["a"]
    # The first run took no time, so that the others fit in a minute.
    more = Record(file, grows=True)
    assert sweep.sweep(jobs, folder, more, minutes=1.0, **options) == [jobs[1]]
    assert sweep.sweep(jobs, folder, more, minutes=1.0, **options) == []
    assert trained == ["a", "b", "b", "c", "b"]
    assert sweep.predicted(job, {}, "1 x cpu") == 1000.0
    record = Record(file, grows=True)
    sweep.add_data(record, {"own": {"sha256": "a"}})
    with pytest.raises(
        ValueError, match="other data of own .sha256 a, here b.: name another --rec"
    ):
        sweep.add_data(Record(file, grows=True), {"own": {"sha256": "b"}, "more": {"sha256": "c"}})


def test_parts_of_a_sweep_share_the_record(tmp_path):
    jobs = [ScalingRun(name, "group", grid.SETS["assistments"].base, 1.0) for name in "abcde"]
    assert [job.name for job in run.part_of(jobs, "2/3")] == ["b", "e"]
    assert run.part_of(jobs, "1/1") == jobs
    with pytest.raises(ValueError, match="--part=4/3: write K/N with K from 1 to N, such as 2/4"):
        run.part_of(jobs, "4/3")
    one, other = (Record(tmp_path / "record.json", grows=True) for _ in range(2))
    sweep.add_data(one, {"own": {"sha256": "a"}})
    for record, name in ((one, "a"), (other, "b"), (one, "c")):
        with sweep.shared(record):
            record.add(runs=sweep.finished(record) | {name: {}})
    assert list(sweep.finished(Record(one.path, grows=True))) == ["a", "b", "c"]
    assert other.values["data"] == {"own": {"sha256": "a"}}


def test_a_missing_set_is_named_and_the_others_are_read(tiny, tmp_path, monkeypatch):
    here = grid.Set(grid.ASSISTMENTS, (8, 16), (2, 2, 2), 10, 10, 1.0)
    monkeypatch.setattr(grid, "SETS", grid.SETS | {"assistments": here})
    names = ["assistments", "synthetic_long"]
    data, missing = run.read_sets(names, str(tmp_path / "nowhere"), str(tmp_path / "data"))
    assert list(data) == ["synthetic_long"]
    assert "assistments is left out" in missing[0]
    assert "--config.data.source=assistments-2017" in missing[0]


def test_what_can_be_reached_on_the_stream():
    """By drawing: who ranks by the true chances hits as often as the bound says."""
    settings = SyntheticConfig(users=20_000, length=9, items=60, categories=4, prior_categories=2)
    bounds = [stream.bound(settings, 0.5, hides=hides) for hides in (True, False)]
    assert 0.3 < bounds[0]["hr@10"] <= bounds[1]["hr@10"] < bounds[1]["hr@50"] <= 1
    # Of equal chances, the first 10 of the most likely category are hit 10 / 15 of its times.
    items = draw_stream(dataclasses.replace(settings, released_at_start=0.9999, prior_categories=1))
    one = dataclasses.replace(settings, released_at_start=0.9999, prior_categories=1)
    assert stream.bound(one, 0.5, hides=False)["hr@10"] == pytest.approx(10 / 15, abs=0.05)
    assert ((items[:, :1] - items) % 4 == 0).all()


def made_up_record():
    """Runs whose NE follows a power law of their compute, ULTRA's with twice the exponent."""
    runs = {}
    for name in grid.SETS:
        for point in grid.points(name):
            cost = 1e6 * point.length * point.layers * (1 if point.model == "ultra" else 4)
            beta = 0.04 if point.model == "ultra" else 0.02
            runs[point.name] = dataclasses.asdict(point) | {
                "training": 3 * cost,
                "inference": cost,
                "result": {"best": {"ne": 1.5 * cost**-beta}},
            }
    return {"device": "1 x GPU", "commit": "0", "date": "2026-01-01T00:00", "runs": runs}


def test_tables_and_figure_come_from_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "FIGURES", tmp_path)
    drawn = [tmp_path / "scaling.png", tmp_path / "scaling_dark.png"]
    of_record = (tables.fits_table, tables.power_law_table, tables.runs_table, tables.floor_table)
    for table in (*of_record, tables.pieces_table, tables.stream_table, tables.generated_table):
        assert table() == records.NOT_MEASURED
    tables.scaling_figure()
    assert tables.scaling_picture() == records.NOT_MEASURED and not drawn[0].exists()
    (tmp_path / "scaling_h200.json").write_text(json.dumps(made_up_record()))
    rows = [line.split(" | ") for line in tables.fits_table().splitlines() if "ULTRA" in line]
    assert rows[0][5].startswith("2 [") and rows[0][5].endswith("paper 2.08")
    assert "0.02 [" in tables.power_law_table() and "1,024" in tables.runs_table()
    tables.scaling_figure()
    assert all(path.stat().st_size > 20_000 for path in drawn)
    assert "figures/scaling_dark.png" in tables.scaling_picture()


def test_claims_of_papers_are_filled_from_the_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    of_runs = (
        claims.ratios("ultra", which=0)[1],
        claims.power_laws("hstu")[1],
        claims.over_depth("ultra")[1],
    )
    for record in ({}, made_up_record() | {"runs": {}}, made_up_record()):
        for name in ("counts", "h200"):
            (tmp_path / f"scaling_{name}.json").write_text(json.dumps(record))
        counted, *fitted = map(str, (claims.operations("ultra"), *of_runs))
        if record.get("runs"):
            assert counted.startswith("operations -75% in training, -75% at inference, 16,384 ")
            assert ", all: efficiency " in fitted[0] and "exponents 2 [" in fitted[0]
            assert ": exponent 0.02 [" in fitted[1] and " over 1.8 decades" in fitted[1]
            assert " with 2 layers, " in fitted[2] and fitted[2].count(" .") == 3
        else:
            not_measured = "not measured: `python -m scripts.scaling."
            assert all(one.startswith(not_measured) for one in (counted, *fitted))
