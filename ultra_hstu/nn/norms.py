"""Normalisations, computed in float32 whatever the dtype of the activations."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ultra_hstu.nn.remat import NORM_STATS

L2_EPS = 1e-6  # the published code's clamp of a norm


def l2_normalize(x: Float[Array, "*rows D"], eps: float = L2_EPS) -> Float[Array, "*rows D"]:
    """x / max(||x||_2, eps) over the last axis, in float32.

    The clamp acts on the squared norm, so that a row of zeros has a finite gradient: the square
    root of zero has none.
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps * eps))


def layer_norm(
    x: Float[Array, "*rows D"],
    weight: Float[Array, " D"] | None = None,
    bias: Float[Array, " D"] | None = None,
    *,
    eps: float,
) -> Float[Array, "*rows D"]:
    """(x - mean) / sqrt(biased variance + eps) over the last axis, in the dtype of x.

    Then comes `* weight + bias`, where given.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - checkpoint_name(jnp.mean(x32, axis=-1, keepdims=True), NORM_STATS)
    y = centred * checkpoint_name(
        jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps), NORM_STATS
    )
    if weight is not None:
        y = y * weight[None]
    if bias is not None:
        y = y + bias[None]
    return y.astype(x.dtype)
