"""Arrays in an npz file without pickle, written whole and read with errors that name the file."""

import contextlib
import os
import zipfile
from collections.abc import Iterator

import numpy as np

from ultra_hstu.data import strings

Path = str | os.PathLike
NAMES = "names"  # a member that names the others: a damaged directory may hide some
# An array of strings is two in the file, under its name and these.
_TEXT, _ENDS = "/text", "/ends"


def save(path: Path, arrays: dict[str, np.ndarray], *, compress: bool = True) -> None:
    """Writes the whole file or nothing."""
    plain = packed(arrays)
    names = {NAMES: np.array(list(plain))}
    write = np.savez_compressed if compress else np.savez
    part = f"{os.fspath(path)}.part"
    with open(part, "wb") as file:
        write(file, allow_pickle=False, **names | plain)
    os.replace(part, path)


@contextlib.contextmanager
def reading(path: Path, what: str, remedy: str) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of a file, to be checked and used inside.

    Raises ValueError, saying that the file is not `what`, for whatever fails inside, too.
    """
    try:
        with zipfile.ZipFile(path) as members:  # NumPy reads no further than an array: no sum
            if (damaged := members.testzip()) is not None:
                raise ValueError(f"{damaged} is not what was written")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as members:
            plain = dict(members)
        names = plain.pop(NAMES, np.array(list(plain))).tolist()  # older files do not name them
        if set(names) != set(plain):
            raise ValueError(f"it lacks some of {', '.join(names)}")
        yield unpacked(plain)
    except Exception as error:  # a damaged file makes zipfile, zlib and NumPy raise anything
        raise ValueError(f"{os.fspath(path)} is not {what} ({error}): {remedy}") from error


def packed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays that NumPy writes without pickle: every array of strings becomes two."""
    plain: dict[str, np.ndarray] = {}
    for name, values in arrays.items():
        if values.dtype == strings.STRINGS:
            plain[name + _TEXT], plain[name + _ENDS] = strings.pack(values)
        else:
            plain[name] = values
    return plain


def unpacked(plain: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that `packed` took. Strings of fixed width, as older files hold them, are read."""
    arrays: dict[str, np.ndarray] = {}
    for name, values in plain.items():
        if name.endswith(_TEXT):
            name = name.removesuffix(_TEXT)
            values = strings.unpack(values, plain[name + _ENDS])
        elif name.endswith(_ENDS):
            continue
        arrays[name] = values.astype(strings.STRINGS) if values.dtype.kind == "U" else values
    return arrays
