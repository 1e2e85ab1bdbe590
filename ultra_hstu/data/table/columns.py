"""What the columns of own events mean: by usual names, times by their range, tasks by rule."""

import dataclasses
import datetime
import difflib
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32, Int32, Num, Shaped

from ultra_hstu.data.times import FIRST_SECOND, LAST_SECOND, UNITS, WORDS, unit_of
from ultra_hstu.data.times import TICKS as UNIT_TICKS
from ultra_hstu.table_config import COMPARISON, TableConfig

# Usual names, lower case and without anything but letters and digits; earlier ones first.
USERS = (
    "userid user uid visitorid reviewerid customerid customer memberid accountid learnerid "
    "studentid authorid sessionid id"
).split()
ITEMS = (
    "itemid movieid item asin parentasin videoid trackid productid product articleid songid "
    "artistid bookid isbn animeid venueid gameid businessid newsid contentid problemid sku iid id"
).split()
TIMES = (
    "timestamp time ts unixreviewtime timems timestampms eventtime datetime unixtime createdat "
    "date eventdate"
).split()
EVENT_TITLES = "title itemtitle itemname producttitle productname movietitle".split()
TITLES = [*EVENT_TITLES, "name"]
ACTIONS = (
    "rating ratings stars star score overall click clicks isclick clicked like liked islike "
    "watchtime watchratio playtimems durationms longview dwelltime event eventtype action "
    "behavior behaviortype correct purchase purchased quantity"
).split()
_DAY = 86_400
TICKS: dict[str, int] = {str(unit): ticks for unit, ticks in UNIT_TICKS.items()}
_COMPARE: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    ">=": np.greater_equal,
    "<=": np.less_equal,
    "==": np.equal,
    "!=": np.not_equal,
    ">": np.greater,
    "<": np.less,
}


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns that are read, by what they are for; `time` is None where there are no times."""

    user: str
    item: str
    time: str | None
    actions: tuple[str, ...]
    title: str | None = None  # of the item, where events have it

    @property
    def names(self) -> tuple[str, ...]:
        some = (self.user, self.item, self.time, self.title, *self.actions)
        return tuple(dict.fromkeys(name for name in some if name is not None))


def choose(
    names: Sequence[str], config: TableConfig, where: object, *, items: bool = False
) -> Columns:
    """The columns of a table that has these names; `where` says which table, in errors.

    Args:
        items: whether a table of items has the titles.

    Raises:
        ValueError: a column that is not there; shows those that are, and the flag that names it.
    """

    def of(part: str, usual: Sequence[str]) -> str:
        if (named := getattr(config, part)) is not None:
            return require(named, f"data.table.{part}")
        if (found := find(names, usual)) is None:
            remedy = f"name it by --config.data.table.{part}=NAME"
            if part == "time":
                remedy += ", or say that rows are in order of time: --config.data.table."
                remedy += "time_unit=none"
            raise ValueError(
                f"{where}: no column looks like the {part}'s; there are {listed(names)}: {remedy}"
            )
        return found

    def require(name: str, field: str) -> str:
        if name not in names:
            near = difflib.get_close_matches(name, names[:1000], 1)
            raise ValueError(
                f"{field}={name!r}: {where} has no such column (or has it twice); there are "
                f"{listed(names)}" + (f": --config.{field}={near[0]}?" if near else "")
            )
        return name

    user, item = of("user", USERS[:-1]), of("item", ITEMS[:-1])
    time = None if config.time_unit == "none" else of("time", TIMES)
    asked = [require(name, "data.table.actions") for name in config.actions]
    asked += [require(name, "data.table.features") for name in config.features]
    for task, rule in config.tasks.items():
        asked.append(require(Comparison.of(rule).column, f"data.table.tasks.{task}"))
    usual = [name for name in names if simple(name) in ACTIONS]
    title = None
    if not items:
        title = config.item_title and require(config.item_title, "data.table.item_title")
        title = title or find(names, EVENT_TITLES)
    known = (user, item, time, title)
    actions = tuple(name for name in dict.fromkeys(usual + asked) if name not in known)
    return Columns(user, item, time, actions, title)


def find(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """The name that is earliest among the usual ones."""
    known = {simple(name): name for name in reversed(names)}
    return next((known[name] for name in usual if name in known), None)


def simple(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def listed(names: Sequence[str]) -> str:
    """The names of columns, for messages."""
    shown = ", ".join(repr(name[:40]) for name in names[:20]) or "none"
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 20 else shown


# --- tasks ---


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A rule of `data.table.tasks`: a column alone, or compared with a value."""

    column: str
    sign: str = ""
    value: str = ""

    @classmethod
    def of(cls, rule: str) -> "Comparison":
        """Raises ValueError for a rule without a column."""
        found = COMPARISON.fullmatch(rule)
        if found is None:
            raise ValueError(
                f"data.table.tasks: {rule!r} is no rule: write a column, or compare it with a "
                "value by >=, <=, ==, !=, > or <, such as 'rating>=4'"
            )
        column, sign, value = (part or "" for part in found.groups())
        return cls(column.strip(), sign, value.strip().strip("'\""))

    def labels(
        self, values: Num[np.ndarray, " E"], texts: Sequence[str] | None
    ) -> Int32[np.ndarray, " E"] | Float32[np.ndarray, " E"]:
        """1 where the rule holds, 0 where not, NaN where the column has no value.

        Args:
            texts: what the codes 1, 2, ... of a text column stand for; 0 is no value.

        Raises:
            ValueError: a text that the column never holds, or a comparison that it cannot have.
        """
        if not self.sign:
            return values if texts is None else values.astype(np.int32)
        if texts is None:
            try:
                number = float(self.value)
            except ValueError:
                raise ValueError(
                    f"data.table.tasks: {self.column!r} holds numbers, and {self.value!r} is none"
                ) from None
            unknown_E = np.isnan(values)
        elif self.value not in texts or self.sign not in ("==", "!="):
            raise ValueError(
                f"data.table.tasks: {self.column!r} holds text, which can be == or != one of "
                f"{listed(texts)}, not {self.sign} {self.value!r}"
            )
        else:
            number, unknown_E = texts.index(self.value) + 1, values == 0
        label_E = _COMPARE[self.sign](values, number)
        if unknown_E.any():
            return np.where(unknown_E, np.nan, label_E).astype(np.float32)
        return label_E.astype(np.int32)


