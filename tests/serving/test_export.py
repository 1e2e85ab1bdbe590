"""A scorer in a file: it runs where this code is not, and says the same.

A damaged or foreign one is named.
"""

import io
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranking import rank_data
from tests.serving import fuzzed
from tests.serving.small_serving import built, full_pass, unchecked
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.serving import artefact, export
from ultra_hstu.serving.compiled import CompiledRanker

FORM = "mixture"  # with contextual tokens, interleaved
READ = """
import sys
sys.modules["ultra_hstu"] = sys.modules["kernels"] = None  # as where they are not installed
import numpy as np
import artefact
scorer = artefact.Scorer(sys.argv[1])
given = np.load(sys.argv[2])
names = {name.split("/")[1] for name in given if name.startswith("channels/")}
channels = {
    name: {key.split("/")[2]: given[key] for key in given if key.startswith(f"channels/{name}/")}
    for name in names
}
history = {"channels": channels, "context_BC": given["context_BC"], "now_B": given["now_B"]}
cache = scorer.encode(history)
prefix = "candidates/"
candidates = {key.removeprefix(prefix): given[key] for key in given if key.startswith(prefix)}
np.save(sys.argv[3], scorer.score(cache, candidates))
imported = [name for name, module in sys.modules.items() if module is not None]
assert not [name for name in imported if name.startswith(("flax", "ultra_hstu", "kernels"))]
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "scorer.zip"
    task, model, _ = built(FORM)
    export.save(
        path,
        model,
        config=task.config,
        catalog=task.interactions.catalog,
        users=8,
        events=40,
        candidates=30,
        micro_batch=20,
    )
    return path


@pytest.fixture(scope="module")
def scorer(path):
    return artefact.Scorer(path)


def inputs():
    history, candidates, _ = full_pass(FORM)
    channels = {
        name: {key: np.asarray(value) for key, value in vars(events).items()}
        for name, events in history.channels.items()
    }
    asked = {key: np.asarray(value) for key, value in vars(candidates).items() if value is not None}
    return {"channels": channels, "context_BC": history.context_BC, "now_B": history.now_B}, asked


def test_runs_without_the_training_code(path, tmp_path):
    history, candidates = inputs()
    flat = {
        f"channels/{name}/{key}": value
        for name, events in history["channels"].items()
        for key, value in events.items()
    }
    flat |= {f"candidates/{key}": value for key, value in candidates.items()}
    np.savez(tmp_path / "in.npz", context_BC=history["context_BC"], now_B=history["now_B"], **flat)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PYTHONPATH": str(path)
    }
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), "in.npz", "out.npy"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    want = full_pass(FORM)[2]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), want, atol=1e-5 * np.abs(want).max())


def test_raw_ids_stand_for_dense_ones(scorer, monkeypatch):
    history, candidates = inputs()
    want = scorer.score(scorer.encode(history), candidates)
    raw = np.array(["", *(f"item {number:02}" for number in range(30))])
    monkeypatch.setattr(scorer, "raw_ids", raw)

    def with_raw(columns, name):
        rest = {key: value for key, value in columns.items() if key != name}
        return rest | {"items": raw[columns[name]].tolist()}

    channels = {name: with_raw(one, "item_E") for name, one in history["channels"].items()}
    cache = scorer.encode(history | {"channels": channels})
    np.testing.assert_array_equal(scorer.score(cache, with_raw(candidates, "item_C")), want)
    assert scorer.items([]).shape == (0,)
    with pytest.raises(ValueError, match="unknown item 'item 99', and 0 more"):
        scorer.score(cache, with_raw(candidates, "item_C") | {"items": ["item 99"]})


def test_what_it_says_of_itself(scorer):
    task, _, _ = built(FORM)
    about = scorer.metadata
    assert about["capacity"] == {
        "users": 8,
        "candidates": 40,
        "events": {"consumption": 40, "engagement": 40},
    }
    assert (
        about["config"]["name"] == task.config.name
        and about["config"]["rank"]["targets"] == task.config.rank.targets
    )
    assert (about["tasks"], about["contextual"]) == (
        ["rating_at_least_4", "rating"],
        ["age", "region"],
    )
    assert scorer.items([1, 30]).tolist() == [1, 30]
    with pytest.raises(ValueError, match="unknown item 31, and 0 more: the model has 30 items"):
        scorer.items([1, 31])
    with pytest.raises(ValueError, match="raw ids of this scorer are int64, got <U1"):
        scorer.items(["1"])


def test_a_truncated_file_is_named(path, tmp_path):
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "short.zip").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="short.zip is no scorer that can be read"):
            artefact.Scorer(tmp_path / "short.zip")
    with pytest.raises(ValueError, match="missing.zip is no scorer"):
        artefact.Scorer(tmp_path / "missing.zip")
    with zipfile.ZipFile(path) as file:
        at = file.getinfo("params.npz").header_offset + 300
    (tmp_path / "flipped.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match="flipped.zip is no scorer.*CRC"):
        artefact.Scorer(tmp_path / "flipped.zip")


def changed(path, other, **parts):
    """A copy of a scorer with other parts: of bytes, or of the old bytes; None leaves one out."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as file:
        for name in source.namelist():
            new = parts.get(name.partition(".")[0], source.read(name))
            if content := new(source.read(name)) if callable(new) else new:
                file.writestr(name, content)
    return other


