"""Prepared data that was damaged is noticed and prepared again; intact data is only read."""

import builtins
import fcntl
import os
import shutil

import numpy as np
import pytest

from tests.data.data_files import load
from tests.data.official_files import official
from ultra_hstu.config import SyntheticConfig
from ultra_hstu.data import npz, sums
from ultra_hstu.data import raw as raw_files
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.strings import STRINGS, pack, unpack
from ultra_hstu.data.sums import SUMS
from ultra_hstu.data.table import prepared as tables

FILES = {
    "ml-1m": ("interactions.npz", "reading.json", "catalog.npz", "contexts.npz", SUMS),
    "synthetic": ("*.array_record*", "dataset_info.json", "features.json", "catalog.npz", SUMS),
}
DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "bit": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
    "list": lambda data: b"[]",
    "gone": None,
}


SMALL = SyntheticConfig(users=4, length=4, items=20, categories=4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    raw = official("ml-1m", folder / "raw")
    return folder, raw, load(folder, "ml-1m", raw)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    return folder, None, load(folder, "synthetic", synthetic=SMALL)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("source", "pattern"), [(source, name) for source, names in FILES.items() for name in names]
)
def test_what_was_damaged_is_prepared_again(
    prepared, generated, tmp_path, caplog, source, pattern, damage
):
    folder, raw, before = prepared if source == "ml-1m" else generated
    shutil.copytree(folder / "prepared", tmp_path / "prepared")
    (path,) = (tmp_path / "prepared").rglob(pattern)
    data = path.read_bytes()
    if (change := DAMAGES[damage]) is None:
        path.unlink()
    else:
        path.write_bytes(change(data))
    after = load(tmp_path, source, raw, synthetic=SMALL)
    assert after.fingerprint() == before.fingerprint()
    if path.name != SUMS:
        assert f"{path.name} " in caplog.text and "prepared again" in caplog.text
    caplog.clear()
    load(tmp_path, source, raw, synthetic=SMALL)
    assert not caplog.text


def test_intact_data_is_read_without_writing(prepared, monkeypatch):
    folder, raw, before = prepared
    (folder / "prepared/ml-1m.lock").unlink(missing_ok=True)
    listed = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))

    def read_only(path, mode="r", *arguments, **options):
        if set(mode) & set("wax+"):
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, mode, *arguments, **options)

    opened = builtins.open
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", read_only)
        for module, name in ((os, "mkdir"), (os, "replace"), (os, "rename"), (fcntl, "flock")):
            patch.setattr(module, name, lambda *_, **__: pytest.fail("the disk is read-only"))
        assert load(folder, "ml-1m", raw).fingerprint() == before.fingerprint()
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == listed
    (path,) = (folder / "prepared").rglob("catalog.npz")
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", read_only)
        with pytest.raises(
            ValueError, match="catalog.npz has changed .*, and .* cannot be written .*data_dir"
        ):
            load(folder, "ml-1m", raw)
    path.write_bytes(data)


def test_a_download_is_read_without_a_lock(tmp_path, monkeypatch):
    raw = official("ml-1m", tmp_path / "prepared/raw/ml-1m")
    names = ["ratings.dat", "movies.dat", "users.dat"]
    sums.write(raw, sums.checksums(raw, names))
    before = load(tmp_path, "ml-1m")
    with monkeypatch.context() as patch:
        for module in (raw_files, tables):
            patch.setattr(module, "locked", lambda *_: pytest.fail("a lock was taken"))
        assert load(tmp_path, "ml-1m").fingerprint() == before.fingerprint()
    (raw / "users.dat").write_bytes(b"1::F::1::10::48067\n")
    with pytest.raises(
        ValueError, match="users.dat has changed since it was downloaded: .*moved to"
    ):
        load(tmp_path, "ml-1m")


@pytest.mark.parametrize(
    "values",
    [[], [""], ["a"], ["", "ü", "x" * 300, "a\nb", "東京"]],
)
def test_strings_are_packed_into_one_buffer(tmp_path, values):
    strings = np.array(values, STRINGS)
    assert unpack(*pack(strings)).tolist() == values
    npz.save(tmp_path / "file", {"one": strings, "two": np.arange(3)})
    with npz.reading(tmp_path / "file", "readable", "write it") as arrays:
        assert arrays["one"].tolist() == values and arrays["two"].tolist() == [0, 1, 2]
    buffer, ends = pack(strings)
    for wrong in (ends[:-1], ends + 1, ends[::-1]):
        if values and "x" in "".join(values):
            with pytest.raises(ValueError, match="do not match"):
                unpack(buffer, wrong)


def test_a_catalogue_with_wrong_contents_is_named(tmp_path):
    path = tmp_path / "catalog.npz"
    ids = np.array([-1, 3, 5])
    for arrays, problem in (
        ({"raw_ids": ids[::-1]}, "not ascending"),
        ({"raw_ids": ids.astype(float)}, "float64"),
        ({"raw_ids": ids[:1]}, "shape"),
        ({"titles": ids}, "raw_ids"),
        ({"raw_ids": ids, "titles": np.array(["", "a"], STRINGS)}, "2 titles for 3 ids"),
    ):
        npz.save(path, arrays)
        with pytest.raises(
            ValueError, match=f"catalog.npz is not a readable cat.*{problem}.*: train"
        ):
            Catalog.load(path)
    # As it was written before strings had any length.
    np.savez(path, raw_ids=np.array(["", "a", "b"]), titles=np.array(["", "A", "B"]))
    assert Catalog.load(path).titles == ("", "A", "B")
    assert Catalog.load(path).find(["b", "c"]).tolist() == [2, 0]


def test_ids_of_any_size_are_looked_up():
    catalog = Catalog.from_ids(np.array([3, 2**63 - 1]))
    assert catalog.find(["3", str(2**63 - 1), str(2**63), str(-(2**63))]).tolist() == [1, 2, 0, 0]
    assert catalog.find([2**63 - 1, "3", 2**64]).tolist() == [2, 1, 0]
    assert catalog.find([2**64, 3]).tolist() == [0, 1]
