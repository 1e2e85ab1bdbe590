"""The KV cache of encoded histories: what it holds, which of its rows stay when events are added, and
how users leave a batch and join another."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float32, Int, Int32, Shaped

from kernels.typing import Leaf
from ultra_hstu.nn.cached import CachedRows
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.key_values import CacheDtype
from ultra_hstu.ranking.batch import Form
from ultra_hstu.serving.compiled import CompiledRanker
from ultra_hstu.serving.inputs import Bucket, UserHistory, cumulative, padded, padded_offsets
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

    channels: dict[str, tuple[CachedRows, ...]]
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
        """Bytes of keys and values, their frames and the events. A bucket may be half as large again as
        its rows need."""
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


@dataclasses.dataclass(frozen=True)
class Growth:
    """Which rows of a channel stay when its histories grow.

    The first `keep_B` rows of each user do; above a truncation, the first `keep_kept_B` of the rows
    that it keeps.
    """

    keep_B: Int32[np.ndarray, " B"]
    keep_kept_B: Int32[np.ndarray, " B"]
    new_rows: int  # computed anew
    kept_rows: int  # computed anew above a truncation

    @property
    def nothing_stays(self) -> bool:
        return not self.keep_B.any()

    @property
    def all_stays(self) -> bool:
        return self.new_rows == 0 and self.kept_rows == 0


def growth(
    encoder: HSTU,
    form: Form,
    before_B: Int[np.ndarray, " B"],
    after_B: Int[np.ndarray, " B"],
    added_B: Int[np.ndarray, " B"],
) -> Growth:
    """What stays of a cache of `before_B` events a user when `added_B` are added and `after_B` are
    left, the oldest ones gone where they are fewer.

    A row stays if neither its own input nor anything that it sees has changed. Attention is causal:
    without contextual tokens all rows before the first changed one stay, in every layer. Nothing of
    a growing history stays if positions count from the targets, if there are contextual tokens (they
    see the whole history, and all of it sees them), or if its oldest events are gone. Otherwise the
    first changed row is

    - the first new one;
    - with full rows under a window, the first of those that were the newest: they lose the far keys
      that they saw;
    - with a relative bias, the last old one: it asked at the time of the request, and now does at
      the time of the event after it. This one changes without new events too.

    Rows above a truncation lose keys and move as soon as one of them is dropped: then none stays.
    """
    old_B, new_B = (form.contextual + form.per_event * count_B for count_B in (before_B, after_B))
    grows_B = added_B > 0
    biased = int(encoder.layers[0].bias is not None)
    # The newest rows see more than others under a window alone.
    full = max(
        (mask.full_rows for mask in encoder.layer_masks if mask.window is not None), default=0
    )
    moves_B = np.full_like(grows_B, form.backwards) | (after_B < before_B + added_B)
    changed_B = np.where(grows_B, np.where(moves_B, old_B, max(full, biased)), biased)
    if form.contextual and (grows_B.any() or biased):
        changed_B = old_B
    stay_B = np.maximum(old_B - changed_B, 0)
    if encoder.truncation is None:
        left_B = kept_B = np.zeros_like(stay_B)
    else:
        longest = encoder.truncation.length + form.contextual
        left_B = np.minimum(new_B, longest)
        kept_B = np.where(grows_B & (new_B > longest), 0, np.maximum(left_B - (new_B - stay_B), 0))
    return Growth(
        stay_B.astype(np.int32),
        kept_B.astype(np.int32),
        int((new_B - stay_B).sum()),
        int((left_B - kept_B).sum()),
    )


def grows(model: CompiledRanker) -> bool:
    """Whether rows of a growing history can stay at all."""
    return not model.form.backwards and not model.form.contextual


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
    """One cache of these users, at the sizes that `encode_history` gives to a bucket. Scores against
    it are the scores against the caches that the users are from.

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
    layers, input_SD = jax.tree.map(lambda leaf: leaf[span], (part.layers, part.input_SD))
    return CachedRows(own, layers, input_SD)


def _together(parts: Sequence[CachedRows], rows: int, users: int) -> CachedRows:
    """The rows of users one after another, at the sizes of a bucket."""
    offsets = cumulative([len(part.frame.time_T) for part in parts])
    if (count := int(offsets[-1])) > rows:
        raise ValueError(f"{count} rows are more than the {rows} of the bucket: join fewer users")

    def stacked(*leaves: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "rows ..."]:
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
    layers, input_SD = jax.tree.map(stacked, *((part.layers, part.input_SD) for part in parts))
    return CachedRows(frame, layers, input_SD)
