"""Arrays of strings of any length: NumPy's variable-width strings, and their form on disk.

A fixed-width array has the width of its longest string in every row, so that one bad line would
cost gigabytes.
"""

import itertools

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, Shaped, UInt8

STRINGS = np.dtypes.StringDType()
Strings = Shaped[np.ndarray, " n"]  # with dtype STRINGS


def is_strings(values: np.ndarray) -> bool:
    """Whether an array holds strings, of variable or of fixed width."""
    return values.dtype.kind in "TU"


def pack(strings: Strings) -> tuple[UInt8[np.ndarray, " bytes"], Int64[np.ndarray, " n"]]:
    """All strings in one buffer, as UTF-8, and where each of them ends."""
    array = pa.array(strings.tolist(), pa.large_string())
    _, bounds, text = array.buffers()
    ends = np.frombuffer(bounds, np.int64)[1 : len(array) + 1]
    return np.frombuffer(text or b"", np.uint8)[: ends[-1] if len(ends) else 0], ends


def unpack(buffer: UInt8[np.ndarray, " bytes"], ends: Int64[np.ndarray, " n"]) -> Strings:
    """The strings that `pack` packed. Raises ValueError where buffer and ends do not match."""
    bounds, text = [0, *ends.tolist()], buffer.tobytes()
    if bounds != sorted(bounds) or bounds[-1] != len(text):
        raise ValueError("the ends of its strings do not match their text")
    return np.array([text[a:b].decode() for a, b in itertools.pairwise(bounds)], STRINGS)
