"""Amazon reviews: Books as published by the SNAP group, Beauty as one user a line."""

import array
import dataclasses
import logging
import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from ultra_hstu.data.builder import InteractionsBuilder, SourceConfig
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.delimited import Column, read_table
from ultra_hstu.data.download import Download
from ultra_hstu.data.events import RawEvents
from ultra_hstu.data.strings import Strings
from ultra_hstu.data.text import lines

_log = logging.getLogger(__name__)
MIN_COUNT = 5
_FORM = "user,item,rating,timestamp"
# What Amazon's ids look like, in all of its published files.
_USER = re.compile("A[0-9A-Z]{9,}")
_ITEM = re.compile("[0-9]{9}[0-9X]|B[0-9A-Z]{9}")


class AmazonBooks(InteractionsBuilder):
    """`ratings_Books.csv`: lines of user,item,rating,time without a header; all ids are strings.

    Filtered as in HSTU's published code: users and items with at least 5 ratings in the raw file
    (counted once, not iterated), then users that still have 5. The catalogue is the items that the
    first filter leaves: 695,762.
    """

    STRING_USERS = True
    ACTIONS = {"rating": np.float32}
    BUILDER_CONFIGS = [
        SourceConfig(
            name="amazon-books",
            description="Amazon Books: users, books, ratings, times",
            files=("ratings_Books.csv",),
            downloads=(
                Download(
                    "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
                    "ratings_Books.csv"
                ),
            ),
        )
    ]

    def read(self) -> tuple[RawEvents, Catalog]:
        columns = (
            Column("user", np.str_),
            Column("item", np.str_),
            Column("rating", np.float32, 1, 5),
            Column.time("timestamp", "s"),
        )
        path = self.raw_dir / "ratings_Books.csv"
        table = read_table(path, columns)
        _check_order(path, table["user"], table["item"])
        where = ((str(path), 1, len(table["user"])),)
        # Strings are sorted once, then all is integers.
        users, user = np.unique(table["user"], return_inverse=True)
        items, item = np.unique(table["item"], return_inverse=True)
        events = RawEvents(
            user, item, table["timestamp"], {"rating": table["rating"]}, where
        ).without_duplicates()
        read = len(events.users)
        events = events.select(_often(events.users) & _often(events.items))
        kept = _often(events.users)
        if not kept.any():
            raise ValueError(
                f"{path}: no user with {MIN_COUNT} ratings of items with {MIN_COUNT} ratings is "
                "left"
            )
        catalog = Catalog.from_ids(items[np.unique(events.items)])
        events = events.select(kept)
        if len(events.users) < read:
            _log.warning(
                "%s: kept %d of %d events, %d of %d users and %d of %d items: users and items "
                "with at least %d events, counted once, then users that still have as many",
                path,
                len(events.users),
                read,
                len(np.unique(events.users)),
                len(users),
                catalog.num_items,
                len(items),
                MIN_COUNT,
            )
        return dataclasses.replace(
            events, users=users[events.users], items=items[events.items]
        ), catalog


def _check_order(path: Path, users: Strings, items: Strings) -> None:
    """Finds a file whose lines begin with the item, as in Amazon's files of 2018."""
    first = list(zip(users[:1000].tolist(), items[:1000].tolist(), strict=True))
    if all(_ITEM.fullmatch(user) and _USER.fullmatch(item) for user, item in first):
        raise ValueError(
            f"{path}, line 1: the columns must be {_FORM}, but {first[0][0]!r} is an item of "
            f"Amazon and {first[0][1]!r} a user, here and in the lines that follow. Put the user "
            "first: awk -F, -v OFS=, '{print $2, $1, $3, $4}'"
        )


def _often(ids: Int64[np.ndarray, " events"]) -> Bool[np.ndarray, " events"]:
    """Which events are of an id with at least `MIN_COUNT` of them."""
    return (np.bincount(ids) >= MIN_COUNT)[ids]


class AmazonBeauty(InteractionsBuilder):
    """`Beauty.txt`: a user a line, "user item item ...", in order of time but without times;
    5-core, ids from 1.

    An item that comes again is another event: without times it cannot be told from a repeated one.
    """

    TICKS = 0
    BUILDER_CONFIGS = [
        SourceConfig(
            name="amazon-beauty",
            description="Amazon Beauty, 5-core: users, and products that they reviewed, in order",
            files=("Beauty.txt",),
            downloads=(
                Download(
                    "https://raw.githubusercontent.com/RUCAIBox/CIKM2020-S3Rec/"
                    "2a81540ae18615d88ef88227b0c066e5b74781e5/data/Beauty.txt",
                    "sha256:226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
                ),
            ),
        )
    ]

    def read(self) -> tuple[RawEvents, Catalog]:
        path = self.raw_dir / "Beauty.txt"
        users: dict[int, int] = {}
        items, lengths = array.array("q"), []
        for line in lines(path):
            user, *history = line.integers("[ \t]+", "user or item id", 1).tolist()
            if not history:
                raise line.error("expected 'user item item ...' separated by blanks")
            if user in users:
                raise line.error(f"user {user} was given on line {users[user]} already")
            users[user] = line.number
            items.extend(history)
            lengths.append(len(history))
        repeated = np.repeat(np.array(list(users), np.int64), lengths)
        found = np.frombuffer(items, np.int64)
        return RawEvents(repeated, found, None, {}), Catalog.from_ids(np.unique(found))
