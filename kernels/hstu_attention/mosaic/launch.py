"""How a Hopper kernel is launched, its shared memory with its barriers, and copies into it."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.hstu_attention.mosaic.padding import COUNTERS, TAIL

ROW = plgpu.Layout.WGMMA.reduce(1)  # one number for each of 64 rows


def launch(kernel, name, operands, counters, *, scratch, out_type, workers):
    """Runs `kernel(*operands, counters, *outputs, s)` on `workers` thread blocks that stay.

    A thread block has three warpgroups. `s` holds what `scratch` names. `counters` is a reference
    that begins with zeros, int32, which `feed_items` draws from.
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


def wait(s, barrier, slot=None):
    plgpu.barrier_wait(s[barrier] if slot is None else s[barrier].at[slot])


def arrive(s, barrier, slot=None):
    plgpu.barrier_arrive(s[barrier] if slot is None else s[barrier].at[slot])


def open_rings(s, **slots):
    """What each reader of the named rings does first: all their buffers are empty."""
    for name, number in slots.items():
        for i in range(number):
            arrive(s, f"{name}_empty", i)


def fill(s, name, source, slot=None, full=None):
    """Copies `source` to the buffer `name`, of a ring if there is a `slot`; `NAME_full` tells."""
    into, full = s[name], s[full or f"{name}_full"]
    if slot is not None:
        into, full = into.at[slot], full.at[slot]
    plgpu.copy_gmem_to_smem(source, into, full)


def put(stage, values, pending=0):
    """Writes `values` for a copy to memory, once no more copies than `pending` are on their way."""
    plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
    stage[...] = values.astype(stage.dtype)
    plgpu.commit_smem()


def with_sums(body, *shapes):
    """Runs `body` with float32 accumulators, which begin with zeros."""
    return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def loaded(acc, pending):
    """An accumulator once so many products are pending.

    The barrier keeps the compiler from using it before.
    """
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=pending))


def load_rows(gm, tails_gm, row, size, head, tail_first, into, full, column=0, first=0):
    """Copies rows of one head. `gm` begins with row `first`.

    Rows of the buffer's last partly filled tile come from `tails_gm` (see `padding.clean_tails`),
    from `column` on.
    """
    in_tail = row >= tail_first

    @pl.when(in_tail)
    def _():
        start = pl.multiple_of(COUNTERS + lax.rem(row - tail_first, TAIL), COUNTERS)
        place = tails_gm.at[pl.ds(start, size), head, pl.ds(column, gm.shape[2])]
        plgpu.copy_gmem_to_smem(place, into, full)

    @pl.when(~in_tail)
    def _():
        plgpu.copy_gmem_to_smem(gm.at[pl.ds(row - first, size), head], into, full)
