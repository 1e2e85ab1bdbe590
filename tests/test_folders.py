"""Folders of runs, as commands understand them: several seeds, comparisons, starting over."""

import dataclasses
import json
import re

import numpy as np
import pytest

from experiments import compare
from tests import commands
from tests.small_run import small_config
from ultra_hstu.fields import changed
from ultra_hstu.json_files import write_json
from ultra_hstu.starts import read_starts
from ultra_hstu.workdir import Workdir, require_same


def trained(folder, *arguments):
    config = f"--config={commands.ROOT}/tests/small_config.py:{folder / 'data'}"
    done = commands.run(
        "experiments.train",
        *(config, f"--workdir={folder / 'runs'}", "--config.train.epochs=1", *arguments),
        folder=folder,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    code, said = trained(folder, "--seeds=7,43", "--nobaselines", f"--record={folder}/runs.json")
    assert code == 0, said
    return folder


def test_seeds_are_evaluated_with_mean_and_deviation(two_seeds):
    trained_record = json.loads((two_seeds / "runs.json").read_text())
    assert trained_record["seeds"] == [7, 43] and trained_record["baselines"] == {}
    record = two_seeds / "record.json"
    arguments = [f"--workdir={two_seeds}/runs", f"--record={record}"]
    done = commands.run("experiments.evaluate", *arguments, folder=two_seeds)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("small, seed 7, step 8", "small, seed 43, step 8", "mean", "standard deviation"):
        assert line in done.stdout
    found = json.loads(record.read_text())["tables"]["float32"]
    best = {
        seed: json.loads((two_seeds / f"runs/seed_{seed}/result.json").read_text())["best"]
        for seed in ("7", "43")
    }
    assert found["seeds"]["43"]["mrr"] == pytest.approx(best["43"]["mrr"], rel=1e-5)
    values = [one["mrr"] for one in best.values()]
    assert found["metrics"]["mrr"] == pytest.approx(np.mean(values), rel=1e-5)
    assert found["stdev"]["mrr"] == pytest.approx(np.std(values, ddof=1), rel=1e-3)


def test_a_run_says_how_it_was_made_and_starts_over_when_told_to(two_seeds):
    folder = Workdir(two_seeds / "runs" / "seed_7")
    (first,) = read_starts(folder)
    assert first["command"] and first["outcome"] == "done"
    assert first["seconds"] > 0 and first["commit"] and first["device"]
    wider = "--config.model.width=24"
    code, said = trained(two_seeds, "--seeds=7", wider)
    assert code == 1 and "model.width: 16 -> 24" in said and "--overwrite" in said
    assert "prepar" not in said and len(read_starts(folder)) == 1  # before anything was read
    code, said = trained(two_seeds, f"--workdir={folder.path}", "--seeds=1")
    assert code == 1 and "is the folder of one run" in said


def test_runs_are_compared(two_seeds, tmp_path, capsys):
    other = Workdir(tmp_path / "other")
    config = changed(small_config("data", epochs=1), model={"width": 24}, eval={"hide": "all"})
    other.claim(config)
    other.release()
    runs = str(two_seeds / "runs")
    compare.main(["compare", runs, str(other.path)])
    said = " ".join(capsys.readouterr().out.split())
    assert "±" in said and re.search(r"\(1\b.*\bnot\b.*\bfinished\)", said)
    assert "model.width 16 24" in said and "train.seed 7, 43 42" in said
    assert "model.layers" not in said and "eval differ: their metrics do not compare" in said
    write_json(other.data, {"users": 1, "items": 1, "events": 1, "sha256": "other"})
    compare.main(["compare", runs, str(other.path)])
    assert "trained on different data" in capsys.readouterr().out
    for wrong, message in (([runs], "at least two"), ([runs, runs], "twice")):
        with pytest.raises(ValueError, match=message):
            compare.main(["compare", *wrong])
    done = commands.run("experiments", "compare", runs, tmp_path / "none", folder=tmp_path)
    assert done.returncode == 1 and f"error: {tmp_path}/none holds no run" in done.stderr


def test_runs_of_several_tasks_are_compared_by_few_columns():
    best = {
        "ne": 0.8,
        "ne/like": 0.8,
        "log_loss/like": 0.4,
        "mse/share": 0.1,
        "base_rate/like": 0.2,
    }
    best |= {f"log_loss/like/{part}": 0.3 for part in ("warm", "cold", "new")}
    rank = compare.Compared({}, 1, [{"best": best, "best_epoch": 3}], None, 60.0)
    table = compare.metrics_table({"a": rank, "b": dataclasses.replace(rank, results=[])})
    header = [str(column.header) for column in table.columns]
    assert header == "test|NE|AUC|GAUC|LOG LOSS|MSE|best epoch|minutes".split("|")
    assert table.columns[0].overflow == "fold"  # the ends of paths tell runs apart
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows[0] == ("a: like", "0.8000", "", "", "0.4000", "", "3", "1.0")
    assert rows[1] == ("a: share", "", "", "", "", "0.1000", "3", "1.0")
    assert rows[2] == ("b", "", "", "", "", "", "(1 not finished)", "1.0")


def test_seeds_of_other_configurations_have_no_mean(two_seeds, tmp_path):
    for seed, width in ((1, 16), (2, 24)):
        folder = Workdir(tmp_path / f"seed_{seed}")
        folder.claim(changed(small_config("data"), train={"seed": seed}, model={"width": width}))
        folder.release()
    with pytest.raises(ValueError, match="no mean is taken:\n  model.width: 16 -> 24\n"):
        require_same(list(Workdir(tmp_path).seeds.values()))
    require_same(list(Workdir(two_seeds / "runs").seeds.values()))
