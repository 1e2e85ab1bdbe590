"""What an implementation of `sampled_softmax` is chosen by, and what it is given."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from kernels.softmax_rows import PerRow

COLLISION_LOGIT = -5e4  # of a negative that is the positive (published research code)


# From what `by_chunks` cuts for C rows, and their weights: positive and negatives int32[C, 1 + R].
IdsOf = Callable[[PyTree, PerRow], Int[Array, "C X"]]


class SampledSpec(NamedTuple):
    dtype: jnp.dtype  # of q
    width: int
    negatives: int  # of a row


@dataclasses.dataclass(frozen=True)
class Negatives:
    """The negatives of T rows, drawn where a chunk of them is worked off.

    Attributes:
      rows: pytree of arrays [T, ...], such as a key a row.
      count: R.
      draw: from `rows` of a chunk of C rows, and `shared`, to int[C, R].
      shared: pytree of arrays, what all rows draw from.
    """

    rows: PyTree
    count: int
    draw: Callable[[PyTree, PyTree], Int[Array, "C R"]]
    shared: PyTree = None

    @staticmethod
    def of(negative_TR: Int[Array, "T R"]) -> "Negatives":
        """Those of an array."""
        return Negatives(negative_TR, negative_TR.shape[1], lambda negative_CR, _: negative_CR)
