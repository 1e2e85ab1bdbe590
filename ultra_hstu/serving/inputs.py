"""What a request holds: events of users, and candidates to score; checked before anything is computed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ultra_hstu.ranking.batch import RankEvents
from ultra_hstu.ranking.form import Form, Sizes

_INT32 = np.iinfo(np.int32)
COLUMNS = ("item_E", "time_E", "signal_ES", "feature_EF")  # of events


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Events:
    """Events of B users, oldest first, one user after another."""

    item_E: Any  # int32 [E]: dense ids 1..I
    time_E: Any  # int32 [E]: seconds, from any origin that all requests share (Unix time is one)
    signal_ES: Any  # int32 [E, S]: codes of the model's signals, 0 none
    feature_EF: Any  # int32 [E, F]: codes of the model's features, 0 none
    offsets: Any  # int32 [B + 1]

    @staticmethod
    def of(
        items: Sequence[Any],
        times: Sequence[Any] | None = None,
        signals: Sequence[Any] | None = None,
        features: Sequence[Any] | None = None,
    ) -> "Events":
        """From one entry a user: ids [n]; seconds [n], all 0 without them; codes [n, S] and [n, F], none without them.

        Raises:
          ValueError: entries of a user that differ in length.
        """
        item_of = [np.atleast_1d(np.asarray(user)) for user in items]
        lengths = [len(user) for user in item_of]

        def column(name: str, given: Sequence[Any] | None, axes: int) -> np.ndarray:
            parts = [np.asarray(user) for user in given or []]
            shape = next((part.shape[1:] for part in parts if part.ndim == axes), (0,) * (axes - 1))
            if given is None:
                return np.zeros((sum(lengths), *shape), np.int32)
            if [len(part) for part in parts] != lengths:
                raise ValueError(
                    f"{name} of {[len(part) for part in parts]} events, but items of {lengths}: give one an event"
                )
            nothing = np.zeros((0, *shape), np.int32)
            return np.concatenate(
                [
                    nothing,
                    *(
                        part if part.ndim == axes else part.reshape(-1, *shape)
                        for part in parts
                        if len(part)
                    ),
                ]
            )

        return Events(
            np.concatenate([np.zeros(0, np.int32), *item_of]),
            column("times", times, 1),
            column("signals", signals, 2),
            column("features", features, 2),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """Everything that stands in front of the candidates of B users.

    Attributes:
      channels: the events of each of the model's channels; a model without a mixture has one, "events".
      context_BC: int32 [B, C], the user's contextual features as codes over all features together (as `RankEvents.context_UC`).
      now_B: int32 [B], when the request is made: the time of the first candidate. Only models with a relative bias read it.
    """

    channels: dict[str, Events]
    context_BC: Any
    now_B: Any

    @property
    def users(self) -> int:
        return len(self.now_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """Items to score for each of B users, one user after another. A candidate may occur twice.

    Attributes:
      item_C: int32 [C], dense ids 1..I.
      feature_CF: int32 [C, F], codes of the model's features.
      time_C: int32 [C], seconds: when the user would act.
      offsets: int32 [B + 1].
      slot_C: int32 [C], the place of a candidate among the user's targets. Only a relative position bias reads it: 0, 1, 2, ... is what a full pass
        does, and 0 for all makes a score independent of the others' number and order. None: 0, 1, 2, ...
    """

    item_C: Any
    feature_CF: Any
    time_C: Any
    offsets: Any
    slot_C: Any = None

    @staticmethod
    def of(
        items: Sequence[Any], times: Any = None, features: Sequence[Any] | None = None
    ) -> "Candidates":
        """From one entry a user: ids [m] and codes [m, F]; `times` are one number a user (or one for all), 0 without them."""
        given = Events.of(items, features=features)
        lengths = np.diff(given.offsets)
        time_B = np.broadcast_to(np.asarray(0 if times is None else times), lengths.shape)
        return Candidates(given.item_E, given.feature_EF, np.repeat(time_B, lengths), given.offsets)


def from_source(
    events: RankEvents, columns_B: Mapping[str, Any], form: Form
) -> tuple[History, Candidates]:
    """Requests of a data set, as columns of `RankingTask.table`: their histories, and their targets as candidates."""
    column = {name: np.asarray(values, np.int64) for name, values in columns_B.items()}

    def spans(start_B: np.ndarray, length_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.concatenate([[0], np.cumsum(length_B)])
        user_E = np.repeat(np.arange(len(length_B)), length_B)
        return start_B[user_E] + np.arange(offsets[-1]) - offsets[user_E], offsets.astype(np.int32)

    channels = {}
    for name, _ in form.max_history:
        start_B = column[f"start/{name}"]
        event_E, offsets = spans(start_B, column[f"stop/{name}"] - start_B)
        if name in events.index:
            event_E = np.asarray(events.index[name])[event_E]
        channels[name] = Events(
            events.item_E[event_E],
            events.time_E[event_E],
            events.signal_ES[event_E],
            events.feature_EF[event_E],
            offsets,
        )
    target_C, offsets = spans(column["target"], column["count"])
    candidates = Candidates(
        events.item_E[target_C], events.feature_EF[target_C], events.time_E[target_C], offsets
    )
    return History(
        channels, events.context_UC[column["user"]], events.time_E[column["target"]]
    ), candidates


def check_history(history: Any, form: Form, sizes: Sizes, *, what: str = "history") -> History:
    """The same as int32 NumPy arrays, the newest `max_history` events of each channel.

    Raises:
      ValueError: wrong channels, shapes or dtypes, and ids or codes that the model does not know; with the value.
    """
    known = [name for name, _ in form.max_history]
    if not isinstance(history, History):
        raise ValueError(f"{what} must be a serving.History, got {type(history).__name__}")
    if sorted(history.channels) != sorted(known):
        raise ValueError(
            f"{what} has the channels {sorted(history.channels)}, the model {sorted(known)}: give each, an empty one too"
        )
    now_B = _ints(f"{what}.now_B", history.now_B, (None,), _INT32.min, _INT32.max)
    users = len(now_B)
    if users == 0:
        raise ValueError(f"{what} holds no users: give at least one, who may have no events")
    highest = sum(size - 1 for size in sizes.contextual)
    context_BC = _ints(
        f"{what}.context_BC", history.context_BC, (users, form.contextual), 0, highest
    )
    channels = {}
    for name, longest in form.max_history:
        events, here = history.channels[name], f"{what}.channels[{name!r}]"
        checked = _check_events(here, events, users, sizes)
        channels[name] = newest(checked, longest)
    return History(channels, context_BC, now_B)


def check_candidates(candidates: Any, users: int, sizes: Sizes) -> Candidates:
    """The same as int32 NumPy arrays. Raises ValueError as `check_history`."""
    if not isinstance(candidates, Candidates):
        raise ValueError(f"candidates must be serving.Candidates, got {type(candidates).__name__}")
    offsets = _offsets("candidates.offsets", candidates.offsets, users)
    count = int(offsets[-1])
    item_C = _ids("candidates.item_C", candidates.item_C, count, sizes)
    feature_CF = _codes("candidates.feature_CF", candidates.feature_CF, count, sizes.features)
    time_C = _ints("candidates.time_C", candidates.time_C, (count,), _INT32.min, _INT32.max)
    if candidates.slot_C is None:
        slot_C = np.arange(count, dtype=np.int32) - np.repeat(offsets[:-1], np.diff(offsets))
    else:
        slot_C = _ints("candidates.slot_C", candidates.slot_C, (count,), 0, _INT32.max)
    return Candidates(item_C, feature_CF, time_C, offsets, slot_C)


def newest(events: Events, longest: int) -> Events:
    """The newest `longest` events of each user."""
    length_B = np.diff(events.offsets)
    if length_B.max(initial=0) <= longest:
        return events
    left_B = np.minimum(length_B, longest)
    keep_E = np.arange(events.offsets[-1]) >= np.repeat(events.offsets[1:] - left_B, length_B)
    return _take(events, np.flatnonzero(keep_E), left_B)


def joined(before: Events, after: Events) -> Events:
    """The events of each user, and then their newer ones."""
    first_B, second_B = np.diff(before.offsets), np.diff(after.offsets)
    both = jax.tree.map(lambda *parts: np.concatenate(parts), before, after)
    user_E = np.concatenate(
        [np.repeat(np.arange(len(first_B)), first_B), np.repeat(np.arange(len(second_B)), second_B)]
    )
    return _take(both, np.argsort(user_E, kind="stable"), first_B + second_B)


def _take(events: Events, place_E: np.ndarray, length_B: np.ndarray) -> Events:
    offsets = np.concatenate([[0], np.cumsum(length_B)]).astype(np.int32)
    return Events(**{name: getattr(events, name)[place_E] for name in COLUMNS}, offsets=offsets)


def _check_events(name: str, events: Any, users: int, sizes: Sizes) -> Events:
    if not isinstance(events, Events):
        raise ValueError(f"{name} must be serving.Events, got {type(events).__name__}")
    offsets = _offsets(f"{name}.offsets", events.offsets, users)
    count = int(offsets[-1])
    return Events(
        _ids(f"{name}.item_E", events.item_E, count, sizes),
        _ints(f"{name}.time_E", events.time_E, (count,), _INT32.min, _INT32.max),
        _codes(f"{name}.signal_ES", events.signal_ES, count, sizes.signals),
        _codes(f"{name}.feature_EF", events.feature_EF, count, sizes.features),
        offsets,
    )


def _ints(
    name: str, values: Any, shape: tuple[int | None, ...], least: Any, most: Any
) -> np.ndarray:
    """int32 of a shape (None: any size) with values in [least, most], numbers or one a column."""
    array = np.asarray(values)
    if array.ndim != len(shape) or any(
        want not in (None, got) for want, got in zip(shape, array.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have the shape [{wanted}], got {list(array.shape)}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {array.dtype}")
    least, most = np.broadcast_to(least, array.shape[1:]), np.broadcast_to(most, array.shape[1:])
    wrong = (array < least[None]) | (array > most[None])
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{name}[{', '.join(map(str, place))}] is {array[place]}, not in {least[place[1:]]}..{most[place[1:]]}"
        )
    return array.astype(np.int32)


def _ids(name: str, values: Any, count: int, sizes: Sizes) -> np.ndarray:
    try:
        return _ints(name, values, (count,), 1, sizes.items)
    except ValueError as error:
        raise ValueError(
            f"{error}: items are dense ids of the model's {sizes.items} items; leave unknown ones out"
        ) from None


def _codes(name: str, values: Any, count: int, sizes: tuple[int, ...]) -> np.ndarray:
    return _ints(name, values, (count, len(sizes)), 0, np.asarray(sizes, np.int64) - 1)


def _offsets(name: str, values: Any, users: int) -> np.ndarray:
    offsets = _ints(name, values, (users + 1,), 0, _INT32.max)
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"{name} must start at 0 and never fall, got {offsets.tolist()[:20]}: they are cumulative lengths"
        )
    return offsets
