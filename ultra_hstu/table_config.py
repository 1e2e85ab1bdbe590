"""The section `data.table`: how own files are read, and which of their events are kept."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from ultra_hstu.fields import Limit, NotNegative, Positive, Section

# Fields that say which events are kept, and how: they are there for public sets, too. The others
# name files and columns, which a public set knows.
RULES = (
    "tasks",
    "missing",
    "unlisted_items",
    "repeats",
    "sample_users",
    "sample_seed",
    "min_item_events",
    "min_user_events",
    "k_core",
)
Share = Annotated[float, Limit(lambda value: 0 < value <= 1, "in (0, 1]")]
# Of a rule: a column, and what it is compared with.
COMPARISON = re.compile(r"\s*(.+?)\s*(?:(>=|<=|==|!=|>|<)\s*(\S.*?))?\s*")

# What a name of rank.signals or rank.tasks is made from, where it is not the column of that name.
MADE_FROM = {
    "watch_time": ("play_time_ms",),
    "watched_share": ("play_time_ms", "duration_ms"),
    "rating_at_least_4": ("rating",),
}
# A signal that says where its buckets end: price[10,20,50].
BUCKETS = re.compile(r"(.+)\[([^\[\]]*)\]")


def made_from(name: str) -> tuple[str, ...]:
    """The columns that a signal, a feature or a task is made from."""
    if found := BUCKETS.fullmatch(name):
        return (found[1],)
    return MADE_FROM.get(name, (name,))


@dataclasses.dataclass(frozen=True)
class TableConfig(Section):
    """Columns by name, and what is left out. Whatever is left out is counted in a warning.

    A column that is not named is found by a usual name, such as user_id, item_id and timestamp.
    """

    user: str | None = None  # column of user ids
    item: str | None = None  # column of item ids
    time: str | None = None  # column of times
    # Of numbers: what they count since 1970; yyyymmdd: calendar days; none: there are no times, and
    # rows are in order. auto: by range, refused where several units are possible.
    time_unit: Literal["auto", "s", "ms", "us", "ns", "days", "yyyymmdd", "none"] = "auto"
    # Further columns to read, beside those of usual names and those that tasks, signals and
    # features are made from.
    actions: tuple[str, ...] = ()
    # Columns that are known of an event before the user acts, which `rank.features` may name.
    features: tuple[str, ...] = ()
    # What to predict, by name: a comparison of a column, such as rating>=4 or event==buy.
    tasks: dict[str, str] = dataclasses.field(default_factory=dict)
    delimiter: str | None = None  # of CSV; None: from the header
    names: tuple[str, ...] = ()  # of all columns, for CSV without a header
    quotes: bool = True  # fields of CSV may stand in quotes; False: quotes are a part of the text
    items_file: str | None = None  # a table of items: id, and title where it has one
    item_title: str | None = None  # its column of titles
    # Its columns that features of items are made from, beside those that features.items names.
    item_features: tuple[str, ...] = ()
    item_separator: str | None = None  # between the values of an item in a column of texts
    # Its column of times, where an item has several rows: the newest counts.
    item_time: str | None = None
    users_file: str | None = None  # a table of users, whose other columns are contextual features
    # Items of the catalogue. kept: those with an event that is kept; counted: those left by a first
    # count of min_item_events and min_user_events, as in HSTU's published code; listed: all items
    # of items_file.
    catalog: Literal["kept", "counted", "listed"] = "kept"
    # Rows without a user, an item or a time.
    missing: Literal["refuse", "drop"] = "refuse"
    # Items of events that items_file lacks.
    unlisted_items: Literal["refuse", "keep", "drop"] = "refuse"
    # events: the same user, item and time; pairs: the same user and item, the oldest stays
    repeats: Literal["drop_events", "drop_pairs", "keep"] = "drop_events"
    sample_users: Share = 1.0  # share of the users that is drawn
    sample_seed: NotNegative[int] = 0  # of that draw
    # Items with fewer events go, once, before users do.
    min_item_events: Positive[int] = 1
    min_user_events: Positive[int] = 3  # the same for users, who need three in any case
    # Users and items with fewer events go, again and again, until none is left with fewer.
    k_core: Positive[int] = 1

    def with_columns(
        self, features: Sequence[str], names: Sequence[str], of_items: Sequence[str]
    ) -> "TableConfig":
        """The same, reading also the columns that these names of `rank` are made from.

        `of_items` are columns of items.
        """
        columns = dict.fromkeys(column for name in names if name for column in made_from(name))
        features = [made_from(name)[0] for name in features]
        more = [name for name in columns if name not in (*self.tasks, *self.features, *features)]
        return dataclasses.replace(
            self,
            features=tuple(dict.fromkeys((*self.features, *features))),
            actions=tuple(dict.fromkeys((*self.actions, *more))),
            item_features=tuple(dict.fromkeys((*self.item_features, *of_items))),
        )

    def check(self, source: str, names: Sequence[str]) -> None:
        """Raises ValueError for rules that are none, and for features that are known too late.

        `names` are the signals and tasks of the run. Another source than `table` has no settings.
        """
        if source != "table":
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if field.name not in RULES and value != getattr(TableConfig(), field.name):
                    raise ValueError(
                        f"data.table.{field.name}={value!r} does nothing under data.source="
                        f"{source!r}, whose files and columns are known: use 'table'"
                    )
        elif self.items_file is None and (self.item_features or self.item_time):
            raise ValueError(
                f"features.items, or data.table.item_features={self.item_features}: what is known "
                "of items is read from a table of them: name it by data.table.items_file"
            )
        elif self.catalog == "listed" and self.items_file is None:
            raise ValueError("data.table.catalog='listed' needs data.table.items_file")
        for task, rule in self.tasks.items():
            if not (found := COMPARISON.fullmatch(rule)):
                raise ValueError(f"data.table.tasks.{task}={rule!r} must name a column")
            if task in self.features or found[1] in self.features:
                raise ValueError(
                    f"data.table.features={self.features}: {task!r} is to be predicted from "
                    f"{found[1]!r}, which is not known before: leave it out"
                )
        afterwards = {column for name in names for column in made_from(name)}
        if both := sorted(afterwards & set(self.features)):
            raise ValueError(
                f"rank.features names {both[0]!r}, which rank.signals or rank.tasks read, too: a "
                "feature is known before the user acts, the others after; name it in one of them"
            )
