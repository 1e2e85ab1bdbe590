"""Dropout as a function of its key: modules hold no random state, so a step is a pure function.

What is dropped of a row depends on the key, the number of the row's sequence in the batch and the
row's position in it: not on where the row lies in which buffer on which device.
"""

import functools
from typing import overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from kernels.jagged import Rows
from ultra_hstu.sequences import Sequences

KeyOrNone = Key[Array, ""] | None
KeysOrNone = Key[Array, "*rows"] | None  # one for all rows, or one a row


@overload
def row_keys(
    key: Key[Array, ""], sequences: Sequences, rows: Rows | None = None
) -> Key[Array, " t"]: ...
@overload
def row_keys(key: None, sequences: Sequences, rows: Rows | None = None) -> None: ...
def row_keys(
    key: KeyOrNone, sequences: Sequences, rows: Rows | None = None
) -> Key[Array, " t"] | None:
    """A key for each of `rows`, without them of this device's rows; None without a key."""
    if key is None:
        return None
    rows = sequences.rows if rows is None else rows
    return jax.vmap(jax.random.fold_in)(sequence_keys(key, sequences)[rows.segment], rows.position)


def sequence_keys(key: Key[Array, ""], sequences: Sequences) -> Key[Array, " B"]:
    """A key for each sequence."""
    batch = sequences.num_sequences
    number_B = sequences.shards.first_sequence(batch) + jnp.arange(batch, dtype=jnp.int32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, number_B)


def another_key(key: KeysOrNone) -> KeysOrNone:
    """Keys of draws that are independent of those by `key`, one for each of them."""
    if key is None:
        return None
    fold = functools.partial(jax.random.fold_in, data=1)
    return fold(key) if key.ndim == 0 else jax.vmap(fold)(key)


def dropout(x: Float[Array, "..."], rate: float, key: KeysOrNone) -> Float[Array, "..."]:
    """Zeroes entries with probability `rate` and divides the others by 1 - rate.

    Without a key (evaluation) it is x itself.
    """
    return apply_dropout(x, dropout_mask(key, rate, x.shape), rate)


def dropout_mask(key: KeysOrNone, rate: float, shape: tuple[int, ...]) -> Bool[Array, "..."] | None:
    """True with probability 1 - rate; None where nothing is dropped.

    Keys of rows each draw one entry of the first axis.
    """
    if key is None or rate == 0.0:
        return None
    keep = jnp.float32(1.0 - rate)  # its dtype is that of the draws
    if key.ndim == 0:
        return jax.random.bernoulli(key, keep, shape)
    return jax.vmap(lambda row_key: jax.random.bernoulli(row_key, keep, shape[1:]))(key)


def apply_dropout(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"] | None, rate: float
) -> Float[Array, "*shape"]:
    """x / (1 - rate) where `mask` is True, 0 elsewhere; x itself without a mask."""
    return x if mask is None else jnp.where(mask, x / (1.0 - rate), jnp.zeros((), x.dtype))


def split_key(key: KeyOrNone, count: int) -> list[KeyOrNone]:
    """`count` keys, or as many None."""
    return [None] * count if key is None else list(jax.random.split(key, count))
