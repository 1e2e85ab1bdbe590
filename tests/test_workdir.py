"""A run has its folder for itself: another configuration, process or folder is refused."""

import json
import os
import resource
import subprocess
import sys

import jax.numpy as jnp
import pytest

from tests.small_run import small_config, with_
from ultra_hstu.checkpoint import Checkpoints
from ultra_hstu.report import MetricLog, read_metrics
from ultra_hstu.workdir import Workdir, write_json


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    config = small_config("data")
    first = Workdir(tmp_path / "run")
    first.claim(config)
    first.release()
    with pytest.raises(ValueError, match=r"another configuration.*\n  model.width: 16 -> 32\n"):
        Workdir(tmp_path / "run").claim(with_(config, model__width=32))


def test_a_run_is_evaluated_in_one_way(tmp_path):
    """Its best epoch was chosen so; runs from before there was a choice have the defaults."""
    config = small_config("data")
    first = Workdir(tmp_path)
    first.claim(config)
    first.release()
    with pytest.raises(ValueError, match="eval.hide: 'window' -> 'all'"):
        Workdir(tmp_path).claim(with_(config, eval__hide="all"))
    values = json.loads(first.config.read_text())
    del values["eval"]
    write_json(first.config, values)
    second = Workdir(tmp_path)
    second.claim(config)
    second.release()


def test_epochs_and_places_may_change(tmp_path):
    config = small_config("data")
    first = Workdir(tmp_path)
    first.claim(config)
    first.release()
    second = Workdir(tmp_path)
    second.claim(with_(config, train__epochs=9, data__data_dir="elsewhere"))
    second.release()


def test_a_second_process_is_refused(tmp_path):
    config = small_config("data")
    holder = Workdir(tmp_path)
    holder.claim(config)
    with pytest.raises(ValueError, match="another process is training in"):
        Workdir(tmp_path).claim(config)
    holder.release()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="'thesis.tex'"):
        Workdir(tmp_path).claim(small_config("data"))


def test_no_run_and_broken_config_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        Workdir(tmp_path).read_config()
    (tmp_path / "config.json").write_text('{\n"name": \n')
    with pytest.raises(ValueError, match=r"config.json, line 3: not JSON"):
        Workdir(tmp_path).read_config()


def test_metric_log_drops_what_is_done_again(tmp_path):
    log = MetricLog(tmp_path / "m.jsonl", tmp_path / "tb")
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    with open(tmp_path / "m.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    log = MetricLog(tmp_path / "m.jsonl", tmp_path / "tb", resume_step=2)
    log.write(3, {"loss": 33.0})
    log.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path / "m.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 33.0),
    ]


def test_newest_and_best_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step, best in enumerate([True, True, False, False, False], start=1):
        checkpoints.save(step, {"x": jnp.full(3, float(step))}, {"epoch": step}, best=best)
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir() if path.name.isdigit()) == [
        2,
        4,
        5,
    ]
    reader = Checkpoints(tmp_path / "c", read_only=True)
    assert reader.restore({"x": jnp.zeros(3)}, best=True)[0] == 2
    step, state, position = reader.restore({"x": jnp.zeros(3)})
    assert (step, state["x"][0], position) == (5, 5.0, {"epoch": 5})


FULL_DISK = """
import resource, signal, sys
import numpy as np, jax.numpy as jnp
from pathlib import Path
from ultra_hstu.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(Path(sys.argv[1]))
noise = np.random.default_rng(0).random(200_000).astype(np.float32)
checkpoints.save(1, {"x": jnp.asarray(noise)}, {"epoch": 1})
checkpoints.wait()
# Files cannot grow beyond: as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, {"x": jnp.asarray(noise + 1)}, {"epoch": 2})
    checkpoints.wait()
except OSError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
step, state, _ = Checkpoints(Path(sys.argv[1]), read_only=True).restore({"x": jnp.zeros(200_000)})
print("kept:", step, bool((np.asarray(state["x"]) == noise).all()))
"""


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "refused: a checkpoint could not be written to" in done.stdout, done.stdout + done.stderr
    assert "The last good checkpoint is" in done.stdout and "kept: 1 True" in done.stdout


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="a.json could not be written .*No space left.*Make room"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_whose_first_write_was_killed_is_no_stranger(tmp_path):
    (tmp_path / "config.json.partial").write_text("{")
    folder = Workdir(tmp_path)
    folder.claim(small_config("data"))
    folder.release()


def test_config_of_the_wrong_shape_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"config.json: config section model is 3"):
        Workdir(tmp_path).read_config()
