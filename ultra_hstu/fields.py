"""Fields of a configuration's sections: limits of their values, and plain data from and to them."""

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Collection, Iterator
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from ml_collections import config_dict

T = TypeVar("T")
Values = dict[str, Any]  # a section as plain data: values, and sections as dicts, by field


@dataclasses.dataclass(frozen=True)
class Section:
    """A dataclass whose fields are values, other sections, or dicts of sections.

    Raises:
      ValueError: a choice by name that is not there, however the section is made.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and (value := getattr(self, name)) not in get_args(hint):
                where, names = f"{type(self).__name__}.{name}", map(repr, get_args(hint))
                raise ValueError(f"{where}={value!r} is not allowed: use {', '.join(names)}")


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a field's value must satisfy unless it is None. An error says: "must be `words`"."""

    holds: Callable[[Any], bool]
    words: str


Positive = Annotated[T, Limit(lambda value: value > 0, "greater than 0")]
NotNegative = Annotated[T, Limit(lambda value: value >= 0, "at least 0")]
BelowOne = Annotated[T, Limit(lambda value: 0 <= value < 1, "in [0, 1)")]


def check_limits(section: Section, prefix: str = "") -> None:
    """Raises ValueError for the first field of a section whose value is not within its limits.

    Sections that the fields hold are checked, too; `prefix` stands before the names of fields.
    """
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if isinstance(value, Section):
            check_limits(value, f"{prefix}{name}.")
        if isinstance(value, dict):
            for key, part in value.items():
                check_limits(part, f"{prefix}{name}.{key}.")
        for part in (hint, *get_args(hint)):
            for limit in getattr(part, "__metadata__", ()):
                if value is not None and not limit.holds(value):
                    raise ValueError(f"{prefix}{name}={value!r} must be {limit.words}")


def to_values(section: Section) -> Values:
    """A section as plain data. A typed placeholder stands for None: flags can override it, too."""
    values: Values = {}
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if isinstance(value, Section):
            value = to_values(value)
        elif isinstance(value, dict):
            value = {key: to_values(part) for key, part in value.items()}
        elif value is None:
            value = config_dict.placeholder(get_args(hint)[0])
        values[name] = value
    return values


def build[S: Section](cls: type[S], values: Any, prefix: str = "") -> S:
    """The section whose fields have these values. Lists become tuples: JSON has no tuples.

    Raises:
      ValueError: naming an unknown field or a value of the wrong type.
    """
    if not isinstance(values, dict):
        where = prefix.rstrip(".") or "(root)"
        raise ValueError(f"config section {where} is {values!r}, not a mapping of fields")
    hints = get_type_hints(cls)
    if others := sorted(values.keys() - hints.keys(), key=str):
        raise ValueError(unknown(f"{prefix}{others[0]}", [f"{prefix}{name}" for name in hints]))
    built: Values = {}
    for name, value in values.items():
        hint = hints[name]
        if isinstance(hint, type) and issubclass(hint, Section):
            built[name] = build(hint, value, f"{prefix}{name}.")
        elif get_origin(hint) is dict and isinstance(value, dict):
            built[name] = {
                key: build(get_args(hint)[1], part, f"{prefix}{name}.{key}.")
                for key, part in value.items()
            }
        elif isinstance(value, list) and _fits(tuple(value), hint):
            built[name] = tuple(value)
        elif _fits(value, hint):
            # Flags may give 1 where 1.0 is meant; nothing else is converted.
            built[name] = float(value) if hint is float and type(value) is int else value
        else:
            allowed = getattr(hint, "__name__", str(hint))
            if get_origin(hint) is Literal:
                allowed = ", ".join(map(repr, get_args(hint)))
            raise ValueError(f"{prefix}{name}={value!r} is not allowed: use {allowed}")
    return cls(**built)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, float | int) and math.isfinite(value)
    return isinstance(value, hint)


def paths(values: Values, prefix: str = "") -> Iterator[str]:
    """The names of all fields and sections of nested values: "train", "train.seed", ..."""
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{name}.")


def unknown(path: str, known: Collection[str]) -> str:
    """What to say of a field that is none of those known: those of near names, else the outer ones.

    Args:
      known: as `paths` gives them.
    """
    near = difflib.get_close_matches(path, known)
    outer = min(name.count(".") for name in known)
    names = ", ".join(near or (name for name in known if name.count(".") == outer))
    advice = f"did you mean {names}?" if near else f"there are {names}"
    return f"unknown config field {path}: {advice}"


def changed[S: Section](section: S, **fields: Any) -> S:
    """The section with other values: `changed(config, train={"seed": 1})`, not validated."""
    values: Values = {}
    for name, value in fields.items():
        old = getattr(section, name)
        nested = isinstance(old, Section) and isinstance(value, dict)
        values[name] = changed(old, **value) if nested else value
    return dataclasses.replace(section, **values)


def difference(old: Values, new: Values, prefix: str = "") -> list[str]:
    """One line for every field in which nested dicts differ: `data.ties: 'stable' -> 'random'`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