def with_metadata(**fields):
    return lambda content: json.dumps(json.loads(content) | fields)


def with_array(member, array):
    """Of an npz file, one array in place of another: an array, or the bytes of its file."""

    def change(content):
        if isinstance(array, bytes):
            given = array
        else:
            np.save(buffer := io.BytesIO(), array)
            given = buffer.getvalue()
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(made, "w") as file:
            for name in source.namelist():
                file.writestr(name, given if name == f"{member}.npy" else source.read(name))
        return made.getvalue()

    return change


def npy(header):
    """An npy file with this head and eight bytes."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8)


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1000000), }"
SIZES = dict(items=30, signals=[11, 3], features=[5], contextual=[4, 3])
ODD = [
    (dict(metadata=with_metadata(version=2)), "it has version 2, and this reader takes 1: export"),
    (dict(metadata=with_metadata(format="other")), "it holds a 'other', no 'ultra_hstu scorer'"),
    (dict(metadata=b"[]"), r"metadata.json: metadata is \[\], no dict"),
    (dict(metadata=b"null"), "metadata.json: metadata is None, no dict"),
    (dict(metadata=b"{"), "metadata.json: Expecting property name"),
    (dict(metadata=b"\xff"), "metadata.json: 'utf-8' codec can't decode"),
    (dict(metadata=b"[" * 10**5), "metadata.json: maximum recursion|metadata.json: Recursion"),
    (dict(metadata=with_metadata(sizes=[])), r"metadata.sizes is \[\], no dict"),
    (dict(metadata=with_metadata(sizes=SIZES | dict(items=-1))), "sizes.items is -1, no int"),
    (dict(metadata=with_metadata(sizes=SIZES | dict(signals=[11, "3"]))), r"signals\[1\] is '3'"),
    (dict(metadata=with_metadata(sizes=SIZES | dict(items=29))), "items.npz: 30 slots, but raw"),
    (dict(metadata=with_metadata(channels=dict(a=1.5))), "metadata.channels.a is 1.5, no int"),
    (dict(metadata=with_metadata(tasks="rating")), "metadata.tasks is 'rating', no list"),
    (dict(metadata=None), "metadata.json: \"There is no item named 'metadata.json'"),
    (dict(params=with_array("3", npy(HUGE))), r"3.npy: shape \(1000000000000, 1000000\)"),
    (dict(params=with_array("3", npy(HUGE.replace("(1", "(-1")))), "params.npz: 3.npy: shape"),
    (dict(params=with_array("3", npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"))),
     "params.npz: 3.npy: Object arrays cannot be loaded"),
    (dict(params=with_array("3", npy("__import__('os')"))), "params.npz: 3.npy: malformed"),
    (dict(params=with_array("3", b"no array at all")), "3.npy: the magic string is not correct"),
    (dict(params=with_array("2", np.float32([1, np.nan]))), "array 2 holds NaN or infinity: train"),
    (dict(params=with_array("2", np.float32([-np.inf]))), "array 2 holds NaN or infinity"),
    (dict(params=b"no zip"), "params.npz: File is not a zip file"),
    (dict(items=with_array("raw_ids", np.arange(31)[::-1].copy())), "raw_ids do not ascend"),
    (dict(items=with_array("raw_ids", np.zeros((31, 2)))), "items.npz: 31 slots, but raw_ids of"),
]  # fmt: skip
ODD_PROGRAMS = [
    (dict(params=with_array("2", np.float32([1, 2]))), "not of one export: other parameters"),
    (dict(encode=b"\x00" * 50), "encode.bin: "),
    (dict(score=b""), "score.bin: "),
    (dict(score=lambda content: content[: len(content) // 2]), "score.bin: "),
    (dict(encode=lambda content: content.replace(b"ML\xefR", b"MLxR")), "encode.bin: "),
    (dict(metadata=with_metadata(
        capacity=dict(users=9, candidates=40, events=dict(consumption=40, engagement=40)))),
     "not of one export: sizes"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "message"), ODD + ODD_PROGRAMS)
def test_an_odd_part_is_named(path, tmp_path, parts, message):
    other = changed(path, tmp_path / "odd.zip", **parts)
    with pytest.raises(ValueError, match=f"odd.zip is no scorer that can be read: .*({message})"):
        artefact.Scorer(other)


@pytest.mark.parametrize(("parts", "message"), ODD)
def test_an_odd_part_is_not_served(path, tmp_path, parts, message):
    other = changed(path, tmp_path / "odd.zip", **parts)
    with pytest.raises(ValueError, match=f"odd.zip is no scorer that can be served.*({message})"):
        export.load(other)


def test_a_compressed_part_is_named(path, tmp_path):
    """What is stored as it is takes no more memory than the file has bytes."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "bomb.zip", "w") as file:
        for name in source.namelist():
            packed = zipfile.ZIP_DEFLATED if name == "params.npz" else zipfile.ZIP_STORED
            file.writestr(name, source.read(name), packed)
    with pytest.raises(ValueError, match="params.npz: it is compressed"):
        artefact.Scorer(tmp_path / "bomb.zip")


