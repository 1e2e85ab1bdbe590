"""Work items on the device: drawing them, and reading their records."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, memref

from kernels.hstu_attention.mosaic import schedule
from kernels.hstu_attention.mosaic.launch import arrive, fill, ring, row_values, wait
from kernels.hstu_attention.mosaic.masking import keep_inside


class WorkItem:
    """A work item's record, read from shared memory where it is needed: registers are scarce."""

    def __init__(self, gm, s, slot):
        self._bounds, self._get = gm.bounds, lambda name: s.rec[slot, name]

    def __getattr__(self, name):
        return self._get(getattr(schedule, name.upper()))

    def block(self, i):
        """Number in the buffer of the item's block i."""
        return i + jnp.where(
            i < self.cut1, self.shift0, jnp.where(i < self.cut2, self.shift1, self.shift2)
        )

    def span(self, half, in_turns):
        """(first, end) of the item's blocks that a half of its tile sees, at most one less."""
        if not in_turns:
            return 0, self.count
        late, early = jnp.where(half == 1, self.late, 0), jnp.where(half == 0, self.early, 0)
        return late, self.count - early

    def whole(self, block):
        """Whether the tile sees all of this block."""
        inside = (block >= self.full0) & (block < self.full_end0)
        inside |= (block >= self.full1) & (block < self.full_end1)
        return inside | ((block >= self.full2) & (block < self.full_end2))

    def simple(self, block):
        """Whether the first interval of each row (or key) says all about this block."""
        other = (block >= self.other0) & (block < self.other_end0)
        return ~(other | ((block >= self.other1) & (block < self.other_end1)))

    def bounds(self, first, which=0):
        """One of the three intervals of 64 rows (or keys) from `first` on."""
        place = pl.ds(first, 64)
        return tuple(row_values(self._bounds, 2 * which + end, place) for end in range(2))

    def masked(self, i, size, first, arrays, nearest, begin=0, intervals=None):
        """Scores with 0 where a row (or key) does not see.

        Args:
          i, size: the item's block, and columns of a block.
          first: row (or key) of the first score.
          arrays: scores, from column `begin` of the block on.
          nearest: the interval that mostly says all, loaded beforehand; None loads it here, where
            registers are scarce.
          intervals: how many there are, 1 or 3; None asks block by block, at the price of
            registers.
        """
        block = self.block(i)
        left = block * size + begin

        def partly(*arrays):
            closest = self.bounds(first) if nearest is None else nearest

            def mask(*others):
                return keep_inside(
                    arrays, [(lo - left, hi - left) for lo, hi in (closest, *others)]
                )

            def mask_all():
                return mask(*(self.bounds(first, which) for which in (1, 2)))

            if intervals is None:
                return lax.cond(self.simple(block), mask, mask_all)
            return mask() if intervals == 1 else mask_all()

        return lax.cond(self.whole(block), lambda *x: x, partly, *arrays)


def record_scratch(slots):
    """Shared memory of `slots` records with its barriers; one row more passes a drawn number on."""
    return dict(rec=plgpu.SMEM((slots + 1, schedule.RECORD), jnp.int32), **ring("rec", slots))


