"""Arrays by their axes, and the annotation of fields whose values JAX replaces.

T rows, S keys, R rows beside a cache, Q rows beside the keys of another buffer; H heads, K and V
the widths of a head.
"""

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from jaxtyping import Array, Float, Int, Shaped

THK = Float[Array, "T H K"]
THV = Float[Array, "T H V"]
SHK = Float[Array, "S H K"]
SHV = Float[Array, "S H V"]
RHK = Float[Array, "R H K"]
RHV = Float[Array, "R H V"]
QHK = Float[Array, "Q H K"]
QHV = Float[Array, "Q H V"]
Scale = float | Float[Array, "..."]  # of outputs: a constant, or one a row
PositionTable = Float[Array, " P"]  # of the relative bias; P = 2N - 1
TimeTable = Float[Array, " buckets"]
Unchecked = Shaped[Array | np.ndarray, "..."]  # until the function names the remedy
Scalar = Int[Array, ""]
PerRow = Int[Array, " T"]
PerQuery = Int[Array, " R"]
PerTile = Int[Array, " tiles"]

STATIC = {"static": True}  # metadata of fields of a pytree dataclass that are no leaves

T = TypeVar("T")

if TYPE_CHECKING:
    Leaf = Annotated[T, "leaf"]
else:

    class Leaf:
        """`Leaf[Int[Array, " T"]]`: an array field of a pytree dataclass.

        A type checker sees the array. At run time it is `Any`, because JAX rebuilds pytrees around
        shapes, shardings, specs and stacks of arrays.
        """

        def __class_getitem__(cls, array):
            return Any
