"""A run has its folder for itself: another configuration, process or folder is refused."""

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.command import ConfigParser, PathParser
from experiments.record import Record
from tests.small_run import small_config, with_
from ultra_hstu.checkpoint import Checkpoints
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.report import MetricLog, draw_curves, read_metrics
from ultra_hstu.workdir import Workdir, remedy_of, write_json


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    config = small_config("data")
    first = Workdir(tmp_path / "run")
    first.claim(config)
    first.release()
    with pytest.raises(ValueError, match=r"another configuration.*\n  model.width: 16 -> 32\n"):
        Workdir(tmp_path / "run").claim(with_(config, model__width=32))


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


def damaged(path, text):
    path.write_bytes(text)
    return path


WHOLE = {"name": "a"} | {name: {} for name in ("data", "model", "loss", "optim", "train")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "line 1: not JSON"),
        (b"[]", "line 1: [] is not a JSON object"),
        (b"{}", "line 1: 'name' is None, not str"),
        (b"null", "line 1: None is not a JSON object"),
        (b'{\n"name": "\xff"}', "line 2: not UTF-8"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b"1" * 5000, "line 1: not JSON"),
        (json.dumps(WHOLE | {"model": 3}).encode(), "line 1: 'model' is 3, not dict"),
        (json.dumps(WHOLE | {"model": {"channels": []}}).encode(), "model.channels=[] is not"),
        (json.dumps(WHOLE | {"loss": {"temperature": 10**400}}).encode(), "loss.temperature=100"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path, text, message):
    file = damaged(tmp_path / "config.json", text)
    with pytest.raises(ValueError) as error:
        Workdir(tmp_path).read_config()
    assert str(error.value).startswith(str(file)) and message in str(error.value)


@pytest.mark.parametrize("text", [b"", b"[]", b'{"users": 1}', b'{"users": "1"}', b"\xff", None])
def test_a_damaged_file_about_the_data_is_named(tmp_path, text):
    if text is not None:
        damaged(tmp_path / "data.json", text)
    with pytest.raises(ValueError, match=f"{tmp_path}/data.json.*: delete it, and the same train"):
        Workdir(tmp_path).read_data()


GOOD = b'{"step": 1, "epoch": 1, "loss": 2.0, "hr@10": null}\n'


@pytest.mark.parametrize("line", [b"null", b"[]", b"\xff", b'{"loss": 1}', b'{"step": 1', b"{}"])
def test_damaged_metrics_are_named(tmp_path, caplog, line):
    file = damaged(tmp_path / "metrics.jsonl", GOOD + line + b"\n" + GOOD + b'{"step": 2, "lo')
    with pytest.raises(ValueError, match=f"{file}, line 2: .*: delete this line"):
        read_metrics(file)
    log = MetricLog(file, tmp_path / "tb", resume_step=1)
    log.close()
    assert "metrics.jsonl, line 2: " in caplog.text and "line 4" not in caplog.text
    assert file.read_bytes() == 2 * GOOD and len(read_metrics(file)) == 2
    draw_curves({"run": file}, tmp_path / "curves.png")


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "back\\slash"])
def test_paths_that_orbax_cannot_read_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="checkpoints cannot be read from a path with .*: choose"):
        Workdir(tmp_path / name / "run")


@pytest.mark.parametrize("path", ["gs://b/run", "s3://b/run", "file:///tmp/run", "gs:/b/run"])
def test_urls_are_refused(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config("data")
    for refused in (
        lambda: Workdir(path),
        lambda: Record(path),
        lambda: PathParser().parse(path),
        lambda: with_(config, data__raw_dir=path).validate(),
        lambda: with_(config, data__data_dir=path).validate(),
        lambda: load_interactions(dataclasses.replace(config.data, data_dir=path)),
        lambda: load_interactions(dataclasses.replace(config.data, source="ml-1m", raw_dir=path)),
    ):
        with pytest.raises(ValueError, match="must be a path of this machine, not a URL"):
            refused()
    with pytest.raises(ValueError, match="/gs/b/run: checkpoints cannot be read .* with gs"):
        Workdir("/gs/b/run")
    assert not list(tmp_path.iterdir())


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Workdir("~/run").path == tmp_path / "run"
    assert PathParser().parse("~/run") == f"{tmp_path}/run" and PathParser().parse("-") == "-"
    Record("~/record.json").add(done=True)
    config = dataclasses.replace(small_config("~/data").data, data_dir="~/data")
    load_interactions(config)
    (tmp_path / "own.py").write_text("def get_config(): return {'name': 'mine'}")
    with warnings.catch_warnings(action="ignore"):  # of ml_collections: load_module
        assert ConfigParser("config").parse("~/own.py").name == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "own.py", "record.json"]
    with pytest.raises(ValueError, match="~no_such_user_/run: .* Write the folder out"):
        Workdir("~no_such_user_/run")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Make room and start the same command again."),
        (errno.EACCES, "Make the folder writable and start the same command again."),
        (errno.EIO, "Mend that and start the same command again."),
    ],
)
def test_the_remedy_follows_from_the_error(tmp_path, monkeypatch, number, remedy):
    def fails(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=f"could not be written .*{os.strerror(number)}.*{remedy}"):
        write_json(tmp_path / "a.json", {})
    wrapped = RuntimeError("no cause is named here")
    wrapped.__cause__ = OSError(number, os.strerror(number))
    assert remedy_of(wrapped) == remedy


def test_a_full_disk_is_one_error(tmp_path):
    """Neither a thread of TensorBoard nor the end of the program say more."""
    code = """
import resource, signal, sys
from pathlib import Path
from ultra_hstu.report import MetricLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
log = MetricLog(folder / "m.jsonl", folder / "tb")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    for step in range(100):
        log.write(step, {"loss": 1.0, "hr@10": 0.5})
except OSError as error:
    print(error)
log.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert "m.jsonl could not be written ([Errno 27] File too large)" in done.stdout, done.stderr
    assert not done.stderr


def test_a_lost_catalogue_is_written_again(tmp_path, caplog):
    config = small_config(tmp_path / "data")
    data = load_interactions(config.data)
    folder = Workdir(tmp_path)
    folder.claim_data(data)
    whole = folder.catalog.read_bytes()
    for damage in (whole[:100], b"", whole.replace(b"raw_ids", b"raw_idz"), None):
        if damage is None:
            dataclasses.replace(data.catalog, raw_ids=data.catalog.raw_ids[:-1]).save(
                folder.catalog
            )
        else:
            folder.catalog.write_bytes(damage)
        with pytest.raises(ValueError, match="catalog.npz"):
            folder.read_catalog()
        caplog.clear()
        folder.claim_data(data)
        assert "the catalogue is written again from the data: " in caplog.text
        assert folder.read_catalog().num_items == data.num_items


def test_every_flipped_bit_of_a_catalogue_is_noticed(tmp_path):
    """The titles too, which a reader could take for absent."""
    catalog = Catalog.from_ids(np.arange(1, 40), [f"title {i}" for i in range(39)])
    catalog.save(tmp_path / "c.npz")
    whole, rng = (tmp_path / "c.npz").read_bytes(), np.random.default_rng(0)
    for bit in rng.choice(8 * len(whole), 300, replace=False):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "c.npz").write_bytes(flipped)
        try:
            found = Catalog.load(tmp_path / "c.npz")
        except ValueError as error:
            assert "c.npz" in str(error)
        else:  # a date in the headers, say
            assert found.titles == catalog.titles
            assert np.array_equal(found.raw_ids, catalog.raw_ids)
