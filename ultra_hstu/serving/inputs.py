"""What a request holds: histories and candidates, checked before anything is computed.

The sizes that programs are compiled for are here too: `Bucket`, and the ladder that it is chosen
from.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, Int32, Shaped

from kernels.typing import Leaf
from ultra_hstu.ranking.form import Form, Sizes
from ultra_hstu.serving import artefact
from ultra_hstu.serving.artefact import Numbers

MAX_USERS = 16  # requests of an online call, if nothing else is asked for
# Two sizes an octave, so that a bucket is at most half as large again as it must be.
LADDER = sorted({2**n for n in range(31)} | {3 * 2**n for n in range(29)})
ROW_SIZES = LADDER[LADDER.index(64) :]
COLUMNS = ("item_E", "time_E", "signal_ES", "feature_EF")  # of events
AnyArray = Array | np.ndarray  # NumPy on the host, JAX in compiled functions


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Sizes that a program is compiled for: users, and events of each channel."""

    users: int
    events: dict[str, int]


def bucket_size(count: int, sizes: Sequence[int] = LADDER) -> int:
    """The smallest of ascending sizes that holds `count`."""
    return sizes[bisect.bisect_left(sizes, count)]


def bucket_sizes(least: int, most: int, factor: int) -> list[int]:
    """Sizes from `least`, each `factor` times the one before, up to `most`, which is the last."""
    sizes = [min(least, most)]
    while sizes[-1] < most:
        sizes.append(min(factor * sizes[-1], most))
    return sizes


def cumulative(lengths: Numbers) -> Int32[np.ndarray, " B1"]:
    """Offsets of sequences of these lengths."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _no_ids() -> Int32[np.ndarray, " 0"]:
    return np.zeros(0, np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UserEvents:
    """Events of B users, oldest first, one user after another.

    Attributes:
      item_E: dense ids 1..I.
      time_E: seconds, from any origin that all requests share (Unix time is one).
      signal_ES, feature_EF: codes of the model's signals and features, 0 none.
    """

    item_E: Leaf[Int[AnyArray, " E"]]
    time_E: Leaf[Int[AnyArray, " E"]]
    signal_ES: Leaf[Int[AnyArray, "E S"]]
    feature_EF: Leaf[Int[AnyArray, "E F"]]
    offsets: Leaf[Int[AnyArray, " B1"]]

    @staticmethod
    def of(
        items: Sequence[Numbers],
        times: Sequence[Numbers] | None = None,
        signals: Sequence[Numbers] | None = None,
        features: Sequence[Numbers] | None = None,
    ) -> "UserEvents":
        """Events from one entry a user: ids [n]; seconds [n], all 0 without them; codes [n, S] and
        [n, F], none without them.

        Raises:
          ValueError: entries of a user that differ in length.
        """
        lengths = [np.size(user) for user in items]
        return UserEvents(
            _column("items", [np.atleast_1d(user) for user in items], lengths, 1),
            _column("times", times, lengths, 1),
            _column("signals", signals, lengths, 2),
            _column("features", features, lengths, 2),
            cumulative(lengths),
        )

    @staticmethod
    def of_columns(
        columns: Iterable[Shaped[AnyArray, "..."]], offsets: Int[AnyArray, " B1"]
    ) -> "UserEvents":
        """Events from columns in the order of COLUMNS."""
        item_E, time_E, signal_ES, feature_EF = columns
        return UserEvents(item_E, time_E, signal_ES, feature_EF, offsets)

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        return np.diff(np.asarray(self.offsets))

    def take(self, row_E: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " B"]) -> "UserEvents":
        """Some of the events, in a given order, for users who then have `lengths` of them."""
        columns = (np.asarray(getattr(self, name))[row_E] for name in COLUMNS)
        return UserEvents.of_columns(columns, cumulative(lengths))

    def newest(self, longest: int) -> "UserEvents":
        """The newest `longest` events of each user."""
        keep_E, kept_B = artefact.newest_events(np.asarray(self.offsets), longest)
        return self if keep_E.all() else self.take(np.flatnonzero(keep_E), kept_B)

    def user(self, number: int) -> "UserEvents":
        """The events of one user."""
        first, last = np.asarray(self.offsets)[number : number + 2]
        return self.take(np.arange(first, last), np.array([last - first]))

    @staticmethod
    def concatenate(parts: Sequence["UserEvents"]) -> "UserEvents":
        """The users of all parts, one part after another."""
        columns = (np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS)
        lengths = np.concatenate([part.lengths for part in parts])
        return UserEvents.of_columns(columns, cumulative(lengths))

    def then(self, newer: "UserEvents") -> "UserEvents":
        """The events of each user, and then the newer ones."""
        user_E = np.concatenate(
            [np.repeat(np.arange(len(x.lengths)), x.lengths) for x in (self, newer)]
        )
        order_E = np.argsort(user_E, kind="stable")
        return UserEvents.concatenate([self, newer]).take(order_E, self.lengths + newer.lengths)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UserHistory:
    """Everything that stands in front of the candidates of B users.

    Attributes:
      channels: the events of each of the model's channels; a model without a mixture has one,
        "events".
      context_BC: the user's contextual features as codes over all features together
        (as `RankEvents.context_UC`).
      now_B: when the request is made: the time of the first candidate. Only models with a relative
        bias read it.
    """

    channels: dict[str, UserEvents]
    context_BC: Leaf[Int[AnyArray, "B C"]]
    now_B: Leaf[Int[AnyArray, " B"]]

    @property
    def users(self) -> int:
        return len(self.now_B)

    def user(self, number: int) -> "UserHistory":
        """The history of one user."""
        channels = {name: events.user(number) for name, events in self.channels.items()}
        one = slice(number, number + 1)
        return UserHistory(channels, self.context_BC[one], self.now_B[one])

    @staticmethod
    def concatenate(parts: Sequence["UserHistory"]) -> "UserHistory":
        """The users of all parts, one part after another."""
        return UserHistory(
            {
                name: UserEvents.concatenate([part.channels[name] for part in parts])
                for name in parts[0].channels
            },
            np.concatenate([part.context_BC for part in parts]),
            np.concatenate([part.now_B for part in parts]),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """Items to score for each of B users, one user after another. A candidate may occur twice.

    Attributes:
      item_C: dense ids 1..I.
      feature_CF: codes of the model's features.
      time_C: seconds, when the user would act.
      slot_C: the position of a candidate among the user's targets. Only a relative position bias
        reads it: 0, 1, 2, ... is what a full pass does, and 0 for all makes a score independent of
        the others' number and order. None: 0, 1, 2, ...
    """

    item_C: Leaf[Int[AnyArray, " C"]]
    feature_CF: Leaf[Int[AnyArray, "C F"]]
    time_C: Leaf[Int[AnyArray, " C"]]
    offsets: Leaf[Int[AnyArray, " B1"]]
    slot_C: Leaf[Int[AnyArray, " C"] | None] = None

    @staticmethod
    def of(
        items: Sequence[Numbers],
        times: Numbers | int = 0,
        features: Sequence[Numbers] | None = None,
    ) -> "Candidates":
        """Candidates from one entry a user: ids [m] and codes [m, F]; `times` are one number a
        user, or one for all."""
        given = UserEvents.of(items, features=features)
        time_B = np.broadcast_to(np.asarray(times), given.lengths.shape)
        time_C = np.repeat(time_B, given.lengths)
        return Candidates(given.item_E, given.feature_EF, time_C, given.offsets)


@dataclasses.dataclass(frozen=True, eq=False)
class Query:
    """A checked request of one user, ready for the device.

    Attributes:
      history: what the encoder sees.
      key: a hash of all that the encoder reads.
      k, hidden: of a retrieval run, how many items, and the distinct dense ids that must not be
        among them: those of the whole history and the blocked ones.
      candidates: of a ranking run, the items that the catalogue has.
      raw_ids, known_C: the candidates as they were given, and their dense ids, 0 where the
        catalogue lacks them.
      warnings: what of the request was ignored or missing.
      user: of a retrieval run that reads it, the code of the user's id, 0 for nobody who is known.
    """

    history: UserHistory
    key: bytes
    k: int = 0
    hidden: Int[np.ndarray, " h"] = dataclasses.field(default_factory=_no_ids)
    candidates: Candidates = dataclasses.field(default_factory=lambda: Candidates.of([()]))
    raw_ids: Sequence[int | str] = ()
    known_C: Int[np.ndarray, " n"] = dataclasses.field(default_factory=_no_ids)
    warnings: tuple[str, ...] = ()
    user: int = 0

    @property
    def num_events(self) -> int:
        """How many events are encoded; of a mixture, those of its longest channel."""
        return max(int(events.offsets[-1]) for events in self.history.channels.values())


def require[T](name: str, value: T, kind: type) -> T:
    """The value, if it is of this class. Raises ValueError."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be serving.{kind.__name__}, got {type(value).__name__}")
    return value


