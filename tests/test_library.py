"""What docs/library.md calls beside what other tests cover: sequences, and data in memory."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from tests.small_run import small_config
from ultra_hstu import Interactions, Sequences, fit, load_interactions
from ultra_hstu.tasks import of_run
from ultra_hstu.workdir import Workdir


def test_sequences_of_lengths():
    made = Sequences.of([2, 0, 3], times=[10, 40, 20, 20, 90], num_rows=7)
    assert made.offsets.tolist() == [0, 2, 2, 5] and made.offsets.dtype == np.int32
    assert made.real_T.tolist() == [True] * 5 + [False] * 2
    assert made.time_T[:5].tolist() == [0, 30, 10, 10, 80]
    # The event behind the last one of a sequence follows at once.
    assert made.next_time_T[:5].tolist() == [30, 30, 10, 80, 80]
    assert (made.num_rows, made.num_sequences, made.counts) == (7, 3, (None, None))
    counted = Sequences.of([4, 3], num_targets=[1, 2], num_contextual=[1, 0])
    assert (counted.num_rows, counted.max_targets, counted.max_contextual) == (7, 2, 1)
    assert counted.rows.targets.tolist() == [1] * 4 + [2] * 3
    assert not counted.time_T.any()
    assert Sequences.of([]).num_sequences == Sequences.of([0, 0]).num_rows == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": [2, -1]}, r"lengths must be whole numbers from 0 on.*\[2, -1\]"),
        ({"lengths": [2.0]}, "lengths must be whole numbers"),
        ({"lengths": [[2]]}, "lengths must be whole numbers"),
        ({"num_rows": 4}, "add up to 5 rows, more than num_rows=4"),
        ({"times": [1, 2, 3]}, r"one a row of the sequences, \[5\]; got int64\[3\]"),
        ({"times": [1.5, 2, 3, 4, 5]}, r"whole seconds.*got float64\[5\]"),
        ({"times": [3, 2, 1, 2, 3]}, "times go back behind row 0"),
        ({"times": [0, 1, 0, 1, 2**31]}, r"more than 2\^31 - 1 seconds"),
        ({"num_targets": [1]}, "num_targets must be whole numbers from 0 on, one a sequence"),
        ({"num_targets": [1, 2], "num_contextual": [2, 0]}, "sequence 0 has 2 rows, fewer than"),
    ],
)
def test_bad_sequences_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        Sequences.of(**{"lengths": [2, 3]} | given)


def test_data_in_memory_is_kept_as_it_is(tmp_path):
    plain = Interactions.from_arrays([1] * 3, [3, 1, 3], None)
    full = Interactions.from_arrays(
        ["a"] * 3 + ["b"] * 3,
        list("xyzxyz"),
        [3, 2, 1, 1, 2, 3],
        actions={"rating": [1, 2, 3, 4, 5, 0.5], "is_like": [0, 1, 0, 1, 0, 1]},
        titles={"x": "X", "y": "Ÿ", "z": ""},
    )
    contexts = {"age": np.array([2, 0], np.int32)}
    values = {"age": ("", "18", "25")}
    full = dataclasses.replace(full, contexts=contexts, context_values=values, features=("shelf",))
    for number, data in enumerate([plain, full]):
        file = tmp_path / f"{number}.npz"
        data.save(file)
        config = dataclasses.replace(small_config("none").data, source="arrays", raw_dir=str(file))
        read = load_interactions(config)
        assert read.fingerprint() == data.fingerprint()
        assert (read.catalog.titles, read.context_values) == (
            data.catalog.titles,
            data.context_values,
        )
        assert (read.timestamps is None) == (data.timestamps is None)
        assert read.features == data.features
    file.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="1.npz is not the data of a run that was trained on arr"):
        load_interactions(config)


def test_a_run_on_arrays_finds_its_data(tmp_path):
    rng = np.random.default_rng(0)
    users, items = np.repeat(np.arange(40), 8), rng.integers(1, 60, 320)
    data = Interactions.from_arrays(users, items, rng.integers(0, 5, 320))  # with many ties
    config = small_config("none", epochs=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, ties="random"))
    quiet = Console(quiet=True)
    result = fit(config, data, tmp_path / "run", console=quiet)
    assert 0 <= result["best"]["hr@10"] <= 1
    folder = Workdir(tmp_path / "run")
    assert of_run(folder).interactions.num_events == data.num_events
    assert json.loads(folder.config.read_text())["data"]["source"] == "arrays"
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = Workdir(tmp_path / "moved")
    with pytest.raises(ValueError, match="name it by --raw_dir if it was moved"):
        of_run(moved)
    assert of_run(moved, str(moved.interactions)).interactions.num_users == 40
    other = Interactions.from_arrays(users, items, np.arange(320))
    with pytest.raises(ValueError, match="the data is not what .* was trained on"):
        fit(config, other, moved.path, console=quiet)
