"""HSTU attention on Hopper, backward for head widths above 128.

Accumulators of dK and dV for 128 keys and 256 columns do not fit the registers. So a tile has 64 keys, and the two
computing warpgroups share the work by gradient: one makes the weights P and the slopes dS, and sums dK; the other
sums dV, and makes dQ of each row block and adds it to memory. Five products a pair, none of them twice.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels.hstu_attention.mosaic import schedule
from kernels.hstu_attention.mosaic.backward_shared import RECORDS, feed
from kernels.hstu_attention.mosaic.items import (
    draw_items,
    launch,
    open_rings,
    record_scratch,
    ring,
    swizzled,
)
from kernels.hstu_attention.mosaic.schedule import BackwardConfig, WorkList
from kernels.hstu_attention.mosaic.split_tiles import write_sums
from kernels.hstu_attention.plan import AttentionPlan
from kernels.zeros import zeros_after

COLUMNS = 128  # of dQ that are made at a time
SENT = 32  # of them added to memory at a time


def one_pass(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    tails: Any,
    plan: AttentionPlan,
    scale: Array,
    alpha: float,
    config: BackwardConfig,
) -> Any:
    """(dQ, dK, dV) of padded buffers (T a multiple of 128), widths 128 and 256; `scale` is one number."""
    return _gradients(q, k, v, do, tails, plan, scale, alpha, config, with_dq=True)


def key_gradients(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    tails: Any,
    plan: AttentionPlan,
    scale: Array,
    alpha: float,
    config: BackwardConfig,
) -> Any:
    """(dK, dV) alone, the first pass of the two-pass backward."""
    return _gradients(q, k, v, do, tails, plan, scale, alpha, config, with_dq=False)[1:]


def _gradients(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    tails: Any,
    plan: AttentionPlan,
    scale: Array,
    alpha: float,
    config: BackwardConfig,
    *,
    with_dq: bool,
) -> Any:
    _, heads, width = q.shape
    width_v = v.shape[-1]
    dtype, first_row = q.dtype, plan.first_row
    tile, block_q, stages = config.tile, config.block_q, config.stages
    intervals = 1 if plan.rows_in_one_piece else 3
    work = schedule.schedule_of(plan, WorkList.backward(heads, config))
    factor = scale.reshape(1)

    def kernel(q_gm, k_gm, v_gm, do_gm, bounds_gm, factor_gm, records_gm, tail_first_gm,
               dq_gm, tails_gm, dk_gm, dv_gm, dk_part_gm, dv_part_gm, s):  # fmt: skip
        wg = lax.axis_index("wg")

        def write(item, slot, gradient, times, gm, part_gm):
            """An item's gradient, from the registers to memory."""
            part, head, keys = item.slot, item.head, pl.ds(item.tile * tile, tile)
            plgpu.barrier_arrive(s["rec_empty"].at[slot])
            for c in range(0, gradient.shape[1], 64):
                chunk, columns = gradient[:, c : c + 64] * times, pl.ds(c, 64)

                @pl.when(part < 0)
                def _(chunk=chunk, columns=columns):
                    gm.at[keys, head, columns][...] = chunk.astype(dtype)

                @pl.when(part >= 0)
                def _(chunk=chunk, columns=columns):
                    part_gm.at[part, :, columns][...] = chunk

        @pl.when(wg == 0)
        def _weigh():
            plgpu.set_max_registers(240, action="increase")
            open_rings(s, kv=1, row=stages, rec=RECORDS)

            def one_item(item, slot, step, begun, ahead):
                key0 = item.tile * tile
                nearest = item.bounds(bounds_gm, key0)
                plgpu.barrier_wait(s["kv_full"])

                def accumulate(dk):
                    @pl.loop(0, item.count)
                    def _(i):
                        now = lax.rem(step + i, stages)
                        plgpu.barrier_wait(s["row_full"].at[now])

                        # Computed anew in every step: kept from step to step it would take registers there are not.
                        keys = pl.ds(
                            pl.multiple_of(lax.optimization_barrier(jnp.int32(0)), tile), tile
                        )

                        def scores(s_acc, dp_acc):
                            plgpu.wgmma(s_acc, s["k"].at[keys], s["q"].at[now].T)
                            plgpu.wgmma(dp_acc, s["v"].at[keys], s["do"].at[now].T)
                            plgpu.wgmma_wait(2)  # dK of the block before has read its rows

                            @pl.when(i > 0)
                            def _():
                                plgpu.barrier_arrive(
                                    s["row_empty"].at[lax.rem(step + i + stages - 1, stages)]
                                )

                            score = plgpu.wgmma_accumulator_load(s_acc, wait_n=0)
                            return lax.optimization_barrier(
                                (score, plgpu.wgmma_accumulator_load(dp_acc, wait_n=None))
                            )

                        block = plgpu.ACC((tile, block_q), jnp.float32)
                        score, dp = item.masked(
                            i,
                            block_q,
                            bounds_gm,
                            key0,
                            pl.run_scoped(scores, block, block),
                            nearest,
                            intervals=intervals,
                        )
                        half = score * (0.5 * alpha)
                        t = jnp.tanh(half)
                        w = t + 1.0
                        ds = dp * (w * (half - half * t) + w)  # twice the derivative of silu
                        plgpu.barrier_wait(s["weights_empty"])
                        s["p"][...] = (half * w).astype(dtype)
                        s["ds"][...] = ds.astype(dtype)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(s["weights_full"])
                        plgpu.wgmma(dk, s["ds"], s["q"].at[now])

                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(s["row_empty"].at[lax.rem(step + item.count - 1, stages)])
                    return dk[...]

                dk = pl.run_scoped(accumulate, plgpu.ACC((tile, width), jnp.float32))
                plgpu.barrier_arrive(s["kv_empty"])
                write(item, slot, dk, factor_gm[0] * (0.5 * alpha), dk_gm, dk_part_gm)
                return ahead()

            draw_items(s["rec"], s["rec_full"], one_item)

        @pl.when(wg == 1)
        def _sum():
            plgpu.set_max_registers(240, action="increase")
            open_rings(s, kv=1, row=stages, weights=1, rec=RECORDS)

            def one_item(item, slot, step, begun, ahead):
                plgpu.barrier_wait(s["kv_full"])

                def accumulate(dv):
                    @pl.loop(0, item.count)
                    def _(i):
                        now = lax.rem(step + i, stages)
                        plgpu.barrier_wait(s["row_full"].at[now])
                        plgpu.barrier_wait(s["weights_full"])

                        def dq_of(first, dq_acc, last):
                            """dQ in some columns; dV of the block is summed while the first of them leave."""
                            plgpu.wgmma(dq_acc, s["ds"].T, s["k"].at[:, pl.ds(first, COLUMNS)])
                            if first == 0:
                                plgpu.wgmma(dv, s["p"], s["do"].at[now])
                            return lax.optimization_barrier(
                                plgpu.wgmma_accumulator_load(dq_acc, wait_n=0 if last else 1)
                            )

                        def release():
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(s["weights_empty"])
                            plgpu.barrier_arrive(s["row_empty"].at[now])

                        if not with_dq:
                            plgpu.wgmma(dv, s["p"], s["do"].at[now])
                            release()
                            return
                        place = pl.ds(item.block(i) * block_q - first_row, block_q)
                        for first in range(0, width, COLUMNS):
                            last = first > 0
                            dq = pl.run_scoped(
                                functools.partial(dq_of, first, last=last),
                                plgpu.ACC((block_q, COLUMNS), jnp.float32),
                            )
                            if last:
                                release()
                            for c in range(0, COLUMNS, SENT):
                                stage = s["dq"].at[c // SENT % 2]
                                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                                stage[...] = dq[:, c : c + SENT]
                                plgpu.commit_smem()
                                columns = pl.ds(first + c, SENT)
                                plgpu.copy_smem_to_gmem(
                                    stage, dq_gm.at[place, item.head, columns], reduction_op="add"
                                )
                        if width == COLUMNS:
                            release()

                    return dv[...]

                dv = pl.run_scoped(accumulate, plgpu.ACC((tile, width_v), jnp.float32))
                plgpu.barrier_arrive(s["kv_empty"])
                write(item, slot, dv, factor_gm[0], dv_gm, dv_part_gm)
                return ahead()

            draw_items(s["rec"], s["rec_full"], one_item)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _feed():
            plgpu.set_max_registers(24, action="decrease")
            feed(
                q_gm,
                k_gm,
                v_gm,
                do_gm,
                tails_gm,
                records_gm,
                tail_first_gm[0],
                config,
                first_row,
                s,
            )

    dq = jax.new_ref(zeros_after(do, q.shape if with_dq else (1, 1, 1)))
    slots = schedule.part_slots(plan, tile, heads, config.workers)
    dk, dv, dk_parts, dv_parts = launch(
        kernel,
        "hstu_backward_wide",
        (q, k, v, do, work.bounds, factor, work.records, work.tail, dq),
        tails,
        scratch=dict(
            k=swizzled((tile, width), dtype),
            v=swizzled((tile, width_v), dtype),
            q=swizzled((stages, block_q, width), dtype),
            do=swizzled((stages, block_q, width_v), dtype),
            p=swizzled((tile, block_q), dtype),
            ds=swizzled((tile, block_q), dtype),
            **({"dq": swizzled((2, block_q, SENT), jnp.float32)} if with_dq else {}),
            **record_scratch(RECORDS),
            **ring("kv", 1, filled=2),
            **ring("row", stages, filled=2),
            **ring("weights", 1, emptied=1),
        ),
        out_type=[
            jax.ShapeDtypeStruct(k.shape, dtype),
            jax.ShapeDtypeStruct(v.shape, dtype),
            jax.ShapeDtypeStruct((slots, tile, width), jnp.float32),
            jax.ShapeDtypeStruct((slots, tile, width_v), jnp.float32),
        ],
        workers=config.workers,
    )
    dk, dv = write_sums(work.parts, [(dk_parts, dk), (dv_parts, dv)], heads)
    dq_THK = (dq[...] * (0.5 * alpha * factor)[:, None, None]).astype(dtype) if with_dq else None
    return dq_THK, dk, dv
