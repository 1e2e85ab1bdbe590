"""Which events are learned from, validated on and tested on: indices, no copies."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int64

from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.new_users import NewUsers
from ultra_hstu.data.windows import place_of

PerExample = Int64[np.ndarray, " examples"]
PROTOCOLS = ("published", "validated", "temporal", "new_users", "windows")


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """One example a row.

    Attributes:
        user: the place of the user in `Interactions.users`.
        start, stop: the history, events start..stop-1, at most `max_history` of them, the newest.
        hide_from: where events hide_from..stop-1, and not the history, are those whose items an
            evaluation leaves out: the first of them.
        rows: of each history, where tokens of series stand among its events; None: one an event.
        learn_from: where events before it are no targets of training: the first that is one.
        code: of the user's id, where a model reads it.

    Every row of a training history predicts the event after it, the last row event `stop`; in a
    test only the last row does.
    """

    user: PerExample
    start: PerExample
    stop: PerExample
    hide_from: PerExample | None = None
    rows: PerExample | None = None
    learn_from: PerExample | None = None
    code: PerExample | None = None

    def __len__(self) -> int:
        return len(self.user)

    @property
    def lengths(self) -> PerExample:
        return self.stop - self.start if self.rows is None else self.rows

    @property
    def columns(self) -> dict[str, np.ndarray]:
        columns = {"start": self.start, "stop": self.stop}
        others = {"hide_from": self.hide_from, "learn_from": self.learn_from, "user": self.code}
        return columns | {name: one for name, one in others.items() if one is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The examples of a protocol.

    Attributes:
        train: at most one a user; users whose training events hold no pair of neighbours have none.
        validation: None under `published`, which has no validation data.
        test: at most one a user.
        cut: the time, in seconds, from which on nothing is trained on; None unless `temporal`.
        known: whole histories, as baselines learn from them; None: those of `train`.
    """

    train: Examples
    validation: Examples | None
    test: Examples
    cut: int | None = None
    known: Examples | None = None


def window(
    interactions: Interactions,
    since: int | None,
    max_history: int,
    *,
    targets: Literal["first", "last", "all"] = "first",
    anew: bool = False,
) -> Split:
    """Splits for a window, which begins at time `since` (None: with the data) and ends with the
    data.

    A model is tested on the window before it is trained on it. Both have one example for every user
    with an event of the window behind another one, and none may be left. Training predicts the
    window's events, those among a user's newest `max_history + 1`.

    Args:
        targets: which events of the window a test asks about.
        anew: training predicts older events, too, and has examples of all users.
    """
    first, last = interactions.offsets[:-1], interactions.offsets[1:]
    begin = first if since is None else place_of(interactions, since)
    inside = begin < last
    old = np.flatnonzero(begin > first)
    known = Examples(old, first[old], begin[old] - 1)
    train = _examples(first, last - 1, max_history, where=True if anew else inside)
    # Given in any case, so that both share their compiled programs.
    learn_from = (first if anew else begin)[train.user]
    train = dataclasses.replace(train, learn_from=learn_from)
    if targets == "all":
        user = np.repeat(np.arange(len(first)), last - begin)
        event = np.flatnonzero(np.arange(last[-1]) >= np.repeat(begin, last - first))
        some = event > first[user]
        user, event = user[some], event[some]
        test = Examples(user, np.maximum(first[user], event - max_history), event)
    else:
        asked = begin if targets == "first" else last - 1
        test = _examples(first, asked, max_history, where=inside)
    return Split(train, None, test, since, known)


def split(
    interactions: Interactions,
    protocol: str,
    max_history: int,
    temporal_test_fraction: float = 0.1,
) -> Split:
    """Splits every user's events e_0 .. e_{n-1}.

    - `published`: train on e_0 .. e_{n-2}, test e_{n-1}. No validation: the reference picks the
        best epoch on test.
    - `validated`: train on e_0 .. e_{n-3}, validation e_{n-2}, test e_{n-1} with e_{n-2} in its
        history.
    - `temporal`: the newest `temporal_test_fraction` of all events, from the cut on, is never
      trained or validated on. Of a user's k events before the cut, train on e_0 .. e_{k-2} and
      validate e_{k-1} (users with k >= 2); test e_k, the first event from the cut on (users with k
      >= 1 that have one). Events at the time of the cut belong to test.

    Raises:
        ValueError: an unknown protocol, `temporal` without timestamps or with nothing on one side
            of the cut, max_history below 1.
    """
    if max_history < 1:
        raise ValueError(f"data.max_history must be at least 1, not {max_history}")
    first, last = interactions.offsets[:-1], interactions.offsets[1:]
    newest, second, third = (_examples(first, last - back, max_history) for back in (1, 2, 3))
    if protocol == "published":
        return Split(second, None, newest)
    if protocol == "validated":
        return Split(third, second, newest)
    if protocol != "temporal":
        raise ValueError(
            f"protocol must be published, validated or temporal here, not {protocol!r}"
        )
    if interactions.timestamps is None:
        raise ValueError(
            "protocol 'temporal' needs timestamps, and this source has none: use 'validated'"
        )
    if not 0 < temporal_test_fraction < 1:
        raise ValueError(
            f"data.temporal_test_fraction must lie between 0 and 1, not {temporal_test_fraction}"
        )
    times = interactions.timestamps
    rank = min(int(len(times) * (1 - temporal_test_fraction)), len(times) - 1)
    cut = int(np.partition(times, rank)[rank])
    before = np.concatenate([[0], np.cumsum(times < cut)])
    # The first event from the cut on; events are in order of time.
    middle = first + before[last] - before[first]
    train = _examples(first, middle - 2, max_history)
    test = _examples(first, middle, max_history, where=middle < last)
    if not len(train) or not len(test):
        lacking = "events on both sides of" if len(train) else "two events before"
        raise ValueError(
            f"protocol 'temporal': no user has {lacking} time {cut} ({temporal_test_fraction=})"
        )
    return Split(train, _examples(first, middle - 1, max_history), test, cut)


def new_users(interactions: Interactions, max_history: int, fraction: float) -> Split:
    """Tests the last event of the newest users, none of whose events is trained on.

    All events of the others are, but the last ones of those that validate.
    """
    users = NewUsers.of(interactions, fraction)
    first, newest = interactions.offsets[:-1], interactions.offsets[1:] - 1
    return Split(
        _examples(first, newest - users.validation_U, max_history, where=~users.test_U),
        _examples(first, newest, max_history, where=users.validation_U),
        _examples(first, newest, max_history, where=users.test_U),
    )


def _examples(
    first: np.ndarray, target: np.ndarray, max_history: int, where: np.ndarray | bool = True
) -> Examples:
    """An example for every user whose target has at least one event before it."""
    user = np.flatnonzero((target > first) & where)
    stop = target[user]
    return Examples(user, np.maximum(first[user], stop - max_history), stop)
