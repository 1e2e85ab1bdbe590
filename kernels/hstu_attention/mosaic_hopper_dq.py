"""HSTU attention on Hopper: dQ alone, the second pass of the deterministic backward. Built like the forward: rows
stay, keys stream past them.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels.hstu_attention import mosaic_schedule as schedule
from kernels.hstu_attention.mosaic_device import ROW, draw_items, feed_items, launch, load_rows, open_rings, record_scratch, ring, swizzled
from kernels.hstu_attention.mosaic_parts import write_sums
from kernels.hstu_attention.plan import AttentionPlan

TILE = schedule.TAIL  # query rows of a work item: two warpgroups of 64
BLOCK = 64  # keys a step
RECORDS = 4  # of work items, in shared memory at a time
AHEAD = 4  # blocks before the end of an item at which the next one is drawn


def query_gradients(q: Array, k: Array, v: Array, do: Array, plan: AttentionPlan, scale: Array, alpha: float) -> Any:
    """dQ of padded buffers (T a multiple of 128)."""
    rows, heads, width = q.shape
    workers = schedule.WORKERS
    width_v = v.shape[-1]
    dtype = q.dtype
    stages = 1 if max(width, width_v) > 128 else 2
    work = schedule.forward_schedule(plan, heads, BLOCK, workers)

    def kernel(
        q_gm,
        k_gm,
        v_gm,
        do_gm,
        k_tail_gm,
        bounds_gm,
        scale_gm,
        records_gm,
        tail_first_gm,
        counter_gm,
        dq_gm,
        part_gm,
        s,
    ):
        wg = lax.axis_index("wg")

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            open_rings(s, row=1, key=stages, rec=RECORDS)
            mine = pl.ds(wg * 64, 64)
            my_q, my_do, stage = s["q"].at[mine], s["do"].at[mine], s["o"].at[wg]

            def one_item(item, slot, step):
                row0 = item.tile * TILE + wg * 64
                nearest = item.bounds(bounds_gm, row0)
                plgpu.barrier_wait(s["row_full"])

                def accumulate(dq):
                    @pl.loop(0, item.count)
                    def _(i):
                        now = lax.rem(step + i, stages)
                        plgpu.barrier_wait(s["key_full"].at[now])

                        def scores(s_acc, dp_acc):
                            plgpu.wgmma(s_acc, my_q, s["k"].at[now].T)
                            plgpu.wgmma(dp_acc, my_do, s["v"].at[now].T)
                            score = plgpu.wgmma_accumulator_load(s_acc, wait_n=0)
                            return lax.optimization_barrier((score, plgpu.wgmma_accumulator_load(dp_acc, wait_n=None)))

                        block = plgpu.ACC((64, BLOCK), jnp.float32)
                        score, dp = item.masked(i, BLOCK, bounds_gm, row0, pl.run_scoped(scores, block, block), nearest)
                        half = score * (0.5 * alpha)
                        t = jnp.tanh(half)
                        w = t + 1.0
                        ds = dp * (w * (half - half * t) + w)  # twice the derivative of silu
                        plgpu.wgmma(dq, ds.astype(dtype), s["k"].at[now])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(s["key_empty"].at[now])

                    plgpu.barrier_arrive(s["row_empty"])
                    return dq[...]

                dq = pl.run_scoped(accumulate, plgpu.ACC((64, width), jnp.float32))
                part, head = item.slot, item.head
                plgpu.barrier_arrive(s["rec_empty"].at[slot])
                times = plgpu.load(scale_gm.at[pl.ds(row0, 64)], layout=ROW, optimized=False) * (0.5 * alpha)
                for c in range(0, width, 64):
                    chunk = dq[:, c : c + 64] * lax.broadcast_in_dim(times, (64, 64), [0])

                    @pl.when(part < 0)
                    def _(chunk=chunk, c=c):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        stage[...] = chunk.astype(dtype)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(stage, dq_gm.at[pl.ds(row0, 64), head, pl.ds(c, 64)])

                    @pl.when(part >= 0)
                    def _(chunk=chunk, c=c):
                        part_gm.at[part, mine, pl.ds(c, 64)][...] = chunk

            draw_items(s["rec"], s["rec_full"], one_item)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _feed():
            plgpu.set_max_registers(24, action="decrease")
            tail_first = tail_first_gm[0]

            def queries(item, slot):
                place = pl.ds(item.tile * TILE, TILE)
                plgpu.barrier_wait(s["row_empty"])
                plgpu.copy_gmem_to_smem(q_gm.at[place, item.head], s["q"], s["row_full"])
                plgpu.copy_gmem_to_smem(do_gm.at[place, item.head], s["do"], s["row_full"])

            def keys_and_values(item, step, i):
                now = lax.rem(step + i, stages)
                row, full = item.block(i) * BLOCK, s["key_full"].at[now]
                plgpu.barrier_wait(s["key_empty"].at[now])
                load_rows(k_gm, k_tail_gm, row, BLOCK, item.head, tail_first, s["k"].at[now], full)
                plgpu.copy_gmem_to_smem(v_gm.at[pl.ds(row, BLOCK), item.head], s["v"].at[now], full)

            feed_items(records_gm, counter_gm, s, keys_and_values, queries, ahead=AHEAD, workers=workers)

    slots = schedule.capacity(rows // TILE, heads, workers)[1] * heads
    dq, parts = launch(
        kernel,
        "hstu_backward_dq",
        (q, k, v, do, schedule.clean_tail(k, plan), work.bounds, schedule.row_scales(scale, plan, rows), work.records, work.tail),
        scratch=dict(
            q=swizzled((TILE, width), dtype),
            do=swizzled((TILE, width_v), dtype),
            k=swizzled((stages, BLOCK, width), dtype),
            v=swizzled((stages, BLOCK, width_v), dtype),
            o=swizzled((2, 64, 64), dtype),
            **record_scratch(RECORDS),
            **ring("row", 1, filled=2),
            **ring("key", stages, filled=2),
        ),
        out_type=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((slots, TILE, width), jnp.float32)],
        workers=workers,
    )
    (dq,) = write_sums(work.parts, [(parts, dq)], heads)
    return dq
