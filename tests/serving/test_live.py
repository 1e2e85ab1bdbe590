"""A newer model takes the place of the one that answers: nothing is lost, nothing is mixed."""

import importlib.util
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from ultra_hstu.serving import schema

# Without checks of annotations: services here are stand-ins.
_SPEC = importlib.util.spec_from_file_location(
    "live", Path(schema.__file__).parent / "front" / "live.py"
)
live = sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(live)
Live, place_of = live.Live, live.place_of


class Named:
    """A service whose answers name the folder that it was loaded from."""

    def __init__(self, folder):
        if (Path(folder) / "damaged").exists():
            raise ValueError(f"{folder}: no checkpoint can be read")
        self.folder, self.data = folder, SimpleNamespace(step=len(Path(folder).name))
        self.warm = False

    def warm_up(self):
        self.warm = True

    def prepare(self, request):
        return (self.folder, request)

    def answer(self, queries):
        assert self.warm and all(folder == self.folder for folder, _ in queries)
        return [f"{Path(self.folder).name} {request}" for _, request in queries]


@pytest.fixture
def link(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "open_service", lambda folder, raw_dir, options: Named(folder))
    for name in ("old", "new", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "damaged").touch()
    (tmp_path / "current").symlink_to(tmp_path / "old")
    return tmp_path / "current"


def lead(link, name):
    other = link.with_name("other")
    other.symlink_to(link.with_name(name))
    other.replace(link)


def test_what_was_asked_before_is_answered_by_the_model_that_took_it(link):
    served = Live(str(link), None, None, page=False)
    assert served.version == "old:3" and not served.renew()
    first, second = served.prepare(1), served.prepare(2)
    lead(link, "new")
    assert served.renew() and served.version == "new:3"
    third = served.prepare(3)
    asked = [first, third, second]
    assert [one.model.version for one in asked] == ["old:3", "new:3", "old:3"]
    assert served.answer(asked) == ["old 1", "new 3", "old 2"]


def test_a_model_that_cannot_be_served_leaves_the_other_at_work(link, caplog):
    served = Live(str(link), None, None, page=False)
    lead(link, "broken")
    assert not served.renew() and not served.renew()
    assert served.version == "old:3" and "no checkpoint can be read" in served.problem
    assert caplog.text.count("old:3 goes on, its newer model cannot be served") == 1
    lead(link, "new")
    assert served.renew() and served.problem is None


def test_answers_are_those_of_the_version_that_they_name(link):
    """Threads ask while the model changes all the time."""
    served, wrong, done = Live(str(link), None, None, page=False), [], threading.Event()

    def ask(number):
        while not done.is_set():
            asked = served.prepare(number)
            (answer,) = served.answer([asked])
            if answer != f"{asked.model.version.partition(':')[0]} {number}":
                wrong.append(answer)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(20):
        lead(link, ("new", "old")[turn % 2])
        assert served.renew()
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_newest_finished_window_is_served(tmp_path):
    for number in (0, 1, 2):
        folder = tmp_path / f"window_{number:03d}"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if number < 2:
            (folder / "result.json").write_text("{}")
    assert place_of(str(tmp_path)).name == "window_001"
    for number in (0, 1):
        (tmp_path / f"window_{number:03d}" / "result.json").unlink()
    with pytest.raises(ValueError, match="has no finished window yet: train it first"):
        place_of(str(tmp_path))