def require_count(name: str, value: int) -> int:
    """The value, if it is an integer of at least 1. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}={value} must be an integer of at least 1")
    return int(value)


def check_history(
    history: UserHistory, form: Form, sizes: Sizes, *, what: str = "history"
) -> UserHistory:
    """The history as int32 NumPy arrays, the newest `max_history` events of each channel.

    Raises:
      ValueError: what `artefact.check_history` refuses.
    """
    longest = dict(form.max_history)
    given = {
        name: vars(require(f"{what}.channels[{name!r}]", events, UserEvents))
        for name, events in history.channels.items()
    }
    checked = artefact.check_history(
        vars(history) | {"channels": given}, longest, vars(sizes), what
    )
    channels = {
        name: UserEvents(**columns).newest(longest[name])
        for name, columns in checked.pop("channels").items()
    }
    return UserHistory(channels, **checked)


def check_candidates(candidates: Candidates, users: int, sizes: Sizes) -> Candidates:
    """The candidates as int32 NumPy arrays, with slots. Raises ValueError as `check_history`."""
    return Candidates(**artefact.check_candidates(vars(candidates), users, vars(sizes)))


def _column(
    name: str, given: Sequence[Numbers] | None, lengths: Sequence[int], axes: int
) -> Shaped[np.ndarray, "E ..."]:
    """The entries of all users, one after another, in one array of `axes` axes."""
    parts = [np.asarray(user) for user in given or []]
    shape = next((part.shape[1:] for part in parts if part.ndim == axes), (0,) * (axes - 1))
    if given is None:
        return np.zeros((sum(lengths), *shape), np.int32)
    if [len(part) for part in parts] != lengths:
        raise ValueError(
            f"{name} of {[len(part) for part in parts]} events, but items of {lengths}: "
            "give one an event"
        )
    shaped = [part.reshape(len(part), *shape) for part in parts if len(part)]
    return np.concatenate([np.zeros((0, *shape), np.int32), *shaped])