# --- times ---


def unit_by_range(low: int | float, high: int | float, column: str, config: TableConfig) -> str:
    """The unit of a column of numbers from `low` to `high`.

    Numbers are taken to be in the unit in which the largest lies between 1973 and 2106, and all
    after 1901: of seconds, milliseconds, microseconds and nanoseconds it is one at most.

    Raises:
        ValueError: several units are possible, shown with the times that they mean; or none is.
    """
    if config.time_unit not in ("auto", "none"):
        return config.time_unit
    unit = unit_of(int(high))
    if unit is not None and low >= FIRST_SECOND * TICKS[unit]:
        return unit
    readings = []
    for name in (*UNITS, "days", "yyyymmdd"):
        try:
            first, last = (int(seconds(np.array([int(v)]), name)[0]) for v in (low, high))
        except ValueError:
            continue
        if FIRST_SECOND <= first <= last <= LAST_SECOND:
            readings.append(f"{day(first)} to {day(last)} (--config.data.table.time_unit={name})")
    span = f"data.table.time: column {column!r} holds numbers from {low:.16g} to {high:.16g}"
    if not readings:
        raise ValueError(f"{span}, which are times between 1901 and 2106 in no unit")
    raise ValueError(f"{span}. That may be {'; or '.join(readings)}. Say which")


def seconds(values: Num[np.ndarray, " E"], unit: str) -> Shaped[np.ndarray, " E"]:
    """Whole seconds since 1970. Raises ValueError for numbers that are no days of a calendar."""
    if unit in TICKS:
        return np.floor_divide(values, TICKS[unit]).astype(np.int64, copy=False)
    if unit == "days":
        return np.floor(values * _DAY).astype(np.int64)
    texts = np.floor(values).astype(np.int64).astype(str)
    days, day_E = np.unique(texts, return_inverse=True)
    if odd := [text for text in days.tolist() if not re.fullmatch(r"[12]\d{7}", text)]:
        raise ValueError(f"{odd[0]!r} is no day written as yyyymmdd")
    dates = [datetime.datetime.strptime(text, "%Y%m%d").date() for text in days.tolist()]
    return np.array(dates, "datetime64[s]").astype(np.int64)[day_E]


def day(second: int) -> str:
    """A second as a day, or with its time where it is within 1970's first days."""
    when = datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(
        seconds=int(second)
    )
    return f"{when:%Y-%m-%d}" if abs(second) > 10 * _DAY else f"{when:%Y-%m-%d %H:%M:%S}"


def unit_words(unit: str) -> str:
    return next((words for name, words in WORDS.items() if name == unit), unit)


# --- what was read ---


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a table was read, to be shown: the columns, the unit of the times and their range, and
    how many events there were and were dropped, by reason."""

    columns: dict[str, str | None]
    actions: tuple[str, ...]
    unread: tuple[str, ...]
    unit: str
    times: tuple[int, int] | None
    events: int
    dropped: dict[str, int]

    def lines(self) -> list[str]:
        """What a user must see before anything is made from the data."""
        named = [f"{part} = {name}" for part, name in self.columns.items() if name]
        lines = [f"columns: {', '.join(named)}; actions: {', '.join(self.actions) or 'none'}"]
        if self.unread:
            lines.append(
                f"not read: {listed(self.unread)} (--config.data.table.actions=NAME reads more)"
            )
        if self.times is None:
            lines.append("times: none, rows are in order")
        else:
            first, last = map(day, self.times)
            lines.append(f"times: {unit_words(self.unit)}, {first} to {last}")
        return lines