@given(st.integers(0, 10**9), st.binary(min_size=1, max_size=8))
@settings(fuzzed.BOUNDED, max_examples=60)
def test_any_damage_is_noticed_or_harmless(path, tmp_path, scorer, place, noise):
    """Without a checksum for what is between the parts, some damage changes nothing that counts."""
    whole = path.read_bytes()
    at = place % len(whole)
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    try:
        with zipfile.ZipFile(damaged) as file:
            metadata, items, params = artefact.read(file)
    except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError):
        with pytest.raises(ValueError, match="damaged.zip is no scorer that can be served"):
            export.load(damaged)
        return
    assert metadata == scorer.metadata
    np.testing.assert_array_equal(items["raw_ids"], scorer.raw_ids)
    for given_, read in zip(params, scorer._params, strict=True):
        np.testing.assert_array_equal(given_, read)


def test_another_device_is_named(path, monkeypatch):
    monkeypatch.setattr(artefact, "_platform", lambda: "cuda")
    with pytest.raises(
        ValueError, match="was made for cpu, and the device here is cuda: export it for cuda"
    ):
        artefact.Scorer(path)


def test_bad_requests_are_named(scorer):
    history, candidates = inputs()
    for change, message in [
        (dict(now_B=np.zeros(9, int)), "9 users are more than the 8 of this artefact"),
        (dict(context_BC=np.full((7, 2), 99)), r"context_BC\[0, 0\] is 99, not in 0..5"),
        (dict(channels={}), r"has the channels \[\], the model"),
        (
            dict(
                channels=history["channels"]
                | {"engagement": history["channels"]["engagement"] | {"offsets": [0, 1]}}
            ),
            "offsets must have the shape",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            scorer.encode(history | change)
    many = np.zeros(48, int)
    events = {
        "item_E": many + 1,
        "time_E": many,
        "signal_ES": np.zeros((48, 2), int),
        "feature_EF": np.zeros((48, 1), int),
    }
    events["offsets"] = np.arange(9) * 6
    wide = {
        "channels": {name: events for name in history["channels"]},
        "context_BC": np.zeros((8, 2), int),
        "now_B": np.zeros(8, int),
    }
    with pytest.raises(
        ValueError,
        match="48 events of consumption are more than the 40 of this artefact: "
        "send fewer, or export",
    ):
        scorer.encode(wide)
    many = dict(
        item_C=np.ones(41, int), feature_CF=np.zeros((41, 1), int), time_C=np.zeros(41, int)
    )
    for change, message in [
        (dict(item_C=np.full(29, 31)), r"item_C\[0\] is 31, not in 1..30"),
        (dict(item_C=np.full(29, 1.0)), "item_C must hold integers, got float64"),
        (many | dict(offsets=np.array([0, 41])), "41 candidates are more than the 40"),
        (dict(offsets=np.array([1, 0])), "must start at 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            scorer.score([], candidates | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(candidates=0), "candidates=0 must be at least 1"),
        (dict(candidates=5, kind="int2"), "kind='int2' must be one of"),
    ],
)
def test_bad_exports_are_named(tmp_path, options, message):
    task, model, _ = built(FORM)
    with pytest.raises(ValueError, match=message), unchecked():
        export.save(
            tmp_path / "x.zip",
            model,
            config=task.config,
            catalog=task.interactions.catalog,
            **options,
        )
    assert not list(tmp_path.iterdir())


def test_baselines_that_keep_no_keys_are_not_served():
    """DIN and softmax attention: by name, where a model is loaded and where it is exported."""
    for model in (dict(kind="din", ffn_width=4), dict(attention="masked_softmax")):
        task = RankingTask.of(rank_data.config(model=model), rank_data.interactions((9, 8)))
        ranker = task.recipe.build(0)
        name = next(iter(model))
        for refused in (lambda: CompiledRanker(ranker), lambda: export._portable(ranker)):  # noqa: B023
            with pytest.raises(NotImplementedError, match=f"model.{name}=.* neither served nor"):
                refused()


def test_no_kernel_is_written_into_a_file():
    """Whatever the model names, and where it names the best of the device: JAX keeps plain XLA."""
    model = dict(implementation="triton", layer_implementation="mosaic", feed_forward=16)
    task = RankingTask.of(rank_data.config(model=model), rank_data.interactions((9, 8)))
    programs, params = export._portable(task.recipe.build(0))
    named = {
        (type(module).__name__, module.implementation)
        for _, module in nnx.iter_modules(programs.model(params, None))
        if hasattr(module, "implementation")
    }
    assert named == {(name, "xla") for name in ("HSTU", "ProductionLayer", "FeedForward")}
