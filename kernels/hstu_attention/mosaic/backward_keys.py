"""dK and dV alone, for widths up to 128: the first pass of the two-pass backward.

A tile of keys stays, and blocks of rows stream past it.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.hstu_attention.mosaic.backward_shared import (
    AHEAD,
    BackwardInputs,
    launch_over_keys,
    load_rows_and_gradients,
    loaded_pair,
    silu_slopes,
)
from kernels.hstu_attention.mosaic.items import draw_items, feed_items, pass_over
from kernels.hstu_attention.mosaic.launch import (
    arrive,
    clean_rows,
    computing,
    feeding,
    fill,
    open_rings,
    wait,
    with_sums,
)
from kernels.hstu_attention.mosaic.schedule import BackwardConfig

RECORDS = 4  # of work items, in shared memory at a time
KEY_SLOTS = 2  # tiles of keys and values in shared memory: the next ones load early


def key_gradients(x: BackwardInputs, config: BackwardConfig) -> list[Float[Array, "S H _"]]:
    """(dK, dV)."""
    width, dtype, alpha = x.q.shape[2], x.q.dtype, x.alpha
    width_v = x.v.shape[2]
    tile, block_q, stages = config.tile, config.block_q, config.stages
    intervals = 1 if x.plan.rows_in_one_piece else None

    def kernel(wg, gm, s):
        @computing(wg < 2)
        def _compute():
            open_rings(s, kv=KEY_SLOTS, row=stages, rec=RECORDS)
            mine = pl.ds(wg * 64, 64)  # keys of the tile

            def first_key(item):  # behind the last item the tile is -1
                return jnp.maximum(item.tile, 0) * tile + wg * 64

            def one_item(item, slot, step, nearest, ahead):
                key_slot = lax.rem(slot, KEY_SLOTS)
                begin, end = item.span(wg, gm.in_turns)
                if gm.in_turns:
                    pass_over(s, "row", stages, step, step + begin)
                wait(s.kv_full, key_slot)

                def accumulate(dk, dv):
                    @pl.loop(begin, end)
                    def _(i):
                        now = lax.rem(step + i, stages)
                        wait(s.row_full, now)
                        if x.tails is None:
                            row = item.block(i) * block_q
                            clean_rows(s.q.at[now], row, gm.real[0])
                            clean_rows(s.do.at[now], row, gm.real[0])
                        # Computed anew in every step: kept from step to step it would take
                        # registers there are not.
                        keys = pl.ds(
                            pl.multiple_of(mine.start + lax.optimization_barrier(jnp.int32(0)), 64),
                            64,
                        )
                        my_k, my_v = s.k.at[key_slot, keys], s.v.at[key_slot, keys]

                        def scores(s_acc):
                            plgpu.wgmma(s_acc, my_k, s.q.at[now].T)
                            # dV and dK of the last block: their operands leave the registers that
                            # dP needs
                            plgpu.wgmma_wait(1)

                            @pl.when(i > begin)
                            def _():
                                arrive(s.row_empty, lax.rem(step + i + stages - 1, stages))

                            def slopes(dp_acc):
                                plgpu.wgmma(dp_acc, my_v, s.do.at[now].T)
                                return loaded_pair(s_acc, dp_acc)

                            return with_sums(slopes, (64, block_q))

                        pair = with_sums(scores, (64, block_q))
                        score, dp = item.masked(
                            i,
                            block_q,
                            first_key(item),
                            pair,
                            nearest,
                            intervals=intervals,
                        )
                        half, w, ds = silu_slopes(score, dp, alpha)
                        plgpu.wgmma(dv, (half * w).astype(dtype), s.do.at[now])
                        plgpu.wgmma(dk, ds.astype(dtype), s.q.at[now])

                    plgpu.wgmma_wait(0)
                    arrive(s.row_empty, lax.rem(step + end - 1, stages))
                    return dk[...], dv[...]

                dk, dv = with_sums(accumulate, (64, width), (64, width_v))
                if gm.in_turns:
                    pass_over(s, "row", stages, step + end, step + item.count)
                keys, head, part = pl.ds(first_key(item), 64), item.head, item.slot
                nearest_next = ahead()
                arrive(s.rec_empty, slot)
                outputs = (
                    (dv, gm.factor[0], s.v, gm.dv, gm.dv_part),
                    (dk, gm.factor[0] * (0.5 * alpha), s.k, gm.dk, gm.dk_part),
                )
                for grad, times, buffer, out_gm, part_gm in outputs:
                    stage = buffer.at[key_slot, mine]

                    @pl.when(part < 0)
                    def _(grad=grad, times=times, stage=stage, out_gm=out_gm):
                        stage[...] = (grad * times).astype(dtype)  # nobody else reads these keys
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(stage, out_gm.at[keys, head])

                    @pl.when(part >= 0)
                    def _(grad=grad, times=times, part_gm=part_gm):
                        part_gm.at[part, mine][...] = grad * times

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                arrive(s.kv_empty, key_slot)
                return nearest_next

            draw_items(
                gm,
                s,
                one_item,
                lambda item, slot, step: item.bounds(first_key(item)),
            )
            plgpu.wait_smem_to_gmem(0)

        @feeding(wg == 2)
        def _feed():
            rows_and_gradients = load_rows_and_gradients(gm, s, config, x.plan.first_row)

            def keys_and_values(item, slot):
                key_slot, keys = lax.rem(slot, KEY_SLOTS), pl.ds(item.tile * tile, tile)
                wait(s.kv_empty, key_slot)
                fill(s, "k", gm.k.at[keys, item.head], key_slot, "kv_full")
                fill(s, "v", gm.v.at[keys, item.head], key_slot, "kv_full")

            feed_items(gm, s, rows_and_gradients, keys_and_values, ahead=AHEAD)

    return launch_over_keys(
        kernel,
        "hstu_backward_dkv",
        x,
        config,
        key_slots=KEY_SLOTS,
        records=RECORDS,
        buffers={},
        barriers={},
    )
