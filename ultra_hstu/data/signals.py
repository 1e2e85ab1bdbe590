"""What the actions of a source mean: signals and features to embed, tasks to predict, each by name.

A *signal* is what a user did with an event, so it is known only afterwards. A *feature* is known of
an event before the user acts. A *task* is a signal to predict. Codes are integers from 1; 0 says
"none" and is what targets, padding and other tokens carry.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int32, Num

from ultra_hstu.config import Config, Kind
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.item_features import number_codes
from ultra_hstu.feature_config import Spelled
from ultra_hstu.table_config import BUCKETS, MADE_FROM, made_from

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
_SINGLE, _EXPONENTS = 32, 27  # of other columns: 0..31 each, then doubling up to 2^31
OTHER_SIZE = 2 + _SINGLE + _EXPONENTS  # 0: none, 1: negative

_SIZES = {
    "rating": 11,
    "watch_time": WATCH_BUCKETS + 1,
    "watched_share": SHARE_BUCKETS + 1,
    **dict.fromkeys(FLAGS, 3),
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

    Known names have codes of their own. Any other column has one for each of 0..31, then one for
    each doubling; `column[10,20,50]` has one for each bucket between these values. No value (NaN)
    is 0.

    Raises ValueError for an unknown one, naming those known, and for flags outside {0, 1}.
    """
    _require("signal", _SIZES, actions, name)
    column = actions[made_from(name)[0]]
    if (edges := _edges(name)) is not None:
        code_E = np.searchsorted(edges, column, side="right") + 1
    elif name == "rating":  # half stars: 0.5 is 1, 5 is 10
        code_E = np.round(2 * column)
        if code_E.size and (np.nanmin(code_E) < 1 or np.nanmax(code_E) > 10):
            low, high = np.nanmin(column), np.nanmax(column)
            raise ValueError(
                f"ratings must lie in 0.5..5, but they run from {low:g} to {high:g}: name the "
                "signal with the ends of its buckets, such as rating[2,4,6,8]"
            )
    elif name == "watch_time":
        edges = 2.0 ** np.arange(WATCH_BUCKETS - 1)
        code_E = np.searchsorted(edges, column / 1000, side="right") + 1
    elif name == "watched_share":
        share_E, known_E = _share(actions)
        bucket_E = np.minimum((share_E * SHARE_BUCKETS).astype(np.int32), SHARE_BUCKETS - 1) + 1
        code_E = np.where(known_E, bucket_E, 0)
    elif name in FLAGS:
        if (wrong := _not_flags(column)).size:
            raise ValueError(f"{name} must be 0 or 1, but a value is {wrong[0]}")
        code_E = column + 1
    else:
        value_E = np.clip(np.nan_to_num(column), -1, 2.0**31)
        exponent_E = np.frexp(np.maximum(value_E, 1))[1] - 1  # of 32: 5
        code_E = np.where(
            value_E < _SINGLE, np.floor(value_E) + 2, exponent_E + _SINGLE - 3
        ).astype(np.int32)
    if column.dtype.kind == "f":
        code_E = np.where(np.isnan(column), 0, code_E)
    return Codes(code_E.astype(np.int32), _size(name))


def _edges(name: str) -> Float64[np.ndarray, " n"] | None:
    """Where the buckets of `column[10,20,50]` end; None for another name.

    Raises ValueError for edges that do not ascend.
    """
    if BUCKETS.fullmatch(name) is None:
        return None
    if not (edges := Spelled.of(name).edges):
        raise ValueError(f"signal {name!r}: brackets must hold the ends of its buckets")
    return np.array(edges)


def _size(name: str) -> int:
    edges = _edges(name)
    return _SIZES.get(name, OTHER_SIZE) if edges is None else len(edges) + 2


def signals(actions: Actions, names: Sequence[str], count: int) -> Int32[np.ndarray, "E S"]:
    """The codes of several signals of `count` events, side by side."""
    return side_by_side([signal(actions, name).code for name in names], count, np.int32)


def side_by_side(
    columns: list[Num[np.ndarray, " n"]], length: int, dtype: type[np.generic]
) -> Num[np.ndarray, "n c"]:
    """Columns of a length as one array, which may have none."""
    return np.stack(columns, axis=1).astype(dtype) if columns else np.zeros((length, 0), dtype)


def needs(names: Sequence[str]) -> tuple[str, ...]:
    """The actions that signals are made from."""
    return tuple(dict.fromkeys(action for name in names for action in made_from(name)))


def sizes(names: Sequence[str]) -> tuple[int, ...]:
    """How many codes each signal has, 0 (none) counted; the same for every data set."""
    return tuple(map(_size, names))


def feature(interactions: Interactions, name: str) -> Codes:
    """The codes of a feature of events: its distinct values in ascending order; no value is 0.

    `column[10,20,50]` has a code for each bucket between these values, `column[hash 1000]` for each
    of so many buckets of a hash.

    Raises ValueError for an unknown one.
    """
    require_feature(interactions, name)
    ascending, column_E = values(interactions, name), interactions.actions[made_from(name)[0]]
    return Codes(feature_codes(name, ascending, column_E), feature_size(name, ascending))


def require_feature(interactions: Interactions, name: str) -> None:
    """Raises ValueError for an unknown feature of events, naming those of the source."""
    _require_feature(interactions.actions, (*FEATURES, *interactions.features), name)


