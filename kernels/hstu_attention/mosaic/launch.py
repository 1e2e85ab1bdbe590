"""How a Hopper kernel is launched, its shared memory with its barriers, and copies into it."""

import types

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.hstu_attention.mosaic import schedule
from kernels.hstu_attention.mosaic.padding import COUNTERS, TAIL, padding_start
from kernels.hstu_attention.mosaic.split_tiles import write_sums

ROW = plgpu.Layout.WGMMA.reduce(1)  # one number for each of 64 rows


def launch(kernel, name, plan, wanted, tensors, factor, *, scratch, results, dq=None, tails=None):
    """The results of `kernel(wg, gm, s)` on thread blocks that stay, one an SM.

    A thread block has three warpgroups, of which `wg` is the number. `gm` holds the operands:
    `tensors` by their names, `factor`, `bounds` and `records` of the schedule; `results` by their
    names; and for each result `NAME_part`, the slots of split tiles, which are summed behind the
    kernel. `s` holds what `scratch` names.

    Args:
      wanted: the list of work that the kernel draws from, of `plan`.
      factor: on the results.
      results: shapes and dtypes.
      dq: what the kernel adds dQ to.
      tails: of `clean_tails`, which begin with the counters that `feed_items` draws from; `gm` has
        `tail_first`, too. None: of a kernel that reads no tails. It gets the counters alone, or,
        where items come in turns, nothing but `real`, the row that padding begins with.
    """
    work = plan.find(wanted)
    operands = tensors | {"bounds": work.bounds, "factor": factor, "records": work.records}
    if tails is not None:
        operands["tail_first"] = work.tail
    elif schedule.in_turns(plan):
        operands["real"] = padding_start(plan)
    else:
        tails = jax.new_ref(jnp.zeros((1,), jnp.int32))
    if dq is not None:
        operands["dq"] = dq
    if tails is not None:
        operands["tails"] = tails
    slots = schedule.part_slots(plan, wanted)
    sums = {
        f"{result}_part": jax.ShapeDtypeStruct((slots, wanted.tile, x.shape[2]), jnp.float32)
        for result, x in results.items()
    }
    outs = results | sums

    def entry(*refs):
        gm = types.SimpleNamespace(**dict(zip((*operands, *outs), refs, strict=True)))
        gm.in_turns = schedule.in_turns(plan)

        def body(**s):
            kernel(lax.axis_index("wg"), gm, types.SimpleNamespace(**s))

        pl.run_scoped(body, **scratch, collective_axes="wg")

    run = plgpu.kernel(
        entry,
        out_type=list(outs.values()),
        grid=(schedule.WORKERS,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )
    made = run(*operands.values())
    pairs = list(zip(made[len(results) :], made[: len(results)], strict=True))
    first_row = plan.first_row if wanted.kind == "forward" else 0
    return write_sums(work.parts, pairs, wanted.heads, first_row)


# Registers of a thread: 2 x 240 + 24 = 504 is what a launch of three warpgroups has.
def computing(warpgroups):
    """A decorator: these warpgroups run the function, with more registers than they began with."""
    return _with_registers(warpgroups, 240, "increase")


def feeding(warpgroups):
    """`computing`, with fewer registers."""
    return _with_registers(warpgroups, 24, "decrease")


def _with_registers(warpgroups, number, action):
    def run(body):
        @pl.when(warpgroups)
        def _():
            plgpu.set_max_registers(number, action=action)
            body()

    return run


def swizzled(shape, dtype):
    """Shared memory that TMA and wgmma both read.

    It has tiles of 8 rows of 128 bytes, swizzled against bank conflicts.
    """
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    )


def ring(name, slots, filled=1, emptied=2):
    """Barriers of a ring of buffers.

    `NAME_full` takes `filled` copies, `NAME_empty` an arrival of each of `emptied` readers.
    """
    return {
        f"{name}_full": plgpu.Barrier(num_arrivals=filled, num_barriers=slots),
        f"{name}_empty": plgpu.Barrier(num_arrivals=emptied, num_barriers=slots),
    }


