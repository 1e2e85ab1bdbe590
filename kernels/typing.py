"""The annotation of fields whose values JAX replaces."""

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
