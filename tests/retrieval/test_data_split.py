"""Order and splits of hand-made histories."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.data_files import load, ml1m
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import Interactions, ordered
from ultra_hstu.retrieval.split import new_users, split


def make(*times: list[int], timed: bool = True) -> Interactions:
    """One user a list of times."""
    lengths = [len(user) for user in times]
    events = sum(lengths)
    return Interactions(
        users=np.arange(1, len(times) + 1),
        items=np.arange(1, events + 1, dtype=np.int32),
        offsets=np.cumsum([0, *lengths]),
        timestamps=np.concatenate(times).astype(np.int64) if timed else None,
        actions={"rating": np.arange(events, dtype=np.float32)},
        catalog=Catalog.from_ids(np.arange(100, 100 + events)),
    )


def rows(examples) -> list[tuple[int, ...]]:
    columns = (examples.user, examples.start, examples.stop)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_published():
    done = split(make([1, 2, 3], [1, 2, 3, 4, 5]), "published", 3)
    assert rows(done.train) == [(0, 0, 1), (1, 3, 6)]
    assert done.validation is None and done.cut is None
    assert rows(done.test) == [(0, 0, 2), (1, 4, 7)]  # the newest three before the target


def test_validated():
    done = split(make([1, 2, 3], [1, 2, 3, 4, 5]), "validated", 200)
    assert rows(done.train) == [
        (1, 3, 5)
    ]  # the first user has a single event to train on, and no pair
    assert rows(done.validation) == [(0, 0, 1), (1, 3, 6)]
    assert rows(done.test) == [(0, 0, 2), (1, 3, 7)]


def test_temporal():
    times = ([1, 2, 3, 50, 60], [40, 41, 42], [60, 61, 62], [1, 55, 56], [5, 6, 50])
    done = split(make(*times), "temporal", 200, 0.5)
    assert done.cut == 42  # 8 of 17 events are older
    assert rows(done.train) == [(0, 0, 1)]
    assert rows(done.validation) == [(0, 0, 2), (1, 5, 6), (4, 14, 15)]
    assert rows(done.test) == [(0, 0, 3), (1, 5, 7), (3, 11, 12), (4, 14, 16)]


def test_new_users():
    """Those who come last, whatever their ids: users 1 and 2 here."""
    done = new_users(make([1, 2, 3], [9, 10, 11], [8, 20, 30], [2, 3, 4]), 200, 0.25)
    assert rows(done.test) == [(1, 3, 5)]
    assert rows(done.validation) == [(2, 6, 8)]
    # The events of the others are targets to the last; who validates keeps the last one apart.
    assert rows(done.train) == [(0, 0, 2), (2, 6, 7), (3, 9, 11)]
    untimed = new_users(make([1, 2, 3], [1, 2, 3], [1, 2, 3], timed=False), 2, 0.34)
    assert [rows(one)[0][0] for one in (untimed.validation, untimed.test)] == [1, 2]
    for fraction, tested in ((0.2, 0), (0.7, 2)):
        with pytest.raises(ValueError, match=f"'new_users' tests {tested} of 3 users"):
            new_users(make([1, 2, 3], [1, 2, 3], [1, 2, 3]), 200, fraction)


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.integers(0, 30), min_size=3, max_size=9).map(sorted), min_size=2, max_size=8
    ),
    st.floats(0.05, 0.95),
    st.integers(1, 6),
)
def test_temporal_never_trains_on_the_future(times, fraction, max_history):
    data = make(*times)
    try:
        done = split(data, "temporal", max_history, fraction)
    except ValueError as error:
        assert "temporal" in str(error)
        return
    seconds = data.timestamps
    for user, start, stop in rows(done.train) + rows(done.validation):
        assert (seconds[start : stop + 1] < done.cut).all()
        assert data.offsets[user] <= start < stop < data.offsets[user + 1]
    for user, start, stop in rows(done.test):
        assert (seconds[start:stop] < done.cut).all() and seconds[stop] >= done.cut
        assert data.offsets[user] <= start < stop < data.offsets[user + 1]
    assert (seconds >= done.cut).mean() >= fraction - 1 / len(seconds)
    held_out = set(done.validation.stop.tolist())
    trained = {event for _, start, stop in rows(done.train) for event in range(start, stop + 1)}
    assert not held_out & trained


@pytest.mark.parametrize("protocol", ["published", "validated"])
@settings(max_examples=30)
@given(st.lists(st.integers(3, 12), min_size=1, max_size=6), st.integers(1, 8))
def test_leave_last_out(protocol, lengths, max_history):
    data = make(*([*range(length)] for length in lengths))
    done = split(data, protocol, max_history)
    assert done.test.stop.tolist() == (data.offsets[1:] - 1).tolist()
    parts = [done.train, *([done.validation] if done.validation else []), done.test]
    for part, later in zip(parts, parts[1:], strict=False):
        targets = dict(zip(later.user.tolist(), later.stop.tolist(), strict=True))
        assert all(stop + 1 == targets[user] for user, _, stop in rows(part))
    for part in parts:
        assert (
            (part.stop - part.start) == np.minimum(max_history, part.stop - data.offsets[part.user])
        ).all()
        assert (part.start < part.stop).all()


@pytest.mark.parametrize("item", [0, -1, 7])
def test_items_outside_the_catalogue(item):
    data = make([1, 2, 3], [4, 5, 6])
    items = data.items.copy()
    items[4] = item
    with pytest.raises(ValueError, match=rf"items\[4\]={item} is no item .* ids are 1..6 \(1 ev"):
        dataclasses.replace(data, items=items)


def test_errors():
    data = make([1, 2, 3], [4, 5, 6])
    with pytest.raises(ValueError, match="needs timestamps"):
        split(make([1, 2, 3], timed=False), "temporal", 5)
    with pytest.raises(ValueError, match="no user has events on both sides of time 4"):
        split(data, "temporal", 5, 0.5)
    with pytest.raises(ValueError, match="no user has two events before time 2"):
        split(data, "temporal", 5, 0.8)
    with pytest.raises(
        ValueError, match="temporal_test_fraction must lie between 0 and 1, not 1.5"
    ):
        split(data, "temporal", 5, 1.5)
    with pytest.raises(ValueError, match="max_history must be at least 1, not 0"):
        split(data, "published", 0)


def test_stable_order_keeps_the_rows_of_ties():
    data = ordered(make([5, 1, 5, 1, 5], [2, 2, 2]))
    assert data.items.tolist() == [2, 4, 1, 3, 5, 6, 7, 8]
    assert data.timestamps.tolist() == [1, 1, 5, 5, 5, 2, 2, 2]
    assert data.actions["rating"].tolist() == [1, 3, 0, 2, 4, 5, 6, 7]  # moves with its event


def test_random_ties_are_seeded_and_stay_among_equals():
    data = make([1] * 20 + [2] * 20, [3] * 20)
    first, again, other = (ordered(data, ties="random", seed=seed) for seed in (7, 7, 8))
    assert first.items.tolist() == again.items.tolist() != other.items.tolist()
    assert first.timestamps.tolist() == data.timestamps.tolist()
    for part in (slice(0, 20), slice(20, 40), slice(40, 60)):
        assert (
            sorted(first.items[part].tolist())
            == data.items[part].tolist()
            != first.items[part].tolist()
        )
    with pytest.raises(ValueError, match="ties='random' needs timestamps"):
        ordered(make([1, 2, 3], timed=False), ties="random")


def test_random_ties_through_the_configuration(tmp_path):
    raw = ml1m(
        tmp_path / "raw",
        [f"1::{movie}::3::5" for movie in range(1, 30)],
        [f"{m}::T::G" for m in range(1, 30)],
    )
    stable, *random = (
        load(tmp_path, "ml-1m", raw, ties=ties, ties_seed=seed).items.tolist()
        for ties, seed in (("stable", 0), ("random", 0), ("random", 0), ("random", 1))
    )
    assert stable == list(range(1, 30)) and random[0] == random[1] and random[0] != random[2]


def test_catalog_maps_both_ways_and_survives_the_disk(tmp_path):
    numbers = Catalog.from_ids(np.array([30, 2**60, 7]), ["c", "d", "é"])
    words = Catalog.from_ids(np.array(["b", "0a", "a"]))
    for catalog in (numbers, words):
        catalog.save(tmp_path / "catalog.npz")
        loaded = Catalog.load(tmp_path / "catalog.npz")
        assert (
            loaded.raw_ids.tolist() == catalog.raw_ids.tolist() and loaded.titles == catalog.titles
        )
        assert loaded.raw_ids.dtype == catalog.raw_ids.dtype
        assert (
            catalog.decode(catalog.encode(catalog.raw_ids[1:])).tolist()
            == catalog.raw_ids[1:].tolist()
        )
    assert numbers.titles == ("", "é", "c", "d") and words.titles is None
    assert numbers.encode(["7", " 30"]).tolist() == [1, 2] and numbers.encode([]).tolist() == []
    assert list(tmp_path.iterdir()) == [tmp_path / "catalog.npz"]


def test_catalog_names_what_it_does_not_know():
    numbers = Catalog.from_ids(np.array([7, 30]))
    with pytest.raises(
        ValueError, match="unknown item ids 8, 31: the catalogue has 2 items, 7 to 30"
    ):
        numbers.encode([7, 8, 31])
    with pytest.raises(ValueError, match="are whole numbers, not float64: 7.0"):
        numbers.encode([7.0])
    with pytest.raises(ValueError, match="are whole numbers, not 'x7'"):
        numbers.encode(["x7"])
    with pytest.raises(ValueError, match="are strings, not int64: 7"):
        Catalog.from_ids(np.array(["a"])).encode([7])
    with pytest.raises(ValueError, match="must lie in 1..2, not 0, 3"):
        numbers.decode(np.array([0, 1, 3]))
    with pytest.raises(ValueError, match="item id 7 occurs twice"):
        Catalog.from_ids(np.array([7, 7]))
