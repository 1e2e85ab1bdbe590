"""Fields of a configuration's sections: limits of their values, and plain data from and to them."""

import dataclasses
import difflib
import sys
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
        if _of_sections(hint):
            for key, part in value.items():
                check_limits(part, f"{prefix}{name}.{key}.")
        for words in _exceeded(value, hint):
            raise ValueError(f"{prefix}{name}={value!r} must be {words}")


def _exceeded(value: Any, hint: Any) -> Iterator[str]:
    """The words of the limits that a value exceeds; those of a tuple's items hold for each item."""
    origin, parts = get_origin(hint), get_args(hint)
    if value is None:
        return
    if origin is Annotated:
        yield from _exceeded(value, parts[0])
        yield from (limit.words for limit in parts[1:] if not limit.holds(value))
    elif origin in (Union, types.UnionType):
        for part in parts:
            if _fits(value, part):
                yield from _exceeded(value, part)
    elif origin is tuple:
        for item in value:
            yield from _exceeded(item, parts[0])


class Overridable(config_dict.ConfigDict):
    """A section as flags override it: a field hides the method of ConfigDict of the same name."""

    def __getattribute__(self, name: str) -> Any:
        fields = super().__getattribute__("__dict__").get("_fields", ())
        return self[name] if name in fields else super().__getattribute__(name)


def overridable(section: Section) -> Overridable:
    """A section whose every field a flag can set. `build` checks what flags have made of it.

    An optional field refers to its type, so that a flag can give it a value, or None again.
    """
    values: Values = {}
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if isinstance(value, Section):
            value = overridable(value)
        elif isinstance(value, dict):
            parts = {
                key: overridable(part) if isinstance(part, Section) else part
                for key, part in value.items()
            }
            value = Overridable(parts, type_safe=False)
        elif type(None) in get_args(hint):
            reference = config_dict.FieldReference(None, field_type=hint)
            reference.set(value, type_safe=False)
            value = reference
        values[name] = value
    return Overridable(values, type_safe=False)


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
        elif isinstance(value, dict) and _of_sections(hint):
            built[name] = {
                key: build(get_args(hint)[1], part, f"{prefix}{name}.{key}.")
                for key, part in value.items()
            }
        elif isinstance(value, list) and _fits(tuple(value), hint):
            built[name] = tuple(value)
        elif _fits(value, hint):
            # Flags may give 1 where 1.0 is meant; nothing else is converted.
            floats = float in (hint, *get_args(hint))
            built[name] = float(value) if floats and type(value) is int else value
        else:
            raise ValueError(f"{prefix}{name}={value!r} is not allowed: use {words(hint)}")
    return cls(**built)


def words(hint: Any) -> str:
    """A type in words, as in "use int or None"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return words(parts[0])
    if origin is Literal:
        return ", ".join(map(repr, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(words(part) for part in parts)
    if origin is tuple:
        return f"tuple of {words(parts[0])}"
    if origin is dict:
        return "a section for each name" if _of_sections(hint) else "a text for each name"
    if hint is types.NoneType:
        return "None"
    return "its fields" if issubclass(hint, Section) else hint.__name__


def hint_of(cls: type[Section], path: str) -> Any:
    """The type of a field by its whole name, such as model.channels.liked.layers.

    Raises KeyError for an unknown one.
    """
    name, _, rest = path.partition(".")
    hint = get_type_hints(cls)[name]
    if rest and get_origin(hint) is dict:
        rest, hint = rest.partition(".")[2], get_args(hint)[1]
    return hint_of(hint, rest) if rest else hint


def _of_sections(hint: Any) -> bool:
    """Whether a field is a dict of sections."""
    return get_origin(hint) is dict and issubclass(get_args(hint)[1], Section)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, parts[0])
    if origin is Literal:
        return value in parts
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(part, parts[1]) for part in value.values())
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, float | int) and abs(value) <= sys.float_info.max
    return isinstance(value, origin or hint)


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


def flat(values: Values, prefix: str = "") -> Values:
    """Nested dicts as one, by the whole names of their fields: {"train.seed": 42, ...}."""
    found: Values = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def difference(old: Values, new: Values) -> list[str]:
    """One line for every field in which nested dicts differ: `data.ties: 'stable' -> 'random'`."""
    before, after = flat(old), flat(new)
    shown = [{name: repr(value) for name, value in one.items()} for one in (before, after)]
    return [
        f"{name}: {' -> '.join(one.get(name, '(absent)') for one in shown)}"
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or before[name] != after[name]
    ]
