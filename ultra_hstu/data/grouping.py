"""Events in any order become `Interactions`: coded ids, users one after another, what is left out.

Made for 10^8 events in little memory: columns are worked on in blocks of whole users.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, Num, Shaped
from numpy.typing import ArrayLike

from ultra_hstu.data.catalog import Catalog, few
from ultra_hstu.data.interactions import MIN_EVENTS, Interactions
from ultra_hstu.data.times import check_times
from ultra_hstu.table_config import TableConfig

_log = logging.getLogger(__name__)
MAX_ID_CHARACTERS = 256  # as requests have it
BLOCK = 1 << 22  # events that are worked on at one time

Codes = Int32[np.ndarray, " E"]
Mask = Bool[np.ndarray, " E"]
Titles = Mapping[int, str] | Mapping[str, str] | Mapping[int | str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Coded:
    """A column of ids: the distinct ones, int64 or str, ascending; and the place among them of the
    id of every event."""

    ids: Shaped[np.ndarray, " n"]
    code_E: Codes

    @classmethod
    def of(cls, name: str, ids: ArrayLike) -> "Coded":
        """Of whole numbers or strings. Raises ValueError for other ids, with the first of them."""
        distinct, code_E = np.unique(raw_ids(name, ids), return_inverse=True)
        return cls(distinct, code_E.astype(np.int32))

    def used(self) -> "Coded":
        """The same without ids that no event has."""
        used = np.zeros(len(self.ids), bool)
        used[self.code_E] = True
        code = np.cumsum(used, dtype=np.int32) - np.int32(1)
        return Coded(self.ids[used], code[self.code_E])

    def among(self, ids: ArrayLike) -> "Coded":
        """The same with these ids, too, although no event has them."""
        more = raw_ids("items", ids)
        distinct = np.unique(np.concatenate([self.ids, more.astype(self.ids.dtype)]))
        place = np.searchsorted(distinct, self.ids).astype(np.int32)
        return Coded(distinct, place[self.code_E])


def raw_ids(name: str, ids: ArrayLike) -> Shaped[np.ndarray, " n"]:
    """Ids as int64 or str. Raises ValueError for others: floats, empty strings, long ones."""
    array = np.asarray(ids)
    if array.shape == (0,):
        return np.zeros(0, np.int64)
    if array.dtype.kind == "U" and isinstance(ids, list | tuple):
        array = np.array(ids, object)  # in which numbers among strings stay numbers
    if array.ndim != 1:
        raise ValueError(f"{name} must be one id an event, not an array of shape {array.shape}")
    kind = array.dtype.kind
    if kind in "OT":
        kinds = {type(value) for value in array.tolist()}
        if kinds and kinds <= {str, np.str_}:
            array, kind = array.astype(str), "U"
        elif kinds and kinds <= {int, np.int64, np.int32}:
            array = np.array(array.tolist())
            kind = array.dtype.kind
    if kind == "u" and array.size and int(array.max()) > 2**63 - 1:
        raise ValueError(f"{name}: {array.max()} is above 2^63 - 1: give it as a string")
    if kind in "iu":
        return array.astype(np.int64, copy=False)
    if kind != "U":
        other = next((v for v in array.tolist() if not isinstance(v, str)), None)
        raise ValueError(
            f"{name} must be whole numbers, or strings, not {array.dtype} (a value is {other!r}): "
            "convert them, such as by astype(int) or astype(str)"
        )
    lengths = np.strings.str_len(array)
    for bad, why in ((lengths == 0, "is empty"), (lengths > MAX_ID_CHARACTERS, "is too long")):
        if bad.any():
            event = int(np.argmax(bad))
            raise ValueError(
                f"{name}[{event}] {why}: {array[event].item()[:40]!r}; "
                f"ids have 1 to {MAX_ID_CHARACTERS} characters"
            )
    return array


@dataclasses.dataclass(eq=False, repr=False)
class EventColumns:
    """Events in the order of their source; `group` takes the columns apart.

    Attributes:
        time_E: seconds; None: the events of a user are in order.
        actions: by name, float32 or int32.
    """

    user: Coded
    item: Coded
    time_E: Int64[np.ndarray, " E"] | None
    actions: dict[str, Num[np.ndarray, " E"]]

    def select(self, keep_E: Mask) -> None:
        """Leaves these events alone."""
        self.user = Coded(self.user.ids, self.user.code_E[keep_E]).used()
        self.item = Coded(self.item.ids, self.item.code_E[keep_E]).used()
        self.time_E = None if self.time_E is None else self.time_E[keep_E]
        self.actions = {name: values[keep_E] for name, values in self.actions.items()}


def group(
    columns: EventColumns, rules: TableConfig, titles: Titles | None = None
) -> tuple[Interactions, dict[str, int]]:
    """Each user's events from oldest to newest, ties in their order, without what `rules` drop.

    Args:
        columns: emptied, so that memory is free early.
        rules: of which the fields from `repeats` on are read.
        titles: by raw item id. Items without a title have "" there; None: there are no titles.

    Returns:
        The events, and how many were dropped, by reason. A warning says so, too.

    Raises:
        ValueError: nothing is left.
    """
    if not len(columns.item.code_E):
        raise ValueError("no user is left: there are no events")
    users, items = columns.user.ids, columns.item.ids
    count_U = _counts(columns.user.code_E, len(users))
    offsets = np.concatenate([[0], np.cumsum(count_U)])
    order = _order(columns.user.code_E, columns.time_E, offsets)
    item_E, time_E = columns.item.code_E, columns.time_E
    del columns.user, columns.item, columns.time_E
    item_E = _gather(item_E, order)
    time_E = None if time_E is None else _gather(time_E, order)
    actions = {name: _gather(columns.actions.pop(name), order) for name in list(columns.actions)}
    del order
    keep_E, kept_I, dropped = _kept(offsets, item_E, time_E, len(items), rules)
    count_U = _of_users(keep_E, offsets)
    if not keep_E.any():
        raise ValueError(
            f"no user is left with {MIN_EVENTS} events or more, nothing to learn from: "
            + _listed(dropped)
        )
    if not keep_E.all():
        _log.warning("dropped %s", _listed(dropped))
        item_E = item_E[keep_E]
        time_E = None if time_E is None else time_E[keep_E]
        actions = {name: actions.pop(name)[keep_E] for name in list(actions)}
    dense_I = np.cumsum(kept_I, dtype=np.int32)
    for block in blocks(len(item_E)):
        item_E[block] = dense_I[item_E[block]]
    interactions = Interactions(
        users=users[count_U > 0],
        items=item_E,
        offsets=np.concatenate([[0], np.cumsum(count_U[count_U > 0])]),
        timestamps=time_E,
        actions=actions,
        catalog=_catalog(items[kept_I], titles),
    )
    return interactions, dropped


def _catalog(ids: Shaped[np.ndarray, " n"], titles: Titles | None) -> Catalog:
    if titles is None:
        return Catalog.from_ids(ids)
    known: dict[int | str, str] = {raw: title for raw, title in titles.items()}
    found = [known.get(raw) for raw in ids.tolist()]
    if without := [raw for raw, title in zip(ids.tolist(), found, strict=True) if title is None]:
        kind = type(next(iter(known), ids.tolist()[0])).__name__
        if len(without) == len(ids):
            raise ValueError(
                f"no item has a title: ids of items are such as {few(ids[:1])}, those of titles "
                f"are {kind} such as {next(iter(known), 'none')!r}"
            )
        _log.warning(
            "%d of %d items have no title: %s", len(without), len(ids), few(np.array(without))
        )
    return Catalog.from_ids(ids, [title or "" for title in found])


# --- order ---


def blocks(count: int) -> Iterator[slice]:
    return (slice(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK))


def _user_blocks(offsets: Int64[np.ndarray, " U1"]) -> Iterator[tuple[int, int]]:
    """Ranges of whole users with about so many events: first user, and the one after the last."""
    first = 0
    while first < len(offsets) - 1:
        beyond = int(np.searchsorted(offsets, offsets[first] + BLOCK, side="right")) - 1
        last = max(beyond, first + 1)
        yield first, last
        first = last


def _order(
    user_E: Codes, time_E: Int64[np.ndarray, " E"] | None, offsets: Int64[np.ndarray, " U1"]
) -> Integer[np.ndarray, " E"]:
    """The events by (user, time), ties as they come."""
    order = np.empty(len(user_E), np.int32 if len(user_E) < 2**31 else np.int64)
    # Fewer than 2^33 seconds, and at most BLOCK users in a block of several: their product fits.
    first_time = 0 if time_E is None else int(time_E.min())
    span = 1 if time_E is None else int(time_E.max()) - first_time + 1
    whole = len(user_E) <= BLOCK
    for first, last in _user_blocks(offsets):
        event_n = (
            np.arange(len(user_E)) if whole else np.flatnonzero((user_E >= first) & (user_E < last))
        )
        key_n = (user_E[event_n] - first).astype(np.int64) * span
        if time_E is not None:
            key_n += time_E[event_n] - first_time
        order[offsets[first] : offsets[last]] = event_n[np.argsort(key_n, kind="stable")]
    return order


def _gather(
    column: Num[np.ndarray, " E"], order: Integer[np.ndarray, " E"]
) -> Num[np.ndarray, " E"]:
    ordered = np.empty_like(column)
    for block in blocks(len(order)):
        ordered[block] = column[order[block]]
    return ordered


def _counts(code_E: Codes, size: int, where_E: Mask | None = None) -> Int64[np.ndarray, " size"]:
    """How often each code occurs."""
    count = np.zeros(size, np.int64)
    for block in blocks(len(code_E)):
        codes = code_E[block]
        count += np.bincount(codes if where_E is None else codes[where_E[block]], minlength=size)
    return count


def _of_users(keep_E: Mask, offsets: Int64[np.ndarray, " U1"]) -> Int64[np.ndarray, " U"]:
    """How many events of each user are kept."""
    count_U = np.empty(len(offsets) - 1, np.int64)
    for first, last in _user_blocks(offsets):
        low, high = int(offsets[first]), int(offsets[last])
        starts = offsets[first:last] - low
        count_U[first:last] = np.add.reduceat(keep_E[low:high], starts, dtype=np.int64)
    return count_U


# --- what is left out ---


def _kept(
    offsets: Int64[np.ndarray, " U1"],
    item_E: Codes,
    time_E: Int64[np.ndarray, " E"] | None,
    num_items: int,
    rules: TableConfig,
) -> tuple[Mask, Bool[np.ndarray, " I"], dict[str, int]]:
    """Which events stay, which items the catalogue has, and how many events go, by reason."""
    keep_E, lengths_U = np.ones(len(item_E), bool), np.diff(offsets)
    dropped: dict[str, int] = {}

    def drop(reason: str, keep: Mask) -> None:
        nonlocal keep_E
        still_E = keep_E & keep
        if gone := int(np.count_nonzero(keep_E) - np.count_nonzero(still_E)):
            dropped[reason] = dropped.get(reason, 0) + gone
        keep_E = still_E

    def often(counts_U: Int64[np.ndarray, " U"], least: int) -> Mask:
        return np.repeat(counts_U >= least, lengths_U)

    def at_items(keep_I: Bool[np.ndarray, " I"]) -> Mask:
        keep_E = np.empty(len(item_E), bool)
        for block in blocks(len(item_E)):
            keep_E[block] = keep_I[item_E[block]]
        return keep_E

    def of_users() -> Int64[np.ndarray, " U"]:
        return _of_users(keep_E, offsets)

    def of_items() -> Int64[np.ndarray, " I"]:
        return _counts(item_E, num_items, keep_E)

    if rules.repeats == "drop_pairs":
        words = "that repeat an item of their user"
        drop(words, ~_repeated(offsets, item_E, None))
    elif rules.repeats == "drop_events" and time_E is not None:
        words = "that repeat an earlier one of the same user, item and time"
        drop(words, ~_repeated(offsets, item_E, time_E))
    if rules.sample_users < 1:
        chosen_U = np.random.default_rng(rules.sample_seed).random(len(lengths_U))
        drop("of users who were not drawn", np.repeat(chosen_U < rules.sample_users, lengths_U))
    kept_I = np.ones(num_items, bool)  # as rules.catalog is "listed"
    if rules.catalog == "counted":
        few = rules.min_user_events if rules.min_user_events > MIN_EVENTS else 0
        first_E = keep_E & at_items(of_items() >= rules.min_item_events) & often(of_users(), few)
        kept_I = _counts(item_E, num_items, first_E) > 0
    if (least := rules.min_item_events) > 1:
        drop(f"of items with fewer than {least} events", at_items(of_items() >= least))
    if (least := rules.min_user_events) > MIN_EVENTS:
        drop(f"of users with fewer than {least} events", often(of_users(), least))
    before = -1
    while (core := rules.k_core) > 1 and before != (before := int(np.count_nonzero(keep_E))):
        drop(f"outside the {core}-core", at_items(of_items() >= core))
        drop(f"outside the {core}-core", often(of_users(), core))
    drop(f"of users with fewer than {MIN_EVENTS} events", often(of_users(), MIN_EVENTS))
    return keep_E, of_items() > 0 if rules.catalog == "kept" else kept_I, dropped


def _repeated(
    offsets: Int64[np.ndarray, " U1"], item_E: Codes, time_E: Int64[np.ndarray, " E"] | None
) -> Mask:
    """Events whose user has the same item before (at the same time, where times are given)."""
    again_E = np.zeros(len(item_E), bool)
    for first, last in _user_blocks(offsets):
        low, high = int(offsets[first]), int(offsets[last])
        starts_n = np.zeros(high - low, bool)
        starts_n[offsets[first:last] - low] = True
        if time_E is not None:
            starts_n[1:] |= np.diff(time_E[low:high]) > 0
        # Runs of one event repeat nothing.
        alone_n = starts_n & np.append(starts_n[1:], True)
        event_n = np.flatnonzero(~alone_n)
        run_n = np.cumsum(starts_n)[event_n]
        key_n = run_n * (int(item_E.max()) + 1) + item_E[low:high][event_n]
        order = np.argsort(key_n, kind="stable")
        same = np.flatnonzero(np.diff(key_n[order]) == 0)
        again_E[low + event_n[order[same + 1]]] = True
    return again_E


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} events {reason}" for reason, count in dropped.items())


# --- arrays ---


def event_columns(
    users: ArrayLike, items: ArrayLike, times: ArrayLike | None, actions: Mapping[str, ArrayLike]
) -> EventColumns:
    """Arrays with one entry an event, checked and coded. Raises ValueError for bad ones."""
    user, item = Coded.of("users", users), Coded.of("items", items)
    time_E = None if times is None else _seconds(np.asarray(times))
    columns = EventColumns(
        user, item, time_E, {name: action(name, np.asarray(v)) for name, v in actions.items()}
    )
    count, given = len(user.code_E), {"items": item.code_E, "times": time_E, **columns.actions}
    for name, values in given.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{count} users but {len(values)} {name}: give one an event")
    return columns


def _seconds(times: Shaped[np.ndarray, " E"]) -> Int64[np.ndarray, " E"]:
    kind = times.dtype.kind
    if kind == "M":
        missing = np.isnat(times)
        times = times.astype("datetime64[s]").astype(np.int64)
    elif kind == "f":
        missing = ~np.isfinite(times)
        times = np.floor(np.where(missing, 0, times)).astype(np.int64)
    elif kind in "iu":
        missing = np.zeros(len(times), bool)
        times = times.astype(np.int64)
    else:
        raise ValueError(
            f"times must be seconds since 1970 or datetime64, not {times.dtype} "
            f"(a value is {times.ravel()[:1].tolist()}): convert them, or give None"
        )
    if missing.any():
        raise ValueError(f"times[{np.argmax(missing)}] is missing: leave such events out")
    check_times(times, "s", lambda event: f"times[{event}]")
    return times


def action(name: str, values: Shaped[np.ndarray, " E"]) -> Num[np.ndarray, " E"]:
    """An action column as int32 or float32. Raises ValueError for text."""
    kind = values.dtype.kind
    if kind not in "biuf" or values.ndim != 1:
        raise ValueError(
            f"action {name!r} must be one number an event, not {values.dtype} of shape "
            f"{values.shape}: give a column of numbers"
        )
    if kind != "f" and values.size and -(2**31) <= int(values.min()) <= int(values.max()) < 2**31:
        return values.astype(np.int32)
    return values.astype(np.int32 if not values.size and kind != "f" else np.float32)
