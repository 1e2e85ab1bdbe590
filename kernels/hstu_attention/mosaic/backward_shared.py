"""What the feeding warpgroups of the backward kernels whose keys stay do: rows through a ring, and, of the one pass, keys and values."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.hstu_attention.mosaic.items import feed_items, load_rows
from kernels.hstu_attention.mosaic.schedule import BackwardConfig

RECORDS = 2  # of work items, in shared memory at a time
AHEAD = 2  # blocks before the end of an item at which the next one is drawn


def load_rows_and_gradients(
    q_gm, do_gm, tails_gm, tail_first, config: BackwardConfig, first: int, s
):
    """A function of (item, step, i) that loads block i of an item's rows and their gradients; arguments as those of `feed`."""
    block_q, width = config.block_q, q_gm.shape[2]

    def load_block(item, step, i):
        now = lax.rem(step + i, config.stages)
        row, full = item.block(i) * block_q, s["row_full"].at[now]
        plgpu.barrier_wait(s["row_empty"].at[now])
        load_rows(
            q_gm, tails_gm, row, block_q, item.head, tail_first, s["q"].at[now], full, first=first
        )
        load_rows(
            do_gm,
            tails_gm,
            row,
            block_q,
            item.head,
            tail_first,
            s["do"].at[now],
            full,
            2 * width,
            first,
        )

    return load_block


def feed(
    q_gm, k_gm, v_gm, do_gm, tails_gm, records_gm, tail_first, config: BackwardConfig, first: int, s
):
    """Keys and values of each item, and its row blocks through a ring; `tails_gm`: of q, k, do; `first`: row with which q and do begin."""
    tile, width = config.tile, q_gm.shape[2]
    load_block = load_rows_and_gradients(q_gm, do_gm, tails_gm, tail_first, config, first, s)

    def keys_and_values(item):
        plgpu.barrier_wait(s["kv_empty"])
        row = item.tile * tile
        plgpu.copy_gmem_to_smem(v_gm.at[pl.ds(row, tile), item.head], s["v"], s["kv_full"])
        load_rows(k_gm, tails_gm, row, tile, item.head, tail_first, s["k"], s["kv_full"], width)

    def rows_and_gradients(item, step, i):
        load_block(item, step, i)
        # The first rows do not wait for the last item's keys to leave.
        pl.when(i == jnp.minimum(item.count, 2) - 1)(lambda: keys_and_values(item))

    feed_items(
        records_gm,
        tails_gm,
        s,
        rows_and_gradients,
        lambda item, slot: None,
        ahead=AHEAD,
        workers=config.workers,
    )
