"""Studies: what they list, how a sweep goes on, and a search that sees validation items alone."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from experiments import configs
from experiments.record import read
from scripts import search, studies, study, sweep
from scripts.bench import published_sets
from scripts.studies import StudyRun, with_field
from scripts.sweep import Sweep
from tests import commands
from ultra_hstu import effects, flops
from ultra_hstu.config import Config
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.run import Interrupted

QUIET = Console(quiet=True)
SMALL = {"data.synthetic.users": 20, "data.synthetic.length": 8}
ONE = StudyRun("one", "synthetic", SMALL, seeds=(1, 2), seconds=0.1)

# Stands in for `experiments.train`: counts how often it was started, by its seeds, and writes the
# record that it was asked for. A run named slow waits for a stop the first time; HR@10 is the
# learning rate.
TRAIN = """
import json, pathlib, re, signal, sys, time
given = dict(re.match(r"--([\\w.]+)=(.*)", word).groups() for word in sys.argv[1:])
workdir = pathlib.Path(given["workdir"])
starts = workdir.with_name(workdir.name + " " + given["seeds"] + ".starts")
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if "fails" in workdir.name:
    sys.exit("error: it cannot be")
if "slow" in workdir.name and "record" not in given and starts.read_text() == "x":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    workdir.with_suffix(".ready").write_text("")
    time.sleep(60)
value, split = float(given.get("config.optim.learning_rate", 0.001)), given.get("split", "test")
seeds = [int(seed) for seed in given["seeds"].split(",")]
best = {name: value for name in ("hr@10", "ndcg@10", "hr@50", "hr@200", "mrr")}
runs = [
    {"seed": seed, "split": split, "seconds": 2.0, "compile_seconds": 1.0, "epochs": 3,
     "best": {name: one + seed / 1e9 for name, one in best.items()}}
    for seed in seeds
]
command = "python -m experiments.train " + " ".join(sys.argv[1:])
fields = {"config": given["config"], "platform": "cpu", "runs": runs, "data": {"sha256": "abc"}}
if "record" in given:
    text = json.dumps(fields | {"command": command, "mean": best})
    pathlib.Path(given["record"]).write_text(text)
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRA_HSTU_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(studies.STUDIES, "small", lambda: [ONE])
    (tmp_path / "train.py").write_text(TRAIN)
    program = (sys.executable, "-S", "-E", str(tmp_path / "train.py"))
    given = dict(platform="cpu", program=program, conditions={"study": "small"})

    def make(folder="runs", **more):
        return Sweep(tmp_path / folder, tmp_path / "results", QUIET, **given | more)

    return make


def starts(of):
    return {path.stem: len(path.read_text()) for path in of.folder.glob("*.starts")}


def test_finished_runs_are_not_trained_again(made, tmp_path):
    two = dataclasses.replace(ONE, name="two", overrides=SMALL | {"optim.learning_rate": 0.5})
    first = made(jobs=2)
    with first.alone():
        for _ in range(2):
            assert first.train([ONE, two]) == [] and not first.problems
        # Each seed is a process, and one reads what they have found.
        every = {f"{name} {seeds}": 1 for name in ("one", "two") for seeds in ("1", "2", "1,2")}
        assert starts(first) == every
        # A record lacks a seed: it is no mean of these seeds.
        more = dataclasses.replace(ONE, seeds=(1, 2, 3))
        assert not first.record(more)
        assert first.train([more]) == [] and starts(first)["one 1,2,3"] == 1
        # So is a record of another recipe under the same name.
        other = dataclasses.replace(ONE, overrides=SMALL | {"loss.temperature": 0.1})
        assert first.record(ONE) and not first.record(other)
        # One that a sweep was killed before it named the recipe of may be of any.
        path = first.folder / "one.json"
        unnamed = read(path)
        unnamed.pop("recipe")
        path.write_text(json.dumps(unnamed))
        (tmp_path / "results" / "one.json").unlink()
        assert first.plan([ONE]) == [ONE] and first.train([ONE]) == []
        assert read(tmp_path / "results" / "one.json")["recipe"] == ONE.recipe
    record = read(tmp_path / "results" / "two.json")
    assert record["study"] == "small" and record["overrides"]["optim.learning_rate"] == 0.5
    assert record["shared_device"] and "--seeds=1,2 --workdir=runs/two" in record["command"]
    assert str(tmp_path) not in record["command"]
    # Another sweep of the same results knows them, and what a seed took.
    other = made(folder="elsewhere")
    with other.alone():
        assert other.plan([ONE]) == []
        # It is the configuration's, whose other runs are guessed to take twice as long.
        slower = dataclasses.replace(ONE, name="slower", seeds=(7, 8, 9), seconds=0.2)
        assert other.predicted(slower) == (pytest.approx(18.0), True)
        assert other.predicted(dataclasses.replace(slower, config="ml1m_hstu"))[1] is False
        # What another command has written is no record of this run.
        path = tmp_path / "results" / "one.json"
        path.write_text(json.dumps(read(path) | {"command": "python -m scripts.ablation --x=1"}))
        assert other.plan([ONE]) == [ONE]


