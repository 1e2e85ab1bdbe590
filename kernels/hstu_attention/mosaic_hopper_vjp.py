"""HSTU attention on Hopper (Pallas Mosaic GPU), backward.

One pass over (key tile, row block) pairs makes all three gradients with five products a pair. The tile of keys stays; row blocks stream past it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.hstu_attention import mosaic_schedule as schedule
from kernels.hstu_attention.mosaic_device import draw_items, next_item, swizzled

TILE = 128  # keys of a work item: two warpgroups of 64
ROW = plgpu.Layout.WGMMA.reduce(1)
COL = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    block_q: int = 64  # rows a step
    stages: int = 3  # of the ring of rows and their gradients
    with_dq: bool = True  # False: dK and dV only, for the two-pass backward
    workers: int = 132
    registers: tuple[int, int] = (240, 24)  # compute, feed


def _seen(rows_gm, key0, row0, shape):
    """Which rows (columns here) see which keys: three intervals of rows a key."""
    bounds = [plgpu.load(rows_gm.at[j, pl.ds(key0, 64)], layout=ROW, optimized=False) for j in range(6)]
    row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + row0
    lo0, hi0, lo1, hi1, lo2, hi2 = (lax.broadcast_in_dim(x, shape, [0]) for x in bounds)
    return ((row >= lo0) & (row < hi0)) | ((row >= lo1) & (row < hi1)) | ((row >= lo2) & (row < hi2))


def key_gradients(q, k, v, do, tails, key_rows_6T, row_scale, work, tail_first, config: BackwardConfig, *, alpha, scale_in_rows):
    """dQ (float32, without its factor alpha/2), dK, dV (float32 parts of split tiles beside them), all without the constant scale."""
    rows, heads, width = q.shape
    width_v = v.shape[-1]
    dtype = q.dtype
    block_q, stages = config.block_q, config.stages
    records = work.records

    def kernel(q_gm, k_gm, v_gm, do_gm, qt_gm, kt_gm, dot_gm, rows_gm, scale_gm, records_gm, misc_gm, counter_gm, dq_gm, dk_gm, dv_gm, dkp_gm, dvp_gm, s):
        wg = lax.axis_index("wg")

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(config.registers[0], action="increase")
            plgpu.barrier_arrive(s["kv_empty"])
            for i in range(stages):
                plgpu.barrier_arrive(s["row_empty"].at[i])
            for i in range(2):
                plgpu.barrier_arrive(s["rec_empty"].at[i])
                plgpu.barrier_arrive(s["ds_empty"].at[i])
            mine = pl.ds(wg * 64, 64)
            my_k, my_v = s["k"].at[mine], s["v"].at[mine]
            my_columns = pl.ds(pl.multiple_of(wg * (width // 2), 64), width // 2)
            stage = s["dq"].at[wg]

            def work(item, slot, step):
                plgpu.barrier_wait(s["kv_full"])

                def send_dq(dq, i, ds_slot):
                    """Adds this warpgroup's half of dQ of block i to memory."""
                    plgpu.barrier_arrive(s["ds_empty"].at[ds_slot])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    stage[...] = dq
                    plgpu.commit_smem()
                    rows_of_block = pl.ds(item.block(i) * block_q, block_q)
                    plgpu.copy_smem_to_gmem(stage, dq_gm.at[rows_of_block, item.head, my_columns], reduction_op="add")

                def accumulate(dk, dv):
                    def one(i, _):
                        now = lax.rem(step + i, stages)
                        ds_now = lax.rem(step + i, 2)
                        whole = item.whole(item.block(i))
                        plgpu.barrier_wait(s["row_full"].at[now])

                        def scores(s_acc):
                            plgpu.wgmma(s_acc, my_k, s["q"].at[now].T)
                            plgpu.wgmma_wait(1)  # dV and dK of the last block: their operands leave the registers that dP needs

                            @pl.when(i > 0)
                            def _():
                                plgpu.barrier_arrive(s["row_empty"].at[lax.rem(step + i + stages - 1, stages)])

                            def gradients(dp_acc):
                                plgpu.wgmma(dp_acc, my_v, s["do"].at[now].T)
                                st = plgpu.wgmma_accumulator_load(s_acc, wait_n=0)
                                dpt = plgpu.wgmma_accumulator_load(dp_acc, wait_n=None)
                                return lax.optimization_barrier((st, dpt))

                            return pl.run_scoped(gradients, plgpu.ACC((64, block_q), jnp.float32))

                        st, dpt = pl.run_scoped(scores, plgpu.ACC((64, block_q), jnp.float32))

                        def masked(st, dpt):
                            seen = _seen(rows_gm, item.tile * TILE + wg * 64, item.block(i) * block_q, st.shape)
                            return jnp.where(seen, st, 0.0), jnp.where(seen, dpt, 0.0)

                        st, dpt = lax.cond(whole, lambda *x: x, masked, st, dpt)
                        half = st * (0.5 * alpha)
                        t = jnp.tanh(half)
                        w = t + 1.0
                        p = half * w
                        ds = dpt * (w * (half - half * t) + w)  # twice the derivative of silu
                        if scale_in_rows:
                            scale = plgpu.load(scale_gm.at[pl.ds(item.block(i) * block_q, block_q)], layout=COL, optimized=False)
                            scale = lax.broadcast_in_dim(scale, p.shape, [1])
                            p, ds = p * scale, ds * scale
                        p16, ds16 = p.astype(dtype), ds.astype(dtype)
                        if not config.with_dq:
                            plgpu.wgmma(dv, p16, s["do"].at[now])
                            plgpu.wgmma(dk, ds16, s["q"].at[now])
                            return
                        plgpu.barrier_wait(s["ds_empty"].at[ds_now])
                        s["ds"].at[ds_now, mine][...] = ds16
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(s["ds_full"].at[ds_now])
                        # dQ of the block before, of which the other warpgroup has its half by now. (There is none at first: what is
                        # computed then goes nowhere.)
                        ds_before = 1 - ds_now
                        pl.when(i > 0)(lambda: plgpu.barrier_wait(s["ds_full"].at[ds_before]))

                        def products(dq_acc):
                            plgpu.wgmma(dq_acc, s["ds"].at[ds_before].T, s["k"].at[:, my_columns])
                            plgpu.wgmma(dv, p16, s["do"].at[now])
                            plgpu.wgmma(dk, ds16, s["q"].at[now])
                            dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=2)
                            return lax.optimization_barrier(dq)

                        dq = pl.run_scoped(products, plgpu.ACC((block_q, width // 2), jnp.float32))
                        pl.when(i > 0)(lambda: send_dq(dq, i - 1, ds_before))

                    count = item.count
                    lax.fori_loop(0, count, one, None)
                    if config.with_dq:
                        ds_last = lax.rem(step + count - 1, 2)
                        plgpu.barrier_wait(s["ds_full"].at[ds_last])

                        def product(dq_acc):
                            plgpu.wgmma(dq_acc, s["ds"].at[ds_last].T, s["k"].at[:, my_columns])
                            return dq_acc[...]

                        dq = pl.run_scoped(product, plgpu.ACC((block_q, width // 2), jnp.float32))
                        send_dq(dq, count - 1, ds_last)
                    else:
                        plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(s["row_empty"].at[lax.rem(step + count - 1, stages)])
                    return dk[...], dv[...]

                dk, dv = pl.run_scoped(accumulate, plgpu.ACC((64, width), jnp.float32), plgpu.ACC((64, width_v), jnp.float32))
                plgpu.barrier_arrive(s["kv_empty"])
                dk = dk * (0.5 * alpha)
                key0, head, part = item.tile * TILE + wg * 64, item.head, item.slot
                ds_slot = lax.rem(step + item.count, 2)
                plgpu.barrier_arrive(s["rec_empty"].at[slot])
                # dK and dV leave through this warpgroup's part of a dS buffer
                out = s["ds"].at[ds_slot, mine]
                plgpu.barrier_wait(s["ds_empty"].at[ds_slot])

                @pl.when(part < 0)
                def _():
                    for grad, gm in ((dv, dv_gm), (dk, dk_gm)):
                        grad16 = grad.astype(dtype)
                        for c in range(0, grad.shape[1], block_q):
                            out[...] = grad16[:, c : c + block_q]
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(out, gm.at[pl.ds(key0, 64), head, pl.ds(c, block_q)])
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when(part >= 0)
                def _():
                    dkp_gm.at[part, mine][...] = dk
                    dvp_gm.at[part, mine][...] = dv

                plgpu.barrier_arrive(s["ds_empty"].at[ds_slot])

            draw_items(s["rec"], s["rec_full"], work)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _feed():
            plgpu.set_max_registers(config.registers[1], action="decrease")
            tail_first = misc_gm[0]

            def fetch(index, slot):
                plgpu.barrier_wait(s["rec_empty"].at[slot])
                index = jnp.minimum(index, records.shape[0] - 1)
                plgpu.copy_gmem_to_smem(records_gm.at[index], s["rec"].at[slot], s["rec_full"].at[slot])

            def load(gm, tail_gm, row, size, head, into, full):
                """Rows from the buffer, or from its last partly filled tile, where padding rows have been zeroed."""
                in_tail = row >= tail_first

                @pl.when(in_tail)
                def _():
                    place = pl.ds(pl.multiple_of(lax.rem(row - tail_first, schedule.TAIL), size), size)
                    plgpu.copy_gmem_to_smem(tail_gm.at[place, head], into, full)

                @pl.when(~in_tail)
                def _():
                    plgpu.copy_gmem_to_smem(gm.at[pl.ds(row, size), head], into, full)

            def work(item, slot, step):
                head, row = item.head, item.tile * TILE
                plgpu.barrier_wait(s["kv_empty"])
                plgpu.copy_gmem_to_smem(v_gm.at[pl.ds(row, TILE), head], s["v"], s["kv_full"])
                load(k_gm, kt_gm, row, TILE, head, s["k"], s["kv_full"])

                @pl.loop(0, item.count)
                def _(i):
                    now = lax.rem(step + i, stages)
                    row = item.block(i) * block_q
                    plgpu.barrier_wait(s["row_empty"].at[now])
                    load(q_gm, qt_gm, row, block_q, item.head, s["q"].at[now], s["row_full"].at[now])
                    load(do_gm, dot_gm, row, block_q, item.head, s["do"].at[now], s["row_full"].at[now])

                    @pl.when(i == 0)
                    def _():
                        fetch(next_item(counter_gm, s["box"]) + config.workers, 1 - slot)

            fetch(lax.axis_index("worker"), 0)
            draw_items(s["rec"], s["rec_full"], work)

    def entry(*refs):
        barrier = plgpu.Barrier
        scratch = dict(
            k=swizzled((TILE, width), dtype),
            v=swizzled((TILE, width_v), dtype),
            q=swizzled((stages, block_q, width), dtype),
            do=swizzled((stages, block_q, width_v), dtype),
            ds=swizzled((2, TILE, block_q), dtype),
            dq=swizzled((2, block_q, width // 2), jnp.float32),
            rec=plgpu.SMEM((2, schedule.RECORD), jnp.int32),
            box=plgpu.SMEM((1,), jnp.int32),
            kv_full=barrier(num_arrivals=2),
            kv_empty=barrier(num_arrivals=2),
            row_full=barrier(num_arrivals=2, num_barriers=stages),
            row_empty=barrier(num_arrivals=2, num_barriers=stages),
            ds_full=barrier(num_arrivals=2, num_barriers=2),
            ds_empty=barrier(num_arrivals=2, num_barriers=2),
            rec_full=barrier(num_barriers=2),
            rec_empty=barrier(num_arrivals=2, num_barriers=2),
        )
        pl.run_scoped(lambda **s: kernel(*refs, s), **scratch, collective_axes="wg")

    counter = jax.new_ref(jnp.zeros((1,), jnp.int32))
    dq = jax.new_ref(jnp.zeros(q.shape, jnp.float32))
    slots = max(work.num_slots, 1)
    dk, dv, dk_parts, dv_parts = plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct(k.shape, dtype),
            jax.ShapeDtypeStruct(v.shape, dtype),
            jax.ShapeDtypeStruct((slots, TILE, width), jnp.float32),
            jax.ShapeDtypeStruct((slots, TILE, width_v), jnp.float32),
        ],
        grid=(config.workers,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="wg",
        kernel_name="hstu_backward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(q, k, v, do, *tails, key_rows_6T, row_scale, work.records, tail_first, counter, dq)
    return dq[...], dk, dv, dk_parts, dv_parts
