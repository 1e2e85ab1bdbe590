"""The users that were encoded, in stores that are bounded in bytes: vectors of a retrieval run,
caches of a ranking run."""

import collections
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from ultra_hstu.nn.key_values import CacheDtype
from ultra_hstu.serving.inputs import COLUMNS, Bucket, Query, UserHistory
from ultra_hstu.serving.kv_cache import Cache, DevicePool, join, repacked, split
from ultra_hstu.serving.scoring import NEW_EVENTS, ScoringModel

ENTRY_BYTES = 512  # of a key, an array's header and an entry of the dictionary, rounded up
COMPARED = 16  # histories with a request's first events, the latest, that it may continue

log = logging.getLogger(__name__)


class EncodedUsers[T: (np.ndarray, Cache)]:
    """What users were encoded to, by their keys, in host memory. The least recently used are
    dropped first. Not thread safe."""

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

    def metrics(self) -> dict[str, int | float]:
        """The values of METRICS."""
        return {"hits": self.hits, "misses": self.misses, "bytes": self.bytes}

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def of(self, queries: Sequence[Query], encode: Callable[[list[Query]], Sequence[T]]) -> list[T]:
        """The values of all queries; those that are not held are encoded in one call, each once,
        and kept. A query's `key` is a hash of all that the encoder reads, so that nothing here is
        stale."""
        keys = [query.key for query in queries]
        new = {key: query for key, query in zip(keys, queries, strict=True) if key not in self}
        self.hits += len(keys) - len(new)
        self.misses += len(new)
        encoded = dict(zip(new, encode(list(new.values())), strict=True)) if new else {}
        values = [encoded[key] if key in encoded else self.get(key) for key in keys]
        for key, value in encoded.items():
            self.put(key, value)
        return values

    def get(self, key: bytes, *, soon: bool = False) -> T:
        """The value, which is then the last to be dropped, or with `soon` the first. Raises
        KeyError where the key is not held."""
        self._values.move_to_end(key, last=not soon)
        return self._values[key]

    def put(self, key: bytes, value: T) -> list[bytes]:
        """Keeps a value, and returns the keys of those that are no longer held: of this one, too,
        if it is larger than all the memory."""
        size = value.nbytes + ENTRY_BYTES
        if size > self.max_bytes:
            return [] if key in self else [key]
        if key not in self:
            self.bytes += size
        self._values[key] = value.copy()  # not a view, which would keep the whole batch alive
        self._values.move_to_end(key)
        dropped = []
        while self.bytes > self.max_bytes:
            dropped.append(next(iter(self._values)))
            self.pop(dropped[-1])
        return dropped

    def pop(self, key: bytes) -> T:
        """Takes a value away. Raises KeyError where the key is not held."""
        value = self._values.pop(key)
        self.bytes -= value.nbytes + ENTRY_BYTES
        return value

    def peek(self, key: bytes) -> T:
        """The value, without a use of it. Raises KeyError where the key is not held."""
        return self._values[key]


