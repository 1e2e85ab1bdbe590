"""The events of a source as columns, in the order of its files, before they are grouped by user."""

import dataclasses
import logging

import numpy as np
from jaxtyping import Int64, Shaped

from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.text import MAX_SECONDS

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Events:
    """Columns of equal length.

    Attributes:
        users: raw user ids, int64 or str.
        items: raw item ids, int64 or str.
        timestamps: int64, seconds unless a reader says otherwise; None where the source has none.
        actions: what the user did, by name: float32 or int32.
        where: for each file, its path, the line of its first event, and its number of events, in order.
    """

    users: Shaped[np.ndarray, " events"]
    items: Shaped[np.ndarray, " events"]
    timestamps: Int64[np.ndarray, " events"] | None
    actions: dict[str, np.ndarray]
    where: tuple[tuple[str, int, int], ...] = ()

    def select(self, rows: np.ndarray) -> "Events":
        """These rows (a bool mask or indices); their places in the files are forgotten."""
        timestamps = None if self.timestamps is None else self.timestamps[rows]
        actions = {name: values[rows] for name, values in self.actions.items()}
        return Events(self.users[rows], self.items[rows], timestamps, actions)

    def place(self, row: int) -> str:
        """File and line of an event."""
        for path, first, count in self.where:
            if row < count:
                return f"{path}, line {first + row}"
            row -= count
        raise IndexError(row)

    def without_duplicates(self) -> "Events":
        """Drops events that repeat an earlier one of the same user, item and time, with a warning that counts them.

        The same item at another time is another event and stays: people rate, watch and solve things again.
        """
        if self.timestamps is None:
            raise ValueError("without timestamps, an item that comes again cannot be told from a repeated line")
        users = np.unique(self.users, return_inverse=True)[1]
        items = np.unique(self.items, return_inverse=True)[1]
        order = np.lexsort((self.timestamps, items, users))
        users, items, times = users[order], items[order], self.timestamps[order]
        again = (users[1:] == users[:-1]) & (items[1:] == items[:-1]) & (times[1:] == times[:-1])
        if not again.any():
            return self
        duplicates = order[1:][again]  # lexsort is stable: the first of equal events is the earliest in the files
        row = int(duplicates.min())
        _log.warning(
            "dropped %d events that repeat an earlier one of the same user, item and time; first: %s, user %s",
            len(duplicates), self.place(row), self.users[row],
        )  # fmt: skip
        return self.select(np.delete(np.arange(len(self.users)), duplicates))

    def encode(self, catalog: Catalog, file_with_items: str) -> np.ndarray:
        """Dense item ids, int32.

        Raises:
            ValueError: an item that the catalogue lacks; names the file, line and value.
        """
        known = catalog.raw_ids[1:]
        index = np.minimum(np.searchsorted(known, self.items), len(known) - 1)
        unknown = np.flatnonzero(known[index] != self.items)
        if len(unknown):
            row = int(unknown[0])
            raise ValueError(f"{self.place(row)}: item {self.items[row].item()!r} is not in {file_with_items}")
        return (index + 1).astype(np.int32)


def check_seconds(seconds: np.ndarray, source: str) -> None:
    if len(seconds) and not 0 <= seconds.min() <= seconds.max() <= MAX_SECONDS:
        raise ValueError(f"{source}: timestamps must lie in 0..{MAX_SECONDS} seconds, not up to {seconds.max()}")
