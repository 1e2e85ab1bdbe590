"""Data that goes on: its windows of time, and the data as it was when a window ended.

What is known at the end of a window is a function of the events before it alone: users, items and
values that appear later are not there, not even as numbers of a vocabulary.
"""

import dataclasses
import datetime
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from ultra_hstu.data.interactions import MIN_EVENTS, Interactions
from ultra_hstu.sections import WindowsConfig

DAY = 86400


class Window(NamedTuple):
    """Events from `start` to before `end`, in seconds; `number` counts from 0."""

    number: int
    start: int
    end: int

    @property
    def words(self) -> str:
        """From when to when, in UTC."""
        first, last = (
            datetime.datetime.fromtimestamp(second, datetime.UTC)
            for second in (self.start, self.end)
        )
        midnight = first.time() == last.time() == datetime.time()
        return " to ".join(
            one.strftime("%Y-%m-%d" if midnight else "%Y-%m-%d %H:%M:%S") for one in (first, last)
        )


def windows(data: Interactions, config: WindowsConfig) -> list[Window]:
    """The windows of a data set, oldest first; the first one holds `config.first` of them.

    Stretches of time without events are no windows. The newest window is taken to be complete.

    Raises:
      ValueError: no times, or fewer than two windows.
    """
    if data.timestamps is None:
        raise ValueError(
            "train.protocol='windows' needs times, and this source has none: use 'validated'"
        )
    times = np.sort(data.timestamps)
    end = int(times[-1]) + 1
    edges = np.append(_edges(data, config), end)
    before = np.searchsorted(times, edges)
    starts = edges[:-1][before[1:] > before[:-1]]
    starts = np.append(starts[:1], starts[config.first :])
    if len(starts) < 2 or config.count == 1:
        raise ValueError(
            f"windows.by={config.by!r}, windows.size={config.size}, windows.first={config.first} "
            f"and windows.count={config.count} make one window of the {data.num_events:,} events, "
            "and a model is judged by the next one: choose smaller windows, or more"
        )
    ends = np.append(starts[1:], end)
    found = zip(starts.tolist(), ends.tolist(), strict=True)
    return [Window(i, first, last) for i, (first, last) in enumerate(found)][: config.count]


def _counted(data: Interactions) -> Int64[np.ndarray, " n"]:
    """The times of the events that windows of events count: the third of each user, and later.

    Users with fewer are not in the data. So what comes later does not change what is counted.
    """
    assert data.timestamps is not None
    place = np.arange(data.num_events) - np.repeat(data.offsets[:-1], data.lengths)
    return data.timestamps[place >= MIN_EVENTS - 1]


def _edges(data: Interactions, config: WindowsConfig) -> Int64[np.ndarray, " edges"]:
    """Where windows may begin, ascending; nothing has happened before the first."""
    assert data.timestamps is not None
    first, last, size = int(data.timestamps.min()), int(data.timestamps.max()), config.size
    match config.by:
        case "event":
            return np.unique(np.append(first, np.sort(_counted(data))[size::size]))
        case "day":
            span = DAY * size
            return np.arange(first // span * span, last + 1, span)
        case "month":
            month, newest = (
                int(np.array(second, "datetime64[s]").astype("datetime64[M]").astype(np.int64))
                for second in (first, last)
            )
            months = np.arange(month // size * size, newest + 1, size).astype("datetime64[M]")
            return months.astype("datetime64[s]").astype(np.int64)


def until(data: Interactions, end: int) -> Interactions:
    """The data as it was at a time: events before it, their items, and what was known of users.

    Users with fewer than 3 events by then are not there yet.
    """
    assert data.timestamps is not None
    user_E = np.repeat(np.arange(data.num_users), data.lengths)
    keep_E = data.timestamps < end
    count_U = np.bincount(user_E[keep_E], minlength=data.num_users)
    keep_U = count_U >= MIN_EVENTS
    keep_E &= keep_U[user_E]
    items, dense_E = np.unique(data.items[keep_E], return_inverse=True)
    contexts, words = {}, {}
    for name, code_U in data.contexts.items():
        known, code = np.unique(np.append(0, code_U[keep_U]), return_inverse=True)
        contexts[name] = code[1:].astype(np.int32)
        words[name] = tuple(data.context_values[name][one] for one in known)
    return dataclasses.replace(
        data,
        users=data.users[keep_U],
        items=(dense_E + 1).astype(np.int32),
        offsets=np.append(0, np.cumsum(count_U[keep_U])),
        timestamps=data.timestamps[keep_E],
        actions={name: values[keep_E] for name, values in data.actions.items()},
        catalog=data.catalog.of_items(items),
        contexts=contexts,
        context_values=words,
    )


def place_of(data: Interactions, time: int) -> Int64[np.ndarray, " users"]:
    """The place of each user's first event from a time on, the user's end where there is none."""
    assert data.timestamps is not None
    before = np.append(0, np.cumsum(data.timestamps < time))
    return data.offsets[:-1] + before[data.offsets[1:]] - before[data.offsets[:-1]]


def newcomers(data: Interactions, start: int) -> dict[str, int]:
    """Of the events from `start` on: how many, of how many users, and what is new with them."""
    place_U = place_of(data, start)
    active_U = place_U < data.offsets[1:]
    user_E = np.repeat(np.arange(data.num_users), data.lengths)
    before_E = np.arange(data.num_events) < place_U[user_E]
    enough_U = place_U - data.offsets[:-1] >= MIN_EVENTS
    known = len(np.unique(data.items[before_E & enough_U[user_E]]))
    return {
        "events": int((data.offsets[1:] - place_U).sum()),
        "users": int(active_U.sum()),
        "new_users": int((active_U & (place_U == data.offsets[:-1])).sum()),
        "new_items": data.num_items - known,
    }
