"""The KV cache of encoded histories: what it holds, which of its rows stay when events are added,
and how users leave a batch and join another."""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped

from kernels.typing import Leaf
from ultra_hstu.nn.cached import CachedRows
from ultra_hstu.nn.key_values import CacheDtype, KeyValues, pack
from ultra_hstu.serving.compiled import Channels, CompiledRanker
from ultra_hstu.serving.inputs import (
    AnyArray,
    Bucket,
    UserHistory,
    cumulative,
    padded,
    padded_offsets,
)
from ultra_hstu.serving.tokens import bucket_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """B users' encoded histories, flat and jagged: an explicit pytree, which nothing else holds.

    An encoded user, as a server keeps it, is a cache with B = 1.

    Attributes:
      channels: keys and values of every layer of every channel, at the sizes of a bucket.
      history: the events that were encoded, the newest of each channel, in host memory.
      mark: some of the parameters that the cache was made with.
      signature: of the model's structure.
      kind: dtype of the cache.
    """

    channels: Channels
    history: UserHistory
    mark: Leaf[Float32[Array, "..."]]
    signature: str = dataclasses.field(metadata={"static": True})
    kind: CacheDtype = dataclasses.field(metadata={"static": True})

    @property
    def users(self) -> int:
        return self.history.users

    @property
    def bucket_users(self) -> int:
        """Users that the bucket holds."""
        return len(next(iter(self.channels.values()))[0].frame.offsets) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, their frames and the events. A bucket may be half as large
        again as its rows need."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.channels, self.history)))

    def copy(self) -> "Cache":
        """The cache in NumPy arrays of its own, which keep no batch alive."""
        channels, history = jax.tree.map(np.array, (self.channels, self.history))
        return dataclasses.replace(self, channels=channels, history=history)


def check_cache(cache: Cache, model: CompiledRanker) -> None:
    """Raises ValueError for a cache of another configuration or of other parameters."""
    if cache.signature != model.signature:
        raise ValueError(
            f"the cache was made by a model of another configuration ({cache.signature}, this one "
            f"is {model.signature}): encode the history again"
        )
    if cache.mark is not model.mark and not np.array_equal(cache.mark, model.mark):
        raise ValueError(
            "the cache was made with other parameters of this model: encode the history again"
        )


def split(cache: Cache) -> list[Cache]:
    """The users of a cache, each a cache with B = 1: views of one copy in host memory."""
    channels = jax.device_get(cache.channels)
    return [
        dataclasses.replace(
            cache,
            channels={
                name: tuple(_rows_of(part, user) for part in parts)
                for name, parts in channels.items()
            },
            history=cache.history.user(user),
        )
        for user in range(cache.users)
    ]


def join(model: CompiledRanker, users: Sequence[Cache], bucket: Bucket) -> Cache:
    """One cache of these users, at the sizes that `encode_history` gives to a bucket. Scores
    against it are the scores against the caches that the users are from.

    Raises:
      ValueError: more users or rows than the bucket holds.
    """
    if len(users) > bucket.users:
        raise ValueError(f"{len(users)} users are more than {bucket} holds: join fewer")
    channels = {}
    for name in model.encoders:
        parts = zip(*(user.channels[name] for user in users), strict=True)
        sizes = part_rows(model, name, bucket)
        channels[name] = tuple(
            _together(part, rows, bucket.users) for part, rows in zip(parts, sizes, strict=True)
        )
    history = UserHistory.concatenate([user.history for user in users])
    return dataclasses.replace(users[0], channels=channels, history=history)


def part_rows(model: CompiledRanker, name: str, bucket: Bucket) -> tuple[int, ...]:
    """Rows of a channel in a bucket: below a truncation, and above it where there is one."""
    rows = bucket_rows(model.form, bucket, name)
    truncation = model.encoders[name].truncation
    if truncation is None:
        return (rows,)
    return rows, min(rows, bucket.users * (truncation.length + model.form.contextual))


def repacked(model: CompiledRanker, cache: Cache, kind: CacheDtype) -> Cache:
    """The cache in another dtype."""
    if cache.kind == kind:
        return cache
    channels = _repack(cache.channels, kind=kind, dtype=model.dtype)
    return dataclasses.replace(cache, channels=channels, kind=kind)


