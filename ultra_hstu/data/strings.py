"""Arrays of strings of any length: NumPy's variable-width strings, and their form on disk.

A fixed-width array has the width of its longest string in every row, so that one bad line would
cost gigabytes.
"""

import itertools

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

STRINGS = np.dtypes.StringDType()
Strings = Shaped[np.ndarray, " n"]  # with dtype STRINGS


def is_strings(values: np.ndarray) -> bool:
    """Whether an array holds strings, of variable or of fixed width."""
    return values.dtype.kind in "TU"


def pack(strings: Strings) -> tuple[UInt8[np.ndarray, " bytes"], Int64[np.ndarray, " n"]]:
    """All strings in one buffer, as UTF-8, and where each of them ends."""
    parts = [text.encode() for text in strings.tolist()]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return np.frombuffer(b"".join(parts), np.uint8), ends


def unpack(buffer: UInt8[np.ndarray, " bytes"], ends: Int64[np.ndarray, " n"]) -> Strings:
    """The strings that `pack` packed. Raises ValueError where buffer and ends do not match."""
    bounds, text = [0, *ends.tolist()], buffer.tobytes()
    if bounds != sorted(bounds) or bounds[-1] != len(text):
        raise ValueError("the ends of its strings do not match their text")
    return np.array([text[a:b].decode() for a, b in itertools.pairwise(bounds)], STRINGS)
