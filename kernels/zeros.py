"""Zeros to add up in."""

import math

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped


def zeros_after(
    value: Shaped[Array, "..."], shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> Shaped[Array, "..."]:
    """Zeros that cannot exist before `value` does.

    XLA merges the plain zeros of all layers of a model into one constant and copies it for each
    layer that writes into its own, all at the start of the program: memory in proportion to depth.
    """
    if value.size == 0 or math.prod(shape) == 0:
        return jnp.zeros(shape, dtype)
    # The condition is never true, which the compiler does not know. It asks the last element:
    # buffers that were put together may begin with zeros, and those the compiler knows.
    return jnp.broadcast_to(jnp.where(value.ravel()[-1] > jnp.inf, 1, 0).astype(dtype), shape)
