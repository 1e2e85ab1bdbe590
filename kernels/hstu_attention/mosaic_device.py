"""Small pieces of device code that Pallas has no name for."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, memref

from kernels.hstu_attention import mosaic_schedule as schedule


def record_scratch(slots):
    """Shared memory of `slots` records, whose last row passes a drawn number on, and its barriers."""
    return dict(
        rec=plgpu.SMEM((slots + 1, schedule.RECORD), jnp.int32),
        rec_full=plgpu.Barrier(num_barriers=slots),
        rec_empty=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
    )


def _draw_number(counter_gm, box_sm):
    """The next number from a counter in global memory, for a whole warpgroup; `box_sm` passes it on from the thread
    that draws.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def draw(_, counter, box):
        i32 = ir.IntegerType.get_signless(32)
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            counter_ptr = mgpu.utils.memref_ptr(counter)
            value = llvm.atomicrmw(llvm.AtomicBinOp.add, counter_ptr, mgpu.c(1, i32), llvm.AtomicOrdering.monotonic)
            memref.store(value, box, [mgpu.c(0, ir.IndexType.get())])
        mgpu.utils.warpgroup_barrier()

    draw(counter_gm, box_sm)
    return box_sm[0]


def fetch_item(records_gm, counter_gm, s, slot, *, workers, first=False):
    """Starts the copy of the next item's record into `slot`; the first item of a thread block is the one of its own
    number.
    """
    number = lax.axis_index("worker") if first else _draw_number(counter_gm, s["rec"].at[s["rec"].shape[0] - 1]) + workers
    plgpu.barrier_wait(s["rec_empty"].at[slot])
    number = jnp.minimum(number, records_gm.shape[0] - 1)
    plgpu.copy_gmem_to_smem(records_gm.at[number], s["rec"].at[slot], s["rec_full"].at[slot])


def load_rows(gm, tail_gm, row, size, head, tail_first, into, full):
    """Copies rows of one head; those of the buffer's last partly filled tile from `tail_gm`, where padding rows
    have been zeroed.
    """
    in_tail = row >= tail_first

    @pl.when(in_tail)
    def _():
        place = pl.ds(pl.multiple_of(lax.rem(row - tail_first, schedule.TAIL), size), size)
        plgpu.copy_gmem_to_smem(tail_gm.at[place, head], into, full)

    @pl.when(~in_tail)
    def _():
        plgpu.copy_gmem_to_smem(gm.at[pl.ds(row, size), head], into, full)


def swizzled(shape, dtype):
    """Shared memory that TMA and wgmma both read: tiles of 8 rows of 128 bytes, swizzled against bank conflicts."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


class Item:
    """A work item's record, read from shared memory where it is needed: registers are scarce."""

    def __init__(self, records_sm, slot):
        self._get = lambda name: records_sm[slot, name]

    def __getattr__(self, name):
        return self._get(getattr(schedule, name.upper()))

    def block(self, i):
        """Number in the buffer of the item's block i."""
        return i + jnp.where(i < self.cut1, self.shift0, jnp.where(i < self.cut2, self.shift1, self.shift2))

    def whole(self, block):
        """Whether the tile sees all of this block."""
        inside = (block >= self.full0) & (block < self.full_end0)
        inside |= (block >= self.full1) & (block < self.full_end1)
        return inside | ((block >= self.full2) & (block < self.full_end2))

    def simple(self, block):
        """Whether the first interval of each row (or key) says all about this block."""
        other = (block >= self.other0) & (block < self.other_end0)
        return ~(other | ((block >= self.other1) & (block < self.other_end1)))

    def masked(self, i, size, bounds_gm, first, arrays, short=False):
        """`arrays` of scores of block i, `size` wide, with 0 where a row (or key) from `first` on does not see.

        short: with a branch of its own for blocks where one interval says all; it takes registers that the backward
        does not have.
        """
        shape = arrays[0].shape

        def mask(intervals):
            def apply(*arrays):
                place = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + self.block(i) * size
                seen = None
                for j in range(intervals):
                    lo, hi = (lax.broadcast_in_dim(self._bound(bounds_gm, 2 * j + k, first, shape[0]), shape, [0]) for k in range(2))
                    inside = (place >= lo) & (place < hi)
                    seen = inside if seen is None else seen | inside
                return tuple(jnp.where(seen, x, 0.0) for x in arrays)

            return apply

        def partly(*arrays):
            return lax.cond(self.simple(self.block(i)), mask(1), mask(3), *arrays) if short else mask(3)(*arrays)

        return lax.cond(self.whole(self.block(i)), lambda *x: x, partly, *arrays)

    @staticmethod
    def _bound(bounds_gm, which, first, size):
        return plgpu.load(bounds_gm.at[which, pl.ds(first, size)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def draw_items(records_sm, full, body):
    """Runs `body(item, step)` for every item that the feeding warpgroup draws; `step` counts the blocks before it."""

    slots = records_sm.shape[0] - 1

    def one(carry):
        _, slot, step = carry
        item = Item(records_sm, slot)
        count = item.count
        body(item, slot, step)
        slot = lax.rem(slot + 1, slots)
        plgpu.barrier_wait(full.at[slot])
        return Item(records_sm, slot).tile >= 0, slot, step + count

    plgpu.barrier_wait(full.at[0])
    lax.while_loop(lambda c: c[0], one, (Item(records_sm, 0).tile >= 0, jnp.int32(0), jnp.int32(0)))
