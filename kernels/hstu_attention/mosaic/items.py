"""Small pieces of device code that Pallas has no name for."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

from kernels.hstu_attention.mosaic import schedule

ROW = plgpu.Layout.WGMMA.reduce(1)  # of one number for each of 64 rows


def launch(kernel, name, operands, counters, *, scratch, out_type, workers):
    """Runs `kernel(*operands, counters, *outputs, s)` on `workers` thread blocks of three warpgroups that stay; `s` holds what `scratch` names.

    counters: a reference that begins with zeros, int32, that `feed_items` draws from.
    """

    def entry(*refs):
        pl.run_scoped(lambda **s: kernel(*refs, s), **scratch, collective_axes="wg")

    run = plgpu.kernel(
        entry,
        out_type=out_type,
        grid=(workers,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )
    return run(*operands, counters)


def ring(name, slots, filled=1, emptied=2):
    """Barriers of a ring of buffers: `NAME_full` takes `filled` copies, `NAME_empty` an arrival of each of `emptied` readers."""
    return {
        f"{name}_full": plgpu.Barrier(num_arrivals=filled, num_barriers=slots),
        f"{name}_empty": plgpu.Barrier(num_arrivals=emptied, num_barriers=slots),
    }


def open_rings(s, **slots):
    """What each reader of the named rings does first: all their buffers are empty."""
    for name, number in slots.items():
        for i in range(number):
            plgpu.barrier_arrive(s[f"{name}_empty"].at[i])


def record_scratch(slots):
    """Shared memory of `slots` records, whose last row passes a drawn number on, and its barriers."""
    return dict(rec=plgpu.SMEM((slots + 1, schedule.RECORD), jnp.int32), **ring("rec", slots))


def _draw_number(counters_gm, which, box_sm):
    """The next number from a counter in global memory, for a whole warpgroup; `box_sm` passes it on from the thread
    that draws.
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


def fetch_item(records_gm, counters_gm, s, slot, *, workers, which, first=False):
    """Starts the copy of the next item's record into `slot`; the first item of a thread block is the one of its own
    number.
    """
    number = (
        lax.axis_index("worker")
        if first
        else _draw_number(counters_gm, which, s["rec"].at[s["rec"].shape[0] - 1]) + workers
    )
    plgpu.barrier_wait(s["rec_empty"].at[slot])
    number = jnp.minimum(number, records_gm.shape[0] - 1)
    plgpu.copy_gmem_to_smem(records_gm.at[number], s["rec"].at[slot], s["rec_full"].at[slot])


def feed_items(records_gm, counters_gm, s, load_block, begin, *, ahead, workers, which=0):
    """The feeding warpgroup: for every item `begin(item, slot)`, then `load_block(item, step, i)` for each of its blocks.

    ahead: blocks before the end of an item at which the next one is drawn: late, or the last ones are shared badly.
    which: counter, of those that are zero when the kernel begins.
    """

    slots = s["rec"].shape[0] - 1

    def one_item(item, slot, step, begun, next_item):
        begin(item, slot)

        @pl.loop(0, item.count)
        def _(i):
            load_block(item, step, i)

            @pl.when(i == jnp.maximum(item.count - ahead, 0))
            def _():
                fetch_item(
                    records_gm,
                    counters_gm,
                    s,
                    lax.rem(slot + 1, slots),
                    workers=workers,
                    which=which,
                )

        return next_item()

    fetch_item(records_gm, counters_gm, s, 0, workers=workers, which=which, first=True)
    draw_items(s["rec"], s["rec_full"], one_item)


