"""Arrays in an npz file without pickle, written whole and read with errors that name the file."""

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.lib.npyio import NpzFile

Path = str | os.PathLike


def save(path: Path, arrays: dict[str, np.ndarray], *, compress: bool = True) -> None:
    """Writes the whole file or nothing."""
    part = f"{os.fspath(path)}.part"
    with open(part, "wb") as file:
        write = np.savez_compressed if compress else np.savez
        write(file, allow_pickle=False, **arrays)
    os.replace(part, path)


@contextlib.contextmanager
def reading(path: Path, what: str, remedy: str) -> Iterator[NpzFile]:
    """The arrays of a file. Raises ValueError, saying that it is not `what`, for a damaged one."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            yield file
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{os.fspath(path)} is not {what} ({error}): {remedy}") from error
