"""What the feeding warpgroup of the one-pass backward does, for all widths."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.hstu_attention.mosaic_device import feed_items, load_rows
from kernels.hstu_attention.mosaic_schedule import BackwardConfig

RECORDS = 2  # of work items, in shared memory at a time
AHEAD = 2  # blocks before the end of an item at which the next one is drawn


def feed(q_gm, k_gm, v_gm, do_gm, tails_gm, records_gm, tail_first, config: BackwardConfig, first: int, s):
    """Keys and values of each item, and its row blocks through a ring; `tails_gm`: of q, k, do; `first`: row with which q and do begin."""
    tile, block_q, stages, width = config.tile, config.block_q, config.stages, q_gm.shape[2]

    def keys_and_values(item):
        plgpu.barrier_wait(s["kv_empty"])
        row = item.tile * tile
        plgpu.copy_gmem_to_smem(v_gm.at[pl.ds(row, tile), item.head], s["v"], s["kv_full"])
        load_rows(k_gm, tails_gm, row, tile, item.head, tail_first, s["k"], s["kv_full"], width)

    def rows_and_gradients(item, step, i):
        now = lax.rem(step + i, stages)
        row, full = item.block(i) * block_q, s["row_full"].at[now]
        plgpu.barrier_wait(s["row_empty"].at[now])
        load_rows(q_gm, tails_gm, row, block_q, item.head, tail_first, s["q"].at[now], full, first=first)
        load_rows(do_gm, tails_gm, row, block_q, item.head, tail_first, s["do"].at[now], full, 2 * width, first)
        # The first rows do not wait for the last item's keys to leave.
        pl.when(i == jnp.minimum(item.count, 2) - 1)(lambda: keys_and_values(item))

    feed_items(records_gm, tails_gm, s, rows_and_gradients, lambda item, slot: None, ahead=AHEAD, workers=config.workers)
