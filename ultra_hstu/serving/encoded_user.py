"""A cache cut into its users, each in host memory, and users from any calls put together again: how a server keeps whom it has encoded."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ultra_hstu.nn.cached import EncodedHistory
from ultra_hstu.sequences import Sequences
from ultra_hstu.serving.cache import Cache
from ultra_hstu.serving.capacity import Room, padded, padded_offsets
from ultra_hstu.serving.frozen import Channel, FrozenRanker
from ultra_hstu.serving.inputs import History


class _Rows(NamedTuple):
    """A user's rows below a truncation, or above it: keys and values of every layer there."""

    layers: tuple[Any, ...]  # KeyValues [n, H, width]
    time_S: np.ndarray
    contextual: Any  # rows of contextual tokens; None: the model has none


class _ChannelOfUser(NamedTuple):
    below: _Rows
    above: _Rows | None  # None without a truncation
    events: np.ndarray
    last: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedUser:
    """One user of a `Cache`: NumPy arrays. It can be scored against, and not be appended to."""

    channels: dict[str, _ChannelOfUser]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.channels))

    def copy(self) -> "EncodedUser":
        """The same in arrays of its own, which keep no batch alive."""
        return EncodedUser(jax.tree.map(np.array, self.channels))


def split(model: FrozenRanker, cache: Cache) -> list[EncodedUser]:
    """The users of a cache of this model, as views of one copy in host memory."""
    host: dict[str, Channel] = jax.device_get(cache.channels)
    return [
        EncodedUser({name: _channel_of(host[name], _edge(model, name), user) for name in host})
        for user in range(cache.users)
    ]


def join(model: FrozenRanker, users: Sequence[EncodedUser], room: Room) -> Cache:
    """The cache of these users, at the sizes that `encode_history` gives to a room. Scores against it are those against the caches that they are from.

    Raises:
      ValueError: more users or rows than there is room for.
    """
    if len(users) > room.users:
        raise ValueError(f"{len(users)} users are more than {room} holds: join fewer")
    channels = {}
    for name, encoder in model.encoders.items():
        parts = [user.channels[name] for user in users]
        rows = room.users * model.form.contextual + model.form.per_event * room.events[name]
        layers, whole = _together([part.below for part in parts], rows, room.users)
        kept = None
        if encoder.truncation is not None:
            most = room.users * (encoder.truncation.length + model.form.contextual)
            above, kept = _together(
                [part.above for part in parts if part.above is not None],
                min(rows, most),
                room.users,
            )
            layers += above
        numbers = (
            padded(np.array([getattr(part, field) for part in parts], np.int32), room.users)
            for field in ("events", "last")
        )
        channels[name] = Channel(EncodedHistory(layers, whole, kept, None), *numbers)
    nobody = History({}, np.zeros((len(users), 0), np.int32), np.zeros(len(users), np.int32))
    return Cache(channels, nobody, model.mark, model.signature, "same")


def _edge(model: FrozenRanker, name: str) -> int:
    """How many layers are below the truncation."""
    encoder = model.encoders[name]
    return len(encoder.layers) if encoder.truncation is None else encoder.truncation.after


def _channel_of(channel: Channel, edge: int, user: int) -> _ChannelOfUser:
    encoded = channel.encoded
    above = None if encoded.kept is None else _rows_of(encoded.layers[edge:], encoded.kept, user)
    return _ChannelOfUser(
        _rows_of(encoded.layers[:edge], encoded.whole, user),
        above,
        channel.events_B[user],
        channel.last_B[user],
    )


def _rows_of(layers: tuple[Any, ...], frame: Sequences, user: int) -> _Rows:
    span = slice(frame.offsets[user], frame.offsets[user + 1])
    contextual = None if frame.num_contextual is None else frame.num_contextual[user]
    return _Rows(
        jax.tree.map(lambda leaf: leaf[span], layers), np.asarray(frame.time_T)[span], contextual
    )


def _together(parts: Sequence[_Rows], rows: int, users: int) -> tuple[tuple[Any, ...], Sequences]:
    """Keys and values of users one after another, at the size of a room, and their frame."""
    lengths = [len(part.time_S) for part in parts]
    if sum(lengths) > rows:
        raise ValueError(
            f"{sum(lengths)} rows are more than the {rows} that there is room for: join fewer users"
        )

    def stacked(*leaves: np.ndarray) -> np.ndarray:
        whole = np.zeros((rows, *leaves[0].shape[1:]), leaves[0].dtype)
        np.concatenate(leaves, out=whole[: sum(lengths)])
        return whole

    time_T = stacked(*(part.time_S for part in parts))
    offsets = padded_offsets(np.cumsum([0, *lengths]), users)
    contextual = (
        None
        if parts[0].contextual is None
        else padded(np.array([part.contextual for part in parts], np.int32), users)
    )
    frame = Sequences(offsets, np.arange(rows) < offsets[-1], time_T, time_T, None, contextual)
    return jax.tree.map(stacked, *(part.layers for part in parts)), frame
