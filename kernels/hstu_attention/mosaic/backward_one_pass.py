"""HSTU attention on Hopper (Pallas Mosaic GPU), backward.

One pass over (key tile, row block) pairs makes all three gradients with five products a pair. The tile of keys
stays; row blocks stream past it.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels.hstu_attention import tuning
from kernels.hstu_attention.mosaic import backward_wide as wide
from kernels.hstu_attention.mosaic import schedule
from kernels.hstu_attention.mosaic.backward_keys import key_gradients
from kernels.hstu_attention.mosaic.backward_queries import query_gradients
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


def backward_config(
    k_width: int, v_width: int, plan: AttentionPlan, passes: int | None = None
) -> BackwardConfig:
    """For widths as `padded_widths` leaves them.

    passes: 1 or 2; None takes those of the table of measurements where it has this call, else two where short sequences or a window leave a tile
    few blocks: what dQ costs beside its products, float32 memory to be zeroed and rounded, is then the most.
    """
    found = tuning.find("mosaic", jnp.bfloat16, k_width, v_width, plan)
    values: Any = {} if found is None else found["backward"]
    passes = passes or values.get(
        "passes", 2 if plan.mask.window is not None or tuning.is_short(plan) else 1
    )
    widest = max(k_width, v_width)
    if widest > 128:
        config = BackwardConfig(tile=64, block_q=64, stages=2)
    elif passes == 2:
        config = BackwardConfig(tile=128, block_q=64, stages=3 if widest > 64 else 4)
    elif widest > 64:
        config = BackwardConfig(tile=128, block_q=64, stages=3)
    else:
        config = BackwardConfig(tile=128, block_q=128, stages=2)
    return dataclasses.replace(config, passes=passes, workers=schedule.WORKERS)


def padded_widths(k_width: int, v_width: int) -> tuple[int, int]:
    """Widths that the backward computes with: 64 only beside 64."""
    return (64, 64) if k_width == v_width == 64 else (max(k_width, 128), max(v_width, 128))


def gradients(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    plan: AttentionPlan,
    scale: Array,
    alpha: float,
    deterministic: bool,
    config: BackwardConfig | None = None,
) -> Any:
    """(dQ, dK, dV) of padded buffers (T a multiple of 128).

    In one pass every key tile adds its part of dQ to float32 memory, in the order in which they come; in two, dQ has one of its own, seven
    products a pair instead of five. deterministic: two.
    """
    widths = k_width, v_width = q.shape[2], v.shape[2]
    k_wide, v_wide = padded_widths(*widths)
    q, k = (jnp.pad(x, ((0, 0), (0, 0), (0, k_wide - k_width))) for x in (q, k))
    v, do = (jnp.pad(x, ((0, 0), (0, 0), (0, v_wide - v_width))) for x in (v, do))
    if scale.ndim == 1:
        do, scale = _scaled_rows(do, schedule.row_scales(scale, plan, q.shape[0]))
    config = config or backward_config(k_wide, v_wide, plan, 2 if deterministic else None)
    is_wide = max(k_wide, v_wide) > 128
    tails = schedule.clean_tails(plan, q, k, do)
    if config.passes == 1:
        dq, dk, dv = (wide.one_pass if is_wide else one_pass)(
            q, k, v, do, tails, plan, scale, alpha, config
        )
    else:
        dk, dv = (wide.key_gradients if is_wide else key_gradients)(
            q, k, v, do, tails, plan, scale, alpha, config
        )
        dq = query_gradients(q, k, v, do, tails, plan, scale, alpha)
    return dq[..., :k_width], dk[..., :k_width], dv[..., :v_width]


def _scaled_rows(do: Array, scale_T: Array) -> tuple[Array, Array]:
    """(dO with a factor a row, the constant factor that is left); the largest row factor is 1, for float16."""
    largest = jnp.max(jnp.abs(scale_T))
    relative_T = scale_T / jnp.where(largest > 0, largest, 1.0)
    return (do * relative_T[:, None, None]).astype(do.dtype), largest


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
    """(dQ, dK, dV) of padded buffers (T a multiple of 128), widths 64 or 128; `scale` is one number. `tails`: of q, k, do.

    Each computing warpgroup has half of the keys of a tile, and of dQ half of the columns (or rows, at width 64).
    """
    _, heads, width = q.shape
    width_v = v.shape[-1]
    dtype, first = q.dtype, plan.first_row
    tile, block_q, stages = config.tile, config.block_q, config.stages
    dq_shape = (block_q // 2, width) if width == 64 else (block_q, 64)
    intervals = 1 if plan.rows_in_one_piece else 3
    out_slots = 2 if block_q == 128 else 0
    work = schedule.schedule_of(plan, WorkList.backward(heads, config))
    factor = scale.reshape(1)

    def kernel(q_gm, k_gm, v_gm, do_gm, bounds_gm, factor_gm, records_gm, tail_first_gm,
               dq_gm, tails_gm, dk_gm, dv_gm, dk_part_gm, dv_part_gm, s):  # fmt: skip
        wg = lax.axis_index("wg")

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(
                240, action="increase"
            )  # 2 x 240 + 24 = 504: what a launch of three warpgroups has
            open_rings(s, kv=1, row=stages, ds=2, rec=RECORDS)
            mine = pl.ds(wg * 64, 64)  # keys of the tile
            key_of = lambda item: item.tile * tile + wg * 64  # noqa: E731
            if width > 64:
                my_rows, my_columns = (
                    pl.ds(0, block_q),
                    pl.ds(pl.multiple_of(wg * (width // 2), 64), width // 2),
                )
            else:
                my_rows, my_columns = (
                    pl.ds(pl.multiple_of(wg * (block_q // 2), 64), block_q // 2),
                    pl.ds(0, width),
                )

            def one_item(item, slot, step, begun, ahead):
                nearest = item.bounds(bounds_gm, key_of(item))
                plgpu.barrier_wait(s["kv_full"])

                def send_dq(dq, i):
                    """Adds this warpgroup's part of dQ of block i to memory."""
                    rows = pl.ds(item.block(i) * block_q + my_rows.start - first, my_rows.size)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    s["dq"].at[wg][...] = dq
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        s["dq"].at[wg], dq_gm.at[rows, item.head, my_columns], reduction_op="add"
                    )

                def accumulate(dk, dv):
                    def one(i, _):
                        now = lax.rem(step + i, stages)
                        ds_now = lax.rem(step + i, 2)
                        plgpu.barrier_wait(s["row_full"].at[now])

                        # What depends on `here` is computed anew: kept from step to step it would take registers there are not.
                        here = lax.optimization_barrier(jnp.int32(0))
                        keys = pl.ds(pl.multiple_of(mine.start + here, 64), 64)
                        my_k, my_v = s["k"].at[keys], s["v"].at[keys]
                        columns = range(0, block_q, 64)

                        def loaded(s_acc, dp_acc, pending):
                            st = plgpu.wgmma_accumulator_load(s_acc, wait_n=pending)
                            return lax.optimization_barrier(
                                (st, plgpu.wgmma_accumulator_load(dp_acc, wait_n=None))
                            )

                        def weigh(c, pair):
                            score, dp = item.masked(
                                i, block_q, bounds_gm, key_of(item), pair, nearest, c, intervals
                            )
                            half = score * (0.5 * alpha)
                            t = jnp.tanh(half)
                            w = t + 1.0
                            ds = dp * (w * (half - half * t) + w)  # twice the derivative of silu
                            return (half * w).astype(dtype), ds.astype(dtype)

                        my_slopes = s["ds"].at[ds_now, mine]

                        def store_slopes(c, ds16):
                            if c == 0:
                                plgpu.barrier_wait(s["ds_empty"].at[ds_now])
                            my_slopes.at[:, pl.ds(c, 64)][...] = ds16
                            plgpu.commit_smem()

                        def key_products(c, p16):
                            plgpu.wgmma(dv, p16, s["do"].at[now, pl.ds(c, 64)])
                            # From memory, where it lies for dQ anyhow: as an operand in registers it takes 16 that there are not.
                            plgpu.wgmma(
                                dk, my_slopes.at[:, pl.ds(c, 64)], s["q"].at[now, pl.ds(c, 64)]
                            )

                        def first_scores(s_acc):
                            plgpu.wgmma(s_acc, my_k, s["q"].at[now, pl.ds(0, 64)].T)
                            plgpu.wgmma_wait(
                                1
                            )  # dV and dK of the last block: their operands leave the registers that dP needs

                            @pl.when(i > 0)
                            def _():
                                plgpu.barrier_arrive(
                                    s["row_empty"].at[lax.rem(step + i + stages - 1, stages)]
                                )

                            def products(*accs):
                                accs = [s_acc, *accs]
                                for c in columns:
                                    if c:
                                        plgpu.wgmma(
                                            accs[c // 32], my_k, s["q"].at[now, pl.ds(c, 64)].T
                                        )
                                    plgpu.wgmma(
                                        accs[c // 32 + 1], my_v, s["do"].at[now, pl.ds(c, 64)].T
                                    )
                                for c in columns:  # the elementwise work of a half beside the products of the other
                                    if c:
                                        store_slopes(c - 64, ds16)
                                        key_products(c - 64, p16)
                                    pair = loaded(
                                        *accs[c // 32 : c // 32 + 2], pending=2 * (len(columns) - 1)
                                    )
                                    if c == columns[-1]:
                                        return pair
                                    p16, ds16 = weigh(c, pair)

                            return pl.run_scoped(
                                products,
                                *[plgpu.ACC((64, 64), jnp.float32)] * (2 * len(columns) - 1),
                            )

                        weights, slopes = weigh(
                            columns[-1],
                            pl.run_scoped(first_scores, plgpu.ACC((64, 64), jnp.float32)),
                        )
                        store_slopes(columns[-1], slopes)
                        plgpu.barrier_arrive(s["ds_full"].at[ds_now])
                        # dQ of the block before, of which the other warpgroup has its half by now. (There is
                        # none at first: what is computed then goes nowhere.)
                        ds_before = 1 - ds_now
                        pl.when(i > 0)(lambda: plgpu.barrier_wait(s["ds_full"].at[ds_before]))

                        def products_before(dq_acc):
                            all_keys = pl.ds(pl.multiple_of(here, 128), 128)
                            plgpu.wgmma(
                                dq_acc,
                                s["ds"].at[ds_before, :, my_rows].T,
                                s["k"].at[all_keys, my_columns],
                            )
                            key_products(columns[-1], weights)
                            return lax.optimization_barrier(
                                plgpu.wgmma_accumulator_load(dq_acc, wait_n=2)
                            )

                        dq = pl.run_scoped(products_before, plgpu.ACC(dq_shape, jnp.float32))

                        @pl.when(i > 0)
                        def _():
                            plgpu.barrier_arrive(s["ds_empty"].at[ds_before])
                            send_dq(dq, i - 1)

                    count = item.count
                    lax.fori_loop(0, count, one, None)
                    ds_last = lax.rem(step + count - 1, 2)
                    plgpu.barrier_wait(s["ds_full"].at[ds_last])

                    def product(dq_acc):
                        plgpu.wgmma(
                            dq_acc, s["ds"].at[ds_last, :, my_rows].T, s["k"].at[:, my_columns]
                        )
                        return dq_acc[...]

                    dq = pl.run_scoped(product, plgpu.ACC(dq_shape, jnp.float32))
                    plgpu.barrier_arrive(s["ds_empty"].at[ds_last])
                    send_dq(dq, count - 1)
                    plgpu.barrier_arrive(s["row_empty"].at[lax.rem(step + count - 1, stages)])
                    return dk[...], dv[...]

                dk, dv = pl.run_scoped(
                    accumulate,
                    plgpu.ACC((64, width), jnp.float32),
                    plgpu.ACC((64, width_v), jnp.float32),
                )
                plgpu.barrier_arrive(s["kv_empty"])
                key0, head, part = key_of(item), item.head, item.slot
                ds_slot = lax.rem(step + item.count, 2)
                plgpu.barrier_arrive(s["rec_empty"].at[slot])
                # dK and dV leave through buffers of their own, or through this warpgroup's part of a dS buffer
                outs = [s["o"].at[wg, n] for n in range(out_slots)] or [s["ds"].at[ds_slot, mine]]
                others = len(outs) - 1
                if not out_slots:
                    plgpu.barrier_wait(s["ds_empty"].at[ds_slot])
                factor = factor_gm[0]
                for grad, times, gm, part_gm in (
                    (dv, factor, dv_gm, dv_part_gm),
                    (dk, factor * (0.5 * alpha), dk_gm, dk_part_gm),
                ):
                    for c in range(0, grad.shape[1], 64):
                        chunk, columns = grad[:, c : c + 64] * times, pl.ds(c, 64)
                        outs = [*outs[1:], outs[0]]

                        @pl.when(part < 0)
                        def _(chunk=chunk, gm=gm, columns=columns, out=outs[-1]):
                            plgpu.wait_smem_to_gmem(others, wait_read_only=True)
                            out[...] = chunk.astype(dtype)
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(out, gm.at[pl.ds(key0, 64), head, columns])

                        @pl.when(part >= 0)
                        def _(chunk=chunk, part_gm=part_gm, columns=columns):
                            part_gm.at[part, mine, columns][...] = chunk

                if not out_slots:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(s["ds_empty"].at[ds_slot])
                return ahead()

            draw_items(s["rec"], s["rec_full"], one_item)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _feed():
            plgpu.set_max_registers(24, action="decrease")
            feed(q_gm, k_gm, v_gm, do_gm, tails_gm, records_gm, tail_first_gm[0], config, first, s)

    dq = jax.new_ref(zeros_after(do, q.shape))
    slots = schedule.part_slots(plan, tile, heads, config.workers)
    dk, dv, dk_parts, dv_parts = launch(
        kernel,
        "hstu_backward",
        (q, k, v, do, work.bounds, factor, work.records, work.tail, dq),
        tails,
        scratch=dict(
            k=swizzled((tile, width), dtype),
            v=swizzled((tile, width_v), dtype),
            q=swizzled((stages, block_q, width), dtype),
            do=swizzled((stages, block_q, width_v), dtype),
            ds=swizzled((2, tile, block_q), dtype),
            dq=swizzled((2, *dq_shape), jnp.float32),
            **({"o": swizzled((2, out_slots, 64, 64), dtype)} if out_slots else {}),
            **record_scratch(RECORDS),
            **ring("kv", 1, filled=2),
            **ring("row", stages, filled=2),
            **ring("ds", 2, filled=2),
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
    dq_THK = (dq[...] * (0.5 * alpha * factor)[:, None, None]).astype(dtype)
    return dq_THK, dk, dv
