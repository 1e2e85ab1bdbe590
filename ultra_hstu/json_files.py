"""Files of JSON and text: written whole or not at all, read with errors that name file and line."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

# What to do about a write that failed.
REMEDIES = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room",
    errno.EACCES: "Make the folder writable",
    errno.EPERM: "Make the folder writable",
    errno.EROFS: "Make the folder writable, or choose another",
    errno.ENAMETOOLONG: "Choose a shorter path",
}


def read_object(path: Path, fields: Mapping[str, type], remedy: str) -> dict[str, Any]:
    """The JSON object in a file of a run.

    Args:
      fields: names that the object must have, and the type of each value.

    Raises:
      ValueError: naming the file, the line and the remedy.
    """
    try:
        return parse_object(path.read_bytes(), fields)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}, {error}: {remedy}") from None


def parse_object(text: bytes, fields: Mapping[str, type], first_line: int = 1) -> dict[str, Any]:
    """The JSON object in a text. Raises ValueError ("line 3: not JSON ...") as `read_object`."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"line {line}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        line = first_line + text.count(b"\n", 0, error.start)
        raise ValueError(f"line {line}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {first_line}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"line {first_line}: {value!r:.60} is not a JSON object")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            found = f"{value.get(name)!r:.60}"
            raise ValueError(f"line {first_line}: {name!r} is {found}, not {kind.__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or nothing."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or nothing; a failed write leaves the old file as it was."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise not_written(path, error) from error


def not_written(what: str | os.PathLike[str], error: BaseException) -> OSError:
    """The error to raise for a failed write; it says what to do."""
    return OSError(f"{os.fspath(what)} could not be written ({error}). {remedy_of(error)}")


def remedy_of(error: BaseException) -> str:
    """What to do about a failed write, from the words of the operating system."""
    said, seen = "", cast(BaseException | None, error)
    while seen is not None:
        said, seen = f"{said} {seen}", seen.__cause__ or seen.__context__
    known = (todo for number, todo in REMEDIES.items() if os.strerror(number) in said)
    return f"{next(known, 'Mend that')} and start the same command again."
