"""What values look like in text files: types by their looks, and whether one is of a type."""

import datetime
import re
from collections.abc import Callable, Sequence

import pyarrow as pa

# Fields that are no values.
MISSING = ("", "NULL", "null", "NA", "N/A", "NaN", "nan", "None")
INTEGER = re.compile(r"-?[0-9]{1,18}")
DATE = re.compile(
    r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.(\d{1,9}))?)?)?(?P<zone>Z|[-+]\d\d:?(\d\d)?)?"
)


def type_of_texts(values: Sequence[str]) -> pa.DataType:
    """What most of the values look like, so that a stray one is found as a fault; else text."""

    def most(like: Callable[[str], object]) -> bool:
        return 2 * sum(bool(like(value)) for value in values) > len(values)

    if not values:
        return pa.null()
    if most(_is_number):
        whole = all(INTEGER.fullmatch(one.strip()) for one in values if _is_number(one))
        return pa.int64() if whole else pa.float64()
    if most(lambda value: value.lower() in ("true", "false")):
        return pa.bool_()
    if most(is_date):
        dates = [DATE.fullmatch(value.strip()) for value in values if is_date(value)]
        zones = sum(bool(date["zone"]) for date in dates if date)
        fine = any(len(date[4] or "") > 6 for date in dates if date)
        zone = "UTC" if 2 * zones > len(dates) else None
        return pa.timestamp("ns" if fine else "us", tz=zone)
    return pa.string()


def _is_number(value: str) -> bool:
    try:
        return "_" not in value and float(value) is not None
    except ValueError:
        return False


def type_of_json(values: Sequence[object]) -> pa.DataType:
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.null()
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds <= {int, float}:
        return pa.float64()
    return pa.string() if kinds == {str} else pa.struct([])  # nested or mixed: not read


def fits(value: object, kind: pa.DataType) -> bool:
    """Whether pyarrow would take this value of a text file."""
    if not isinstance(value, str):
        return type_of_json([value]) == kind or (pa.types.is_floating(kind) and type(value) is int)
    checks: dict[Callable[[pa.DataType], bool], Callable[[str], bool]] = {
        pa.types.is_integer: lambda text: INTEGER.fullmatch(text.strip()) is not None,
        pa.types.is_floating: _is_number,
        pa.types.is_boolean: lambda text: text.lower() in ("true", "false", "0", "1"),
        pa.types.is_timestamp: is_date,
    }
    return all(check(value) for is_kind, check in checks.items() if is_kind(kind))


def is_date(value: str) -> bool:
    try:
        datetime.datetime.fromisoformat(value.strip())
    except ValueError:
        return False
    return DATE.fullmatch(value.strip()) is not None


def words(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind):
        return "dates with a time zone" if kind.tz else "dates such as 2020-01-31 23:59:59"
    names: dict[Callable[[pa.DataType], bool], str] = {
        pa.types.is_integer: "whole numbers",
        pa.types.is_floating: "numbers",
        pa.types.is_boolean: "true or false",
    }
    return next((words for is_kind, words in names.items() if is_kind(kind)), "text")
