"""HSTU attention on Hopper (Pallas Mosaic GPU), forward.

A thread block stays on its SM and draws work items until none is left. Two warpgroups compute 64 query rows each, a third feeds them by TMA.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.hstu_attention import mosaic_schedule as schedule
from kernels.hstu_attention.mosaic_device import next_item

TILE = 128  # query rows of a work item: two warpgroups of 64
ROW = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    block_k: int  # keys a step
    stages: int  # of the rings of keys and values
    workers: int = 132


def _smem(shape: tuple[int, ...], dtype: Any) -> Any:
    swizzle = 128
    elems = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, elems)), plgpu.SwizzleTransform(swizzle)))


def silu(score: Array, alpha: float) -> Array:
    """silu(alpha x) with one special-function instruction: silu(x) = h tanh(h) + h, h = x / 2."""
    half = score * (0.5 * alpha)
    return half * jnp.tanh(half) + half


def forward(q, k, v, v_tail, rows_5T, scale_T, work, tail_block, config: ForwardConfig, *, alpha):
    rows, heads, width = q.shape
    width_v = v.shape[-1]
    dtype = q.dtype
    block_k, stages = config.block_k, config.stages
    records = work.records

    def kernel(q_gm, k_gm, v_gm, tail_gm, rows_gm, scale_gm, records_gm, misc_gm, counter_gm, o_gm, part_gm, scratch):
        (q_sm, k_sm, v_sm, o_sm, rec_sm, box_sm, q_full, q_empty, k_full, k_empty, v_full, v_empty, rec_full, rec_empty) = scratch
        wg = lax.axis_index("wg")

        def field(slot, name):
            return rec_sm[slot, name]

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            plgpu.barrier_arrive(q_empty)
            for s in range(stages):
                plgpu.barrier_arrive(k_empty.at[s])
                plgpu.barrier_arrive(v_empty.at[s])
            for s in range(2):
                plgpu.barrier_arrive(rec_empty.at[s])
            my_q = q_sm.at[pl.ds(wg * 64, 64)]
            my_o = o_sm.at[wg]

            def item(carry):
                _, slot, step = carry
                tile, head = field(slot, schedule.TILE), field(slot, schedule.HEAD)
                begin, end = field(slot, schedule.BEGIN), field(slot, schedule.END)
                cut1, cut2 = field(slot, schedule.CUT1), field(slot, schedule.CUT2)
                shifts = [field(slot, schedule.SHIFT0 + i) for i in range(3)]
                full = [field(slot, schedule.FULL0 + i) for i in range(4)]
                part = field(slot, schedule.SLOT)
                plgpu.barrier_arrive(rec_empty.at[slot])
                row0 = tile * TILE + wg * 64
                bounds = [plgpu.load(rows_gm.at[i, pl.ds(row0, 64)], layout=ROW, optimized=False) for i in range(5)]

                def weights(s, i):
                    block = i + jnp.where(i < cut1, shifts[0], jnp.where(i < cut2, shifts[1], shifts[2]))
                    whole = ((block >= full[0]) & (block < full[1])) | ((block >= full[2]) & (block < full[3]))
                    p = silu(s, alpha)

                    def masked(p):
                        key = plgpu.broadcasted_iota(jnp.int32, p.shape, 1, layout=plgpu.Layout.WGMMA) + block * block_k
                        lo0, hi0, lo1, hi1, own = (lax.broadcast_in_dim(b, p.shape, [0]) for b in bounds)
                        seen = ((key >= lo0) & (key < hi0)) | ((key >= lo1) & (key < hi1)) | (key == own)
                        return jnp.where(seen, p, 0.0)

                    return lax.cond(whole, lambda p: p, masked, p).astype(dtype)

                plgpu.barrier_wait(q_full)

                def accumulate(acc):
                    first = lax.rem(step, stages)
                    plgpu.barrier_wait(k_full.at[first])

                    def first_scores(s_acc):
                        plgpu.wgmma(s_acc, my_q, k_sm.at[first].T)
                        return s_acc[...]

                    s = pl.run_scoped(first_scores, plgpu.ACC((64, block_k), jnp.float32))
                    plgpu.barrier_arrive(k_empty.at[first])
                    p = weights(s, begin)

                    def one(i, p):
                        now = lax.rem(step + i - begin, stages)
                        before = lax.rem(step + i - begin - 1, stages)
                        plgpu.barrier_wait(k_full.at[now])

                        def products(s_acc):
                            plgpu.wgmma(s_acc, my_q, k_sm.at[now].T)
                            plgpu.barrier_wait(v_full.at[before])
                            plgpu.wgmma(acc, p, v_sm.at[before])
                            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                            return lax.optimization_barrier(s)

                        s = pl.run_scoped(products, plgpu.ACC((64, block_k), jnp.float32))
                        plgpu.barrier_arrive(k_empty.at[now])
                        p_next = weights(s, i)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(v_empty.at[before])
                        return p_next

                    p = lax.fori_loop(begin + 1, end, one, p)
                    plgpu.barrier_arrive(q_empty)
                    last = lax.rem(step + end - begin - 1, stages)
                    plgpu.barrier_wait(v_full.at[last])
                    plgpu.wgmma(acc, p, v_sm.at[last])
                    out = acc[...]
                    plgpu.barrier_arrive(v_empty.at[last])
                    return out

                out = pl.run_scoped(accumulate, plgpu.ACC((64, width_v), jnp.float32))
                scale = plgpu.load(scale_gm.at[pl.ds(row0, 64)], layout=ROW, optimized=False)
                out = out * lax.broadcast_in_dim(scale, out.shape, [0])

                @pl.when(part < 0)
                def _():
                    out16 = out.astype(dtype)
                    for c in range(width_v // 64):
                        chunk = my_o.at[c % 2]
                        if c < 2:
                            plgpu.wait_smem_to_gmem(1 if width_v > 64 else 0, wait_read_only=True)
                        else:
                            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        chunk[...] = out16[:, c * 64 : (c + 1) * 64]
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(chunk, o_gm.at[pl.ds(row0, 64), head, pl.ds(c * 64, 64)])

                @pl.when(part >= 0)
                def _():
                    part_gm.at[part, pl.ds(wg * 64, 64)][...] = out

                step = step + end - begin
                slot = 1 - slot
                plgpu.barrier_wait(rec_full.at[slot])
                return field(slot, schedule.TILE) >= 0, slot, step

            plgpu.barrier_wait(rec_full.at[0])
            lax.while_loop(lambda c: c[0], item, (field(0, schedule.TILE) >= 0, jnp.int32(0), jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _feed():
            plgpu.set_max_registers(40, action="decrease")
            tail_first = misc_gm[0]

            def fetch(index, slot):
                plgpu.barrier_wait(rec_empty.at[slot])
                index = jnp.minimum(index, records.shape[0] - 1)
                plgpu.copy_gmem_to_smem(records_gm.at[index], rec_sm.at[slot], rec_full.at[slot])

            def item(carry):
                _, slot, step = carry
                tile, head = field(slot, schedule.TILE), field(slot, schedule.HEAD)
                begin, end = field(slot, schedule.BEGIN), field(slot, schedule.END)
                cut1, cut2 = field(slot, schedule.CUT1), field(slot, schedule.CUT2)
                shifts = [field(slot, schedule.SHIFT0 + i) for i in range(3)]
                plgpu.barrier_wait(q_empty)
                plgpu.copy_gmem_to_smem(q_gm.at[pl.ds(tile * TILE, TILE), head], q_sm, q_full)

                def one(i, _):
                    block = i + jnp.where(i < cut1, shifts[0], jnp.where(i < cut2, shifts[1], shifts[2]))
                    now = lax.rem(step + i - begin, stages)
                    plgpu.barrier_wait(k_empty.at[now])
                    plgpu.copy_gmem_to_smem(k_gm.at[pl.ds(block * block_k, block_k), head], k_sm.at[now], k_full.at[now])
                    plgpu.barrier_wait(v_empty.at[now])
                    in_tail = block * block_k >= tail_first

                    @pl.when(in_tail)
                    def _():
                        row = pl.multiple_of(block * block_k - tail_first, block_k)
                        plgpu.copy_gmem_to_smem(tail_gm.at[pl.ds(row, block_k), head], v_sm.at[now], v_full.at[now])

                    @pl.when(~in_tail)
                    def _():
                        plgpu.copy_gmem_to_smem(v_gm.at[pl.ds(block * block_k, block_k), head], v_sm.at[now], v_full.at[now])

                    @pl.when(i == begin)
                    def _():
                        fetch(next_item(counter_gm, box_sm) + config.workers, 1 - slot)

                lax.fori_loop(begin, end, one, None)
                step = step + end - begin
                slot = 1 - slot
                plgpu.barrier_wait(rec_full.at[slot])
                return field(slot, schedule.TILE) >= 0, slot, step

            fetch(lax.axis_index("worker"), 0)
            plgpu.barrier_wait(rec_full.at[0])
            lax.while_loop(lambda c: c[0], item, (field(0, schedule.TILE) >= 0, jnp.int32(0), jnp.int32(0)))

    def entry(*refs):
        ring = functools.partial(plgpu.Barrier, num_barriers=stages)
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            _smem((TILE, width), dtype),
            _smem((stages, block_k, width), dtype),
            _smem((stages, block_k, width_v), dtype),
            _smem((2, 2, 64, 64), dtype),
            plgpu.SMEM((2, schedule.RECORD), jnp.int32),
            plgpu.SMEM((1,), jnp.int32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2),
            ring(),
            ring(num_arrivals=2),
            ring(),
            ring(num_arrivals=2),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            collective_axes="wg",
        )

    counter = jax.new_ref(jnp.zeros((1,), jnp.int32))
    out, parts = plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct((rows, heads, width_v), dtype),
            jax.ShapeDtypeStruct((max(work.num_slots, 1), TILE, width_v), jnp.float32),
        ],
        grid=(config.workers,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="wg",
        kernel_name="hstu_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(q, k, v, v_tail, rows_5T, scale_T, records, tail_block, counter)
    return out, parts
