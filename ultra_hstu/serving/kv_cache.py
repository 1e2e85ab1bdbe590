"""The KV cache of encoded histories: what it holds, which of its rows stay when events are added,
and how users leave a batch and join another."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped

from kernels.typing import Leaf
from ultra_hstu.nn.cached import CachedRows
from ultra_hstu.nn.key_values import CacheDtype, KeyValues, pack
from ultra_hstu.serving.artefact import padded, padded_offsets
from ultra_hstu.serving.compiled import Channels, CompiledRanker
from ultra_hstu.serving.inputs import (
    AnyArray,
    Bucket,
    UserHistory,
    cumulative,
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
        return self.parts[0].frame.num_sequences

    @property
    def parts(self) -> list[CachedRows]:
        """The rows of all channels, below a truncation and above it, channels by name."""
        return [part for name in sorted(self.channels) for part in self.channels[name]]

    def with_parts(self, parts: Iterable[CachedRows]) -> "Cache":
        """The cache with other rows, in the order of `parts`."""
        left = iter(parts)
        channels = {
            name: tuple(itertools.islice(left, len(self.channels[name])))
            for name in sorted(self.channels)
        }
        return dataclasses.replace(self, channels=channels)

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
    parts = jax.device_get(cache.parts)
    users = (
        cache.with_parts(_rows_of(part, user) for part in parts) for user in range(cache.users)
    )
    return [
        dataclasses.replace(own, history=cache.history.user(user)) for user, own in enumerate(users)
    ]


def join(model: CompiledRanker, users: Sequence[Cache], bucket: Bucket) -> Cache:
    """One cache of these users, at the sizes that `encode_history` gives to a bucket. Scores
    against it are the scores against the caches that the users are from.

    Raises:
      ValueError: more users or rows than the bucket holds.
    """
    if len(users) > bucket.users:
        raise ValueError(f"{len(users)} users are more than {bucket} holds: join fewer")
    parts = zip(*(user.parts for user in users), strict=True)
    sizes = jax.tree.leaves(part_rows(model, bucket))
    joined = (_together(part, rows, bucket.users) for part, rows in zip(parts, sizes, strict=True))
    history = UserHistory.concatenate([user.history for user in users])
    return dataclasses.replace(users[0].with_parts(joined), history=history)


def part_rows(model: CompiledRanker, bucket: Bucket) -> dict[str, tuple[int, ...]]:
    """Rows of each channel in a bucket: below a truncation, and above it where there is one."""
    sizes: dict[str, tuple[int, ...]] = {}
    for name, encoder in model.encoders.items():
        rows = bucket_rows(model.form, bucket, name)
        sizes[name] = (rows,)
        if encoder.truncation is not None:
            longest = encoder.truncation.length + model.form.contextual
            sizes[name] = (rows, min(rows, bucket.users * longest))
    return sizes


def repacked(model: CompiledRanker, cache: Cache, kind: CacheDtype) -> Cache:
    """The cache in another dtype."""
    if cache.kind == kind:
        return cache
    parts = _repack(cache.parts, kind=kind, dtype=model.dtype)
    return dataclasses.replace(cache.with_parts(parts), kind=kind)


@functools.partial(jax.jit, static_argnames=("kind", "dtype"))
def _repack(parts: list[CachedRows], *, kind: CacheDtype, dtype: np.dtype) -> list[CachedRows]:
    return [
        dataclasses.replace(
            part, layers=tuple(pack(*layer.unpacked(dtype), kind) for layer in part.layers)
        )
        for part in parts
    ]


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


# Keys and values of a part and what enters it: its rows without their frame.
PartRows = tuple[tuple[KeyValues, ...], Float[AnyArray, "..."] | None]


class DevicePool:
    """The rows of users on the device: one buffer for each layer, in which every user has rows.

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
        rows = [_rows(part) for part in example.parts]
        self._row_bytes = [
            sum(leaf.nbytes // len(leaf) for leaf in jax.tree.leaves(part)) for part in rows
        ]
        longest = jax.tree.leaves(part_rows(model, Bucket(1, dict(model.form.max_history))))
        self.max_users = max_bytes // int(np.dot(longest, self._row_bytes))
        self._sizes = self.max_users * np.array(longest)
        # For each part, the rows that no user has.
        self._free = [np.arange(size, dtype=np.int32) for size in self._sizes]
        self._pool: list[PartRows] = [
            jax.tree.map(
                lambda leaf, size=size: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype), part
            )
            for size, part in zip(self._sizes, rows, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        free = [len(free) for free in self._free]
        return int(np.dot(self._sizes - free, self._row_bytes))

    def leaving(self, batch: Cache) -> list[bytes]:
        """The least recently used users, who must leave before a batch has room."""
        missing = _counts(batch) - np.array([len(free) for free in self._free])
        keys = []
        for key, user in self.users.items():
            if (missing <= 0).all():
                break
            keys.append(key)
            missing = missing - _counts(user)
        return keys

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._free = [
                np.concatenate([free, part.pool_S])
                for free, part in zip(self._free, self.users.pop(key).parts, strict=True)
            ]

    def put(self, keys: Sequence[bytes], batch: Cache) -> None:
        """Copies the users of a batch into the pool, which has room for them."""
        parts, indices = batch.parts, []
        for number, (count, part) in enumerate(zip(_counts(batch), parts, strict=True)):
            # Padding is written nowhere.
            index_S = np.full(part.frame.num_rows, np.iinfo(np.int32).max, np.int32)
            index_S[:count], self._free[number] = np.split(self._free[number], [count])
            indices.append(index_S)
        self._pool = _write(self._pool, [_rows(part) for part in parts], indices)
        in_pool = (
            CachedRows(part.frame, (), pool_S=index_S)
            for part, index_S in zip(parts, indices, strict=True)
        )
        self.users |= dict(zip(keys, split(batch.with_parts(in_pool)), strict=True))

    def join(self, keys: Sequence[bytes], bucket: Bucket) -> Cache:
        """One cache of users in the pool, as `join` of caches in host memory."""
        joined = join(self._model, [self.users[key] for key in keys], bucket)
        rows = _read(self._pool, [part.pool_S for part in joined.parts])
        return joined.with_parts(
            CachedRows(part.frame, *own) for part, own in zip(joined.parts, rows, strict=True)
        )


def _rows(part: CachedRows) -> PartRows:
    return part.layers, part.input_SD


def _counts(cache: Cache) -> Int[np.ndarray, " parts"]:
    """How many rows the users have, in each part."""
    return np.array([int(part.frame.offsets[-1]) for part in cache.parts])


@functools.partial(jax.jit, donate_argnums=0)
def _write(
    pool: list[PartRows], rows: list[PartRows], indices: list[Int32[AnyArray, "..."]]
) -> list[PartRows]:
    return [
        jax.tree.map(lambda leaf, x, i=index_S: leaf.at[i].set(x, mode="drop"), part, new)
        for part, new, index_S in zip(pool, rows, indices, strict=True)
    ]


@jax.jit
def _read(pool: list[PartRows], indices: list[Int32[AnyArray, "..."]]) -> list[PartRows]:
    return [
        jax.tree.map(lambda leaf, i=index_S: leaf[i], part)
        for part, index_S in zip(pool, indices, strict=True)
    ]
