"""A memory-bounded store of encoded users."""

import collections
import hashlib

import numpy as np
from jaxtyping import Float

from ultra_hstu.serving.retrieval import Query

ENTRY_BYTES = 512  # of a key, an array's header and a place in the dictionary, rounded up


class UserVectors:
    """Vectors by what they were computed from, the least recently used dropped first.

    A key is a hash of everything that the encoder reads of a query, so an entry can never be stale: a new event is a new key. The user's id adds
    nothing to it. Not thread safe.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._vectors: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._vectors)

    def __contains__(self, key: bytes) -> bool:
        return key in self._vectors

    @staticmethod
    def key(query: Query) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for array in (query.events.item_E, query.events.time_E, query.events.signal_ES):
            if array is not None:
                digest.update(array.tobytes())
        return digest.digest()

    def get(self, key: bytes) -> Float[np.ndarray, " D"]:
        """Raises KeyError where the key is not held."""
        self._vectors.move_to_end(key)
        return self._vectors[key]

    def put(self, key: bytes, vector_D: Float[np.ndarray, " D"]) -> None:
        size = vector_D.nbytes + ENTRY_BYTES
        if size > self.max_bytes:
            return
        if key not in self._vectors:
            self.bytes += size
        self._vectors[key] = vector_D.copy()  # not a view, which would keep the whole batch alive
        self._vectors.move_to_end(key)
        while self.bytes > self.max_bytes:
            self.bytes -= self._vectors.popitem(last=False)[1].nbytes + ENTRY_BYTES