def test_a_sweep_that_is_out_of_time_goes_on_later(made, monkeypatch):
    monkeypatch.setattr(sweep, "SAVE_S", 1.0)
    monkeypatch.setattr(sweep, "COLLECT_S", 0.1)
    slow = dataclasses.replace(ONE, name="slow")
    long = dataclasses.replace(ONE, name="long", seconds=1e4)
    short = made(minutes=3 / 60, jobs=3)
    with short.alone():
        assert [run.name for run in short.train([long, slow, ONE])] == ["long", "slow"]
    begun = {"slow 1", "slow 2", "one 1", "one 2", "one 1,2"}
    assert set(starts(short)) == begun, "what would not end is not begun"
    assert (short.folder / "slow.ready").exists() and not short.record(slow)
    again = made()
    with again.alone():
        assert again.train([slow, long, ONE]) == []
    counted = {"slow 1": 2, "slow 2": 2, "slow 1,2": 1, "long 1,2": 1, "one 1": 1, "one 1,2": 1}
    assert starts(again).items() >= counted.items() and not again.problems


def test_a_sweep_that_is_stopped_lets_its_runs_save(made):
    slow, found = dataclasses.replace(ONE, name="slow"), made(jobs=2)

    def stop():
        while len(starts(found)) < 2 or not (found.folder / "slow.ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with found.alone():
        threading.Thread(target=stop).start()
        with pytest.raises(Interrupted, match="stopped; the same command goes on in"):
            found.train([slow])
        assert not found.record(slow) and not found.problems
        assert found.train([slow]) == []
        assert starts(found) == {"slow 1": 2, "slow 2": 2, "slow 1,2": 1}


def test_no_run_outlives_its_sweep(made, monkeypatch):
    slow, found = dataclasses.replace(ONE, name="slow"), made()
    began = []
    start = Sweep._start
    monkeypatch.setattr(Sweep, "_start", lambda *given: began.append(start(*given)) or began[-1])
    monkeypatch.setattr(sweep, "POLL_S", "no number")
    with found.alone(), pytest.raises(TypeError):
        found.train([slow])
    assert [process.poll() is None for process in began] == [False]


def test_a_digest_holds_what_differs_from_the_defaults():
    """A field that is new leaves the digests of runs as they were."""
    plain = studies.digest(Config())
    assert plain == hashlib.sha256(b"[]").hexdigest()[:12]
    assert plain == studies.digest(with_field(Config(), "name", "other"))
    assert plain != studies.digest(with_field(Config(), "model.layers", 7))


def test_smoke_tests_fill_no_table():
    done = commands.run("scripts.study", "--study=small", "--override=train.epochs=1")
    assert done.returncode == 1 and "name another --results" in done.stderr


def test_two_sweeps_in_one_folder_are_refused(made):
    one, other = made(), made()
    with one.alone():
        with pytest.raises(ValueError, match="another sweep works in .*runs, or a run of one"):
            other.alone().__enter__()
        # A run that is still at work has the lock when its sweep is gone.
        command = [sys.executable, "-S", "-E", "-c", "input()"]
        orphan = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(one.lock,))
    with pytest.raises(ValueError, match="choose another --workdir"):
        other.alone().__enter__()
    orphan.communicate(b"\n")
    with other.alone():
        pass


def test_what_cannot_be_trained_is_named_and_the_others_run(made, tmp_path):
    (tmp_path / "copies" / "ml-1m").mkdir(parents=True)
    missing = StudyRun("missing", "ml1m_hstu")
    fails = dataclasses.replace(ONE, name="fails")
    found = made(copies=tmp_path / "copies")
    with found.alone():
        assert found.train([missing, fails, ONE]) == []
    assert list(found.problems) == ["missing", "fails"] and found.record(ONE)
    problem = found.problems["missing"]
    assert "ultra-hstu inspect --config.data.source=ml-1m" in problem and "ratings.dat" in problem
    assert found.problems["fails"] == "exit code 1\nerror: it cannot be"


def test_every_run_of_a_study_can_be_made(monkeypatch):
    for name, list_of in studies.STUDIES.items():
        runs = study.chosen(name, [])
        assert len({run.name for run in runs}) == len(list_of()) == len(runs)
        for run in runs:
            config = run.made()
            for field in run.overrides:
                effects.require_effect(config, field)
    for name, changes in search.candidates().items():
        run = search.trial(name, changes)
        assert run.trial and "--split=validation" in run.flags() and " " not in run.name
        for field in run.overrides:
            effects.require_effect(run.made(), field)
    assert not search.confirmed({}).trial
    assert study.chosen("stream", [])[0].flags()[-1] == "--baselines=false"
    with pytest.raises(ValueError, match="--only=ml1m_none: the study ml1m has ml1m_best_validate"):
        study.chosen("ml1m", ["ml1m_none"])
    # A mixture of logits is listed where its configuration is there.
    large = configs.CONFIGS["ml1m_hstu_large"]
    mixture = with_field(with_field(large, "loss.temperature", 0.07), "name", "other")
    monkeypatch.setitem(configs.CONFIGS, "ml1m_hstu_large_mol", mixture)
    (run,) = study.chosen("ml1m", ["ml1m_best_mol_temporal"])
    assert run.overrides["loss.temperature"] == 0.07 and run.made().name == "ml1m_best_mol"
    assert "mixture of logits" in search.candidates()


