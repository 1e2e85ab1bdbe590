"""All fields of a configuration as tables, from its dataclasses and the comments in them."""

import ast
import inspect
import io
import tokenize
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from scripts.tables.records import markdown
from ultra_hstu import fields
from ultra_hstu.config import Config
from ultra_hstu.fields import Limit, Section
from ultra_hstu.model_config import ChannelConfig


def field_tables() -> str:
    """A table for every section, by the whole names of its fields."""
    return "\n\n".join(_tables(Config, ""))


def _tables(section: type[Section], prefix: str) -> list[str]:
    meant, hints = meanings(section), get_type_hints(section, include_extras=True)
    defaults, plain, nested = section(), get_type_hints(section), []
    rows = []
    for name, hint in hints.items():
        if isinstance(plain[name], type) and issubclass(plain[name], Section):
            nested += _tables(plain[name], f"{prefix}{name}.")
            continue
        if name == "channels":
            nested += _tables(ChannelConfig, f"{prefix}{name}.NAME.")
        values = fields.words(hint).replace("'", "`"), f"`{getattr(defaults, name)!r}`"
        rows.append((f"`{prefix}{name}`", *values, "; ".join(limits(hint)), meant[name]))
    said = inspect.cleandoc(section.__doc__ or "")
    made = said.startswith(f"{section.__name__}(")  # by dataclasses, where there is no docstring
    about = f"## `{prefix.rstrip('.')}`" + ("" if made else f"\n\n{said}")
    head = markdown(("field", "type", "default", "limit", "meaning"), rows)
    return [f"{about}\n\n{head}" if prefix else head, *nested]


def limits(hint: Any) -> list[str]:
    """The words of all limits in a type."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        return limits(inner) + [one.words for one in metadata if isinstance(one, Limit)]
    return list(dict.fromkeys(words for part in get_args(hint) for words in limits(part)))


def meanings(section: type[Section]) -> dict[str, str]:
    """What the comments above and behind each field say.

    Raises ValueError for a field without any.
    """
    source = inspect.getsource(section)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = {
        one.start[0]: one.string.lstrip("# ") for one in tokens if one.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        first, lines = node.lineno, source.splitlines()
        while lines[first - 2].strip().startswith("#"):
            first -= 1
        above = [comments[n] for n in range(first, node.lineno)]
        own = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        behind = [comments[n] for n in own if n in comments]
        said = " ".join(part for part in (" ".join(above), " ".join(behind)) if part)
        hint = get_type_hints(section)[node.target.id]
        if not said and not (isinstance(hint, type) and issubclass(hint, Section)):
            raise ValueError(f"{section.__name__}.{node.target.id}: no comment says what it is")
        found[node.target.id] = said.rstrip(".")
    return found
