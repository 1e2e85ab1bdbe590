"""A run has its folder for itself: another configuration, process or folder is refused."""

import dataclasses
import errno
import functools
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import command
from experiments.command import ConfigParser, PathParser
from experiments.record import Record
from tests.small_run import small_config, with_
from ultra_hstu import paths, provenance, starts
from ultra_hstu.checkpoint import Checkpoints, abstract
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.digests import digests
from ultra_hstu.json_files import remedy_of, write_json
from ultra_hstu.report import MetricLog, draw_curves, make_console, read_metrics
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.serving.service import open_service
from ultra_hstu.workdir import Workdir


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    config = small_config("data")
    first = Workdir(tmp_path / "run")
    first.claim(config)
    first.release()
    (first.checkpoints / "8").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"another configuration.*\n  model.width: 16 -> 32\n"):
        Workdir(tmp_path / "run").claim(with_(config, model__width=32))


def test_a_folder_without_a_checkpoint_takes_a_new_configuration(tmp_path, caplog):
    first, config = Workdir(tmp_path), small_config("data")
    first.claim(config)
    first.data.write_text('{"users": 1}')
    first.starts.write_text('{"runs": []}')
    first.release()
    (first.checkpoints / "0").mkdir(parents=True)  # the trial of a killed run
    second = Workdir(tmp_path)
    second.claim(with_(config, model__width=32))
    second.release()
    assert f"{tmp_path} has no checkpoint" in caplog.text and "width: 16 -> 32" in caplog.text
    assert second.read_config().model.width == 32 and not second.checkpoints.exists()
    assert not second.data.exists() and second.starts.exists()


def test_overwrite_removes_a_run_and_nothing_else(tmp_path):
    folder, config = Workdir(tmp_path), small_config("data")
    folder.claim(config)
    folder.release()
    (folder.checkpoints / "8").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="start over in this one with --overwrite"):
        folder.claim(with_(config, model__width=32))
    folder.claim(with_(config, model__width=32), overwrite=True)
    folder.release()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", "config.json", "notes.txt"}
    folder.config.write_text('{"architectures": []}')  # somebody else's
    with pytest.raises(ValueError, match="this is no run: delete it by hand"):
        folder.claim(config, overwrite=True)


def test_every_start_is_written_down(tmp_path, monkeypatch):
    folder = Workdir(tmp_path)
    with starts.recorded(folder):
        (entry,) = starts.read_starts(folder)
        assert entry["outcome"] == starts.STARTED and "ended" not in entry
    with pytest.raises(FloatingPointError), starts.recorded(folder):
        raise FloatingPointError("the loss is nan")
    first, second = starts.read_starts(Workdir(tmp_path))
    assert (first["outcome"], second["outcome"]) == ("done", "FloatingPointError: the loss is nan")
    for name in ("command", "commit", "versions", "device", "started", "ended", "seconds"):
        assert first[name] is not None and name in second, name
    folder.starts.write_text("{")
    with pytest.raises(ValueError, match="run.json, line 1: not JSON .*: delete it"):
        with starts.recorded(folder):
            pass


