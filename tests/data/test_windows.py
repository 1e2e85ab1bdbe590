"""Windows of time: where they begin, and what is known when one ends."""

import dataclasses

import numpy as np
import pytest

from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.windows import newcomers, place_of, until, windows
from ultra_hstu.sections import WindowsConfig

DAY = 86400


def seconds(text):
    return int(np.datetime64(text, "s").astype(np.int64))


def data(*events):
    users, items, times = zip(*events, strict=True)
    return Interactions.from_arrays(list(users), list(items), [seconds(time) for time in times])


STREAM = data(
    (1, 7, "2020-01-03"),
    (1, 5, "2020-01-04"),
    (1, 9, "2020-01-30"),
    (1, 5, "2020-01-31"),
    (2, 5, "2020-02-01"),
    (2, 11, "2020-02-02"),
    (2, 9, "2020-02-03"),
    (1, 2, "2020-05-01"),
    (1, 11, "2020-05-09"),
    (3, 2, "2020-05-09"),
    (3, 3, "2020-05-10"),
    (3, 30, "2020-05-11"),
)


@pytest.mark.parametrize(
    ("config", "starts"),
    [
        (dict(), ["2020-01-01", "2020-02-01", "2020-05-01"]),  # March and April have no events
        (dict(first=2), ["2020-01-01", "2020-05-01"]),
        (dict(size=2), ["2020-01-01", "2020-05-01"]),  # January and February, March and April, ...
        (dict(count=2), ["2020-01-01", "2020-02-01"]),
        # Weeks count from 1970-01-01, a Thursday.
        (dict(by="day", size=7, count=3), ["2020-01-02", "2020-01-30", "2020-04-30"]),
        # Every second event is counted from the third of each user: of 30 and 31 January, 3
        # February, 1, 9 and 11 May.
        (dict(by="event", size=2), ["2020-01-03", "2020-02-03", "2020-05-09"]),
    ],
)
def test_where_windows_begin(config, starts):
    found = windows(STREAM, WindowsConfig(**config))
    assert [window.start for window in found] == [seconds(start) for start in starts]
    assert [window.number for window in found] == list(range(len(starts)))
    assert [window.end for window in found[:-1]] == [window.start for window in found[1:]]
    assert found[0].words.startswith(starts[0])


def test_one_window_is_none():
    with pytest.raises(ValueError, match="windows.size=12.* make one window of the 12 events"):
        windows(STREAM, WindowsConfig(size=12))
    untimed = dataclasses.replace(STREAM, timestamps=None)
    with pytest.raises(ValueError, match="needs times, and this source has none"):
        windows(untimed, WindowsConfig())


def test_what_is_known_at_a_time():
    known = until(STREAM, seconds("2020-02-03"))
    assert known.users.tolist() == [1]  # of user 2 there are two events
    assert known.catalog.raw_ids[1:].tolist() == [5, 7, 9]
    assert known.catalog.decode(known.items).tolist() == [7, 5, 9, 5]
    known = until(STREAM, seconds("2020-05-01"))
    assert known.users.tolist() == [1, 2] and known.offsets.tolist() == [0, 4, 7]
    assert known.catalog.raw_ids[1:].tolist() == [5, 7, 9, 11]
    everything = until(STREAM, seconds("2021-01-01"))
    assert everything.fingerprint() == STREAM.fingerprint()
    assert place_of(everything, seconds("2020-05-01")).tolist() == [4, 9, 9]
    assert newcomers(everything, seconds("2020-05-01")) == {
        "events": 5,
        "users": 2,
        "new_users": 1,
        "new_items": 3,
    }


def test_users_and_their_features_that_come_later_are_unknown():
    words = {"country": ("", "at", "de", "fr")}
    described = dataclasses.replace(
        STREAM, contexts={"country": np.array([2, 0, 1], np.int32)}, context_values=words
    )
    known = until(described, seconds("2020-05-01"))
    assert known.contexts["country"].tolist() == [1, 0]
    assert known.context_values["country"] == ("", "de")


@pytest.mark.parametrize("by", ["month", "day", "event"])
def test_the_future_changes_nothing_that_is_known(by):
    """Neither windows nor vocabularies, whatever is appended, left out or renamed later."""
    config = WindowsConfig(by=by, size={"month": 1, "day": 20, "event": 2}[by])
    rng = np.random.default_rng(0)
    n = 400
    users, items = rng.integers(0, 40, n), rng.integers(0, 50, n)
    times = np.sort(rng.integers(seconds("2020-01-01"), seconds("2020-07-01"), n))
    actions = {"rating": rng.integers(1, 6, n)}
    whole = Interactions.from_arrays(users, items, times, actions=actions)
    third = windows(whole, config)[2]
    late = times >= third.end
    changed = Interactions.from_arrays(
        np.where(late, users * 3 - 20, users)[: n - 7],
        np.where(late, 900 - items, items)[: n - 7],
        (times + late * rng.integers(0, 99999, n))[: n - 7],
        actions={
            name: np.where(late, 5 - values, values)[: n - 7] for name, values in actions.items()
        },
    )
    assert whole.fingerprint() != changed.fingerprint()
    assert windows(changed, config)[:2] == windows(whole, config)[:2]
    again = windows(changed, config)[2]
    assert again.start == third.start
    assert until(changed, again.end).fingerprint() == until(whole, third.end).fingerprint()
