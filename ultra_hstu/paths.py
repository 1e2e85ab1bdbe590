"""Paths that a user gives: all of them are local, and `~` stands for the home folder."""

import os
import re
from pathlib import Path
from typing import Annotated

from ultra_hstu.fields import Limit

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
