"""The backward of widths above 128 in one pass, and dK and dV alone there.

Accumulators of dK and dV for 128 keys and 256 columns do not fit the registers. So a tile has 64
keys, and the two computing warpgroups share the work by gradient: one makes the weights P, which
stay in its registers, and the slopes dS, and sums dV; the other sums dK, and makes dQ of each row
block and adds it to memory. Five products a pair, none of them twice.

Each tile adds to dQ, so twice as much is added for a product as with tiles of 128 keys: that bounds
this kernel. Adding pairs from registers instead of tiles by TMA is half as fast.
"""

import functools

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
    ring,
    swizzled,
    wait,
    with_sums,
)
from kernels.hstu_attention.mosaic.schedule import BackwardConfig
from kernels.zeros import zeros_after

COLUMNS = 128  # of dQ that are made at a time
SENT = 32  # of them added to memory at a time
SENT_SLOTS = 3  # such pieces in shared memory: what bounds this kernel is how fast memory adds


def all_gradients(x: BackwardInputs, config: BackwardConfig) -> tuple[Float[Array, "_ H _"], ...]:
    """(dQ, dK, dV)."""
    dq = jax.new_ref(zeros_after(x.do, x.q.shape))
    dk, dv = _gradients(x, config, dq, with_dq=True)
    return finished_dq(dq, x), dk, dv


def key_gradients(x: BackwardInputs, config: BackwardConfig) -> list[Float[Array, "S H _"]]:
    """(dK, dV) alone, the first pass of the two-pass backward."""
    return _gradients(x, config, jax.new_ref(zeros_after(x.do, (1, 1, 1))), with_dq=False)


def _gradients(
    x: BackwardInputs, config: BackwardConfig, dq: jax.Ref, *, with_dq: bool
) -> list[Float[Array, "S H _"]]:
    width, dtype, alpha = x.q.shape[2], x.q.dtype, x.alpha
    width_v = x.v.shape[2]
    tile, block_q, stages = config.tile, config.block_q, config.stages
    intervals = 1 if x.plan.rows_in_one_piece else 3

    def kernel(wg, gm, s):
        def write(item, slot, gradient, times, out_gm, part_gm):
            """An item's gradient, from the registers to memory."""
            part, head, keys = item.slot, item.head, pl.ds(item.tile * tile, tile)
            arrive(s.rec_empty, slot)
            for c in range(0, gradient.shape[1], 64):
                chunk, columns = gradient[:, c : c + 64] * times, pl.ds(c, 64)

                @pl.when(part < 0)
                def _(chunk=chunk, columns=columns):
                    out_gm.at[keys, head, columns][...] = chunk.astype(dtype)

                @pl.when(part >= 0)
                def _(chunk=chunk, columns=columns):
                    part_gm.at[part, :, columns][...] = chunk

        @computing(wg == 0)
        def _weigh():
            open_rings(s, kv=1, row=stages, rec=RECORDS)

            def one_item(item, slot, step, begun, ahead):
                key0 = item.tile * tile
                nearest = item.bounds(key0)
                wait(s.kv_full)

                def accumulate(dv):
                    @pl.loop(0, item.count)
                    def _(i):
                        now = lax.rem(step + i, stages)
                        wait(s.row_full, now)

                        # Computed anew in every step: kept from step to step it would take
                        # registers there are not.
                        keys = pl.ds(
                            pl.multiple_of(lax.optimization_barrier(jnp.int32(0)), tile), tile
                        )

                        def scores(s_acc, dp_acc):
                            plgpu.wgmma(s_acc, s.k.at[keys], s.q.at[now].T)
                            plgpu.wgmma(dp_acc, s.v.at[keys], s.do.at[now].T)
                            plgpu.wgmma_wait(2)  # dV of the block before has read its rows

                            @pl.when(i > 0)
                            def _():
                                arrive(s.row_empty, lax.rem(step + i + stages - 1, stages))

                            return loaded_pair(s_acc, dp_acc)

                        score, dp = item.masked(
                            i,
                            block_q,
                            key0,
                            with_sums(scores, (tile, block_q), (tile, block_q)),
                            nearest,
                            intervals=intervals,
                        )
                        half, w, ds = silu_slopes(score, dp, alpha)
                        wait(s.ds_empty)
                        s.ds[...] = ds.astype(dtype)
                        plgpu.commit_smem()
                        arrive(s.ds_full)
                        plgpu.wgmma(dv, (half * w).astype(dtype), s.do.at[now])

                    plgpu.wgmma_wait(0)
                    arrive(s.row_empty, lax.rem(step + item.count - 1, stages))
                    return dv[...]

                dv = with_sums(accumulate, (tile, width_v))
                arrive(s.kv_empty)
                write(item, slot, dv, gm.factor[0], gm.dv, gm.dv_part)
                return ahead()

            draw_items(gm, s, one_item)

        @computing(wg == 1)
        def _sum():
            open_rings(s, kv=1, row=stages, ds=1, rec=RECORDS)

            def one_item(item, slot, step, begun, ahead):
                wait(s.kv_full)

                def accumulate(dk):
                    @pl.loop(0, item.count)
                    def _(i):
                        now = lax.rem(step + i, stages)
                        wait(s.row_full, now)
                        wait(s.ds_full)

                        def release():
                            arrive(s.ds_empty)
                            arrive(s.row_empty, now)

                        if not with_dq:
                            plgpu.wgmma(dk, s.ds, s.q.at[now])
                            plgpu.wgmma_wait(0)
                            release()
                            return

                        def dq_of(first, dq_acc):
                            """dQ in some columns; dK is summed while the first of them leave."""
                            plgpu.wgmma(dq_acc, s.ds.T, s.k.at[:, pl.ds(first, COLUMNS)])
                            if first == 0:
                                plgpu.wgmma(dk, s.ds, s.q.at[now])
                            return loaded(dq_acc, 1 if first == 0 else 0)

                        place = pl.ds(item.block(i) * block_q - x.plan.first_row, block_q)
                        for first in range(0, width, COLUMNS):
                            dq = with_sums(functools.partial(dq_of, first), (block_q, COLUMNS))
                            if first > 0 and first + COLUMNS == width:
                                release()
                            sent = (step + i) * (width // SENT) + first // SENT
                            for c in range(0, COLUMNS, SENT):
                                stage = s.dq.at[lax.rem(sent + c // SENT, SENT_SLOTS)]
                                plgpu.wait_smem_to_gmem(SENT_SLOTS - 1, wait_read_only=True)
                                stage[...] = dq[:, c : c + SENT]
                                plgpu.commit_smem()
                                target = gm.dq.at[place, item.head, pl.ds(first + c, SENT)]
                                plgpu.copy_smem_to_gmem(stage, target, reduction_op="add")
                        if width == COLUMNS:
                            plgpu.wgmma_wait(0)
                            release()

                    return dk[...]

                dk = with_sums(accumulate, (tile, width))
                arrive(s.kv_empty)
                write(item, slot, dk, gm.factor[0] * (0.5 * alpha), gm.dk, gm.dk_part)
                return ahead()

            draw_items(gm, s, one_item)
            plgpu.wait_smem_to_gmem(0)

        @feeding(wg == 2)
        def _feed():
            feed(gm, s, config, x.plan.first_row)

    sent = {"dq": swizzled((SENT_SLOTS, block_q, SENT), jnp.float32)} if with_dq else {}
    return launch_over_keys(
        kernel,
        "hstu_backward_wide",
        x,
        config,
        dq=dq,
        buffers=dict(ds=swizzled((tile, block_q), dtype), **sent),
        barriers=ring("ds", 1, emptied=1),
    )