def _draw_number(counters_gm, which, box_sm):
    """The next number from a counter in global memory, for a whole warpgroup.

    `box_sm` passes it on from the thread that draws.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def draw(_, counters, box):
        i32 = ir.IntegerType.get_signless(32)
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            counter_ptr = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(counters), [which], i32)
            value = llvm.atomicrmw(
                llvm.AtomicBinOp.add, counter_ptr, mgpu.c(1, i32), llvm.AtomicOrdering.monotonic
            )
            memref.store(value, box, [mgpu.c(0, ir.IndexType.get())])
        mgpu.utils.warpgroup_barrier()

    draw(counters_gm, box_sm)
    return box_sm[0]


def pass_over(s, name, stages, begin, end):
    """Gives blocks [begin, end) of a ring back unread."""

    @pl.loop(begin, end)
    def _(i):
        wait(getattr(s, f"{name}_full"), lax.rem(i, stages))
        arrive(getattr(s, f"{name}_empty"), lax.rem(i, stages))


def fetch_item(gm, s, slot, *, which, number=None):
    """Starts the copy of the record of item `number`, or of the next one drawn, into `slot`."""
    if number is None:
        number = _draw_number(gm.tails, which, s.rec.at[s.rec.shape[0] - 1]) + schedule.WORKERS
    wait(s.rec_empty, slot)
    number = jnp.minimum(number, gm.records.shape[0] - 1)
    fill(s, "rec", gm.records.at[number], slot)


def feed_items(gm, s, load_block, begin, *, ahead, which=0):
    """What the feeding warpgroup does: for every item `begin`, then `load_block` for its blocks.

    The first item of a thread block is the one of its own number. The next are drawn, or, where
    `gm.in_turns`, those a whole round of thread blocks apart: their records are known beforehand,
    and are copied half a ring before they are needed.

    Args:
      load_block: called with (item, step, i).
      begin: called with (item, slot).
      ahead: blocks before the end of an item at which the next one is drawn: late, or the last ones
        are shared badly.
      which: a counter, of those that are zero when the kernel begins.
    """

    slots = s.rec.shape[0] - 1
    early = slots // 2

    def fetch_in_turn(nth):
        number = lax.axis_index("worker") + nth * schedule.WORKERS
        fetch_item(gm, s, lax.rem(nth, slots), which=which, number=number)

    def one_item(item, slot, step, nth, next_item):
        begin(item, slot)

        @pl.loop(0, item.count)
        def _(i):
            load_block(item, step, i)
            if not gm.in_turns:

                @pl.when(i == jnp.maximum(item.count - ahead, 0))
                def _():
                    fetch_item(gm, s, lax.rem(slot + 1, slots), which=which)

        if not gm.in_turns:
            return next_item()
        fetch_in_turn(nth + early)
        return next_item(nth)

    if not gm.in_turns:
        fetch_item(gm, s, 0, which=which, number=lax.axis_index("worker"))
        draw_items(gm, s, one_item)
        return
    for nth in range(early):
        fetch_in_turn(jnp.int32(nth))
    last = draw_items(gm, s, one_item, _counted)
    for behind in range(1, early):  # no copy may be on its way when the thread block ends
        wait(s.rec_full, lax.rem(last + behind, slots))


def _counted(item, slot, step, nth=None):
    """Number of an item, from that of the one before."""
    return jnp.int32(0) if nth is None else nth + 1


def draw_items(gm, s, body, begin=lambda item, slot, step: None):
    """Runs `body(item, slot, step, begun, ahead)` for every item that the feeding warpgroup draws.

    `step` counts the blocks before the item. `begin(item, slot, step)` is what can be done for an
    item before the one in front of it is through; `begun` is its result. The body calls
    `ahead(*more)` once, which waits for the next record, begins the next item with
    `begin(item, slot, step, *more)`, and returns what that gives. Behind the last item there is
    another, with tile -1; the slot of its record is returned.
    """

    slots = s.rec.shape[0] - 1

    def one(carry):
        _, slot, step, begun = carry
        item = WorkItem(gm, s, slot)
        count = item.count

        def ahead(*more):
            next_slot = lax.rem(slot + 1, slots)
            wait(s.rec_full, next_slot)
            after = WorkItem(gm, s, next_slot)
            begun = begin(after, next_slot, step + count, *more)
            return after.tile >= 0, next_slot, step + count, begun

        return body(item, slot, step, begun, ahead)

    zero = jnp.int32(0)
    wait(s.rec_full, 0)
    first = WorkItem(gm, s, 0)
    _, slot, _, _ = lax.while_loop(
        lambda carry: carry[0], one, (first.tile >= 0, zero, zero, begin(first, zero, zero))
    )
    return slot
