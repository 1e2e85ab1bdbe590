"""What the actions of a source mean: signals and features to embed, tasks to predict, each by name.

A *signal* is what a user did with an event, so it is known only afterwards. A *feature* is known of
an event before the user acts. A *task* is a signal to predict. Codes are integers from 1; 0 says
"none" and is what targets, padding and other tokens carry.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float32, Int32, Shaped

from ultra_hstu.config import Kind
from ultra_hstu.data.interactions import Interactions

FLAGS = (
    "correct",
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "is_profile_enter",
)
FEATURES = ("skill", "tab")
WATCH_BUCKETS = 16  # watch time in seconds: below 1, [1, 2), [2, 4), ..., 2^14 and more
SHARE_BUCKETS = 10  # of the share of a video that was watched

_SIZES = {
    "rating": 11,
    "watch_time": WATCH_BUCKETS + 1,
    "watched_share": SHARE_BUCKETS + 1,
    **dict.fromkeys(FLAGS, 3),
}

Actions = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """One integer an event (or a user), from 1 to size - 1; 0 is none."""

    code: Int32[np.ndarray, " n"]
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """What is to be predicted of every event; `weight_E` is 0 where an event has no label."""

    kind: Kind
    label_E: Float32[np.ndarray, " E"]
    weight_E: Float32[np.ndarray, " E"]


def signal(actions: Actions, name: str) -> Codes:
    """The codes of a signal, from actions by name.

    Raises ValueError for an unknown one, naming those known, and for flags outside {0, 1}.
    """
    return _pick("signal", _SIGNALS, actions, name)


def signals(actions: Actions, names: Sequence[str], count: int) -> Int32[np.ndarray, "E S"]:
    """The codes of several signals of `count` events, side by side."""
    codes = [signal(actions, name).code for name in names]
    return np.stack(codes, axis=1) if codes else np.zeros((count, 0), np.int32)


def needs(names: Sequence[str]) -> tuple[str, ...]:
    """The actions that signals are made from. Raises ValueError for an unknown one."""
    sizes(names)
    return tuple(dict.fromkeys(action for name in names for action in _SIGNALS[name][1]))


def sizes(names: Sequence[str]) -> tuple[int, ...]:
    """How many codes each signal has, 0 (none) counted; the same for every data set.

    Raises ValueError for an unknown one.
    """
    if unknown := [name for name in names if name not in _SIZES]:
        raise ValueError(f"unknown signal {unknown[0]!r}: there are {', '.join(sorted(_SIZES))}")
    return tuple(_SIZES[name] for name in names)


def feature(interactions: Interactions, name: str) -> Codes:
    """The codes of a feature of events: its distinct values in ascending order.

    Raises ValueError for an unknown one.
    """
    return _pick("feature", _FEATURES, interactions.actions, name)


def context(interactions: Interactions, name: str) -> Codes:
    """The codes of a feature of users, one a user, 0 where it is unknown.

    Raises ValueError for an unknown one, naming those of the source.
    """
    if name not in interactions.contexts:
        raise ValueError(f"unknown contextual feature {name!r}: {_listed(interactions.contexts)}")
    return Codes(interactions.contexts[name], len(interactions.context_values[name]))


def task(interactions: Interactions, name: str) -> Labels:
    """The labels of a task.

    Raises ValueError for an unknown one, naming those of the source, and for binary labels outside
    {0, 1}.
    """
    found = _pick("task", _TASKS, interactions.actions, name)
    if found.kind == "binary" and np.isin(found.label_E, (0, 1), invert=True).any():
        wrong = found.label_E[np.isin(found.label_E, (0, 1), invert=True)][0]
        raise ValueError(
            f"task {name!r} is binary, but a label is {wrong:g}: labels must be 0 or 1"
        )
    return found


def distinct(values: Shaped[np.ndarray, " n"]) -> Codes:
    """Codes of arbitrary values: 1 for the smallest."""
    known, code = np.unique(values, return_inverse=True)
    return Codes((code + 1).astype(np.int32), len(known) + 1)


# A maker, and the actions that it reads.
type _Makers[Made] = dict[str, tuple[Callable[[Actions], Made], tuple[str, ...]]]


def _pick[Made: Codes | Labels](
    kind: str, makers: _Makers[Made], actions: Actions, name: str
) -> Made:
    here = [
        known for known, (_, needs) in makers.items() if all(action in actions for action in needs)
    ]
    if name not in here:
        raise ValueError(f"unknown {kind} {name!r}: {_listed(here)}")
    return makers[name][0](actions)


def _listed(names: Iterable[str]) -> str:
    return f"this source has {', '.join(sorted(names)) or 'none'}"


def _flag(name: str) -> Callable[[Actions], Codes]:
    def codes(actions: Actions) -> Codes:
        values = actions[name]
        if np.isin(values, (0, 1), invert=True).any():
            raise ValueError(
                f"{name} must be 0 or 1, but a value is "
                f"{values[np.isin(values, (0, 1), invert=True)][0]}"
            )
        return Codes(values.astype(np.int32) + 1, _SIZES[name])

    return codes


def _rating(actions: Actions) -> Codes:
    """Half stars: 0.5 is 1, 5 is 10."""
    code = np.round(2 * actions["rating"]).astype(np.int32)
    if code.size and (code.min() < 1 or code.max() > 10):
        raise ValueError(
            f"ratings must lie in 0.5..5, but they run from {actions['rating'].min():g} to "
            f"{actions['rating'].max():g}"
        )
    return Codes(code, _SIZES["rating"])


def _watch_time(actions: Actions) -> Codes:
    edges = 2.0 ** np.arange(WATCH_BUCKETS - 1)
    return Codes(
        (np.searchsorted(edges, actions["play_time_ms"] / 1000, side="right") + 1).astype(np.int32),
        _SIZES["watch_time"],
    )


def _share(actions: Actions) -> tuple[np.ndarray, np.ndarray]:
    """The share of a video that was watched, in [0, 1], and where it has a length."""
    known = actions["duration_ms"] > 0
    return np.clip(
        actions["play_time_ms"] / np.where(known, actions["duration_ms"], 1), 0, 1
    ), known


def _share_codes(actions: Actions) -> Codes:
    share, known = _share(actions)
    bucket = np.minimum((share * SHARE_BUCKETS).astype(np.int32), SHARE_BUCKETS - 1) + 1
    return Codes(np.where(known, bucket, 0).astype(np.int32), _SIZES["watched_share"])


def _share_task(actions: Actions) -> Labels:
    share, known = _share(actions)
    return Labels("regression", share.astype(np.float32), known.astype(np.float32))


def _everywhere(kind: Kind, values: Callable[[Actions], np.ndarray]) -> Callable[[Actions], Labels]:
    """A task that every event has a label of."""

    def task(actions: Actions) -> Labels:
        label_E = values(actions).astype(np.float32)
        return Labels(kind, label_E, np.ones_like(label_E))

    return task


def _column(name: str) -> Callable[[Actions], np.ndarray]:
    return lambda actions: actions[name]


_SIGNALS: _Makers[Codes] = {
    "rating": (_rating, ("rating",)),
    "watch_time": (_watch_time, ("play_time_ms",)),
    "watched_share": (_share_codes, ("play_time_ms", "duration_ms")),
    **{name: (_flag(name), (name,)) for name in FLAGS},
}
_FEATURES: _Makers[Codes] = {
    name: (lambda actions, name=name: distinct(actions[name]), (name,))  # type: ignore[misc]
    for name in FEATURES
}
_TASKS: _Makers[Labels] = {
    "rating_at_least_4": (
        _everywhere("binary", lambda actions: actions["rating"] >= 4),
        ("rating",),
    ),
    "rating": (_everywhere("regression", _column("rating")), ("rating",)),
    "watched_share": (_share_task, ("play_time_ms", "duration_ms")),
    **{name: (_everywhere("binary", _column(name)), (name,)) for name in FLAGS},
}
