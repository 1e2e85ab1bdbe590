"""What the actions of a source mean: signals and features to embed, tasks to predict, each by name.

A *signal* is what a user did with an event, so it is known only afterwards. A *feature* is known of
an event before the user acts. A *task* is a signal to predict. Codes are integers from 1; 0 says
"none" and is what targets, padding and other tokens carry.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float32, Int32, Num

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

# The actions that a name is made from, where they are not the one action of the same name.
_MADE_FROM = {
    "watch_time": ("play_time_ms",),
    "watched_share": ("play_time_ms", "duration_ms"),
    "rating_at_least_4": ("rating",),
}
_REGRESSIONS = ("rating", "watched_share")
_TASKS = ("rating_at_least_4", *_REGRESSIONS, *FLAGS)

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
    _require("signal", _SIZES, actions, name)
    if name == "rating":  # half stars: 0.5 is 1, 5 is 10
        code_E = np.round(2 * actions[name])
        if code_E.size and (code_E.min() < 1 or code_E.max() > 10):
            low, high = actions[name].min(), actions[name].max()
            raise ValueError(f"ratings must lie in 0.5..5, but they run from {low:g} to {high:g}")
    elif name == "watch_time":
        edges = 2.0 ** np.arange(WATCH_BUCKETS - 1)
        code_E = np.searchsorted(edges, actions["play_time_ms"] / 1000, side="right") + 1
    elif name == "watched_share":
        share_E, known_E = _share(actions)
        bucket_E = np.minimum((share_E * SHARE_BUCKETS).astype(np.int32), SHARE_BUCKETS - 1) + 1
        code_E = np.where(known_E, bucket_E, 0)
    else:
        if (wrong := _not_flags(actions[name])).size:
            raise ValueError(f"{name} must be 0 or 1, but a value is {wrong[0]}")
        code_E = actions[name] + 1
    return Codes(code_E.astype(np.int32), _SIZES[name])


def signals(actions: Actions, names: Sequence[str], count: int) -> Int32[np.ndarray, "E S"]:
    """The codes of several signals of `count` events, side by side."""
    return side_by_side([signal(actions, name).code for name in names], count, np.int32)


def side_by_side(
    columns: list[Num[np.ndarray, " n"]], length: int, dtype: type[np.generic]
) -> Num[np.ndarray, "n c"]:
    """Columns of a length as one array, which may have none."""
    return np.stack(columns, axis=1).astype(dtype) if columns else np.zeros((length, 0), dtype)


def needs(names: Sequence[str]) -> tuple[str, ...]:
    """The actions that signals are made from. Raises ValueError for an unknown one."""
    sizes(names)
    return tuple(dict.fromkeys(action for name in names for action in _made_from(name)))


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
    _require("feature", FEATURES, interactions.actions, name)
    known, code_E = np.unique(interactions.actions[name], return_inverse=True)
    return Codes((code_E + 1).astype(np.int32), len(known) + 1)


def context(interactions: Interactions, name: str) -> Codes:
    """The codes of a feature of users, one a user, 0 where it is unknown.

    Raises ValueError for an unknown one, naming those of the source.
    """
    if name not in interactions.contexts:
        missing = ", ".join(interactions.missing_files)
        remedy = f"; raw_dir lacks {missing}, which describes its users" if missing else ""
        here = _listed(interactions.contexts)
        raise ValueError(f"unknown contextual feature {name!r}: {here}{remedy}")
    return Codes(interactions.contexts[name], len(interactions.context_values[name]))


def task(interactions: Interactions, name: str) -> Labels:
    """The labels of a task.

    Raises ValueError for an unknown one, naming those of the source, and for binary labels outside
    {0, 1}.
    """
    actions = interactions.actions
    _require("task", _TASKS, actions, name)
    known_E = np.ones(interactions.num_events)
    if name == "watched_share":
        label_E, known_E = _share(actions)
    elif name == "rating_at_least_4":
        label_E = actions["rating"] >= 4
    else:
        label_E = actions[name]
    regression = name in _REGRESSIONS
    if not regression and (wrong := _not_flags(label_E)).size:
        raise ValueError(
            f"task {name!r} is binary, but a label is {wrong[0]:g}: labels must be 0 or 1"
        )
    kind: Kind = "regression" if regression else "binary"
    return Labels(kind, label_E.astype(np.float32), known_E.astype(np.float32))


def _made_from(name: str) -> tuple[str, ...]:
    return _MADE_FROM.get(name, (name,))


def _require(kind: str, known: Iterable[str], actions: Actions, name: str) -> None:
    """Raises ValueError for a name that is unknown, or whose actions the source lacks."""
    here = [one for one in known if set(_made_from(one)) <= set(actions)]
    if name not in here:
        raise ValueError(f"unknown {kind} {name!r}: {_listed(here)}")


def _listed(names: Iterable[str]) -> str:
    return f"this source has {', '.join(sorted(names)) or 'none'}"


def _not_flags(values: np.ndarray) -> np.ndarray:
    return values[~np.isin(values, (0, 1))]


def _share(actions: Actions) -> tuple[np.ndarray, np.ndarray]:
    """The share of a video that was watched, in [0, 1], and where it has a length."""
    known = actions["duration_ms"] > 0
    share = actions["play_time_ms"] / np.where(known, actions["duration_ms"], 1)
    return np.clip(share, 0, 1), known
