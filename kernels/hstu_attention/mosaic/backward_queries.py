"""dQ alone: the second pass of the deterministic backward.

It is built like the forward: rows stay, keys stream past them.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.hstu_attention.mosaic.backward_shared import BackwardInputs, loaded_pair, silu_slopes
from kernels.hstu_attention.mosaic.items import (
    draw_items,
    feed_items,
    pass_over,
    record_scratch,
)
from kernels.hstu_attention.mosaic.launch import (
    arrive,
    clean_rows,
    computing,
    feeding,
    fill,
    launch,
    load_rows,
    open_rings,
    ring,
    swizzled,
    wait,
    with_sums,
)
from kernels.hstu_attention.mosaic.padding import TAIL
from kernels.hstu_attention.mosaic.schedule import WorkList
from kernels.typing import THK

TILE = TAIL  # query rows of a work item: two warpgroups of 64
BLOCK = 64  # keys a step
RECORDS = 4  # of work items, in shared memory at a time
AHEAD = 4  # blocks before the end of an item at which the next one is drawn


def work_list(heads: int) -> WorkList:
    return WorkList.forward(heads, BLOCK)


def query_gradients(x: BackwardInputs) -> THK:
    """dQ. The first pass has used the first counter of `x.tails`."""
    plan, alpha, (_, heads, width) = x.plan, x.alpha, x.q.shape
    width_v = x.v.shape[2]
    dtype, first = x.q.dtype, plan.first_row
    # Tiles of rows, blocks of keys and of values that shared memory holds: the next tile begins
    # before the last one has left, and a block of keys is needed for a step more than its values.
    wide = max(width, width_v) > 128
    row_slots, k_stages, v_stages = (1, 2, 1) if wide else (2, 3, 2)

    def kernel(wg, gm, s):
        @computing(wg < 2)
        def _compute():
            open_rings(s, row=row_slots, k=k_stages, v=v_stages, rec=RECORDS)
            mine = pl.ds(wg * 64, 64)

            def first_row(item):  # behind the last item the tile is -1
                return jnp.maximum(item.tile, 0) * TILE + wg * 64

            def slopes(item, slot, step, i, nearest, beside=None, more=True):
                """dS of an item's block i.

                The product that `beside` starts runs during the elementwise work. `more` is False
                behind the last item, where what is computed goes nowhere.
                """
                row_slot = lax.rem(slot, row_slots)
                now_k, now_v = lax.rem(step + i, k_stages), lax.rem(step + i, v_stages)

                @pl.when(more)
                def _():
                    wait(s.k_full, now_k)
                    wait(s.v_full, now_v)
                    if x.tails is None:
                        clean_rows(s.k.at[now_k], item.block(i) * BLOCK, gm.real[0])

                # What depends on `here` is computed anew: kept from step to step it would take
                # registers there are not.
                here = lax.optimization_barrier(jnp.int32(0)) if wide else 0
                rows = pl.ds(pl.multiple_of(mine.start + here, 64), 64)

                def scores(s_acc, dp_acc):
                    plgpu.wgmma(s_acc, s.q.at[row_slot, rows], s.k.at[now_k].T)
                    plgpu.wgmma(dp_acc, s.do.at[row_slot, rows], s.v.at[now_v].T)
                    if beside is not None:
                        beside()
                    return loaded_pair(s_acc, dp_acc, 0 if beside is None else 1)

                score, dp = with_sums(scores, (64, BLOCK), (64, BLOCK))
                pl.when(more)(lambda: arrive(s.v_empty, now_v))
                score, dp = item.masked(i, BLOCK, first_row(item), (score, dp), nearest)
                return silu_slopes(score, dp, alpha)[2].astype(dtype)

            def begin(item, slot, step, beside=None):
                """(the bounds of its rows, dS of its first block).

                The next item begins while this one ends.
                """
                if wide:  # no registers for that
                    return None
                nearest, more = item.bounds(first_row(item)), item.tile >= 0
                first = jnp.int32(0)
                if gm.in_turns:
                    first = jnp.where(more, item.span(wg, True)[0], 0)
                    pass_blocks(step, step + first)
                pl.when(more)(lambda: wait(s.row_full, lax.rem(slot, row_slots)))
                return nearest, slopes(item, slot, step, first, nearest, beside, more)

            def pass_blocks(start, stop):
                """Gives blocks back unread. While it waits, a block of keys is in use."""
                pass_over(s, "k", k_stages, start, stop)
                pass_over(s, "v", v_stages, start, stop)

            def one_item(item, slot, step, begun, ahead):
                row_slot = lax.rem(slot, row_slots)
                first_block, count = (0, item.count) if wide else item.span(wg, gm.in_turns)

                def accumulate(dq):
                    def add(ds, i):
                        plgpu.wgmma(dq, ds, s.k.at[lax.rem(step + i, k_stages)])

                    def release(i):
                        arrive(s.k_empty, lax.rem(step + i, k_stages))

                    if wide:
                        nearest = item.bounds(first_row(item))
                        wait(s.row_full, row_slot)

                        @pl.loop(0, count)
                        def _(i):
                            add(slopes(item, slot, step, i, nearest), i)
                            plgpu.wgmma_wait(0)
                            release(i)

                        return dq[...], ahead()

                    nearest, ds = begun

                    def one_block(i, ds):
                        ds_next = slopes(
                            item, slot, step, i, nearest, beside=lambda: add(ds, i - 1)
                        )
                        plgpu.wgmma_wait(0)
                        release(i - 1)
                        return ds_next

                    ds = lax.fori_loop(first_block + 1, count, one_block, ds)
                    if gm.in_turns:
                        pass_blocks(step + count, step + item.count)
                    begun_next = ahead(lambda: add(ds, count - 1))
                    out = dq[...]
                    release(count - 1)
                    return out, begun_next

                dq, begun_next = with_sums(accumulate, (64, width))
                place, part, head = pl.ds(first_row(item) - first, 64), item.slot, item.head
                arrive(s.rec_empty, slot)
                times = gm.factor[0] * (0.5 * alpha)
                stage = s.q.at[row_slot, mine]  # nobody else reads these rows

                def chunks():
                    for c in range(0, width, 64):
                        yield pl.ds(c, 64), dq[:, c : c + 64] * times

                @pl.when(part < 0)
                def _():
                    for columns, chunk in chunks():
                        stage.at[:, columns][...] = chunk.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(stage, gm.dq.at[place, head])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when(part >= 0)
                def _():
                    for columns, chunk in chunks():
                        gm.dq_part.at[part, mine, columns][...] = chunk

                arrive(s.row_empty, row_slot)
                return begun_next

            draw_items(gm, s, one_item, begin)
            plgpu.wait_smem_to_gmem(0)

        @feeding(wg == 2)
        def _feed():
            tail_first = None if x.tails is None else gm.tail_first[0]

            tails = None if x.tails is None else gm.tails

            def queries(item, slot):
                place, row_slot = pl.ds(item.tile * TILE - first, TILE), lax.rem(slot, row_slots)
                wait(s.row_empty, row_slot)
                fill(s, "q", gm.q.at[place, item.head], row_slot, "row_full")
                fill(s, "do", gm.do.at[place, item.head], row_slot, "row_full")

            def keys_and_values(item, step, i):
                now_k, now_v = lax.rem(step + i, k_stages), lax.rem(step + i, v_stages)
                row = item.block(i) * BLOCK
                wait(s.k_empty, now_k)
                into, full = s.k.at[now_k], s.k_full.at[now_k]
                load_rows(gm.k, tails, row, BLOCK, item.head, tail_first, into, full, width)
                wait(s.v_empty, now_v)
                fill(s, "v", gm.v.at[pl.ds(row, BLOCK), item.head], now_v)

            feed_items(gm, s, keys_and_values, queries, ahead=AHEAD, which=1)

    (dq,) = launch(
        kernel,
        "hstu_backward_dq",
        plan,
        work_list(heads),
        x.tensors,
        x.factor,
        tails=x.tails,
        scratch=dict(
            q=swizzled((row_slots, TILE, width), dtype),
            do=swizzled((row_slots, TILE, width_v), dtype),
            k=swizzled((k_stages, BLOCK, width), dtype),
            v=swizzled((v_stages, BLOCK, width_v), dtype),
            **record_scratch(RECORDS),
            **ring("row", row_slots, filled=2),
            **ring("k", k_stages),
            **ring("v", v_stages),
        ),
        results={"dq": jax.ShapeDtypeStruct(x.q.shape, dtype)},
    )
    return dq
