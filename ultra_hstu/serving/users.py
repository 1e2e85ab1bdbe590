"""Users: those of a run's data, and those that were encoded, in a store that is bounded in bytes."""

import collections
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from ultra_hstu.config import Config
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.serving.inputs import Query, UserHistory
from ultra_hstu.serving.kv_cache import Cache
from ultra_hstu.task import Task
from ultra_hstu.workdir import Workdir

ENTRY_BYTES = 512  # of a key, an array's header and an entry of the dictionary, rounded up

# Dense ids of events, seconds, actions by name, and the user's context as codes by name.
UserData = tuple[
    Int[np.ndarray, " E"],
    Int[np.ndarray, " E"] | None,
    dict[str, Shaped[np.ndarray, " E"]],
    dict[str, int],
]


class RunData:
    """The data that a run was trained on, read when it is first needed."""

    def __init__(self, workdir: str, raw_dir: str | None = None):
        self.folder = Workdir(workdir)
        self.config: Config = self.folder.read_for_one_device(raw_dir)

    @functools.cached_property
    def interactions(self) -> Interactions:
        """Raises ValueError where the data is not what the run was trained on, or cannot be read."""
        interactions = load_interactions(self.config.data)
        self.folder.check_data(interactions)
        return interactions

    @functools.cached_property
    def count_I(self) -> Float[np.ndarray, " I1"]:
        """How often each item occurs in the training data."""
        task = Task.of(self.config, self.interactions)
        assert isinstance(task, Task)
        return np.ceil(task.popularity())

    def user(self, user: int | str) -> UserData:
        """The whole history of a user, by raw id. Raises ValueError for an unknown one."""
        data = self.interactions
        row, events = data.row(user), data.history(user)
        return (
            data.items[events],
            None if data.timestamps is None else data.timestamps[events],
            {name: values[events] for name, values in data.actions.items()},
            {name: int(codes[row]) for name, codes in data.contexts.items()},
        )


def key_of(history: UserHistory, *, with_now: bool) -> bytes:
    """A hash of a history, `now_B` in it or not. Shapes are hashed too: where one array ends and the
    next begins."""
    read = (history.channels, history.context_BC, history.now_B if with_now else None)
    digest = hashlib.blake2b(digest_size=16)
    for array in jax.tree.leaves(read):
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()


class EncodedUsers[T: (np.ndarray, Cache)]:
    """What users were encoded to, by their keys, the least recently used dropped first. A new event is
    a new key. Not thread safe."""

    METRICS: ClassVar = {
        "hits": "users who were held, since the start",
        "misses": "users who had to be encoded, since the start",
        "bytes": "memory of the cached users",
    }

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = self.misses = 0
        self._values: collections.OrderedDict[bytes, T] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def of(self, queries: Sequence[Query], encode: Callable[[list[Query]], Sequence[T]]) -> list[T]:
        """The values of all queries; those that are not held are encoded in one call, each once, and
        kept. A query's `key` is a hash of all that the encoder reads, so that nothing here is stale."""
        keys = [query.key for query in queries]
        new = {key: query for key, query in zip(keys, queries, strict=True) if key not in self}
        self.hits += len(keys) - len(new)
        self.misses += len(new)
        encoded = dict(zip(new, encode(list(new.values())), strict=True)) if new else {}
        values = [encoded[key] if key in encoded else self.get(key) for key in keys]
        for key, value in encoded.items():
            self.put(key, value)
        return values

    def get(self, key: bytes) -> T:
        """Raises KeyError where the key is not held."""
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: bytes, value: T) -> None:
        size = value.nbytes + ENTRY_BYTES
        if size > self.max_bytes:
            return
        if key not in self._values:
            self.bytes += size
        self._values[key] = value.copy()  # not a view, which would keep the whole batch alive
        self._values.move_to_end(key)
        while self.bytes > self.max_bytes:
            self.bytes -= self._values.popitem(last=False)[1].nbytes + ENTRY_BYTES
