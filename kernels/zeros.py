"""Zeros to add up in."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def zeros_after(
    value: Shaped[Array, "..."], shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Shaped[Array, "..."]:
    """Zeros that cannot exist before `value` does.

    XLA merges the plain zeros of all layers of a model into one constant and copies it for each layer that writes into its own, all at the start of the
    program: memory in proportion to depth.
    """
    if value.size == 0 or math.prod(shape) == 0:
        return jnp.zeros(shape, dtype)
    # Never true, which the compiler does not know. Of the last element: buffers that were put together may begin with zeros, and those it knows.
    return jnp.broadcast_to(jnp.where(value.ravel()[-1] > jnp.inf, 1, 0).astype(dtype), shape)