@functools.partial(jax.jit, static_argnames=("kind", "dtype"))
def _repack(channels: Channels, *, kind: CacheDtype, dtype: np.dtype) -> Channels:
    return {
        name: tuple(
            dataclasses.replace(
                part, layers=tuple(pack(*layer.unpacked(dtype), kind) for layer in part.layers)
            )
            for part in parts
        )
        for name, parts in channels.items()
    }


def _rows_of(part: CachedRows, user: int) -> CachedRows:
    """The rows of one user."""
    frame = part.frame
    span = slice(frame.offsets[user], frame.offsets[user + 1])
    contextual_B = frame.num_contextual
    own = dataclasses.replace(
        frame,
        offsets=np.array([0, span.stop - span.start], np.int32),
        real_T=frame.real_T[span],
        time_T=frame.time_T[span],
        next_time_T=frame.next_time_T[span],
        num_contextual=None if contextual_B is None else contextual_B[user : user + 1],
    )
    rows = (part.layers, part.input_SD, part.pool_S)
    return CachedRows(own, *jax.tree.map(lambda leaf: leaf[span], rows))


def _together(parts: Sequence[CachedRows], rows: int, users: int) -> CachedRows:
    """The rows of users one after another, at the sizes of a bucket."""
    offsets = cumulative([len(part.frame.time_T) for part in parts])
    if (count := int(offsets[-1])) > rows:
        raise ValueError(f"{count} rows are more than the {rows} of the bucket: join fewer users")

    def stacked(*leaves: Shaped[AnyArray, "..."]) -> Shaped[np.ndarray, "rows ..."]:
        whole = np.zeros((rows, *leaves[0].shape[1:]), leaves[0].dtype)
        np.concatenate(leaves, out=whole[:count])
        return whole

    frames = [part.frame for part in parts]
    contextual_B = (
        None
        if frames[0].num_contextual is None
        else padded(np.concatenate([frame.num_contextual for frame in frames]), users)
    )
    frame = dataclasses.replace(
        frames[0],
        offsets=padded_offsets(offsets, users),
        real_T=np.arange(rows) < count,
        time_T=stacked(*(frame.time_T for frame in frames)),
        next_time_T=stacked(*(frame.next_time_T for frame in frames)),
        num_contextual=contextual_B,
    )
    columns = [(part.layers, part.input_SD, part.pool_S) for part in parts]
    return CachedRows(frame, *jax.tree.map(stacked, *columns))


# The rows of each channel and part, without their frames; and where they are in a pool.
Rows = dict[str, tuple[tuple[tuple[KeyValues, ...], Float[AnyArray, "..."] | None], ...]]
Indices = dict[str, list[Int32[AnyArray, "..."]]]


