"""Arrays in an npz file without pickle, written whole and read with errors that name the file."""

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.lib.npyio import NpzFile

Path = str | os.PathLike
NAMES = "names"  # a member that names the others: a damaged directory may hide some
# What a damaged file makes zipfile, zlib and NumPy raise.
DAMAGE = (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the whole file or nothing."""
    part = f"{os.fspath(path)}.part"
    with open(part, "wb") as file:
        names = {NAMES: np.array(list(arrays))}
        np.savez_compressed(file, allow_pickle=False, **names | arrays)
    os.replace(part, path)


@contextlib.contextmanager
def reading(path: Path, what: str, remedy: str) -> Iterator[NpzFile]:
    """The arrays of a file. Raises ValueError, saying that it is not `what`, for a damaged one."""
    try:
        with zipfile.ZipFile(path) as members:  # NumPy reads no further than an array: no sum
            if (damaged := members.testzip()) is not None:
                raise ValueError(f"{damaged} is not what was written")
        with np.load(path, allow_pickle=False) as file:
            if NAMES in file and {NAMES, *file[NAMES].tolist()} != set(file):
                raise ValueError(f"it lacks some of {', '.join(file[NAMES].tolist())}")
            yield file
    except DAMAGE as error:
        raise ValueError(f"{os.fspath(path)} is not {what} ({error}): {remedy}") from error
