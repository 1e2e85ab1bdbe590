"""Rows of length 1, computed in float32 whatever the dtype of the activations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

L2_EPS = 1e-6  # the published code's clamp of a norm


def l2_normalize(x: Float[Array, "*rows D"], eps: float = L2_EPS) -> Float[Array, "*rows D"]:
    """x / max(||x||_2, eps) over the last axis, in float32.

    The clamp acts on the squared norm, so that a row of zeros has a finite gradient: the square
    root of zero has none.
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps * eps))
