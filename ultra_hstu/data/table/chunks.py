"""Columns gathered in chunks: ids and text, coded at the end; numbers and times."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int32, Num, Shaped

from ultra_hstu.data.grouping import MAX_ID_CHARACTERS, Coded
from ultra_hstu.data.strings import STRINGS

_INTEGER = r"^-?(0|[1-9][0-9]{0,17})$"
_INTEGRAL = r"^-?(0|[1-9][0-9]{0,14})\.0+$"  # as a table of numbers with gaps is written
_BLOCK = 1 << 18  # strings that are Python's at one time
_MANY = 1 << 24  # distinct values of all chunks that are held


class TextColumn:
    """Chunks of a column with few distinct values against its length."""

    def __init__(self) -> None:
        self._chunks: list[pa.DictionaryArray] = []
        self._held, self._limit = 0, _MANY

    def add(self, values: pa.Array) -> None:
        """Raises pyarrow.ArrowInvalid for values of another kind than those before."""
        if not pa.types.is_dictionary(values.type):
            values = values.dictionary_encode()
        inner = values.dictionary
        if pa.types.is_integer(inner.type):
            inner = inner.cast(pa.int64())
        elif pa.types.is_floating(inner.type):
            inner = inner.cast(pa.float64())
        elif not pa.types.is_string(inner.type):
            inner = inner.cast(pa.string())
        if self._chunks and self._chunks[0].type.value_type != inner.type:
            before = self._chunks[0].type.value_type
            raise pa.ArrowInvalid(f"{inner.type} here, {before} before")
        indices = values.indices.cast(pa.int32())
        self._chunks.append(pa.DictionaryArray.from_arrays(indices, inner))
        self._held += len(inner)
        if self._held > self._limit:
            self._unify()

    def _unify(self) -> pa.Array:
        """All chunks get one dictionary, which is returned."""
        self._chunks = pa.chunked_array(self._chunks).unify_dictionaries().chunks
        one = self._chunks[0].dictionary
        self._held, self._limit = len(one), max(_MANY, 2 * len(one))
        return one

    def take(self, check: Callable[[pa.Array, Callable[[int], int]], pa.Array]) -> Coded:
        """The column, coded; a missing value has code -1. The chunks are given up.

        Args:
            check: gives the values as they count, from the distinct ones, and may raise for the
                k-th of them, with the event that the second argument gives for k.
        """
        one = self._unify()
        used = np.zeros(len(one) + 1, bool)
        for chunk in self._chunks:
            used[_indices(chunk)] = True
        place = np.flatnonzero(used[:-1])  # of values that occur: others may be of dropped rows
        values = check(one.take(pa.array(place)), lambda k: self._first_event(int(place[k])))
        array = _to_numpy(values)
        del values
        pa.default_memory_pool().release_unused()
        ids, inverse = np.unique(array, return_inverse=True)
        del array
        rank = np.full(len(one) + 1, -1, np.int32)
        rank[place] = inverse
        code_E = np.empty(sum(map(len, self._chunks)), np.int32)
        at = 0
        self._chunks.reverse()
        while self._chunks:
            index_n = _indices(self._chunks.pop())
            code_E[at : at + len(index_n)] = rank[index_n]
            at += len(index_n)
        del one
        pa.default_memory_pool().release_unused()
        return Coded(ids, code_E)

    def _first_event(self, value: int) -> int:
        at = 0
        for chunk in self._chunks:
            found = np.flatnonzero(_indices(chunk) == value)
            if len(found):
                return at + int(found[0])
            at += len(chunk)
        raise IndexError(f"value {value} does not occur")


def _indices(chunk: pa.DictionaryArray) -> Int32[np.ndarray, " n"]:
    """-1 where a value is missing."""
    indices = chunk.indices
    return (indices.fill_null(-1) if indices.null_count else indices).to_numpy()


def _to_numpy(values: pa.Array) -> Shaped[np.ndarray, " n"]:
    if not pa.types.is_string(values.type):
        return values.to_numpy()
    array = np.empty(len(values), STRINGS)
    for first in range(0, len(values), _BLOCK):  # a string of Python takes four times the memory
        array[first : first + _BLOCK] = values.slice(first, _BLOCK).to_pylist()
    return array


class BadId(Exception):
    """An id that cannot be one: what is wrong, its value, and the event that has it."""

    def __init__(self, problem: str, value: object, event: int):
        super().__init__(problem)
        self.problem, self.value, self.event = problem, value, event


def ids(values: pa.Array, first_event: Callable[[int], int]) -> pa.Array:
    """Distinct values as ids: int64 where all are whole numbers, else text without blanks around.

    Raises BadId.
    """
    if pa.types.is_integer(values.type):
        return values
    if pa.types.is_floating(values.type):
        whole = pc.equal(pc.floor(values), values)
        exact = pc.and_(whole, pc.less(pc.abs(values), 2.0**53))
        _refuse(values, pc.invert(exact), "an id must be a whole number or text", first_event)
        return values.cast(pa.int64())
    values = _words(values, first_event)
    integer = pc.match_substring_regex(values, _INTEGER)
    if pc.all(integer).as_py():
        return values.cast(pa.int64())
    integral = pc.match_substring_regex(values, _INTEGRAL)
    if pc.all(pc.or_(integer, integral)).as_py():
        return pc.replace_substring_regex(values, r"\.0+$", "").cast(pa.int64())
    return values


def _words(values: pa.Array, first_event: Callable[[int], int]) -> pa.Array:
    """Ids of text, without blanks around. Raises BadId."""
    values = pc.utf8_trim_whitespace(values.cast(pa.string()))
    size = pc.utf8_length(values)
    _refuse(values, pc.equal(size, 0), "an id is missing", first_event)
    problem = f"an id has more than {MAX_ID_CHARACTERS} characters"
    _refuse(values, pc.greater(size, MAX_ID_CHARACTERS), problem, first_event)
    return values


def _refuse(
    values: pa.Array, bad: pa.Array, problem: str, first_event: Callable[[int], int]
) -> None:
    if (place := pc.index(bad, True).as_py()) >= 0:
        raise BadId(problem, values[place].as_py(), first_event(place))


def exact_ids(values: pa.Array, first_event: Callable[[int], int]) -> pa.Array:
    """The same where a format says what ids are: text stays text, also where all are digits.

    Raises BadId.
    """
    return (
        ids(values, first_event)
        if pa.types.is_integer(values.type)
        else _words(values, first_event)
    )


def texts(values: pa.Array, first_event: Callable[[int], int]) -> pa.Array:
    """Distinct values as they stand, without blanks around."""
    return pc.utf8_trim_whitespace(values.cast(pa.string()))


def gaps(values: pa.Array) -> Bool[np.ndarray, " n"]:
    """Where a value is missing, or no finite number."""
    if pa.types.is_floating(values.type):
        return ~np.isfinite(values.to_numpy(zero_copy_only=False))
    if not values.null_count:
        return np.zeros(len(values), bool)
    return values.is_null().to_numpy(zero_copy_only=False)


def compact(times: Num[np.ndarray, " n"]) -> Num[np.ndarray, " n"]:
    """Integers in as few bytes as they need while a file is read."""
    if times.dtype.kind not in "iu":
        return times.astype(np.float64, copy=False)
    small = not times.size or (times.min() >= -(2**31) and times.max() < 2**31)
    return times.astype(np.int32 if small else np.int64)


def narrow(numbers: Shaped[np.ndarray, " n"]) -> Num[np.ndarray, " n"]:
    """int32 where nothing is lost by it, else float32, with NaN for what is not finite there."""
    if numbers.dtype.kind == "b":
        return numbers.astype(np.int32)
    with np.errstate(invalid="ignore", over="ignore"):
        whole = numbers.astype(np.int32)
        narrowed = numbers.astype(np.float32)
    if np.array_equal(whole, numbers):
        return whole
    narrowed[~np.isfinite(narrowed)] = np.nan
    return narrowed


def joined(parts: list[Num[np.ndarray, " n"]], dtype: type[np.generic]) -> Num[np.ndarray, " E"]:
    """One array of all parts, which are given up one by one."""
    joined, at = np.empty(sum(map(len, parts)), dtype), 0
    parts.reverse()
    while parts:
        part = parts.pop()
        joined[at : at + len(part)] = part
        at += len(part)
    return joined
