"""Embedding tables whose rows are divided among all devices, and the lookup that reaches them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ultra_hstu.parallel.mesh import CONTEXT, DATA
from ultra_hstu.parallel.shards import Shards

SLACK = 1.25  # room for requests to one device in a round, over the mean


class Table(nnx.Param):
    """A parameter [X, D] that is read by row numbers. In a mesh of n devices it is filled up with zeros to a multiple of n rows, and device i holds the
    i-th part of them."""


def lookup(
    table_XD: Float[Array, "X D"], row_t: Int[Array, " t"], shards: Shards
) -> Float[Array, "t D"]:
    """Rows of a table by their numbers; negative ones give zeros.

    Inside `shard_map`, `table_XD` is this device's part. A table of no more rows than are looked up is put together: one all-gather, and one
    reduce-scatter of its gradient. Of a longer one, row numbers go to the devices that hold the rows, and the rows come back: two all-to-alls of
    about t rows (`SLACK`). Where a device is asked for more than there is room for, as many rounds follow as it takes: nothing is lost, whatever
    the numbers. The backward sends gradients the same way.
    """
    rows = shards.devices * table_XD.shape[0]
    if shards.devices > 1 and rows > SLACK * row_t.shape[0]:
        return _lookup(shards.devices, table_XD, row_t)
    return jnp.where(
        (row_t >= 0)[:, None], whole_table(table_XD, rows, shards)[jnp.maximum(row_t, 0)], 0.0
    )


def whole_table(table_XD: Float[Array, "X D"], rows: int, shards: Shards) -> Float[Array, "X2 D"]:
    """All `rows` rows of a table on every device, for what meets the whole catalogue; the backward reduce-scatters the gradient."""
    if shards.devices == 1:
        return table_XD
    return jax.lax.all_gather(table_XD, (DATA, CONTEXT), tiled=True)[:rows]


def with_room(tree: Any, shards: Shards) -> Any:
    """The tables of a pytree filled up with rows of zeros, so that the devices can divide them."""

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Table):
            return leaf
        return leaf.replace(jnp.pad(leaf[...], ((0, -leaf.shape[0] % shards.devices), (0, 0))))

    return jax.tree.map(fill, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(devices: int, table_XD: Array, row_t: Array) -> Array:
    routes = _Routes(devices, table_XD.shape[0], row_t)

    def answer(number: Array, out_tD: Array) -> Array:
        wanted = routes.exchange(routes.requests(number))
        found = table_XD.at[wanted].get(mode="fill", fill_value=0)
        return routes.received(number, routes.exchange(found), out_tD)

    return jax.lax.fori_loop(
        0, routes.rounds, answer, jnp.zeros((row_t.shape[0], table_XD.shape[1]), table_XD.dtype)
    )


def _lookup_forward(devices: int, table_XD: Array, row_t: Array) -> tuple[Array, Any]:
    return _lookup(devices, table_XD, row_t), (jnp.zeros_like(table_XD), row_t)


def _lookup_backward(devices: int, saved: Any, g_tD: Array) -> tuple[Array, None]:
    zeros_XD, row_t = saved
    routes = _Routes(devices, zeros_XD.shape[0], row_t)

    def add(number: Array, sum_XD: Array) -> Array:
        wanted = routes.exchange(routes.requests(number))
        return sum_XD.at[wanted].add(routes.exchange(routes.sent(number, g_tD)), mode="drop")

    return jax.lax.fori_loop(0, routes.rounds, add, zeros_XD), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


class _Routes:
    """Which request goes where and in which round: slot i * room + j of a round is the j-th of those to device i."""

    def __init__(self, devices: int, rows: int, row_t: Array):
        """`rows`: of each device's part of the table."""
        self.rows, self.row_t = rows, row_t
        self.room = max(1, -(-int(SLACK * row_t.shape[0]) // devices))
        self.owner_t = jnp.where(row_t >= 0, row_t // rows, devices)
        asked_tN = jnp.cumsum(
            self.owner_t[:, None] == jnp.arange(devices)[None, :], axis=0, dtype=jnp.int32
        )
        self.rank_t = (
            jnp.take_along_axis(asked_tN, jnp.minimum(self.owner_t, devices - 1)[:, None], axis=1)[
                :, 0
            ]
            - 1
        )
        self.slots = devices * self.room
        most = jax.lax.pmax(jnp.max(asked_tN[-1:], initial=0), (DATA, CONTEXT))
        self.rounds = -(-most // self.room)

    def _slot(self, number: Array) -> Array:
        """The slot of each request in a round; beyond the last one if it is not its turn."""
        place_t = self.rank_t - number * self.room
        turn_t = (place_t >= 0) & (place_t < self.room) & (self.row_t >= 0)
        return jnp.where(turn_t, self.owner_t * self.room + place_t, self.slots)

    def requests(self, number: Array) -> Array:
        """Rows wanted of the parts of other devices; `rows`, which is none, in unused slots."""
        return (
            jnp.full(self.slots, self.rows, jnp.int32)
            .at[self._slot(number)]
            .set(self.row_t % self.rows, mode="drop")
        )

    def sent(self, number: Array, g_tD: Array) -> Array:
        return (
            jnp.zeros((self.slots, g_tD.shape[1]), g_tD.dtype)
            .at[self._slot(number)]
            .set(g_tD, mode="drop")
        )

    def received(self, number: Array, answers: Array, out_tD: Array) -> Array:
        slot_t = self._slot(number)
        return jnp.where(
            (slot_t < self.slots)[:, None], answers[jnp.minimum(slot_t, self.slots - 1)], out_tD
        )

    def exchange(self, x: Array) -> Array:
        return jax.lax.all_to_all(x, (DATA, CONTEXT), split_axis=0, concat_axis=0, tiled=True)