def feature_codes(
    name: str, ascending: Num[np.ndarray, " v"], column_n: Num[np.ndarray, " n"]
) -> Int32[np.ndarray, " n"]:
    """The codes of values of a feature; 0 for NaN, and for a value that a vocabulary lacks.

    Args:
      ascending: the vocabulary, as `values` gives it.
    """
    if (spelled := Spelled.of(name)).size:
        return number_codes(spelled, column_n).astype(np.int32)
    if not len(ascending):
        return np.zeros(len(column_n), np.int32)
    index_n = np.minimum(np.searchsorted(ascending, column_n), len(ascending) - 1)
    return np.where(ascending[index_n] == column_n, index_n + 1, 0).astype(np.int32)


def feature_size(name: str, ascending: Num[np.ndarray, " v"]) -> int:
    """How many codes a feature has, 0 (none) counted."""
    return (Spelled.of(name).size or len(ascending)) + 1


def _require_feature(actions: Collection[str], known: Collection[str], name: str) -> None:
    column = made_from(name)[0]
    if Spelled.of(name).mlp:
        raise ValueError(
            f"rank.features: {name!r}: a net reads numbers of items (features.items) alone: give "
            f"the ends of buckets, as in {column}[10,100]"
        )
    if column not in known or column not in actions:
        here = _listed(set(known) & set(actions))
        raise ValueError(f"rank.features: unknown feature {name!r}: {here}")


def check_names(config: Config, actions: Collection[str], features: Collection[str] = ()) -> None:
    """Raises ValueError for names in `rank` or `model.channels` that a source lacks.

    Args:
      actions: the columns of the source's events.
      features: those of them that are known before the user acts.
    """
    for name in config.rank.signals:
        _require("signal", _SIZES, actions, name)
        _edges(name)
    for name in config.rank.tasks:
        _require("task", _TASKS, actions, name)
    for name in config.rank.features:
        _require_feature(actions, (*FEATURES, *features), name)
    check_channels(config, actions)


def check_channels(config: Config, actions: Collection[str]) -> None:
    """Raises ValueError for a channel whose signal is none of these columns of events."""
    for name, channel in config.model.channels.items():
        if channel.signal and channel.signal not in actions:
            raise ValueError(
                f"model.channels.{name}.signal={channel.signal!r} is no action of this source, "
                f"which has {', '.join(sorted(actions)) or 'none'}"
            )


def values(interactions: Interactions, name: str) -> Num[np.ndarray, " n"]:
    """The distinct values of a feature, in ascending order; none where codes do not need them."""
    if Spelled.of(name).size:
        return np.zeros(0)
    found = np.unique(interactions.actions[name])
    return found[~np.isnan(found)]


def context(interactions: Interactions, name: str) -> Codes:
    """The codes of a feature of users, one a user, 0 where it is unknown.

    Raises ValueError for an unknown one, naming those of the source.
    """
    if name not in interactions.contexts:
        missing = ", ".join(interactions.missing_files)
        remedy = f"; raw_dir lacks {missing}, which describes its users" if missing else ""
        here = _listed(interactions.contexts)
        raise ValueError(f"rank.contextual: unknown contextual feature {name!r}: {here}{remedy}")
    return Codes(interactions.contexts[name], len(interactions.context_values[name]))


def task(interactions: Interactions, name: str) -> Labels:
    """The labels of a task. Any column may be one: binary where it holds 0 and 1 alone.

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
    if label_E.dtype.kind == "f" and (gaps := np.isnan(label_E)).any():
        label_E, known_E = np.where(gaps, 0, label_E), known_E * ~gaps
    regression = name in _REGRESSIONS
    wrong = _not_flags(label_E)
    if name not in _TASKS:
        regression = wrong.size > 0
    elif not regression and wrong.size:
        raise ValueError(
            f"task {name!r} is binary, but a label is {wrong[0]:g}: labels must be 0 or 1"
        )
    kind: Kind = "regression" if regression else "binary"
    return Labels(kind, label_E.astype(np.float32), known_E.astype(np.float32))


def _require(kind: str, known: Iterable[str], actions: Collection[str], name: str) -> None:
    """Raises ValueError for a name that is unknown, or whose actions the source lacks."""
    here = {one for one in known if set(made_from(one)) <= set(actions)}
    parts = {part for columns in MADE_FROM.values() if len(columns) > 1 for part in columns}
    others = set(actions) - set(FEATURES) - parts
    buckets = kind == "signal" and BUCKETS.fullmatch(name) and made_from(name)[0] in actions
    if name not in here | others and not buckets:
        listed = _listed(here | others)
        raise ValueError(f"rank.{kind}s: unknown {kind} {name!r}: {listed}")


def _listed(names: Iterable[str]) -> str:
    return f"this source has {', '.join(sorted(names)) or 'none'}"


def _not_flags(values: np.ndarray) -> np.ndarray:
    return values[~np.isin(values, (0, 1))]


def _share(actions: Actions) -> tuple[np.ndarray, np.ndarray]:
    """The share of a video that was watched, in [0, 1], and where it has a length."""
    known = actions["duration_ms"] > 0
    share = actions["play_time_ms"] / np.where(known, actions["duration_ms"], 1)
    return np.clip(share, 0, 1), known