def wait(barrier, slot=None):
    plgpu.barrier_wait(barrier if slot is None else barrier.at[slot])


def arrive(barrier, slot=None):
    plgpu.barrier_arrive(barrier if slot is None else barrier.at[slot])


def open_rings(s, **slots):
    """What each reader of the named rings does first: all their buffers are empty."""
    for name, number in slots.items():
        for i in range(number):
            arrive(getattr(s, f"{name}_empty"), i)


def fill(s, name, source, slot=None, full=None):
    """Copies `source` to the buffer `name`, of a ring if there is a `slot`; `NAME_full` tells."""
    into, full = getattr(s, name), getattr(s, full or f"{name}_full")
    if slot is not None:
        into, full = into.at[slot], full.at[slot]
    plgpu.copy_gmem_to_smem(source, into, full)


def row_values(gm, *place):
    """One number for each of 64 rows, from memory."""
    return plgpu.load(gm.at[place], layout=ROW, optimized=False)


def put(stage, values, pending=0):
    """Writes `values` for a copy to memory, once no more copies than `pending` are on their way."""
    plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
    stage[...] = values.astype(stage.dtype)
    plgpu.commit_smem()


def write_chunks(values, factor, part, stages, pending, target, part_target):
    """Writes `values` times `factor`, 64 columns at a time.

    Args:
      part: the slot of a split tile, whose sums are written as they are; negative: the result,
        which is copied from `stages` in turn.
      pending: copies that may be on their way when the next begins.
      target, part_target: functions of the columns, to the place in the result or the slot.
    """
    for c in range(0, values.shape[1], 64):
        chunk, columns, stage = values[:, c : c + 64] * factor, pl.ds(c, 64), next(stages)

        @pl.when(part < 0)
        def _(chunk=chunk, columns=columns, stage=stage):
            put(stage, chunk, pending)
            plgpu.copy_smem_to_gmem(stage, target(columns))

        @pl.when(part >= 0)
        def _(chunk=chunk, columns=columns):
            part_target(columns)[...] = chunk


def with_sums(body, *shapes):
    """Runs `body` with float32 accumulators, which begin with zeros."""
    return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def loaded(acc, pending):
    """An accumulator once so many products are pending.

    The barrier keeps the compiler from using it before.
    """
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=pending))


def clean_rows(buffer, row, real):
    """Zeros in rows of shared memory from row `real` on, which may hold NaN; the first is `row`.

    Each warpgroup cleans what it reads, and two of them write the same.
    """
    rows, columns = buffer.shape

    @pl.when(row + rows > real)
    def _():
        for first in range(0, rows, 64):
            for column in range(0, columns, 64):
                chunk = buffer.at[pl.ds(first, 64), pl.ds(column, 64)]
                values = plgpu.load(chunk, layout=plgpu.Layout.WGMMA, optimized=False)
                place = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=plgpu.Layout.WGMMA)
                zeros = jnp.zeros((), values.dtype)
                chunk[...] = jnp.where(row + first + place < real, values, zeros)
        plgpu.commit_smem()


def load_rows(gm, tails_gm, row, size, head, tail_first, into, full, column=0, first=0):
    """Copies rows of one head. `gm` begins with row `first`.

    Rows of the buffer's last partly filled tile come from `tails_gm` (see `padding.clean_tails`),
    from `column` on; None: from `gm`, too.
    """
    if tails_gm is None:
        plgpu.copy_gmem_to_smem(gm.at[pl.ds(row - first, size), head], into, full)
        return
    in_tail = row >= tail_first

    @pl.when(in_tail)
    def _():
        start = pl.multiple_of(COUNTERS + lax.rem(row - tail_first, TAIL), COUNTERS)
        place = tails_gm.at[pl.ds(start, size), head, pl.ds(column, gm.shape[2])]
        plgpu.copy_gmem_to_smem(place, into, full)

    @pl.when(~in_tail)
    def _():
        plgpu.copy_gmem_to_smem(gm.at[pl.ds(row - first, size), head], into, full)
