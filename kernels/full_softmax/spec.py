"""What an implementation of `full_softmax` is chosen by."""

from typing import NamedTuple

import jax.numpy as jnp


class FullSpec(NamedTuple):
    dtype: jnp.dtype  # of q
    width: int
