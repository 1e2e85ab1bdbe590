"""Interactions from arrays in memory, against a slow definition in plain Python."""

import logging

import numpy as np
import pytest

from ultra_hstu.data import grouping
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.table_config import TableConfig


def events(seed: int, count: int = 400, users: int = 30, items: int = 20, times: int = 40):
    rng = np.random.default_rng(seed)
    return (
        np.char.add("u", rng.integers(0, users, count).astype(str)),
        rng.integers(-5, items - 5, count),
        rng.integers(1_600_000_000, 1_600_000_000 + times, count),
        rng.integers(0, 2, count),
    )


def slowly(rows, rules: TableConfig):
    """The kept events by user, as (item, time, value); `rows` as (user, item, time, value)."""
    rows = sorted(rows, key=lambda row: (row[0], row[2]))  # stable
    kept, seen = [], set()
    for user, item, time, value in rows:
        what = {"drop_events": (user, item, time), "drop_pairs": (user, item)}.get(rules.repeats)
        if what is None or what not in seen:
            kept.append((user, item, time, value))
        seen.add(what)

    def often(rows, place, least):
        counts = {}
        for row in rows:
            counts[row[place]] = counts.get(row[place], 0) + 1
        return [row for row in rows if counts[row[place]] >= least]

    kept = often(often(kept, 1, rules.min_item_events), 0, rules.min_user_events)
    before = None
    while before != kept:
        before = kept
        kept = often(often(kept, 1, rules.k_core), 0, rules.k_core)
    histories = {}
    for user, *event in often(kept, 0, 3):
        histories.setdefault(user, []).append(tuple(event))
    return histories


def plain(data: Interactions):
    raw = data.catalog.decode(data.items).tolist()
    rows = list(zip(raw, data.timestamps.tolist(), data.actions["value"].tolist(), strict=True))
    return {user: rows[data.history(user)] for user in data.users.tolist()}


RULES = [
    TableConfig(),
    TableConfig(repeats="keep"),
    TableConfig(repeats="drop_pairs"),
    TableConfig(min_item_events=18, min_user_events=10),
    TableConfig(k_core=10),
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_as_the_slow_definition(rules, block, monkeypatch):
    monkeypatch.setattr(grouping, "BLOCK", block)  # blocks of users, too
    users, items, times, values = events(seed=block)
    columns = grouping.event_columns(users, items, times, {"value": values})
    data, dropped = grouping.group(columns, rules)
    rows = list(zip(users.tolist(), items.tolist(), times.tolist(), values.tolist(), strict=True))
    want = slowly(rows, rules)
    assert plain(data) == want
    assert sum(dropped.values()) == len(rows) - data.num_events
    assert data.catalog.raw_ids[1:].tolist() == sorted({e[0] for h in want.values() for e in h})
    assert list(data.users) == sorted(want)


def test_a_sample_of_users_is_whole_histories():
    users, items, times, values = events(seed=3)
    whole = Interactions.from_arrays(users, items, times, actions={"value": values})
    columns = grouping.event_columns(users, items, times, {"value": values})
    data, _ = grouping.group(columns, TableConfig(sample_users=0.5, sample_seed=1))
    assert 5 < data.num_users < 25
    assert plain(data) == {user: plain(whole)[user] for user in data.users.tolist()}


def test_what_is_dropped_is_counted(caplog):
    with caplog.at_level(logging.WARNING):
        data = Interactions.from_arrays(
            [7, 7, 7, 7, 8], ["a", "b", "a", "a", "c"], [5, 4, 5, 6, 1], titles={"a": "A", "d": "D"}
        )
    assert data.catalog.titles == ("", "A", "")
    assert data.items.tolist() == [2, 1, 1]
    assert "dropped 1 events that repeat an earlier one of the same user, item and time" in (
        caplog.text
    )
    assert "1 events of users with fewer than 3 events" in caplog.text
    assert "1 of 2 items have no title: 'b'" in caplog.text


def test_times_may_be_dates_or_missing():
    dates = np.array(["2020-01-03", "2020-01-01", "2020-01-02T00:00:01"], "datetime64[ms]")
    data = Interactions.from_arrays([1, 1, 1], [5, 6, 7], dates, actions={"x": [0.5, 1, 2]})
    assert data.timestamps.tolist() == [1577836800, 1577923201, 1578009600]
    assert data.actions["x"].dtype == np.float32 and data.actions["x"].tolist() == [1, 2, 0.5]
    data = Interactions.from_arrays([1, 1, 1], [5, 7, 5], None)
    assert data.timestamps is None and data.items.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"users": [1.0, 2.0, 3.0]}, "users must be whole numbers, or strings, not float64"),
        ({"users": [1, "a", 2]}, "users must be whole numbers, or strings.*a value is 1"),
        ({"items": ["a", "", "b"]}, r"items\[1\] is empty"),
        ({"items": ["a", "b" * 257, "b"]}, r"items\[1\] is too long"),
        ({"items": [1, 2]}, "3 users but 2 items"),
        ({"times": [1, 2]}, "3 users but 2 times"),
        ({"times": [1.0, np.nan, 2.0]}, r"times\[1\] is missing"),
        ({"times": [1600000000000] * 3}, r"times\[0\].*seems to be in milliseconds"),
        ({"times": ["a", "b", "c"]}, "times must be seconds since 1970 or datetime64"),
        ({"actions": {"kind": ["a", "b", "c"]}}, "action 'kind' must be one number an event"),
        ({"titles": {"1": "One"}}, "no item has a title.*str such as '1'"),
        ({"users": [1, 2, 3]}, "no user is left.*3 events of users with fewer than 3 events"),
        ({"users": [], "items": [], "times": []}, "no user is left"),
    ],
)
def test_bad_arrays(given, message):
    arrays = {"users": [1, 1, 1], "items": [1, 2, 3], "times": [1, 2, 3]} | given
    with pytest.raises(ValueError, match=message):
        Interactions.from_arrays(**arrays)