def keep_inside(arrays, intervals):
    """`arrays` float32[64, N] in accumulator layout, N at most 128, 0 in columns that are in none of the row's `intervals`.

    A thread has at most 32 columns of a row, and an interval is a run of them: so a word of bits says which to keep, whatever the number of
    intervals, and the compiler turns its bits into predicates several at a time.
    """
    shape = arrays[0].shape

    @plgpu.inline_mgpu(
        arg_types=(((ROW, ROW),) * len(intervals), (plgpu.Layout.WGMMA,) * len(arrays)),
        return_type=(plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA),)
        * len(arrays),
    )
    def keep(_, intervals, arrays):
        i32 = ir.IntegerType.get_signless(32)
        _, column = _thread_place()

        def constant(x):
            return mgpu.c(x, i32)

        def columns_before(end):
            """How many of this thread's columns come before column `end`; it has two of every eight."""
            end = arith.minsi(arith.maxsi(arith.subi(end, column), constant(0)), constant(shape[1]))
            pairs = arith.muli(arith.shrui(end, constant(3)), constant(2))
            return arith.addi(pairs, arith.minsi(arith.andi(end, constant(7)), constant(2)))

        def bits(row):
            word = None
            for lo, hi in intervals:
                first, stop = (
                    columns_before(llvm.extractelement(x.registers.flat[row], constant(0)))
                    for x in (lo, hi)
                )
                run = llvm.inline_asm(
                    i32, [first, arith.subi(stop, first)], "bmsk.clamp.b32 $0, $1, $2;", "=r,r,r"
                )
                word = run if word is None else arith.ori(word, run)
            return word

        words = [bits(row) for row in range(2)]
        zero = mgpu.c(0.0, ir.F32Type.get())
        out = [x.registers.copy() for x in arrays]
        for number, place in enumerate(np.ndindex(out[0].shape)):
            for i in range(2):
                bit = constant(1 << (number // 2 * 2 + i))
                seen = arith.cmpi(
                    arith.CmpIPredicate.ne, arith.andi(words[number % 2], bit), constant(0)
                )
                for registers in out:
                    pair = registers[place]
                    kept = arith.select(seen, llvm.extractelement(pair, constant(i)), zero)
                    registers[place] = llvm.insertelement(pair, kept, constant(i))
        return tuple(
            mgpu.FragmentedArray(_registers=r, _layout=x.layout, _is_signed=None)
            for r, x in zip(out, arrays, strict=True)
        )

    return keep(tuple(intervals), tuple(arrays))


def _thread_place():
    """(row, first column) of this thread in an accumulator of 64 rows; it also has the row 8 below, the column on the
    right, and every 8th column from there.
    """
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.c(128, i32))
    warp, lane = (f(thread, mgpu.c(32, i32)) for f in (arith.divui, arith.remui))
    row = arith.addi(arith.muli(warp, mgpu.c(16, i32)), arith.divui(lane, mgpu.c(4, i32)))
    return row, arith.muli(arith.remui(lane, mgpu.c(4, i32)), mgpu.c(2, i32))


def load_rows(gm, tails_gm, row, size, head, tail_first, into, full, column=0, first=0):
    """Copies rows of one head; those of the buffer's last partly filled tile from `tails_gm` (see `mosaic_schedule.clean_tails`), from `column`
    on. `gm` begins with row `first`.
    """
    in_tail = row >= tail_first

    @pl.when(in_tail)
    def _():
        place = pl.ds(
            pl.multiple_of(
                schedule.COUNTERS + lax.rem(row - tail_first, schedule.TAIL), schedule.COUNTERS
            ),
            size,
        )
        plgpu.copy_gmem_to_smem(tails_gm.at[place, head, pl.ds(column, gm.shape[2])], into, full)

    @pl.when(~in_tail)
    def _():
        plgpu.copy_gmem_to_smem(gm.at[pl.ds(row - first, size), head], into, full)


def swizzled(shape, dtype):
    """Shared memory that TMA and wgmma both read: tiles of 8 rows of 128 bytes, swizzled against bank conflicts."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    )


class Item:
    """A work item's record, read from shared memory where it is needed: registers are scarce."""

    def __init__(self, records_sm, slot):
        self._get = lambda name: records_sm[slot, name]

    def __getattr__(self, name):
        return self._get(getattr(schedule, name.upper()))

    def block(self, i):
        """Number in the buffer of the item's block i."""
        return i + jnp.where(
            i < self.cut1, self.shift0, jnp.where(i < self.cut2, self.shift1, self.shift2)
        )

    def whole(self, block):
        """Whether the tile sees all of this block."""
        inside = (block >= self.full0) & (block < self.full_end0)
        inside |= (block >= self.full1) & (block < self.full_end1)
        return inside | ((block >= self.full2) & (block < self.full_end2))

    def simple(self, block):
        """Whether the first interval of each row (or key) says all about this block."""
        other = (block >= self.other0) & (block < self.other_end0)
        return ~(other | ((block >= self.other1) & (block < self.other_end1)))

    def bounds(self, bounds_gm, first, which=0):
        """One of the three intervals of 64 rows (or keys) from `first` on."""
        place = pl.ds(first, 64)
        return tuple(
            plgpu.load(bounds_gm.at[2 * which + end, place], layout=ROW, optimized=False)
            for end in range(2)
        )

    def masked(self, i, size, bounds_gm, first, arrays, nearest, begin=0, intervals=None):
        """`arrays` of scores, from column `begin` of block i on, with 0 where a row (or key) from `first` on does not
        see.

        size: of blocks. nearest: the interval that mostly says all, loaded beforehand; None loads it here, where registers are scarce.
        intervals: how many there are, 1 or 3; None asks block by block, at the price of registers.
        """
        block = self.block(i)
        left = block * size + begin

        def partly(*arrays):
            closest = self.bounds(bounds_gm, first) if nearest is None else nearest

            def mask(*others):
                return keep_inside(
                    arrays, [(lo - left, hi - left) for lo, hi in (closest, *others)]
                )

            def mask_all():
                return mask(*(self.bounds(bounds_gm, first, which) for which in (1, 2)))

            if intervals is None:
                return lax.cond(self.simple(block), mask, mask_all)
            return mask() if intervals == 1 else mask_all()

        return lax.cond(self.whole(block), lambda *x: x, partly, *arrays)


def draw_items(records_sm, full, body, begin=lambda item, slot, step: None):
    """Runs `body(item, slot, step, begun, ahead)` for every item that the feeding warpgroup draws; `step` counts the blocks before it.

    `begin(item, slot, step)` is what can be done for an item before the one in front of it is through, `begun` its result. The body calls
    `ahead(*more)` once, which waits for the next record and begins the next item, `begin(item, slot, step, *more)`, and returns what that
    gives. Behind the last item there is another, with tile -1.
    """

    slots = records_sm.shape[0] - 1

    def one(carry):
        _, slot, step, begun = carry
        item = Item(records_sm, slot)
        count = item.count

        def ahead(*more):
            next_slot = lax.rem(slot + 1, slots)
            plgpu.barrier_wait(full.at[next_slot])
            after = Item(records_sm, next_slot)
            begun = begin(after, next_slot, step + count, *more)
            return after.tile >= 0, next_slot, step + count, begun

        return body(item, slot, step, begun, ahead)

    zero = jnp.int32(0)
    plgpu.barrier_wait(full.at[0])
    first = Item(records_sm, 0)
    lax.while_loop(
        lambda carry: carry[0], one, (first.tile >= 0, zero, zero, begin(first, zero, zero))
    )
