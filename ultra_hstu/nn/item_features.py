"""Vectors of what is known of items: the mean over the values of a column, summed over columns."""

import dataclasses
import functools
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, PyTree

from ultra_hstu.nn.initializers import param, truncated_normal_002, xavier_normal

# Up to so many numbers, a matrix of items x values is multiplied with the table of values: its
# gradient is then a product, too, which has one value. Else values are gathered one by one.
MATRIX_SIZE = 2**22


@dataclasses.dataclass(frozen=True, eq=False)
class ItemCodes:
    """What is known of I items, as codes; entry 0 is padding. Equal if it is the same object.

    Attributes:
      code_IV: entries of one table for all columns, from 1; 0 none. A column of features has as
        many columns here as an item has values in it at most (`widths`).
      sizes: entries of each column of features.
      number_IN: numbers, and behind them 1 where they are known: float32 [I + 1, 2N].
    """

    code_IV: Int32[np.ndarray, "I1 V"]
    widths: tuple[int, ...]
    sizes: tuple[int, ...]
    number_IN: Float32[np.ndarray, "I1 N"]

    @property
    def num_items(self) -> int:
        return len(self.code_IV) - 1

    @property
    def entries(self) -> int:
        """How many entries the table has."""
        return sum(self.sizes)

    @property
    def as_matrix(self) -> bool:
        return self.code_IV.shape[0] * self.entries <= MATRIX_SIZE

    @functools.cached_property
    def matrix_IF(self) -> Float32[np.ndarray, "I1 F"]:
        """The share of each value in the mean of its column, 0 of values that an item lacks."""
        matrix_IF = np.zeros((len(self.code_IV), 1 + self.entries), np.float32)
        for part_IV in self.parts(self.code_IV):
            share_I = 1 / np.maximum((part_IV > 0).sum(axis=1), 1)
            for code_I in part_IV.T:
                matrix_IF[np.arange(len(code_I)), code_I] += share_I
        return matrix_IF[:, 1:]

    def parts[Codes: (np.ndarray, Array)](self, code_XV: Codes) -> Iterator[Codes]:
        """The columns of each column of features."""
        first = 0
        for width in self.widths:
            yield code_XV[:, first : first + width]
            first += width


class ItemFeatures(nnx.Module):
    """A vector of each item, from its features alone; one without any has zeros.

    The values of a column are averaged, columns summed. Numbers go through a net of one hidden
    layer, all together. The module holds the codes of its items, which are no parameters.
    """

    def __init__(self, codes: ItemCodes, width: int, *, hidden_width: int, rngs: nnx.Rngs):
        self.codes = codes
        self.table = param(truncated_normal_002, rngs, max(1, codes.entries), width)
        numbers = codes.number_IN.shape[1]
        self.hidden = param(xavier_normal, rngs, numbers, hidden_width) if numbers else None
        self.output = param(truncated_normal_002, rngs, hidden_width, width) if numbers else None

    def __call__(self, item_t: Int[Array, " t"]) -> Float[Array, "t D"]:
        """Of rows by their item, 0 for none."""
        if self.codes.as_matrix or len(self.codes.code_IV) <= item_t.shape[0]:
            return self.all()[item_t]
        return self._of(item_t)

    def series(self, item_t: Int[Array, " t"], column_t: Int[Array, " t"]) -> Float[Array, "t D"]:
        """Of one column of each item, by its number from 1; zeros for column 0."""
        items = jnp.arange(len(self.codes.code_IV), dtype=jnp.int32)
        of_columns = [x_ID for x_ID in self._columns(items)]
        x_SID = jnp.stack([jnp.zeros_like(of_columns[0]), *of_columns])
        return x_SID[column_t, item_t]

    def all(self) -> Float[Array, "I1 D"]:
        """Of all items, behind padding."""
        return self._of(jnp.arange(len(self.codes.code_IV), dtype=jnp.int32))

    def _of(self, item_t: Int[Array, " t"]) -> Float[Array, "t D"]:
        x_tD = self._of_numbers(jnp.asarray(self.codes.number_IN)[item_t])
        return functools.reduce(operator.add, self._columns(item_t), x_tD)

    def _columns(self, item_t: Int[Array, " t"]) -> Iterator[Float[Array, "t D"]]:
        """The mean of the values of each column that has such."""
        first = 0
        of_items_tV = jnp.asarray(self.codes.code_IV)[item_t]
        for code_tV, size in zip(self.codes.parts(of_items_tV), self.codes.sizes, strict=True):
            table_FD = self.table[...][first : first + size]
            count_t1 = jnp.maximum(jnp.sum(code_tV > 0, axis=1), 1)[:, None]
            if not size:
                continue
            if self.codes.as_matrix:
                share_tF = jnp.asarray(self.codes.matrix_IF[:, first : first + size])[item_t]
                yield jnp.matmul(share_tF, table_FD, precision="highest")
            else:
                found = (
                    jnp.where((code_t > 0)[:, None], self.table[...][code_t - 1], 0.0)
                    for code_t in code_tV.T
                )
                yield functools.reduce(operator.add, found) / count_t1
            first += size

    def _of_numbers(self, number_tN: Float[Array, "t N"]) -> Float[Array, "t D"]:
        if self.hidden is None or self.output is None:
            return jnp.zeros((number_tN.shape[0], self.table.shape[1]), jnp.float32)
        hidden_tH = jax.nn.silu(jnp.matmul(number_tN, self.hidden[...], precision="highest"))
        return jnp.matmul(hidden_tH, self.output[...], precision="highest")


def without_ids(
    table: nnx.Param, codes: ItemCodes | None, trained_I: Bool[np.ndarray, " I1"] | None
) -> None:
    """Items that no training event has begin with an embedding of 0 where they have features.

    Theirs would stay as it was drawn: such an item is then what its features are.
    """
    if codes is not None and trained_I is not None:
        table[...] = jnp.where(trained_I[:, None], table[...], 0.0)


def with_ids(
    codes: ItemCodes | None,
    trained_I: Bool[np.ndarray, " I1"] | None,
    id_dropout: float,
    key: Key[Array, ""],
) -> Bool[Array, " I1"] | None:
    """The items that have an embedding of their own in a step, beside features; None: all.

    Args:
      trained_I: the items of training events; None: all.
      id_dropout: the share of them that go without in this step; `key` draws them.
    """
    if codes is None:
        return None
    with_id_I = np.ones(codes.num_items + 1, bool) if trained_I is None else trained_I
    if not id_dropout:
        return jnp.asarray(with_id_I)
    kept_I = jax.random.bernoulli(jax.random.fold_in(key, 2), 1 - id_dropout, with_id_I.shape)
    return jnp.asarray(with_id_I) & kept_I


def folded(params: PyTree, table_ID: Float[Array, "I1 D"]) -> PyTree:
    """Parameters of a model without features of items, from those of one with them.

    Args:
      params: with `ItemFeatures` as `embedding.item_features`.
      table_ID: the item embeddings, with the vectors of features added.
    """
    leaves = [
        (path, leaf.replace(table_ID) if path == ("embedding", "item_table") else leaf)
        for path, leaf in nnx.to_flat_state(params)
        if path[:2] != ("embedding", "item_features")
    ]
    return nnx.from_flat_state(leaves)
