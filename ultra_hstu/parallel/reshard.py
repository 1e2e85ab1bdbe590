"""From batches that the devices of a group read for themselves to one flat buffer that they share.

This is the all-to-all of arXiv 2508.04711. The shared buffer holds the sequences of device 0, then
those of device 1, and so on; it lies in slices or blocks of rows (`Layout`). A device sends each
other one the rows that are to lie there and nothing else. Over slices, where the devices read about
the same number of rows, these are what sticks out at the edges; over blocks, all but 1 / C of its
rows. Room for them is fixed (`capacity`).

`gather_then_slice` gives the same by putting the rows of all devices together on each and cutting:
C times the rows on the wire and in memory. The paper starts from it; here it is for comparison.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from kernels.jagged import Lengths, Offsets, lengths_to_offsets
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import CONTEXT

# Stands for every integer of a batch that did not fit, as NaN does for every float.
LOST = np.iinfo(np.int32).min


class Shared(NamedTuple):
    """The buffer of a group.

    Attributes:
      values: arrays [T, ...], inside `shard_map` this device's [T / C, ...]; zeros on padding.
      offsets: of the sequences of all devices.
      fits: if not, all values are NaN (integers: LOST).
    """

    values: PyTree
    offsets: Offsets
    fits: Bool[Array, ""]


def reshard(
    values: PyTree,
    lengths: Lengths,
    *,
    num_rows: int,
    mesh: Mesh,
    capacity: int | None = None,
    layout: Layout | None = None,
) -> Shared:
    """The shared buffer of `num_rows` rows, sharded over `context`, from the devices' own ones.

    Args:
      values: arrays (a pytree) [C * L, ...], sharded on rows: L rows of each of the C devices, its
        sequences one after another, then padding.
      lengths: of each device's B / C sequences, one device's after another's; 0 for none.
      num_rows: T.
      capacity: rows that a device may send to one other; needed where lengths are traced, otherwise
        what this batch needs.
      layout: None: contiguous slices.

    Raises:
      ValueError: rows or capacity that are too few for these lengths, with the numbers that would
        do; traced lengths without a capacity.
    """
    shards = mesh.shape[CONTEXT]
    layout = Layout.contiguous(num_rows, shards) if layout is None else layout
    layout.check()
    if isinstance(lengths, jax.core.Tracer):
        if capacity is None:
            raise ValueError(
                "lengths are traced, and what a device sends needs a fixed bound: pass capacity=, "
                "see needed_capacity"
            )
    else:
        needed = needed_capacity(lengths, layout)
        if capacity is not None and capacity < needed:
            raise ValueError(
                f"{capacity=} rows from one device to another, but this batch needs {needed}: "
                "raise it"
            )
        capacity = needed if capacity is None else capacity

    def run(values: PyTree, lengths: Array) -> Shared:
        return to_shared(values, lengths, layout, capacity)

    rows, everywhere = PartitionSpec(CONTEXT), PartitionSpec()
    specs = Shared(rows, everywhere, everywhere)  # type: ignore[arg-type]
    program = jax.shard_map(
        run, mesh=mesh, in_specs=rows, out_specs=specs, axis_names={CONTEXT}, check_vma=False
    )
    return jax.jit(program)(values, jnp.asarray(lengths, jnp.int32))


def needed_capacity(lengths: Lengths, layout: Layout) -> int:
    """The most rows that one device sends to one other. On the host.

    Raises:
      ValueError: more rows than the buffer has.
    """
    totals = np.asarray(lengths, np.int64).reshape(layout.shards, -1).sum(1)
    if totals.sum() > layout.num_rows:
        raise ValueError(
            f"these sequences have {totals.sum()} rows together, more than the shared buffer's "
            f"{layout.num_rows}: raise num_rows"
        )
    source = np.repeat(np.arange(layout.shards), totals)
    owner = np.repeat(np.asarray(layout.owner), layout.block)[: len(source)]
    sent = np.zeros((layout.shards, layout.shards), np.int64)
    np.add.at(sent, (source, owner), source != owner)
    return int(sent.max())


def to_shared(values: PyTree, lengths_b: Int[Array, " b"], layout: Layout, capacity: int) -> Shared:
    """`reshard` for code that runs inside `shard_map` already."""
    trip = _Trip(lengths_b, layout)
    fits = trip.fits & (trip.most_sent <= capacity)
    capacity = max(capacity, 1)

    def move(x: Array) -> Array:
        out_CcX = x.at[trip.local_rows(capacity)].get(mode="fill", fill_value=0)
        in_CcX = jax.lax.all_to_all(out_CcX, CONTEXT, split_axis=0, concat_axis=0, tiled=True)
        slot_t = trip.source_t * capacity + trip.number_t
        slot_t = jnp.where(trip.number_t < capacity, slot_t, layout.shards * capacity)
        came = in_CcX.reshape(-1, *x.shape[1:]).at[slot_t].get(mode="fill", fill_value=0)
        own = x.at[trip.row_t - trip.start_C[trip.me]].get(mode="fill", fill_value=0)
        return trip.checked(jax.vmap(jnp.where)(trip.source_t == trip.me, own, came), fits)

    return Shared(jax.tree.map(move, values), trip.offsets, fits)


def gather_then_slice(values: PyTree, lengths_b: Int[Array, " b"], layout: Layout) -> Shared:
    """What `to_shared` gives, by an all-gather of everything. Inside `shard_map`."""
    trip = _Trip(lengths_b, layout)

    def move(x: Array) -> Array:
        everything = jax.lax.all_gather(x, CONTEXT, tiled=True)
        place_t = trip.source_t * x.shape[0] + trip.row_t - trip.start_C[trip.source_t]
        return trip.checked(everything.at[place_t].get(mode="fill", fill_value=0), trip.fits)

    return Shared(jax.tree.map(move, values), trip.offsets, trip.fits)


class _Trip:
    """Which row goes where.

    Rows that one device sends to one other lie there side by side, in the same order.
    """

    def __init__(self, lengths_b: Array, layout: Layout):
        self.layout, self.me = layout, jax.lax.axis_index(CONTEXT)
        lengths_B = jax.lax.all_gather(lengths_b, CONTEXT, tiled=True)
        total_C = lengths_B.reshape(layout.shards, -1).sum(1)
        edge_C1, self.offsets = lengths_to_offsets(total_C), lengths_to_offsets(lengths_B)
        self.start_C = edge_C1[:-1]
        self.fits = edge_C1[-1] <= layout.num_rows
        # Whose this device's rows of the shared buffer are, and which of those that come from
        # there.
        self.row_t = layout.rows(self.me)
        before_t = jnp.searchsorted(edge_C1, self.row_t, side="right", method="scan_unrolled")
        self.source_t = jnp.clip(before_t - 1, 0, layout.shards - 1).astype(jnp.int32)
        self.real_t = self.row_t < edge_C1[-1]
        inside = jnp.minimum(edge_C1, layout.num_rows)
        self.number_t = (
            jnp.arange(layout.rows_per_shard, dtype=jnp.int32)
            - layout.index(inside[:-1], self.me)[self.source_t]
        )
        # Of this device's own rows: the range that they take on every device.
        shard_C = jnp.arange(layout.shards, dtype=jnp.int32)
        self.first_C, self.last_C = (
            jax.vmap(layout.index, (None, 0))(inside[edge], shard_C)
            for edge in (self.me, self.me + 1)
        )
        sent_C = jnp.where(shard_C == self.me, 0, self.last_C - self.first_C)
        self.most_sent = jax.lax.pmax(sent_C.max(), CONTEXT)

    def local_rows(self, capacity: int) -> Array:
        """Rows of this device's own buffer for every device, [C * capacity].

        Unused entries hold a number far behind the last row.
        """
        place_Cc = self.first_C[:, None] + jnp.arange(capacity, dtype=jnp.int32)[None, :]
        used_Cc = (place_Cc < self.last_C[:, None]) & (
            jnp.arange(self.layout.shards, dtype=jnp.int32)[:, None] != self.me
        )
        rows_Ct = self.layout.permutation().reshape(self.layout.shards, -1)
        row_Cc = jnp.take_along_axis(rows_Ct, place_Cc, axis=1, mode="clip")
        return jnp.where(used_Cc, row_Cc - self.start_C[self.me], 2**30).reshape(-1)

    def checked(self, x_t: Array, fits: Array) -> Array:
        """Zeros on padding; no buffer that lacks rows passes for a whole one."""
        x_t = jax.vmap(jnp.where)(self.real_t, x_t, jnp.zeros_like(x_t))
        lost = jnp.nan if jnp.issubdtype(x_t.dtype, jnp.inexact) else LOST
        return jnp.where(fits, x_t, jnp.asarray(lost, x_t.dtype))