def test_overrides_are_values():
    given = ["train.epochs=1", "model.window=(8,)", "loss.kind=full"]
    read_back = {"train.epochs": 1, "model.window": (8,), "loss.kind": "full"}
    assert study.read_override(given) == read_back
    (run,) = study.overridden([ONE], read_back)
    assert run.made().model.window == (8,) and "--config.loss.kind=full" in run.flags()


def test_a_search_chooses_by_validation_items(made, tmp_path, monkeypatch):
    tried = {
        "a": {"optim.learning_rate": 0.003},
        "b": {"model.item_std": 0.1, "optim.beta1": 0.8},
        "c": {"optim.learning_rate": 0.002},
        "worse": {"optim.learning_rate": 0.0001},
        "fails": {"optim.beta2": 0.9},
    }
    monkeypatch.setattr(search, "candidates", lambda: tried)
    monkeypatch.setattr(search, "BASE", "synthetic")
    monkeypatch.setattr(search, "START", dict(SMALL, **{"train.protocol": "validated"}))
    found = made(jobs=4)
    with found.alone():
        assert study.searched(found, {}) == []
    record = read(tmp_path / "results" / "ml1m_best_search.json")
    assert record["chosen"] == "a" and record["changes"] == tried["a"]
    assert [row["name"] for row in record["tried"]] == ["a", "c", "synthetic", "b", "worse"]
    assert list(record["failed"]) == ["search_fails"] and record["data"] == {"sha256": "abc"}
    # The test items are looked at by the chosen recipe alone, under five seeds.
    best = read(tmp_path / "results" / "ml1m_best_validated.json")
    assert [run["split"] for run in best["runs"]] == ["test"] * 5
    for path in (found.folder, tmp_path / "results"):
        (path / "ml1m_best_validated.json").unlink()
    before = starts(found)
    del tried["fails"]
    with found.alone():
        (planned,) = study.searched(found, {}, plan_only=True)
    assert planned.name == "ml1m_best_validated" and starts(found) == before
    assert [path.stem for path in (tmp_path / "results").iterdir()] == [
        path.stem for path in (tmp_path / "results").glob("ml1m_best_*")
    ]
    with pytest.raises(ValueError, match="has measured test items, by which nothing is chosen"):
        search.value(best)


def test_what_helps_is_put_together(monkeypatch):
    known = {"a": {"x": 1}, "b": {"y": 1}, "c": {"x": 2}, "d": {"z": 1}, "e": {"w": 1}}
    monkeypatch.setattr(search, "candidates", lambda: known)
    tried = {"a": [0.25, 0.26], "b": [0.22, 0.23], "c": [0.24, 0.25], "d": [0.2, 0.21]}
    # c changes what a has changed; d gives nothing, and e less than seeds do.
    tried |= {"e": [0.201, 0.212]}
    assert search.stacks([0.2, 0.21], tried) == [("a", "b")]
    assert search.together(("a", "b")) == {"x": 1, "y": 1}


@pytest.mark.parametrize("name", ["ml20m_hstu", "books_hstu"])
def test_generated_sets_are_read_as_the_published_ones(name, tmp_path):
    data = configs.named(name).data
    published_sets.written(data.source, str(tmp_path), 0.001)
    data = dataclasses.replace(data, raw_dir=str(tmp_path), data_dir=str(tmp_path / "data"))
    found = load_interactions(data)
    most = published_sets.SETS[data.source].events // 1000
    assert found.num_events == most or (name == "books_hstu" and most / 9 < found.num_events < most)


# Lengths of the test histories of MovieLens-1M: of every tenth part of its users, the middle one.
LENGTHS = (22, 31, 43, 59, 80, 108, 147, 200, 200, 200)


def test_ultra_has_60_percent_of_the_operations():
    ultra, hstu = (
        flops.count(configs.named(name), LENGTHS) for name in ("ml1m_ultra_60", "ml1m_hstu")
    )
    share = (ultra.projections + ultra.attention) / (hstu.projections + hstu.attention)
    assert 0.58 < share <= 0.60
    assert configs.named("ml1m_ultra").model.window == (64,), "its record is older"


def test_the_best_recipe_is_the_one_that_was_chosen():
    """Until there is a record, the configuration is a candidate."""
    record = read("experiments/results/ml1m_best_search.json")
    best, large = configs.named("ml1m_best"), configs.named("ml1m_hstu_large")
    for field, value in (record.get("start", {}) | record.get("changes", {})).items():
        large = with_field(large, field, value)
    found = dataclasses.replace(best, train=large.train, name=large.name)
    assert found == large or not record
