"""Records say where they come from, and grow."""

import json

from experiments.record import Record, read


def test_a_record_is_written_with_each_part(tmp_path):
    path = tmp_path / "folder" / "record.json"
    record = Record(path, config="a")
    assert not path.exists()
    record.add(steps=1)
    record.add(steps=2, loss=0.5)
    written = json.loads(path.read_text())
    assert (written["config"], written["steps"], written["loss"]) == ("a", 2, 0.5)
    assert written.keys() >= {"device", "versions", "commit", "command", "date", "xla_flags"}


def test_a_record_that_grows_keeps_what_it_holds(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"first": 1, "date": "long ago"}))
    Record(path, grows=True).add(second=2)
    written = read(path)
    assert (written["first"], written["second"]) == (1, 2) and written["date"] != "long ago"
    Record(path).add(third=3)
    assert "first" not in read(path)


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = Record(None)
    record.add(steps=1)
    assert record.values["steps"] == 1 and not list(tmp_path.iterdir())
    assert read(None) == read(tmp_path / "none.json") == {}
