"""Paths that a user gives: all of them are local, and `~` stands for the home folder.

And where a user keeps files by default, as the XDG base directories say.
"""

import os
import re
from pathlib import Path
from typing import Annotated

from ultra_hstu.fields import Limit

DATA_VARIABLE = "ULTRA_HSTU_DATA"
WORDS = "a path of this machine, not a URL: mount or copy what is there"


def is_local(path: str) -> bool:
    """Whether it is no URL, such as gs://bucket/folder. (`Path` makes gs:/bucket/folder of it.)"""
    return not re.match(r"[A-Za-z][\w+.-]+:/", path)


LocalPath = Annotated[str, Limit(is_local, WORDS)]


def local(path: str | os.PathLike[str]) -> Path:
    """The path, with `~` expanded. Raises ValueError for a URL, and for an unknown user's home."""
    text = os.fspath(path)
    if not is_local(text):
        raise ValueError(f"{text} must be {WORDS}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: {error} Write the folder out.") from None


def user_folder(variable: str, default: str) -> Path:
    """Our part of a user's base directory.

    Args:
      variable: of the environment, such as XDG_CACHE_HOME; a relative path in it counts as none.
      default: the base directory without it, from the home folder, such as .cache.

    Raises RuntimeError where the user has no home.
    """
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / default) / "ultra-hstu"


def data_folder(given: str | None) -> Path:
    """Where prepared data lies.

    Args:
      given: `data.data_dir`. None: the folder that ULTRA_HSTU_DATA names, else
        `~/.local/share/ultra-hstu/data`, wherever a command is started.

    Raises:
      ValueError: a URL, or a user without a home.
    """
    if given or (given := os.environ.get(DATA_VARIABLE)):
        return local(given)
    try:
        return user_folder("XDG_DATA_HOME", ".local/share") / "data"
    except RuntimeError as error:
        raise ValueError(
            f"there is no folder for prepared data ({error}): name one with "
            f"--config.data.data_dir, or with the variable {DATA_VARIABLE}"
        ) from None
