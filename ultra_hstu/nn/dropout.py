"""Dropout as a function of its key: modules hold no random state, so a training step is a pure function and a resumed run is exact.

What is dropped of a row depends on the key, the number of the row's sequence in the batch and the row's place in it: not on where the row lies in which
buffer on which device.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

KeyOrNone = Key[Array, ""] | None
KeysOrNone = Key[Array, "*rows"] | None  # one for all rows, or one a row


def row_keys(
    key: KeyOrNone, offsets: Int[Any, " B1"], row_t: Int[Array, " t"], first_sequence: Any = 0
) -> Any:
    """A key for each of some rows of a buffer of sequences, the first of which has the number `first_sequence`; None without a key."""
    if key is None:
        return None
    offsets = jnp.asarray(offsets)
    segment_t = jnp.clip(
        jnp.searchsorted(offsets, row_t, side="right", method="scan_unrolled") - 1,
        0,
        offsets.shape[0] - 2,
    )
    return jax.vmap(jax.random.fold_in)(
        sequence_keys(key, offsets.shape[0] - 1, first_sequence)[segment_t],
        row_t - offsets[segment_t],
    )


def sequence_keys(key: Key[Array, ""], batch: int, first_sequence: Any = 0) -> Key[Array, " B"]:
    """A key for each of `batch` sequences."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first_sequence + jnp.arange(batch))


def dropout(x: Float[Array, "..."], rate: float, key: KeysOrNone) -> Float[Array, "..."]:
    """Zeroes entries with probability `rate` and divides the others by 1 - rate; x itself if `key` is None (evaluation)."""
    return apply_dropout(x, dropout_mask(key, rate, x.shape), rate)


def dropout_mask(key: KeysOrNone, rate: float, shape: tuple[int, ...]) -> Bool[Array, "..."] | None:
    """True with probability 1 - rate; None where nothing is dropped. Keys of rows each draw one entry of the first axis."""
    if key is None or rate == 0.0:
        return None
    if key.ndim == 0:
        return jax.random.bernoulli(key, 1.0 - rate, shape)
    return jax.vmap(lambda row_key: jax.random.bernoulli(row_key, 1.0 - rate, shape[1:]))(key)


def apply_dropout(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"] | None, rate: float
) -> Float[Array, "*shape"]:
    """x / (1 - rate) where `mask` is True, 0 elsewhere; x itself without a mask."""
    return x if mask is None else jnp.where(mask, x / (1.0 - rate), jnp.zeros((), x.dtype))


def split_key(key: KeyOrNone, count: int) -> list[KeyOrNone]:
    """`count` keys, or as many None."""
    return [None] * count if key is None else list(jax.random.split(key, count))