class CachedUsers:
    """The caches of users in two tiers: on the device within a budget, then in host memory within
    another, then forgotten. The least recently used leave first. Not thread safe.

    A query whose history is held is not encoded. One that continues a history that is held, whoever
    it belongs to, by a few events extends its cache by these alone, if rows of the model stay
    (`score.grows`). Any other is encoded. What is continued is compared event by event, so that no
    response depends on what a replica remembers, rounding aside.
    """

    METRICS: ClassVar = {
        "hits": "requests whose history was held, since the start",
        "device_hits": "requests whose history was held on the device, since the start",
        "host_hits": "requests whose history was held in host memory, since the start",
        "extended": "requests whose history was extended, since the start",
        "extended_share": "share of the requests whose history was extended",
        "misses": "requests whose history was encoded as a whole, since the start",
        "reused_rows": "rows of extended histories that were not computed again, since the start",
        "bytes": "host memory of the cached users",
        "device_bytes": "device memory of the cached users",
    }

    def __init__(
        self,
        model: ScoringModel,
        *,
        host_bytes: int = 2**26,
        host_kind: CacheDtype | None = None,
        device_bytes: int = 0,
    ):
        """
        Args:
          host_bytes, device_bytes: budgets. The device must hold `max_users` of the longest
            histories, else users are kept in host memory alone.
          host_kind: dtype of the cache in host memory; None: the model's.
        """
        self.model = model
        self.host: EncodedUsers[Cache] = EncodedUsers(host_bytes)
        self.host_kind: CacheDtype = host_kind or model.kind
        self.pool: DevicePool | None = None
        if device_bytes:
            example = model.encode([model.short_query()], model.buckets[0])
            pool = DevicePool(model.ranker, example, device_bytes)
            if pool.max_users >= model.max_users:
                self.pool = pool
            else:
                log.warning(
                    "%d bytes on the device hold %d of the longest histories, and a call may need "
                    "%d: users are kept in host memory. Raise the budget, or lower max_users.",
                    device_bytes,
                    pool.max_users,
                    model.max_users,
                )
        self.counts: collections.Counter[str] = collections.Counter()
        self._call: dict[bytes, Cache] = {}  # users of a call, where there is no pool
        # Keys by a hash of the first 1, 2, 4, ... events of a history, which has less than twice as
        # many.
        self._starts: dict[bytes, list[bytes]] = {}
        self._start_of: dict[bytes, bytes] = {}
        longest = dict(model.ranker.form.max_history)
        self._main = max(longest, key=lambda name: longest[name])  # the channel that is hashed

    def __len__(self) -> int:
        return len(self.host) + len(self._on_device)

    def metrics(self) -> dict[str, int | float]:
        """The values of METRICS."""
        count = self.counts
        hits = count["device_hits"] + count["host_hits"]
        return {
            **{name: count[name] for name in self.METRICS},
            "hits": hits,
            "extended_share": count["extended"]
            / max(1, hits + count["extended"] + count["misses"]),
            "bytes": self.host.bytes,
            "device_bytes": 0 if self.pool is None else self.pool.nbytes,
        }

    def of(self, queries: Sequence[Query]) -> Cache:
        """The cache of the users of up to `model.max_users` queries, in their order."""
        self._call = {}
        different = {query.key: query for query in queries}
        on_host: list[bytes] = []
        continued: dict[bytes, bytes] = {}
        new: list[Query] = []
        for key, query in different.items():
            if key in self._on_device:
                self._on_device.move_to_end(key)
                self.counts["device_hits"] += 1
            elif key in self.host:
                on_host.append(key)
                self.counts["host_hits"] += 1
            elif start := self._continued(query.history):
                continued[key] = start
                self.counts["extended"] += 1
            else:
                new.append(query)
                self.counts["misses"] += 1
        # A history that comes twice in a call is computed once.
        tier = "host_hits" if self.pool is None else "device_hits"
        self.counts[tier] += len(queries) - len(different)
        on_host += [start for start in continued.values() if start in self.host]
        self._load(list(dict.fromkeys(on_host)))
        batch = None
        if continued:
            batch = self._extend(continued, different)
        if new:
            batch = self.model.encode(new)
            self._keep(new, batch)
        if batch is not None and batch.users == len(queries):  # all in one batch, in their order
            return batch
        histories = [query.history for query in queries]
        return self._join([query.key for query in queries], self.model.bucket_of(histories))

    def warm_up(self) -> int:
        """Compiles all that calls can need. Returns the number of programs."""
        model, short = self.model, self.model.short_query()
        for bucket in model.buckets:
            self._call = {}
            batch = model.encode([short], bucket)
            self._keep([short], batch)
            cache = self._join([short.key], bucket)
            if model.grows:
                extended = model.warm_up_extend(cache, bucket)
                self.forget(short.key)
                self._keep([short], extended)
            model.score(batch, [short])
            model.score(cache, [short])
            if self.pool is not None:  # to host memory, and back from there
                self._evict([short.key], bucket)
                if short.key in self.host:
                    self._load([short.key], bucket)
            self.forget(short.key)
        return model.programs

    def forget(self, key: bytes) -> None:
        """Keeps a user no longer, if it was kept."""
        if self.pool is not None and key in self.pool.users:
            self.pool.remove([key])
        elif key in self.host:
            self.host.pop(key)
        self._forget([key])

    def _extend(self, continued: dict[bytes, bytes], call: dict[bytes, Query]) -> Cache:
        """Continues users who are held.

        Args:
          continued: by the key of a query, the key of the history that it continues.
          call: all queries of the call.
        """
        queries, starts = [call[key] for key in continued], list(continued.values())
        bucket = self.model.bucket_of([query.history for query in queries], extended=True)
        cache, reused = self.model.extend(self._join(starts, bucket), queries, bucket)
        self.counts["reused_rows"] += reused
        # Their users have moved on: they are the first to be forgotten, if not in the call.
        for start in set(starts) - set(call):
            if self.pool is not None:
                self.pool.users.move_to_end(start, last=False)
            else:
                self.host.get(start, soon=True)
        self._keep(queries, cache)
        return cache

    def _continued(self, history: UserHistory) -> bytes | None:
        """The key of the longest history that is held and that this one continues."""
        if not self.model.grows:
            return None
        for start in reversed(self._hashes(history)):
            found = {
                key: held.channels[self._main].lengths[0]
                for key in self._starts.get(start, [])[-COMPARED:]
                if continues(history, held := self._held(key).history)
            }
            if found:
                key = max(found, key=lambda key: found[key])
                if key in self._on_device:
                    self._on_device.move_to_end(key)
                return key
        return None

    def _held(self, key: bytes) -> Cache:
        return self._on_device[key] if key in self._on_device else self.host.peek(key)

    @property
    def _on_device(self) -> collections.OrderedDict[bytes, Cache]:
        return collections.OrderedDict() if self.pool is None else self.pool.users

    def _join(self, keys: Sequence[bytes], bucket: Bucket) -> Cache:
        """One cache of users of this call."""
        if self.pool is not None:
            return self.pool.join(keys, bucket)
        return join(self.model.ranker, [self._call[key] for key in keys], bucket)

    def _load(self, keys: Sequence[bytes], bucket: Bucket | None = None) -> None:
        """Takes users from host memory, for this call or to the device."""
        if self.pool is None:
            self._call |= {key: self.host.get(key) for key in keys}
        elif keys:
            users = [self.host.pop(key) for key in keys]
            bucket = bucket or self.model.bucket_of([user.history for user in users])
            self._put(keys, join(self.model.ranker, users, bucket))

    def _keep(self, queries: Sequence[Query], batch: Cache) -> None:
        """Keeps new users, for this call and later ones."""
        keys = [query.key for query in queries]
        if self.model.grows:
            for query in queries:
                if hashes := self._hashes(query.history):
                    self._start_of[query.key] = hashes[-1]
                    self._starts.setdefault(hashes[-1], []).append(query.key)
        if self.pool is not None:
            self._put(keys, batch)
            return
        users = split(batch)
        self._call |= dict(zip(keys, users, strict=True))
        self._to_host(keys, users)

    def _put(self, keys: Sequence[bytes], batch: Cache) -> None:
        """Puts users on the device, in place of others."""
        assert self.pool is not None
        leaving = self.pool.leaving(batch)
        for i in range(0, len(leaving), self.model.max_users):
            self._evict(leaving[i : i + self.model.max_users])
        self.pool.put(keys, repacked(self.model.ranker, batch, self.model.kind))

    def _evict(self, keys: Sequence[bytes], bucket: Bucket | None = None) -> None:
        """Moves users from the device to host memory."""
        assert self.pool is not None
        bucket = bucket or self.model.bucket_of([self.pool.users[key].history for key in keys])
        batch = repacked(self.model.ranker, self.pool.join(keys, bucket), self.host_kind)
        self.pool.remove(keys)
        self._to_host(keys, split(batch))

    def _to_host(self, keys: Sequence[bytes], users: Sequence[Cache]) -> None:
        for key, user in zip(keys, users, strict=True):
            self._forget(self.host.put(key, user))

    def _forget(self, keys: Sequence[bytes]) -> None:
        """Users who are no longer held cannot be continued."""
        for key in keys:
            if start := self._start_of.pop(key, None):
                self._starts[start].remove(key)
                if not self._starts[start]:
                    del self._starts[start]

    def _hashes(self, history: UserHistory) -> list[bytes]:
        """Hashes of the first 1, 2, 4, ... events."""
        events = history.channels[self._main]
        columns = [np.ascontiguousarray(getattr(events, name)) for name in COLUMNS]
        lengths = (2**n for n in range(len(events.item_E).bit_length()))
        return [
            hashlib.blake2b(
                b"".join(column[:length].tobytes() for column in columns), digest_size=16
            ).digest()
            for length in lengths
        ]


def continues(history: UserHistory, held: UserHistory) -> bool:
    """Whether a history is another one and at most NEW_EVENTS events more in each channel."""
    for name, events in history.channels.items():
        before = held.channels[name]
        count = len(before.item_E)
        if not count <= len(events.item_E) <= count + NEW_EVENTS:
            return False
        for column in COLUMNS:
            if not np.array_equal(getattr(events, column)[:count], getattr(before, column)):
                return False
    return True
