"""Dropout as a function of its key: modules hold no random state, so a training step is a pure function and a resumed run is exact."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

KeyOrNone = Key[Array, ""] | None


def dropout(x: Float[Array, "..."], rate: float, key: KeyOrNone) -> Float[Array, "..."]:
    """Zeroes entries with probability `rate` and divides the others by 1 - rate; x itself if `key` is None (evaluation)."""
    return apply_dropout(x, dropout_mask(key, rate, x.shape), rate)


def dropout_mask(key: KeyOrNone, rate: float, shape: tuple[int, ...]) -> Bool[Array, "..."] | None:
    """True with probability 1 - rate; None where nothing is dropped."""
    return None if key is None or rate == 0.0 else jax.random.bernoulli(key, 1.0 - rate, shape)


def apply_dropout(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"] | None, rate: float) -> Float[Array, "*shape"]:
    """x / (1 - rate) where `mask` is True, 0 elsewhere; x itself without a mask."""
    return x if mask is None else jnp.where(mask, x / (1.0 - rate), jnp.zeros((), x.dtype))


def split_key(key: KeyOrNone, count: int) -> list[KeyOrNone]:
    """`count` keys, or as many None."""
    return [None] * count if key is None else list(jax.random.split(key, count))
