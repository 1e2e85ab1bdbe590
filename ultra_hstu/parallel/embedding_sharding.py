"""Embedding tables whose entries all devices divide, and the lookup that reaches them."""

import dataclasses
import functools
from collections.abc import Callable
from types import EllipsisType

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from kernels.typing import STATIC, Leaf
from ultra_hstu.parallel.mesh import CONTEXT, DATA
from ultra_hstu.parallel.shards import Shards

SLACK = 1.25  # room for requests to one device in a round, over the mean
# Distinct entries of one device are gathered, and updated, in chunks of so many at least, so many
# chunks at most, as long as a batch has some. Most ids may be equal, and there is room for all.
CHUNK, CHUNKS = 2**14, 16

type Arrays = PyTree


class EmbeddingTable(nnx.Param):
    """A parameter [X, D] that is read by the numbers of its entries.

    In a mesh of n devices it is filled up with zeros to a multiple of n entries, and device i holds
    the i-th part of them.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of a table that a step reads, each once: they take the table's place in a model.

    So lookups, their gradients and updates cost what a batch has, not what the table has. The U
    entries are dealt out in turn to the devices that divide the table.

    Attributes:
      row_uD: of this device.
      number_U: numbers of all of them, ascending; behind those that are read, X and more.
      devices: how many divide the table; 1: each has all of it.
    """

    row_uD: Leaf[Float[Array, "u D"]]
    number_U: Leaf[Int[Array, " U"]]
    devices: int = dataclasses.field(metadata=STATIC)

    @staticmethod
    def of(table_XD: Float[Array, "X D"], number_N: Int[Array, " N"], shards: Shards) -> "Entries":
        """Those that any device reads.

        Args:
          table_XD: this device's part, or all of the table where `shards` is `ONE`.
          number_N: what all devices read, any of it several times; negative numbers: nothing.
        """
        devices, entries = shards.devices, shards.devices * table_XD.shape[0]
        none_N = jnp.where(number_N >= 0, number_N, entries)
        size = min(len(none_N) + 1, entries + 1)
        multiple = devices if devices > 1 else _chunk(size)
        size = -(-size // multiple) * multiple
        # With one number that is none, so that there is always one.
        padded = jnp.pad(none_N, (0, 1), constant_values=entries)
        number_U = jnp.unique(padded, size=size, fill_value=entries)
        # Those behind the last one differ, as an update in place asks.
        number_U = jnp.where(number_U < entries, number_U, entries + jnp.arange(size))
        found = Entries(table_XD[:0], number_U.astype(jnp.int32), devices)
        if devices > 1:
            number_u = jnp.where(found.number_u < entries, found.number_u, -1)
            return dataclasses.replace(found, row_uD=lookup(table_XD, number_u, shards))

        def put(first: Array, number_C: Array, row_UD: Array) -> Array:
            row_CD = table_XD.at[number_C].get(
                mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True
            )
            return jax.lax.dynamic_update_slice_in_dim(row_UD, row_CD, first, axis=0)

        zeros_UD = jnp.zeros((size, table_XD.shape[1]), table_XD.dtype)
        return dataclasses.replace(found, row_uD=in_chunks(put, found.number_U, entries, zeros_UD))

    def __getitem__(self, everything: EllipsisType) -> "Entries":
        """`parameter[...]` gives these, as it gives a table."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row_uD.shape

    @property
    def dealt_U(self) -> Int[Array, " U"]:
        """`number_U` in the order of the rows, one device's after another's."""
        return self.number_U.reshape(-1, self.devices).T.reshape(-1)

    @property
    def number_u(self) -> Int[Array, " u"]:
        """Numbers of this device's entries, ascending."""
        if self.devices == 1:
            return self.number_U
        return self.dealt_U.reshape(self.devices, -1)[jax.lax.axis_index((DATA, CONTEXT))]

    def places(self, number: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """Where entries of the table are among the rows of all devices; anything for others."""
        rank = jnp.searchsorted(self.number_U, number, method="scan_unrolled").astype(jnp.int32)
        return rank % self.devices * (len(self.number_U) // self.devices) + rank // self.devices


def in_chunks(
    function: Callable[[Array, Array, Arrays], Arrays],
    number_U: Int[Array, " U"],
    entries: int,
    arrays: Arrays,
) -> Arrays:
    """`arrays` after `function(place of the first, numbers, arrays)` for each chunk of numbers.

    Args:
      number_U: of `Entries` of one device; from `entries` on, none.
    """
    chunk = _chunk(len(number_U))

    def turn(number: Array, arrays: Arrays) -> Arrays:
        first = number * chunk
        return function(first, jax.lax.dynamic_slice_in_dim(number_U, first, chunk), arrays)

    used = jnp.sum(number_U < entries, dtype=jnp.int32)
    return jax.lax.fori_loop(0, -(-used // chunk), turn, arrays)


def _chunk(size: int) -> int:
    """Entries of a chunk; a size that it divides has the same."""
    return max(min(size, CHUNK), -(-size // CHUNKS))


Table = Float[Array, "X D"] | Entries


def gather(table_XD: Table, number: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """Entries of a table that every device has, by their numbers from 0."""
    if isinstance(table_XD, Entries):
        return table_XD.row_uD[table_XD.places(number)]
    return table_XD[number]


def lookup(table_XD: Table, number_t: Int[Array, " t"], shards: Shards) -> Float[Array, "t D"]:
    """Entries of a table by their numbers; negative ones give zeros.

    Inside `shard_map`, `table_XD` is this device's part. A table with no more entries than are
    looked up is put together: one all-gather, and one reduce-scatter of its gradient. Of a longer
    one, numbers go to the devices that hold the entries, and the entries come back: two all-to-alls
    of about t entries (`SLACK`). Where more are wanted of a device than there is room for, as many
    rounds follow as it takes: nothing is lost, whatever the numbers. The backward sends gradients
    the same way.
    """
    if isinstance(table_XD, Entries):
        number_t = jnp.where(number_t >= 0, table_XD.places(number_t), -1)
        table_XD = table_XD.row_uD
    entries = shards.devices * table_XD.shape[0]
    if shards.devices > 1 and entries > SLACK * number_t.shape[0]:
        return _lookup(shards.devices, table_XD, number_t)
    found_tD = whole_table(table_XD, entries, shards)[jnp.maximum(number_t, 0)]
    return jnp.where((number_t >= 0)[:, None], found_tD, 0.0)


def whole_table(table_XD: Table, entries: int, shards: Shards) -> Float[Array, "X2 D"]:
    """All entries of a table on every device, for what meets the whole catalogue.

    Of `Entries` all rows, by their places. The backward reduce-scatters the gradient.
    """
    if isinstance(table_XD, Entries):
        entries, table_XD = len(table_XD.number_U), table_XD.row_uD
    if shards.devices == 1:
        return table_XD
    return jax.lax.all_gather(table_XD, (DATA, CONTEXT), tiled=True)[:entries]


def padded_tables(tree: PyTree, shards: Shards) -> PyTree:
    """The tables of a pytree, filled up with zeros so that the devices can divide them."""

    def fill(leaf: PyTree) -> PyTree:
        if not isinstance(leaf, EmbeddingTable):
            return leaf
        return leaf.replace(jnp.pad(leaf[...], ((0, -leaf.shape[0] % shards.devices), (0, 0))))

    return jax.tree.map(fill, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(devices: int, table_XD: Array, number_t: Array) -> Array:
    routes = Routes(devices, table_XD.shape[0], number_t)

    def answer(turn: Array, out_tD: Array) -> Array:
        found = table_XD.at[routes.wanted(turn)].get(mode="fill", fill_value=0)
        return routes.received(turn, routes.exchange(found), out_tD)

    zeros_tD = jnp.zeros((number_t.shape[0], table_XD.shape[1]), table_XD.dtype)
    return jax.lax.fori_loop(0, routes.rounds, answer, zeros_tD)


def _lookup_forward(devices: int, *saved: Array) -> tuple[Array, tuple[Array, ...]]:
    return _lookup(devices, *saved), saved


def _lookup_backward(devices: int, saved: tuple[Array, ...], g_tD: Array) -> tuple[Array, None]:
    table_XD, number_t = saved
    routes = Routes(devices, table_XD.shape[0], number_t)

    def add(turn: Array, sum_XD: Array) -> Array:
        return sum_XD.at[routes.wanted(turn)].add(routes.sent(turn, g_tD, 0), mode="drop")

    return jax.lax.fori_loop(0, routes.rounds, add, jnp.zeros_like(table_XD)), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


class Routes:
    """Which request goes where, and when: slot i * capacity + j is the j-th to device i."""

    def __init__(self, devices: int, entries: int, number_t: Array):
        """`entries`: of each device's part of the table."""
        self.entries, self.number_t = entries, number_t
        self.capacity = max(1, -(-int(SLACK * number_t.shape[0]) // devices))
        self.slots = devices * self.capacity
        self.owner_t = jnp.where(number_t >= 0, number_t // entries, devices)
        to_tN = self.owner_t[:, None] == jnp.arange(devices, dtype=jnp.int32)[None, :]
        count_tN = jnp.cumsum(to_tN, axis=0, dtype=jnp.int32)
        owner_t1 = jnp.minimum(self.owner_t, devices - 1)[:, None]
        # How many requests to the same device come before each one.
        self.before_t = jnp.take_along_axis(count_tN, owner_t1, axis=1)[:, 0] - 1
        most = jax.lax.pmax(jnp.max(count_tN[-1:], initial=0), (DATA, CONTEXT))
        self.rounds = -(-most // self.capacity)

    def _slot(self, turn: Array) -> Array:
        """The slot of each request in a round; beyond the last one if it is not its turn."""
        index_t = self.before_t - turn * self.capacity
        now_t = (index_t >= 0) & (index_t < self.capacity) & (self.number_t >= 0)
        return jnp.where(now_t, self.owner_t * self.capacity + index_t, self.slots)

    def wanted(self, turn: Array) -> Array:
        """Entries of this device's part; `entries`, which is none, in unused slots."""
        return self.sent(turn, self.number_t % self.entries, self.entries)

    def sent(self, turn: Array, x_t: Array, unused: int) -> Array:
        """What all devices send to this one of what they have for each request."""
        slots = jnp.full((self.slots, *x_t.shape[1:]), unused, x_t.dtype)
        return self.exchange(slots.at[self._slot(turn)].set(x_t, mode="drop"))

    def received(self, turn: Array, answers: Array, out_tD: Array) -> Array:
        slot_t = self._slot(turn)
        found_tD = answers[jnp.minimum(slot_t, self.slots - 1)]
        return jnp.where((slot_t < self.slots)[:, None], found_tD, out_tD)

    def exchange(self, x: Array) -> Array:
        return jax.lax.all_to_all(x, (DATA, CONTEXT), split_axis=0, concat_axis=0, tiled=True)
