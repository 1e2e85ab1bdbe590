"""All users' histories in memory: read from a prepared dataset, ordered, checked."""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, Shaped
from numpy.typing import ArrayLike

from ultra_hstu.config import DataConfig
from ultra_hstu.data import npz, sources
from ultra_hstu.data.catalog import Catalog, first
from ultra_hstu.data.item_features import FeatureOfItems
from ultra_hstu.data.strings import STRINGS, is_strings, pack
from ultra_hstu.table_config import TableConfig

_log = logging.getLogger(__name__)
MIN_EVENTS = 3  # one to learn from, one to validate and one to test on
# The `data.source` of events that a program had in memory: `data.raw_dir` is a file of them.
ARRAYS = "arrays"


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
    """All events, users one after the other, each user's events from oldest to newest.

    Raises ValueError for items that the catalogue does not have.

    Attributes:
        users: raw user ids, int64 or strings of variable width, ascending.
        items: dense item ids 1..I.
        offsets: user u owns events offsets[u]:offsets[u + 1].
        timestamps: seconds, or None where the source has none.
        actions: what the user did with each item, by name: float32 or int32, one value an event.
        catalog: raw ids and titles of the items.
        contexts: what is known of the users, by name: one code a user, 1..n, or 0 where it is
            unknown.
        context_values: by the same names, the source's text for every code; slot 0 is "". Its
            length bounds the codes.
        features: actions that are known before the user acts; others are known afterwards.
        missing_files: of the source, which would describe the users.
    """

    users: Shaped[np.ndarray, " users"]
    items: Int32[np.ndarray, " events"]
    offsets: Int64[np.ndarray, " users+1"]
    timestamps: Int64[np.ndarray, " events"] | None
    actions: dict[str, Shaped[np.ndarray, " events"]]
    catalog: Catalog
    contexts: dict[str, Int32[np.ndarray, " users"]] = dataclasses.field(default_factory=dict)
    context_values: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    features: tuple[str, ...] = ()
    missing_files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.users.dtype.kind == "U":
            object.__setattr__(self, "users", self.users.astype(STRINGS))
        outside = (self.items < 1) | (self.items > self.num_items)
        if outside.any():
            event = int(np.argmax(outside))
            raise ValueError(
                f"items[{event}]={self.items[event]} is no item of the catalogue, whose dense ids "
                f"are 1..{self.num_items} ({outside.sum()} events have such ids): Catalog.encode "
                "makes dense ids of raw ones"
            )

    @classmethod
    def from_arrays(
        cls,
        users: ArrayLike,
        items: ArrayLike,
        times: ArrayLike | None,
        *,
        actions: Mapping[str, ArrayLike] | None = None,
        titles: Mapping[int, str] | Mapping[str, str] | None = None,
        item_features: Mapping[str, FeatureOfItems] | None = None,
    ) -> "Interactions":
        """Events in any order, one entry an event, [E] each.

        Each user's events are sorted by time, ties in the order that they are given in. Events that
        repeat an earlier one of the same user, item and time are dropped, and users with fewer than
        3 events; a warning counts both.

        Args:
            users, items: ids, whole numbers or strings.
            times: seconds since 1970 (1901 to 2106), or datetime64; None: events of a user are in
                order.
            actions: what the user did, by name, as numbers: integers become int32, floats float32.
            titles: of items, by id. The catalogue is the items of the events that are left.
            item_features: columns of what else is known of items, by name: of each item, by id, a
                number, a text or a list of texts.

        Raises:
            ValueError: arrays of unequal lengths, ids or times of another kind (a value is shown),
                nothing left.
        """
        from ultra_hstu.data import grouping  # which makes objects of this class

        columns = grouping.event_columns(users, items, times, actions or {})
        made = grouping.group(columns, TableConfig(), titles)[0]
        return dataclasses.replace(made, catalog=made.catalog.with_features(item_features or {}))

    @classmethod
    def from_table(
        cls,
        frame: object,
        config: TableConfig | None = None,
        *,
        titles: Mapping[int, str] | Mapping[str, str] | None = None,
    ) -> "Interactions":
        """Events of a frame of pandas, polars or pyarrow, one row an event.

        Args:
            config: which columns are read, and what is left out, as for files; None: what is usual.
            titles: of items, by id.

        Raises:
            ValueError: names row, column, value and remedy.
        """
        from ultra_hstu.data.table import frames  # which makes objects of this class

        return frames.from_frame(frame, config or TableConfig(), titles)

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        return self.catalog.num_items

    @property
    def num_events(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> Int64[np.ndarray, " users"]:
        return np.diff(self.offsets)

    @property
    def timed(self) -> bool:
        """Whether events have times."""
        return self.timestamps is not None

    @property
    def action_names(self) -> list[str]:
        return sorted(self.actions)

    def column(self, name: str) -> Iterator[np.ndarray]:
        """`items`, `timestamps` or an action of all events, in pieces that follow one another."""
        yield getattr(self, name) if name in ("items", "timestamps") else self.actions[name]

    def fingerprint(self) -> dict[str, Any]:
        """Counts and a hash of all that is here: the same for the same data.

        Features of items have hashes of their own, by name.
        """
        digest = hashlib.sha256()

        def add(array: np.ndarray) -> None:
            for part in pack(array) if is_strings(array) else (array,):
                digest.update(np.ascontiguousarray(part).tobytes())

        add(self.users)
        add(self.offsets)
        for name in ("items", *(["timestamps"] if self.timed else [])):
            for piece in self.column(name):
                add(piece)
        add(self.catalog.raw_ids)
        for name in self.action_names:
            digest.update(f"{name} {self.context_values.get(name)}".encode())
            for piece in self.column(name):
                add(piece)
        for name in sorted(self.contexts):
            digest.update(f"{name} {self.context_values.get(name)}".encode())
            add(self.contexts[name])
        of_items = {name: column.digest() for name, column in self.catalog.features.items()}
        return {
            "users": self.num_users,
            "items": self.num_items,
            "events": self.num_events,
            "sha256": digest.hexdigest(),
        } | ({"item_features": of_items} if of_items else {})

    def save(self, path: npz.Path, *, compress: bool = True) -> None:
        """Writes the file, whole or not at all."""
        catalog = self.catalog
        arrays = {
            "users": self.users,
            "items": self.items,
            "offsets": self.offsets,
            **catalog.arrays(),
            **{f"actions/{name}": values for name, values in self.actions.items()},
            **{f"contexts/{name}": codes for name, codes in self.contexts.items()},
            **{f"words/{name}": np.array(words) for name, words in self.context_values.items()},
        }
        if self.timestamps is not None:
            arrays["timestamps"] = self.timestamps
        if self.features:
            arrays["features"] = np.array(self.features)
        npz.save(path, arrays, compress=compress)

    @classmethod
    def load(cls, path: npz.Path) -> "Interactions":
        """What `save` wrote. Raises ValueError naming the file if it is missing or damaged."""
        remedy = "name it by --raw_dir if it was moved, or train in a new folder"
        with npz.reading(path, "the data of a run that was trained on arrays", remedy) as file:

            def columns(part: str) -> dict[str, np.ndarray]:
                return {key.removeprefix(part): file[key] for key in file if key.startswith(part)}

            words, features = columns("words/"), file.get("features", np.array([]))
            return cls(
                users=file["users"],
                items=file["items"],
                offsets=file["offsets"],
                timestamps=columns("timestamps").get(""),
                actions=columns("actions/"),
                catalog=Catalog.from_arrays(file),
                contexts=columns("contexts/"),
                context_values={name: tuple(text.tolist()) for name, text in words.items()},
                features=tuple(features.tolist()),
            )

    def history(self, user: int | str) -> slice:
        """The events of a raw user id. Raises ValueError as `row`."""
        row = self.row(user)
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    def row(self, user: int | str) -> int:
        """The place of a raw user id among the users.

        Raises:
            ValueError: a user that the source lacks (or that was dropped for having too few
                events).
        """
        numeric = not is_strings(self.users)
        if numeric and isinstance(user, str) and re.fullmatch(r"-?[0-9]+", user.strip()):
            user = int(user)
        row = (
            int(np.searchsorted(self.users, user))
            if isinstance(user, str) != numeric
            else self.num_users
        )
        if row == self.num_users or self.users[row] != user:
            known = f"{first(self.users)!r} to {first(self.users[::-1])!r}"
            raise ValueError(
                f"unknown user {user!r}: there are {self.num_users} users with at least "
                f"{MIN_EVENTS} events, {known}"
            )
        return row


def load_interactions(config: DataConfig) -> Interactions:
    """Loads a source, preparing it under `config.data_dir` first where that has not been done.

    Events are sorted stably by (time, row of the file) within a user; without timestamps they keep
    the order of the file. `ties="random"` puts events of a user with equal timestamps in an
    order drawn from `ties_seed` instead. Users with fewer than 3 events are dropped with a warning
    that counts them: the last two events are for testing and validation, and the same users serve
    all protocols. Their items stay in the catalogue.

    Raises:
        ValueError: an unknown source, bad input (file, line and value), no user left, random ties
            without timestamps.
        ConnectionError: the source cannot be downloaded; says what to fetch by hand.
    """
    if config.source == ARRAYS:
        return Interactions.load(config.raw_dir or "")
    sources.check(config.source)
    # These make objects of this class.
    from ultra_hstu.data import synthetic, synthetic_long
    from ultra_hstu.data.table import prepared

    made = {sources.SYNTHETIC: synthetic.load, sources.SYNTHETIC_LONG: synthetic_long.load}
    found = made.get(config.source, prepared.load)(config)
    # Both give each user's events by time, ties as they come.
    return (
        found
        if config.ties == "stable"
        else ordered(found, ties=config.ties, seed=config.ties_seed)
    )


def ordered(
    interactions: Interactions, *, ties: str = "stable", seed: int | np.random.Generator = 0
) -> Interactions:
    """Each user's events by time; ties in the order that they had, or in a seeded random one.

    Users in parts, one after another, have the order of all together where one generator draws.

    Raises:
        ValueError: random ties without timestamps, an unknown kind of ties.
    """
    if ties not in ("stable", "random"):
        raise ValueError(f"data.ties must be 'stable' or 'random', not {ties!r}")
    if interactions.timestamps is None:
        if ties == "random":
            raise ValueError(
                "data.ties='random' needs timestamps, and this source has none: use ties='stable'"
            )
        return interactions
    users = np.repeat(np.arange(interactions.num_users), interactions.lengths)
    times = interactions.timestamps - interactions.timestamps.min()
    key = users * (times.max() + 1) + times  # one key sorts several times faster than two
    if ties == "stable":
        order = np.argsort(key, kind="stable")
    else:
        order = np.lexsort([np.random.default_rng(seed).random(len(key)), key])
    return dataclasses.replace(
        interactions,
        items=interactions.items[order],
        timestamps=interactions.timestamps[order],
        actions={name: values[order] for name, values in interactions.actions.items()},
    )
