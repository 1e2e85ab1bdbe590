"""Dropout as a function of its key: modules hold no random state, so a training step is a pure function and a resumed run is exact."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

KeyOrNone = Key[Array, ""] | None


def dropout(x: Float[Array, "..."], rate: float, key: KeyOrNone) -> Float[Array, "..."]:
    """Zeroes entries with probability `rate` and divides the others by 1 - rate; x itself if `key` is None (evaluation)."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), jnp.zeros((), x.dtype))


def split_key(key: KeyOrNone, count: int) -> list[KeyOrNone]:
    """`count` keys, or as many None."""
    return [None] * count if key is None else list(jax.random.split(key, count))
