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
from ultra_hstu.data.new_users import NewUsers
from ultra_hstu.data.windows import place_of

PerUser = Int64[np.ndarray, " users"]
PARTS = ("train", "validation", "test")
PerRequest = Int64[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Requests:
    """One request a row; `start == stop` is a user without history, which is legal."""

    user: PerRequest  # row of the user
    start: PerRequest
    stop: PerRequest
    count: PerRequest


@dataclasses.dataclass(frozen=True, eq=False)
class RequestTable:
    """Requests as a `Loader` takes them: their columns, and their rows in every channel."""

    columns: dict[str, PerRequest]
    lengths: Int64[np.ndarray, "n channels"]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Where every user's events are cut: train, [validation, test) and [test, last).

    Under protocol `windows` a model is tested on [test, last), and then learns [learned, last).
    Under `new_users` training begins at `begin`, and histories reach back to `first`.
    """

    first: PerUser
    validation: PerUser
    test: PerUser
    last: PerUser
    learned: PerUser | None = None
    begin: PerUser | None = None

    def bounds(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """First and last of one of `PARTS`."""
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}: use {', '.join(PARTS)}")
        if self.learned is not None and part == "train":
            return self.learned, self.last
        begin = self.first if self.begin is None else self.begin
        edges, place = (begin, self.validation, self.test, self.last), PARTS.index(part)
        return edges[place], edges[place + 1]

    @property
    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last of the events that are learned from before a test."""
        return self.bounds("train") if self.learned is None else (self.first, self.test)


def window(interactions: Interactions, since: int | None, *, anew: bool) -> Parts:
    """The parts of a window, which begins at time `since` (None: with the data).

    Args:
      anew: training has all events.
    """
    first, last = interactions.offsets[:-1], interactions.offsets[1:]
    begin = first if since is None else place_of(interactions, since)
    return Parts(first, last, begin, last, first if anew else begin)


def chronological(
    interactions: Interactions, validation_fraction: float, test_fraction: float
) -> Parts:
    """The parts of every user's events by time, `floor(fraction * events)` each; test is last."""
    first, last = interactions.offsets[:-1], interactions.offsets[1:]
    test = last - _share(interactions, test_fraction)
    return Parts(first, test - _share(interactions, validation_fraction), test, last)


def new_users(
    interactions: Interactions, fraction: float, validation_fraction: float, test_fraction: float
) -> Parts:
    """Tests the last events of the newest users, none of whose events is trained on.

    All events of the others are, but the last ones of those that validate.

    Args:
      fraction: share of the users that are tested.
      validation_fraction, test_fraction: of the events of a user that validates or is tested.
    """
    users = NewUsers.of(interactions, fraction)
    first, last = interactions.offsets[:-1], interactions.offsets[1:]
    test = last - users.test_U * _share(interactions, test_fraction)
    validation = test - users.validation_U * _share(interactions, validation_fraction)
    return Parts(first, validation, test, last, begin=np.where(users.test_U, validation, first))


def _share(interactions: Interactions, fraction: float) -> PerUser:
    """So many events of every user, rounded down."""
    # A fraction such as 0.29 of 100 events is 28.999999999999996 in floating point.
    return np.floor(np.round(interactions.lengths * fraction, 6)).astype(np.int64)


def training(parts: Parts, config: Config, seed: int, epoch: int) -> Requests:
    """The training requests of an epoch: segments begin at a random place of every user.

    With `rank.requests="one"` one of each user's stays. With `rank.supervise="all"` a request is a
    stretch of up to `data.max_history` training events without targets: each of its items is
    predicted from what lies before it in the stretch.
    """
    first, last = parts.bounds("train")
    rng = np.random.default_rng((seed, epoch, 1))  # the loader shuffles with (seed, epoch)
    rank, longest = config.rank, config.data.max_history
    everywhere = rank.supervise == "all"
    size = longest if everywhere else rank.train_targets or rank.targets
    head = rng.integers(1, size + 1, len(first))
    if everywhere:
        head = np.where(last - first > size, head, size)
    of = segments(first, last, size, head, parts.first, longest)
    if rank.requests == "one":
        of = one_a_user(of, rng)
    if not everywhere:
        return of
    return Requests(of.user, of.stop, of.stop + of.count, np.zeros_like(of.count))


def one_a_user(of: Requests, rng: np.random.Generator) -> Requests:
    """One of each user's requests, all equally likely: each of n is drawn at the rate 1/n.

    That is the sampling rate of generative training (HSTU, arXiv 2402.17152), under
    which an epoch costs O(N^2 d + N d^2) a user, however many events N there are. Drawing without
    chance in the number, exactly one, has the same rates.
    """
    order = rng.permutation(len(of.user))
    _, first = np.unique(of.user[order], return_index=True)
    chosen = np.sort(order[first])
    return Requests(of.user[chosen], of.start[chosen], of.stop[chosen], of.count[chosen])


def evaluation(parts: Parts, part: str, config: Config) -> Requests:
    """The requests of the validation or test events; the same in every epoch.

    With `rank.supervise="all"` histories are one event shorter: no item of a training stretch has
    had more before it, so that a target's position is one that was trained.
    """
    size = config.rank.targets
    longest = config.data.max_history - (config.rank.supervise == "all")
    return segments(*parts.bounds(part), size, size, parts.first, longest)


def segments(
    first: PerUser,
    last: PerUser,
    size: int,
    head: PerUser | int,
    oldest: PerUser,
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
    # The number of the segment among those of its user.
    place = np.arange(len(user)) - np.repeat(np.cumsum(number) - number, number)
    stop = first[user] + np.where(place > 0, head_U[user] + (place - 1) * size, 0)
    count = np.minimum(np.where(place > 0, size, head_U[user]), last[user] - stop)
    return Requests(user, np.maximum(oldest[user], stop - max_history), stop, count)
