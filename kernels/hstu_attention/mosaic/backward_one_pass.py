"""The backward of widths up to 128 in one pass: all three gradients, five products a pair.

A tile of keys stays, and blocks of rows stream past it. Each computing warpgroup has half of the
keys of a tile, and of dQ half of the columns (of the rows, at width 64).
"""

import itertools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.hstu_attention.mosaic.backward_shared import (
    RECORDS,
    BackwardInputs,
    feed,
    finished_dq,
    launch_over_keys,
    loaded_pair,
    silu_slopes,
)
from kernels.hstu_attention.mosaic.items import draw_items
from kernels.hstu_attention.mosaic.launch import (
    arrive,
    computing,
    feeding,
    loaded,
    open_rings,
    put,
    ring,
    swizzled,
    wait,
    with_sums,
    write_chunks,
)
from kernels.hstu_attention.mosaic.schedule import BackwardConfig
from kernels.zeros import zeros_after


def all_gradients(x: BackwardInputs, config: BackwardConfig) -> tuple[Float[Array, "_ H _"], ...]:
    """(dQ, dK, dV)."""
    width, dtype, alpha, first = x.q.shape[2], x.q.dtype, x.alpha, x.plan.first_row
    width_v = x.v.shape[2]
    tile, block_q, stages = config.tile, config.block_q, config.stages
    dq_shape = (block_q // 2, width) if width == 64 else (block_q, 64)
    intervals = 1 if x.plan.rows_in_one_piece else 3
    out_slots = 2 if block_q == 128 else 0

    def kernel(wg, gm, s):
        @computing(wg < 2)
        def _compute():
            open_rings(s, kv=1, row=stages, ds=2, rec=RECORDS)
            mine = pl.ds(wg * 64, 64)  # keys of the tile
            my_rows, my_columns = pl.ds(0, block_q), pl.ds(0, width)
            if width > 64:
                my_columns = pl.ds(pl.multiple_of(wg * (width // 2), 64), width // 2)
            else:
                my_rows = pl.ds(pl.multiple_of(wg * (block_q // 2), 64), block_q // 2)

            def key_of(item):
                return item.tile * tile + wg * 64

            def one_item(item, slot, step, begun, ahead):
                nearest = item.bounds(key_of(item))
                wait(s.kv_full)

                def send_dq(dq, i):
                    """Adds this warpgroup's part of dQ of block i to memory."""
                    rows = pl.ds(item.block(i) * block_q + my_rows.start - first, my_rows.size)
                    put(s.dq.at[wg], dq)
                    target = gm.dq.at[rows, item.head, my_columns]
                    plgpu.copy_smem_to_gmem(s.dq.at[wg], target, reduction_op="add")

                def accumulate(dk, dv):
                    def one(i, _):
                        now = lax.rem(step + i, stages)
                        ds_now = lax.rem(step + i, 2)
                        wait(s.row_full, now)

                        # What depends on `here` is computed anew: kept from step to step it would
                        # take registers there are not.
                        here = lax.optimization_barrier(jnp.int32(0))
                        keys = pl.ds(pl.multiple_of(mine.start + here, 64), 64)
                        my_k, my_v = s.k.at[keys], s.v.at[keys]
                        columns = range(0, block_q, 64)

                        def weigh(c, pair):
                            score, dp = item.masked(
                                i, block_q, key_of(item), pair, nearest, c, intervals
                            )
                            half, w, ds = silu_slopes(score, dp, alpha)
                            return (half * w).astype(dtype), ds.astype(dtype)

                        my_slopes = s.ds.at[ds_now, mine]

                        def store_slopes(c, ds16):
                            if c == 0:
                                wait(s.ds_empty, ds_now)
                            my_slopes.at[:, pl.ds(c, 64)][...] = ds16
                            plgpu.commit_smem()

                        def key_products(c, p16):
                            plgpu.wgmma(dv, p16, s.do.at[now, pl.ds(c, 64)])
                            # From memory, where it lies for dQ anyhow: as an operand in registers
                            # it takes 16 that there are not.
                            plgpu.wgmma(
                                dk, my_slopes.at[:, pl.ds(c, 64)], s.q.at[now, pl.ds(c, 64)]
                            )

                        def first_scores(s_acc):
                            plgpu.wgmma(s_acc, my_k, s.q.at[now, pl.ds(0, 64)].T)
                            # dV and dK of the last block: their operands leave the registers that
                            # dP needs
                            plgpu.wgmma_wait(1)

                            @pl.when(i > 0)
                            def _():
                                arrive(s.row_empty, lax.rem(step + i + stages - 1, stages))

                            def products(*accs):
                                accs = [s_acc, *accs]
                                for c in columns:
                                    if c:
                                        plgpu.wgmma(
                                            accs[c // 32], my_k, s.q.at[now, pl.ds(c, 64)].T
                                        )
                                    plgpu.wgmma(
                                        accs[c // 32 + 1], my_v, s.do.at[now, pl.ds(c, 64)].T
                                    )
                                # the elementwise work of a half beside the products of the other
                                for c in columns:
                                    if c:
                                        store_slopes(c - 64, ds16)
                                        key_products(c - 64, p16)
                                    accs_c = accs[c // 32 : c // 32 + 2]
                                    pair = loaded_pair(*accs_c, pending=2 * (len(columns) - 1))
                                    if c == columns[-1]:
                                        return pair
                                    p16, ds16 = weigh(c, pair)

                            return with_sums(products, *[(64, 64)] * (2 * len(columns) - 1))

                        weights, slopes = weigh(
                            columns[-1],
                            with_sums(first_scores, (64, 64)),
                        )
                        store_slopes(columns[-1], slopes)
                        arrive(s.ds_full, ds_now)
                        # The other warpgroup has its half of the block before by now, so dQ of that
                        # block is next. (There is none at first: what is computed then goes
                        # nowhere.)
                        ds_before = 1 - ds_now
                        pl.when(i > 0)(lambda: wait(s.ds_full, ds_before))

                        def products_before(dq_acc):
                            all_keys = pl.ds(pl.multiple_of(here, 128), 128)
                            plgpu.wgmma(
                                dq_acc,
                                s.ds.at[ds_before, :, my_rows].T,
                                s.k.at[all_keys, my_columns],
                            )
                            key_products(columns[-1], weights)
                            return loaded(dq_acc, 2)

                        dq = with_sums(products_before, dq_shape)

                        @pl.when(i > 0)
                        def _():
                            arrive(s.ds_empty, ds_before)
                            send_dq(dq, i - 1)

                    count = item.count
                    lax.fori_loop(0, count, one, None)
                    ds_last = lax.rem(step + count - 1, 2)
                    wait(s.ds_full, ds_last)

                    def product(dq_acc):
                        plgpu.wgmma(dq_acc, s.ds.at[ds_last, :, my_rows].T, s.k.at[:, my_columns])
                        return dq_acc[...]

                    dq = with_sums(product, dq_shape)
                    arrive(s.ds_empty, ds_last)
                    send_dq(dq, count - 1)
                    arrive(s.row_empty, lax.rem(step + count - 1, stages))
                    return dk[...], dv[...]

                dk, dv = with_sums(accumulate, (64, width), (64, width_v))
                arrive(s.kv_empty)
                key0, head, part = key_of(item), item.head, item.slot
                ds_slot = lax.rem(step + item.count, 2)
                arrive(s.rec_empty, slot)
                # dK and dV leave through buffers of their own, or through this warpgroup's part of
                # a dS buffer
                outs = [s.o.at[wg, n] for n in range(out_slots)] or [s.ds.at[ds_slot, mine]]
                buffers, others = itertools.cycle(outs), len(outs) - 1
                if not out_slots:
                    wait(s.ds_empty, ds_slot)
                factor = gm.factor[0]
                for grad, times, out_gm, part_gm in (
                    (dv, factor, gm.dv, gm.dv_part),
                    (dk, factor * (0.5 * alpha), gm.dk, gm.dk_part),
                ):
                    write_chunks(
                        grad,
                        times,
                        part,
                        buffers,
                        others,
                        lambda columns, gm=out_gm: gm.at[pl.ds(key0, 64), head, columns],
                        lambda columns, gm=part_gm: gm.at[part, mine, columns],
                    )

                if not out_slots:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    arrive(s.ds_empty, ds_slot)
                return ahead()

            draw_items(gm, s, one_item)
            plgpu.wait_smem_to_gmem(0)

        @feeding(wg == 2)
        def _feed():
            feed(gm, s, config, first)

    dq = jax.new_ref(zeros_after(x.do, x.q.shape))
    out = {"o": swizzled((2, out_slots, 64, 64), dtype)} if out_slots else {}
    dk, dv = launch_over_keys(
        kernel,
        "hstu_backward",
        x,
        config,
        dq=dq,
        buffers=dict(
            ds=swizzled((2, tile, block_q), dtype),
            dq=swizzled((2, *dq_shape), jnp.float32),
            **out,
        ),
        barriers=ring("ds", 2, filled=2),
    )
    return finished_dq(dq, x), dk, dv
