"""A memory-bounded store of encoded users: vectors of a retrieval run, keys and values of a ranking run."""

import collections
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

ENTRY_BYTES = 512  # of a key, an array's header and a place in the dictionary, rounded up


def key_of(arrays: Any) -> bytes:
    """A hash of a pytree of arrays: of their shapes, too, where one ends and the next begins."""
    digest = hashlib.blake2b(digest_size=16)
    for array in jax.tree.leaves(arrays):
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()


class EncodedUsers:
    """What users were encoded to, by their keys, the least recently used dropped first. A new event is a new key.

    Values have `nbytes` and `copy()`. Not thread safe.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = self.misses = 0
        self._values: collections.OrderedDict[bytes, Any] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def of(self, queries: Sequence[Any], encode: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
        """The values of all queries; those that are not held are encoded in one call, each once, and kept. A query's `key` is a hash of all that the
        encoder reads of it, so that nothing here can be stale."""
        keys = [query.key for query in queries]
        new = {key: query for key, query in zip(keys, queries, strict=True) if key not in self}
        self.hits += len(keys) - len(new)
        self.misses += len(new)
        encoded = dict(zip(new, encode(list(new.values())), strict=True)) if new else {}
        values = [encoded[key] if key in encoded else self.get(key) for key in keys]
        for key, value in encoded.items():
            self.put(key, value)
        return values

    def get(self, key: bytes) -> Any:
        """Raises KeyError where the key is not held."""
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: bytes, value: Any) -> None:
        size = value.nbytes + ENTRY_BYTES
        if size > self.max_bytes:
            return
        if key not in self._values:
            self.bytes += size
        self._values[key] = value.copy()  # not a view, which would keep the whole batch alive
        self._values.move_to_end(key)
        while self.bytes > self.max_bytes:
            self.bytes -= self._values.popitem(last=False)[1].nbytes + ENTRY_BYTES
