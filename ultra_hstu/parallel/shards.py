"""How a step is divided among devices: which rows a device has, how it reaches what others have.

Inside `shard_map` a device has the integers of its group's whole batch (ids, times, offsets: a few
bytes a row), or of its rows alone those of its own (`LocalRows`). Of everything with a width,
activations above all, it has its own rows alone. On one device (`ONE`) every method returns what it
is given.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from kernels.mask import AttentionMask, layer_masks
from kernels.typing import STATIC, Leaf, Scalar
from ultra_hstu.config import Config
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import CONTEXT, DATA

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalRows:
    """An array [T, ...] of a batch, of which a device has its own rows alone.

    It stands in the place of the array; `Shards.local` and `Shards.whole` read it.
    """

    row_t: Leaf[Shaped[Array, "t ..."]]
    num_rows: int = dataclasses.field(metadata=STATIC)  # T

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return (self.num_rows, *self.row_t.shape[1:])


if TYPE_CHECKING:
    GroupRows = Annotated[Tree, "rows of a group"]
else:

    class GroupRows:
        """`GroupRows[Int[Array, " T"]]`: an array of the group's rows, or `LocalRows` of it.

        A type checker sees the array.
        """

        def __class_getitem__(cls, array):
            return array | LocalRows


@dataclasses.dataclass(frozen=True)
class Shards:
    """Static: sizes of the mesh and how its devices share work."""

    data: int = 1
    context: int = 1
    strategy: str = "auto"  # of attention over `context`
    striped: bool = False  # rows are dealt out in blocks instead of slices
    fsdp: bool = False  # matrices of layers are sharded over `data`, too

    @staticmethod
    def of(config: Config) -> "Shards":
        """What `config.parallel` says.

        Layout "auto" deals out blocks where every layer's mask is a full causal one.
        """
        parallel = config.parallel
        encoders = config.model.encoders.values()
        causal = (
            not any(mask.windowed for one in encoders for mask in layer_masks(vars(one)))
            and parallel.strategy in ("auto", "gather", "ring")
            and not config.model.relative_bias
        )
        striped = parallel.layout == "striped" or (parallel.layout == "auto" and causal)
        return Shards(
            parallel.data,
            parallel.context,
            parallel.strategy,
            striped and parallel.context > 1,
            parallel.fsdp,
        )

    @property
    def devices(self) -> int:
        return self.data * self.context

    def strategy_of(self, mask: AttentionMask, biased: bool) -> str:
        """The strategy of a layer.

        "auto" takes `ulysses` for a relative bias, `halo` for a window, `ring` for a full mask.
        """
        if self.strategy != "auto":
            return self.strategy
        return "ulysses" if biased else "halo" if mask.windowed else "ring"

    # --- rows of a flat buffer over `context` ---

    def layout(self, num_rows: int) -> Layout:
        """Raises ValueError where the rows cannot be divided."""
        if not self.striped:
            return Layout.contiguous(num_rows, self.context)
        block = math.gcd(num_rows // (2 * self.context), 128) or 1
        return Layout.striped(num_rows, self.context, block)

    def divisible(self, num_rows: int) -> int:
        """The next number of rows that can be divided.

        Blocks have up to 128 rows, so long as that adds no more than an eighth.
        """
        if self.context == 1:
            return num_rows
        multiple = 2 * self.context * 128
        while multiple > max(num_rows // 8, 2 * self.context):
            multiple //= 2
        return -(-num_rows // multiple) * multiple

    def rows(self, num_rows: int) -> Int[Array, " t"]:
        """Numbers of this device's rows of a buffer, ascending."""
        if self.context == 1:
            return jnp.arange(num_rows, dtype=jnp.int32)
        return self.layout(num_rows).rows(jax.lax.axis_index(CONTEXT))

    def local(self, x_T: Tree) -> Tree:
        """This device's rows of arrays (a pytree) that it has whole, or of which it has these."""
        if self.context == 1:
            return x_T

        def own(leaf: Array | LocalRows) -> Array:
            if isinstance(leaf, LocalRows):
                return leaf.row_t
            return jnp.asarray(leaf)[self.rows(leaf.shape[0])]

        return jax.tree.map(own, x_T, is_leaf=_is_local)

    def whole(self, x_T: Tree) -> Tree:
        """Arrays (a pytree) of the group's rows, all-gathered where a device has its own alone."""

        def of_group(leaf: Array | LocalRows) -> Array:
            if not isinstance(leaf, LocalRows):
                return leaf
            layout = self.layout(leaf.num_rows)
            found_T = jax.lax.all_gather(leaf.row_t, CONTEXT, tiled=True)
            if layout.is_contiguous:
                return found_T
            return found_T[jnp.argsort(layout.permutation())]

        return jax.tree.map(of_group, x_T, is_leaf=_is_local)

    def take(
        self,
        x_tD: Shaped[Array, "t ..."],
        row_P: Int[Array, " P"],
        num_rows: int,
        *,
        layout: Layout | None = None,
    ) -> Shaped[Array, "p ..."]:
        """Rows of a sharded buffer of `num_rows` rows by number; zeros for numbers beyond it.

        The P rows are sharded in turn: slices of P / C, the last ones filled up with zeros, or the
        rows of `layout`. The cost is one reduce-scatter of P rows.
        """
        if self.context == 1:
            return x_tD.at[row_P].get(mode="fill", fill_value=0)
        here, me = self.layout(num_rows), jax.lax.axis_index(CONTEXT)
        if layout is None:
            row_P = jnp.pad(row_P, (0, -row_P.shape[0] % self.context), constant_values=num_rows)
        else:
            row_P = row_P[layout.permutation()]
        owner_P = jnp.asarray(here.owner).at[row_P // here.block].get(mode="fill", fill_value=-1)
        index_P = here.index(jnp.minimum(row_P, num_rows), me)
        index_P = jnp.where(owner_P == me, index_P, x_tD.shape[0])
        found_PD = x_tD.at[index_P].get(mode="fill", fill_value=0)
        return jax.lax.psum_scatter(found_PD, CONTEXT, tiled=True)

    def part(self, x_P: Tree) -> Tree:
        """This device's slices of arrays of P rows, as `take` cuts them."""
        if self.context == 1:
            return x_P

        def cut(leaf: Array) -> Array:
            size = -(-leaf.shape[0] // self.context)
            row_p = jax.lax.axis_index(CONTEXT) * size + jnp.arange(size, dtype=jnp.int32)
            return jnp.asarray(leaf).at[row_p].get(mode="fill", fill_value=0)

        return jax.tree.map(cut, x_P)

    # --- the whole mesh ---

    def total(self, x: Tree) -> Tree:
        """Sums over all devices."""
        return x if self.devices == 1 else jax.lax.psum(x, (DATA, CONTEXT))

    def first_sequence(self, batch: int) -> int | Scalar:
        """The number, in the batch of all groups, of a group's first of `batch` sequences."""
        return 0 if self.data == 1 else jax.lax.axis_index(DATA) * batch

    def of_groups(self, x_T: Shaped[Array, "T ..."]) -> Shaped[Array, "T2 ..."]:
        """An array of the whole batch from those of its groups, one after another."""
        return x_T if self.data == 1 else jax.lax.all_gather(x_T, DATA, tiled=True)

    def of_devices(self, x_t: Shaped[Array, "t ..."]) -> Shaped[Array, "T2 ..."]:
        """What all devices have, one after another, on each."""
        if self.devices == 1:
            return x_t
        return jax.lax.all_gather(x_t, (DATA, CONTEXT), tiled=True)

    def collect(self, x_p: Shaped[Array, "p ..."], count: int) -> Shaped[Array, "P ..."]:
        """What all devices found, on each: the inverse of `part` for `count` rows, `of_groups`."""
        whole = x_p if self.context == 1 else jax.lax.all_gather(x_p, CONTEXT, tiled=True)[:count]
        return self.of_groups(whole)


def _is_local(leaf: object) -> bool:
    return isinstance(leaf, LocalRows)


ONE = Shards()