def test_a_folder_of_several_seeds_names_them(tmp_path):
    config = small_config("data")
    for seed in (43, 7):
        folder = Workdir(tmp_path / f"seed_{seed}")
        folder.claim(with_(config, train__seed=seed))
        folder.release()
    (tmp_path / "seed_of_doubt").mkdir()
    parent = Workdir(tmp_path)
    assert list(parent.seeds) == [7, 43] and parent.seeds[7].read_config().train.seed == 7
    for refused in (
        parent.read_config,
        lambda: parent.claim(config),
        lambda: open_service(str(tmp_path)),
        lambda: RecommendationModel(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"runs of 2 seeds .seed_7, seed_43.: .*/seed_7"):
            refused()


def test_a_run_is_evaluated_in_one_way(tmp_path):
    """Its best epoch was chosen so; runs from before there was a choice have the defaults."""
    config = small_config("data")
    first = Workdir(tmp_path)
    first.claim(config)
    first.release()
    first.result.write_text("{}")
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
from ultra_hstu import provenance
from ultra_hstu.checkpoint import Checkpoints, abstract
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
    folder = Workdir(tmp_path / "run")
    folder.claim(config)
    folder.claim_data(data)
    folder.release()
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
    folder.release()


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


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Checkpoints of steps 1 and 2 with noise in them, and the state of each."""
    folder, rng = tmp_path_factory.mktemp("two_steps") / "c", np.random.default_rng(0)
    noise = [jnp.asarray(rng.normal(size=(40, 30)), jnp.float32) for _ in range(2)]
    states = [{"x": one, "step": jnp.int32(number)} for number, one in enumerate(noise, start=1)]
    checkpoints = Checkpoints(folder)
    for step, state in enumerate(states, start=1):
        checkpoints.save(step, state, {"epoch": step, "loss": 0.1 * step}, best=step == 1)
    checkpoints.close()
    return folder, states


def restored(folder, **options):
    empty = {"x": jnp.zeros((40, 30)), "step": jnp.int32(0)}
    return Checkpoints(folder, read_only=True).restore(abstract(empty), **options)


def assert_intact(found, states):
    """Whatever was read is what was written at that step."""
    assert found.position == {"epoch": found.step, "loss": 0.1 * found.step}
    jax.tree.map(np.testing.assert_array_equal, found.state, states[found.step - 1])


def test_flipped_bits_are_never_restored(two_steps, tmp_path, caplog):
    folder, states = two_steps
    shutil.copytree(folder, tmp_path / "c")
    files = [path for path in (tmp_path / "c" / "2").rglob("*") if path.is_file()]
    largest, rng = max(files, key=lambda path: path.stat().st_size), np.random.default_rng(0)
    steps = []
    for file in [*files, *[largest] * 12]:
        whole = file.read_bytes()
        flipped, bit = bytearray(whole), rng.integers(8 * max(1, len(whole)))
        if whole:
            flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        found = restored(tmp_path / "c")
        file.write_bytes(whole)
        assert_intact(found, states)
        steps.append(found.step)
    assert steps[-12:].count(1) >= 10 and "x changed since" in caplog.text  # two were in no array


def test_a_damaged_best_checkpoint_gives_way_to_the_newest(two_steps, tmp_path, caplog):
    folder, states = two_steps
    shutil.copytree(folder, tmp_path / "c")
    assert restored(tmp_path / "c", best=True).step == 1
    (tmp_path / "c" / "1" / "position" / "metadata").write_text("{}")
    assert_intact(restored(tmp_path / "c", best=True)._replace(step=2), states)
    assert "taking the newest, of step 2, in place of the best: " in caplog.text


def test_a_position_that_changed_is_not_restored(two_steps, tmp_path, caplog):
    folder, states = two_steps
    shutil.copytree(folder, tmp_path / "c")
    file = tmp_path / "c" / "2" / "position" / "metadata"
    whole = json.loads(file.read_text())
    for name, value in {
        "epoch": 3,
        "epocs": 2,
        "hashes": {},
        "best_step": [2],
        "sha256": "",
    }.items():
        file.write_text(json.dumps(whole | {name: value}))
        assert_intact(restored(tmp_path / "c"), states)
        assert "its position changed since it was written" in caplog.text
        caplog.clear()
    for text in ("[]", "", "{}", "null"):
        file.write_text(text)
        assert restored(tmp_path / "c").step == 1 and "trying the one before it" in caplog.text
    for name in ("hashes", "sha256"):
        del whole[name]
    file.write_text(json.dumps(whole))
    assert restored(tmp_path / "c").step == 2
    assert "of an older version, without hashes" in caplog.text


def test_hashes_are_the_same_on_every_mesh():
    rng, mesh = np.random.default_rng(0), jax.make_mesh((2, 4), ("a", "b"))
    x = rng.normal(size=(8, 16)).astype(np.float32)
    place = functools.partial(jax.sharding.NamedSharding, mesh)
    spec = jax.sharding.PartitionSpec
    expected = digests({"x": jnp.asarray(x)})
    for where in (spec(), spec("a"), spec("b", "a"), spec(None, ("a", "b")), spec(("b", "a"))):
        assert digests({"x": jax.device_put(x, place(where))}) == expected
    assert digests({"x": jnp.pad(jnp.asarray(x), [(0, 5), (0, 0)])}) == expected
    swapped = x.copy()
    swapped[3, [1, 2]] = x[3, [2, 1]]
    moved = np.roll(x, 1, axis=0)
    assert len({digests({"x": jnp.asarray(one)})["x"] for one in (x, swapped, moved)}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (0, 3)])
def test_every_bit_counts(dtype, shape):
    x = np.random.default_rng(0).integers(0, 2, shape).astype(jnp.dtype(dtype))
    whole = digests({"x": jnp.asarray(x)})
    assert whole == digests({"x": jnp.asarray(x)}) and len(whole["x"]) == 16
    for i in range(x.size):
        changed = x.copy()
        changed.reshape(-1)[i] = not changed.reshape(-1)[i]
        assert digests({"x": jnp.asarray(changed)}) != whole


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    def git(*arguments, cwd):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q", cwd=tmp_path)
    (tmp_path / ".gitignore").write_text("installed")
    git("add", ".", cwd=tmp_path)
    git("commit", "-qm", "another project", cwd=tmp_path)
    monkeypatch.delenv("ULTRA_HSTU_COMMIT", raising=False)
    source = Path(provenance.__file__)
    here = git("rev-parse", "--short=12", "HEAD", cwd=source.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert provenance.provenance()["commit"].rstrip("+") == here
    (tmp_path / "installed").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "installed" / "provenance.py"))
    shutil.copy(source, tmp_path / "installed")
    assert provenance.provenance()["commit"] == "unknown"


def test_output_may_be_closed_or_narrow(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    monkeypatch.setattr(sys, "stderr", None)
    command.prepare_output()
    make_console().print("Am\u00e9lie")
    narrow.flush()
    assert narrow.buffer.getvalue() == b"Am\\xe9lie\n"
    print("nowhere", file=sys.stderr)
    sys.stderr.close()


def test_a_reader_that_closes_the_output_is_named(monkeypatch, capfd):
    """Rich would end the program without a word."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    console = make_console()
    console.file = Closed()
    with pytest.raises(BrokenPipeError):
        console.print("loss 0.5")


def test_prepared_data_does_not_follow_the_current_folder(tmp_path, monkeypatch, caplog):
    """The variable, then the user's data folder; ./data, the default once, is named."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # which the standard says to ignore
    monkeypatch.setenv(paths.DATA_VARIABLE, "~/mine")
    assert paths.data_folder(None) == tmp_path / "home" / "mine"
    assert paths.data_folder("elsewhere") == Path("elsewhere")
    monkeypatch.delenv(paths.DATA_VARIABLE)
    wanted = tmp_path / "home" / ".local" / "share" / "ultra-hstu" / "data"
    (tmp_path / "data" / "synthetic-0123").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(small_config("unused").data, data_dir=None)
    load_interactions(config)
    assert f"{tmp_path}/data holds data of synthetic, which is not read: " in caplog.text
    assert any(wanted.glob("synthetic-*")) and len(list((tmp_path / "data").iterdir())) == 1
    caplog.clear()
    monkeypatch.chdir(tmp_path / "home")
    load_interactions(config)
    assert not caplog.text
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(ValueError, match="no folder for prepared data .no home.: name one with"):
        paths.data_folder(None)
