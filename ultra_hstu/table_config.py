"""The section `data.table`: how own files are read, and which of their events are kept."""

import dataclasses
from typing import Annotated, Literal

from ultra_hstu.fields import Limit, NotNegative, Positive, Section

Share = Annotated[float, Limit(lambda value: 0 < value <= 1, "in (0, 1]")]


@dataclasses.dataclass(frozen=True)
class TableConfig(Section):
    """Columns by name, and what is left out. Whatever is left out is counted in a warning.

    A column that is not named is found by a usual name, such as user_id, item_id and timestamp.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    # Of numbers: what they count since 1970; yyyymmdd: calendar days; none: there are no times, and
    # rows are in order. auto: by range, refused where several units are possible.
    time_unit: Literal["auto", "s", "ms", "us", "ns", "days", "yyyymmdd", "none"] = "auto"
    # Further columns to read, beside those of usual names and those that tasks, signals and
    # features are made from.
    actions: tuple[str, ...] = ()
    # What to predict, by name: a comparison of a column, such as rating>=4 or event==buy.
    tasks: dict[str, str] = dataclasses.field(default_factory=dict)
    delimiter: str | None = None  # of CSV; None: from the header
    items_file: str | None = None  # a table of items: id, and title where it has one
    item_title: str | None = None  # its column of titles
    users_file: str | None = None  # a table of users, whose other columns are contextual features
    # Rows without a user, an item or a time.
    missing: Literal["refuse", "drop"] = "refuse"
    # Items of events that items_file lacks.
    unlisted_items: Literal["refuse", "keep", "drop"] = "refuse"
    # events: the same user, item and time; pairs: the same user and item, the oldest stays
    repeats: Literal["drop_events", "drop_pairs", "keep"] = "drop_events"
    sample_users: Share = 1.0  # share of the users that is drawn
    sample_seed: NotNegative[int] = 0
    # Counted once, items before users. Users need three events in any case.
    min_item_events: Positive[int] = 1
    min_user_events: Positive[int] = 3
    # Users and items with fewer events go, again and again, until none is left with fewer.
    k_core: Positive[int] = 1
