"""sha256 sums of the files in a folder, kept in it: what can be read is not yet intact."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

SUMS = "sha256.json"
Sums = dict[str, str]  # hexadecimal, by the name of a file, relative to the folder


def digest(path: Path, kind: str = "sha256") -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def checksums(folder: Path, names: Iterable[str]) -> Sums:
    """The sums of these files."""
    return {name: digest(folder / name) for name in names}


def write(folder: Path, sums: Sums) -> None:
    """Keeps the sums in the folder; the file appears whole or not at all."""
    part = folder / f"{SUMS}.part"
    part.write_text(json.dumps(sums, indent=1))
    os.replace(part, folder / SUMS)


def read(folder: Path) -> Sums | None:
    """The sums that `write` kept; None where there are none, or their file is damaged."""
    try:
        sums = json.loads((folder / SUMS).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(sums, dict) and all(isinstance(one, str) for one in sums.values())
    return sums if whole and sums else None


def damage(folder: Path, names: Iterable[str] | None = None, since: str = "written") -> str | None:
    """What is wrong with a folder, or some files of it, whose sums were kept; None: nothing."""
    if (expected := read(folder)) is None:
        return f"{folder / SUMS} is missing or damaged"
    for name in expected if names is None else names:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (found := digest(path)) != expected[name]:
            known = expected[name]
            return (
                f"{path} has changed since it was {since}: expected sha256 {known}, found {found}"
            )
    return None
