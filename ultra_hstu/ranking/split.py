"""Requests: which events are asked about together, with what history.

Index arithmetic over the events, no copies.

A request holds the history `[start, stop)` of a user and the targets `[stop, stop + count)`. Every
user's events are split in time: the newest `test_fraction` are test, those before them validation,
the rest training events. A part is cut into consecutive segments of `targets` events, so that the
requests of a part ask about each of its events exactly once; the history may reach back over all
parts.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64

from ultra_hstu.config import Config
from ultra_hstu.data.interactions import Interactions


@dataclasses.dataclass(frozen=True, eq=False)
class Requests:
    """One request a row; `start == stop` is a user without history, which is legal."""

    user: Int64[np.ndarray, " n"]  # row of the user
    start: Int64[np.ndarray, " n"]
    stop: Int64[np.ndarray, " n"]
    count: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.user)


@dataclasses.dataclass(frozen=True, eq=False)
class RequestTable:
    """Requests as a `Loader` takes them: their columns, and their rows in every channel."""

    columns: dict[str, Int64[np.ndarray, " n"]]
    lengths: Int64[np.ndarray, "n channels"]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Where every user's events are cut: train, [validation, test) and [test, last)."""

    first: Int64[np.ndarray, " users"]
    validation: Int64[np.ndarray, " users"]
    test: Int64[np.ndarray, " users"]
    last: Int64[np.ndarray, " users"]

    def bounds(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """First and last of a part; "train", "validation" or "test"."""
        edges = {
            "train": (self.first, self.validation),
            "validation": (self.validation, self.test),
            "test": (self.test, self.last),
        }
        if part not in edges:
            raise ValueError(f"unknown part {part!r}: use {', '.join(edges)}")
        return edges[part]


def chronological(
    interactions: Interactions, validation_fraction: float, test_fraction: float
) -> Parts:
    """The parts of every user's events by time, `floor(fraction * events)` each; test is last."""
    first, last = interactions.offsets[:-1], interactions.offsets[1:]

    def share(fraction: float) -> Int64[np.ndarray, " users"]:
        # A fraction such as 0.29 of 100 events is 28.999999999999996 in floating point.
        return np.floor(np.round(interactions.lengths * fraction, 6)).astype(np.int64)

    test = last - share(test_fraction)
    return Parts(first, test - share(validation_fraction), test, last)


def training(parts: Parts, config: Config, seed: int, epoch: int) -> Requests:
    """The training requests of an epoch: segments begin at a random place of every user.

    With `rank.supervise="all"` a request is a stretch of up to `data.max_history` training events
    without targets: each of its items is predicted from what lies before it in the stretch.
    """
    first, last = parts.bounds("train")
    rng = np.random.default_rng((seed, epoch, 1))  # the loader shuffles with (seed, epoch)
    size = config.data.max_history if config.rank.supervise == "all" else config.rank.targets
    head = rng.integers(1, size + 1, len(first))
    if config.rank.supervise == "all":
        head = np.where(last - first > size, head, size)
    requests = segments(first, last, size, head, parts.first, config.data.max_history)
    if config.rank.supervise == "all":
        return Requests(
            requests.user,
            requests.stop,
            requests.stop + requests.count,
            np.zeros_like(requests.count),
        )
    return requests


def evaluation(parts: Parts, part: str, config: Config) -> Requests:
    """The requests of the validation or test events; the same in every epoch.

    With `rank.supervise="all"` histories are one event shorter: no item of a training stretch has
    had more before it, so that a target's position is one that was trained.
    """
    size = config.rank.targets
    longest = config.data.max_history - (config.rank.supervise == "all")
    return segments(*parts.bounds(part), size, size, parts.first, longest)


def segments(
    first: Int64[np.ndarray, " users"],
    last: Int64[np.ndarray, " users"],
    size: int,
    head: Int64[np.ndarray, " users"] | int,
    oldest: Int64[np.ndarray, " users"],
    max_history: int,
) -> Requests:
    """Cuts events [first, last) of every user into segments: one of `head` events, then of `size`.

    The history of a segment is the newest `max_history` events before it, none from before
    `oldest`.
    """
    length = last - first
    head_U = np.minimum(np.broadcast_to(head, length.shape), length)
    number = np.where(length > 0, 1 + -(-(length - head_U) // size), 0)
    user = np.repeat(np.arange(len(first)), number)
    place = np.arange(len(user)) - np.repeat(
        np.cumsum(number) - number, number
    )  # number of the segment of its user
    stop = first[user] + np.where(place > 0, head_U[user] + (place - 1) * size, 0)
    count = np.minimum(np.where(place > 0, size, head_U[user]), last[user] - stop)
    return Requests(user, np.maximum(oldest[user], stop - max_history), stop, count)
