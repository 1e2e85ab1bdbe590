"""Initial values as the published research code draws them (in PyTorch)."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from ultra_hstu.parallel.embedding_sharding import EmbeddingTable

Initializer = Callable[[Key[Array, ""], tuple[int, ...]], Float[Array, "..."]]

xavier_uniform = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", dtype=jnp.float32)
xavier_normal = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "normal", dtype=jnp.float32)


def normal(std: float) -> Initializer:
    """N(0, std)."""
    return jax.nn.initializers.normal(std, jnp.float32)


normal_002 = normal(0.02)


def truncated_normal(std: float) -> Initializer:
    """N(0, std), cut at two standard deviations of the normal one."""
    return jax.nn.initializers.truncated_normal(std, jnp.float32, lower=-2.0, upper=2.0)


truncated_normal_002 = truncated_normal(0.02)


def linear_bias(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as PyTorch's linear and convolution layers have it."""
    bound = 1.0 / math.sqrt(fan_in)
    return functools.partial(jax.random.uniform, dtype=jnp.float32, minval=-bound, maxval=bound)


def param(init: Initializer, rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """A float32 parameter drawn with `init(key, shape)`."""
    return nnx.Param(init(rngs.params(), shape))


def table(init: Initializer, rngs: nnx.Rngs, *shape: int) -> EmbeddingTable:
    """A `param` whose entries are looked up and, in a mesh, divided among the devices."""
    return EmbeddingTable(init(rngs.params(), shape))
