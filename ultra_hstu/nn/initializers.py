"""Initial values as the published research code draws them (in PyTorch)."""

import math
from typing import Any

import jax
from flax import nnx

from ultra_hstu.parallel.embedding_sharding import Table

normal_002 = jax.nn.initializers.normal(0.02)
truncated_normal_002 = jax.nn.initializers.truncated_normal(0.02, lower=-2.0, upper=2.0)
xavier_uniform = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
xavier_normal = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "normal")


def linear_bias(fan_in: int) -> Any:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which PyTorch's linear and convolution layers start their bias from."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def param(init: Any, rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """A float32 parameter drawn with `init(key, shape)`."""
    return nnx.Param(init(rngs.params(), shape))


def table(init: Any, rngs: nnx.Rngs, *shape: int) -> Table:
    """The same for rows that are looked up by number and, in a mesh, divided among the devices."""
    return Table(init(rngs.params(), shape))
