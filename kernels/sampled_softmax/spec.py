"""What an implementation of `sampled_softmax` is chosen by, and what it is given."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

COLLISION_LOGIT = -5e4  # of a negative that is the positive (published research code)


# What `by_chunks` cuts for C rows -> their positives, and the negatives of each draw, all int32 and
# numbers of entries, whatever they are where the weight is 0.
IdsOf = Callable[[PyTree], tuple[Int[Array, " C"], Int[Array, "G R"]]]


class SampledSpec(NamedTuple):
    dtype: jnp.dtype  # of q
    width: int
    negatives: int  # of a row
    rows_per_draw: int  # that share them


@dataclasses.dataclass(frozen=True)
class Negatives:
    """The negatives of T rows, drawn where a chunk of them is computed.

    Attributes:
      rows: pytree of arrays [T, ...], such as a key a row.
      count: R.
      draw: from `rows` of a chunk of C rows, and `shared`, to int[C, R].
      shared: pytree of arrays, what all rows draw from.
      rows_per_draw: so many successive rows have the same negatives, those of the first of them.
    """

    rows: PyTree
    count: int
    draw: Callable[[PyTree, PyTree], Int[Array, "C R"]]
    shared: PyTree = None
    rows_per_draw: int = 1

    @staticmethod
    def of(negative_TR: Int[Array, "T R"]) -> "Negatives":
        """Those of an array."""
        return Negatives(negative_TR, negative_TR.shape[1], lambda negative_CR, _: negative_CR)