class DevicePool:
    """The rows of users on the device: one buffer for each layer, of which every user has some
    rows.

    Attributes:
      users: by key, each a cache with B = 1 whose rows are in the pool; the least recently used
        first.
      max_users: how many of the longest histories the budget holds.
    """

    def __init__(self, model: CompiledRanker, example: Cache, max_bytes: int):
        """
        Args:
          example: an encoded history, for the sizes of a row.
        """
        self.users: collections.OrderedDict[bytes, Cache] = collections.OrderedDict()
        self._model = model
        rows = _rows(example)
        self._row_bytes = {
            name: [
                sum(leaf.nbytes // len(leaf) for leaf in jax.tree.leaves(part)) for part in parts
            ]
            for name, parts in rows.items()
        }
        one = Bucket(1, dict(model.form.max_history))
        longest = {name: list(part_rows(model, name, one)) for name in model.encoders}
        self.max_users = max_bytes // self._bytes(longest)
        self._free = {
            name: [np.arange(self.max_users * count, dtype=np.int32) for count in parts]
            for name, parts in longest.items()
        }

        self._size = self.max_users * self._bytes(longest)
        self._pool: Rows = {
            name: tuple(
                jax.tree.map(
                    lambda leaf, free=free: jnp.zeros((len(free), *leaf.shape[1:]), leaf.dtype),
                    part,
                )
                for free, part in zip(self._free[name], parts, strict=True)
            )
            for name, parts in rows.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        free = {name: [len(free) for free in parts] for name, parts in self._free.items()}
        return self._size - self._bytes(free)

    def leaving(self, batch: Cache) -> list[bytes]:
        """The least recently used users, who must leave before a batch has room."""
        short = {
            name: [count - len(free) for count, free in zip(parts, self._free[name], strict=True)]
            for name, parts in _counts(batch).items()
        }
        keys = []
        for key, user in self.users.items():
            if all(count <= 0 for parts in short.values() for count in parts):
                break
            keys.append(key)
            for name, parts in _counts(user).items():
                short[name] = [most - own for most, own in zip(short[name], parts, strict=True)]
        return keys

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            for name, parts in self.users.pop(key).channels.items():
                self._free[name] = [
                    np.concatenate([free, part.pool_S])
                    for free, part in zip(self._free[name], parts, strict=True)
                ]

    def put(self, keys: Sequence[bytes], batch: Cache) -> None:
        """Copies the users of a batch into the pool, which has room for them."""
        indices: Indices = {name: [] for name in batch.channels}
        frames = dataclasses.replace(batch, channels=_frames(batch))
        for name, parts in _counts(batch).items():
            for number, (count, part) in enumerate(zip(parts, batch.channels[name], strict=True)):
                free = self._free[name][number]
                self._free[name][number] = free[count:]
                # Padding is written nowhere.
                index_S = np.full(len(part.frame.real_T), np.iinfo(np.int32).max, np.int32)
                index_S[:count] = free[:count]
                indices[name].append(index_S)
        self._pool = _write(self._pool, _rows(batch), indices)
        channels = {
            name: tuple(
                dataclasses.replace(part, pool_S=index_S)
                for part, index_S in zip(parts, indices[name], strict=True)
            )
            for name, parts in frames.channels.items()
        }
        users = split(dataclasses.replace(frames, channels=channels))
        self.users |= dict(zip(keys, users, strict=True))

    def join(self, keys: Sequence[bytes], bucket: Bucket) -> Cache:
        """One cache of users in the pool, as `join` of caches in host memory."""
        joined = join(self._model, [self.users[key] for key in keys], bucket)
        indices = {name: [part.pool_S for part in parts] for name, parts in joined.channels.items()}
        rows = _read(self._pool, indices)
        channels = {
            name: tuple(
                CachedRows(part.frame, layers, input_SD)
                for part, (layers, input_SD) in zip(parts, rows[name], strict=True)
            )
            for name, parts in joined.channels.items()
        }
        return dataclasses.replace(joined, channels=channels)

    def _bytes(self, counts: dict[str, list[int]]) -> int:
        return sum(
            count * size
            for name, parts in counts.items()
            for count, size in zip(parts, self._row_bytes[name], strict=True)
        )


def _rows(cache: Cache) -> Rows:
    return {
        name: tuple((part.layers, part.input_SD) for part in parts)
        for name, parts in cache.channels.items()
    }


def _frames(cache: Cache) -> Channels:
    """The channels without rows."""
    return {
        name: tuple(CachedRows(part.frame, ()) for part in parts)
        for name, parts in cache.channels.items()
    }


def _counts(cache: Cache) -> dict[str, list[int]]:
    """How many rows the users have, in each channel and part."""
    return {
        name: [int(part.frame.offsets[-1]) for part in parts]
        for name, parts in cache.channels.items()
    }


@functools.partial(jax.jit, donate_argnums=0)
def _write(pool: Rows, rows: Rows, indices: Indices) -> Rows:
    return {
        name: tuple(
            jax.tree.map(lambda leaf, x, i=index_S: leaf.at[i].set(x, mode="drop"), part, new)
            for part, new, index_S in zip(pool[name], rows[name], indices[name], strict=True)
        )
        for name in pool
    }


@jax.jit
def _read(pool: Rows, indices: Indices) -> Rows:
    return {
        name: tuple(
            jax.tree.map(lambda leaf, i=index_S: leaf[i], part)
            for part, index_S in zip(pool[name], indices[name], strict=True)
        )
        for name in pool
    }
