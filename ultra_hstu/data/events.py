"""The events of a source as columns, in the order of its files, before they are grouped by user."""

import dataclasses
import logging

import numpy as np
from jaxtyping import Int64, Shaped

from ultra_hstu.data.catalog import Catalog, first
from ultra_hstu.data.strings import is_strings

_log = logging.getLogger(__name__)
RawIds = Shaped[np.ndarray, " events"]  # int64 or strings, one an event


@dataclasses.dataclass(frozen=True)
class RawEvents:
    """Columns of equal length.

    Attributes:
        users, items: their raw ids.
        timestamps: int64, seconds unless a reader says otherwise; None where the source has none.
        actions: what the user did, by name: float32 or int32.
        where: for each file, its path, the line of its first event, and its number of events, in
            order.
        rows: the place of each event among all those of the files; None: event i is the i-th.
    """

    users: RawIds
    items: RawIds
    timestamps: Int64[np.ndarray, " events"] | None
    actions: dict[str, np.ndarray]
    where: tuple[tuple[str, int, int], ...] = ()
    rows: Int64[np.ndarray, " events"] | None = None

    def select(self, chosen: np.ndarray) -> "RawEvents":
        """These events (a bool mask or indices)."""
        rows = np.arange(len(self.users)) if self.rows is None else self.rows
        return RawEvents(
            self.users[chosen],
            self.items[chosen],
            None if self.timestamps is None else self.timestamps[chosen],
            {name: values[chosen] for name, values in self.actions.items()},
            self.where,
            rows[chosen],
        )

    def place(self, event: int) -> str:
        """File and line of an event."""
        row = event if self.rows is None else int(self.rows[event])
        for path, line, count in self.where:
            if row < count:
                return f"{path}, line {line + row}"
            row -= count
        raise IndexError(f"event {event} of {len(self.users)}")

    def without_duplicates(self) -> "RawEvents":
        """Drops events that repeat an earlier one of the same user, item and time, and warns.

        The same item at another time is another event and stays: people rate, watch and solve
        things again.
        """
        if self.timestamps is None:
            raise ValueError(
                "without timestamps, an item that comes again cannot be told from a repeated line"
            )
        # Ids as numbers, which sort faster than strings.
        users, items = (
            np.unique(ids, return_inverse=True)[1] if is_strings(ids) else ids
            for ids in (self.users, self.items)
        )
        keys = (self.timestamps, items, users)
        order = np.lexsort(keys)
        again = np.ones(max(0, len(order) - 1), bool)
        for key in keys:
            ordered = key[order]
            again &= ordered[1:] == ordered[:-1]
        if not again.any():
            return self
        # lexsort is stable: the first of equal events is the earliest in the files.
        duplicates = order[1:][again]
        _log.warning(
            "dropped %d events that repeat an earlier one of the same user, item and time; the "
            "first: %s",
            len(duplicates),
            self.place(int(duplicates.min())),
        )
        return self.select(np.delete(np.arange(len(self.users)), duplicates))

    def encode(self, catalog: Catalog, file_with_items: str) -> np.ndarray:
        """Dense item ids, int32.

        Raises:
            ValueError: an item that the catalogue lacks; names the file, line and value.
        """
        dense = catalog.find(self.items)
        unknown = np.flatnonzero(dense == 0)
        if len(unknown):
            item = first(self.items[unknown])
            raise ValueError(
                f"{self.place(int(unknown[0]))}: item {item!r} is not in {file_with_items}"
            )
        return dense
