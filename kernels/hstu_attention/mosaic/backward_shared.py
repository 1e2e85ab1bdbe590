"""What the kernels of the backward share: their inputs, the slopes of silu, and what feeds them."""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.hstu_attention.mosaic.items import feed_items, record_scratch
from kernels.hstu_attention.mosaic.launch import fill, launch, load_rows, ring, swizzled, wait
from kernels.hstu_attention.mosaic.schedule import (
    BackwardConfig,
    Schedule,
    WorkList,
    part_slots,
)
from kernels.hstu_attention.mosaic.split_tiles import write_sums
from kernels.hstu_attention.plan import AttentionPlan
from kernels.typing import SHK, SHV, THK, THV

RECORDS = 2  # of work items, in shared memory at a time
AHEAD = 2  # blocks before the end of an item at which the next one is drawn


class BackwardInputs(NamedTuple):
    """What the kernels of the backward read.

    Attributes:
      q, k, v, do: padded buffers; their rows are whole tiles.
      tails: `clean_tails` of q, k and do.
      scale: of all outputs.
    """

    q: THK
    k: SHK
    v: SHV
    do: THV
    tails: jax.Ref
    plan: AttentionPlan
    scale: Float[Array, ""]
    alpha: float

    @property
    def factor(self) -> Float[Array, " 1"]:
        return self.scale.reshape(1)

    def find_work(self, config: BackwardConfig) -> Schedule:
        return self.plan.find(WorkList.backward(self.q.shape[1], config))


def silu_slopes(score, dp, alpha):
    """(half, w, dS) of a block: the weights P are half * w, and dS has twice silu's derivative."""
    half = score * (0.5 * alpha)
    t = jnp.tanh(half)
    w = t + 1.0
    return half, w, dp * (w * (half - half * t) + w)


def loaded_pair(s_acc, dp_acc, pending=0):
    """Scores once so many products are pending, and dP, which is then there, too."""
    score = plgpu.wgmma_accumulator_load(s_acc, wait_n=pending)
    return lax.optimization_barrier((score, plgpu.wgmma_accumulator_load(dp_acc, wait_n=None)))


def finished_dq(dq_ref: jax.Ref, x: BackwardInputs, factor: Float[Array, " 1"]) -> THK:
    """dQ as it leaves, of what was added up in float32."""
    return (dq_ref[...] * (0.5 * x.alpha * factor)[:, None, None]).astype(x.q.dtype)


def launch_over_keys(
    kernel,
    name: str,
    x: BackwardInputs,
    work: Schedule,
    factor: Float[Array, " 1"],
    config: BackwardConfig,
    *,
    buffers,
    barriers,
    dq: tuple[jax.Ref, ...] = (),
    key_slots: int = 0,
    records: int = RECORDS,
) -> list[Float[Array, "S H _"]]:
    """(dK, dV) of a kernel whose tiles of keys stay.

    Args:
      buffers, barriers: shared memory beside the operands' own, and barriers.
      dq: what dQ is added to.
      key_slots: tiles of keys and values in shared memory; 0 is one, without an axis for slots.
      records: of work items, in shared memory at a time.
    """
    heads, dtype, tile = x.q.shape[1], x.q.dtype, config.tile
    slots = part_slots(x.plan, tile, heads, config.workers)
    rows = (config.stages, config.block_q)
    keys = (key_slots, tile) if key_slots else (tile,)
    dk, dv, dk_parts, dv_parts = launch(
        kernel,
        name,
        (x.q, x.k, x.v, x.do, work.bounds, factor, work.records, work.tail, *dq),
        x.tails,
        scratch=dict(
            k=swizzled((*keys, x.k.shape[2]), dtype),
            v=swizzled((*keys, x.v.shape[2]), dtype),
            q=swizzled((*rows, x.q.shape[2]), dtype),
            do=swizzled((*rows, x.do.shape[2]), dtype),
            **buffers,
            **record_scratch(records),
            **ring("kv", key_slots or 1, filled=2),
            **ring("row", config.stages, filled=2),
            **barriers,
        ),
        out_type=[
            *(jax.ShapeDtypeStruct(y.shape, dtype) for y in (x.k, x.v)),
            *(jax.ShapeDtypeStruct((slots, tile, y.shape[2]), jnp.float32) for y in (x.k, x.v)),
        ],
        workers=config.workers,
    )
    return write_sums(work.parts, [(dk_parts, dk), (dv_parts, dv)], heads)


def load_rows_and_gradients(q_gm, do_gm, tails_gm, tail_first, config, first, s):
    """A function of (item, step, i) that loads rows of an item's block i, and their gradients.

    Arguments are those of `feed`.
    """
    block_q, width = config.block_q, q_gm.shape[2]

    def load_block(item, step, i):
        now = lax.rem(step + i, config.stages)
        row, full = item.block(i) * block_q, s["row_full"].at[now]
        wait(s, "row_empty", now)
        for gm, into, column in ((q_gm, s["q"], 0), (do_gm, s["do"], 2 * width)):
            load_rows(
                gm, tails_gm, row, block_q, item.head, tail_first, into.at[now], full, column, first
            )

    return load_block


def feed(q_gm, k_gm, v_gm, do_gm, tails_gm, records_gm, tail_first, config, first, s):
    """Loads keys and values of each item, and its row blocks through a ring.

    `tails_gm` has q, k and do; q and do begin with row `first`.
    """
    tile, width = config.tile, q_gm.shape[2]
    load_block = load_rows_and_gradients(q_gm, do_gm, tails_gm, tail_first, config, first, s)

    def keys_and_values(item):
        wait(s, "kv_empty")
        row = item.tile * tile
        fill(s, "v", v_gm.at[pl.ds(row, tile), item.head], full="kv_full")
        load_rows(k_gm, tails_gm, row, tile, item.head, tail_first, s["k"], s["kv_full"], width)

    def rows_and_gradients(item, step, i):
        load_block(item, step, i)
        # The first rows do not wait for the last item's keys to leave.
        pl.when(i == jnp.minimum(item.count, 2) - 1)(lambda: keys_and_values(item))

    def begin(item, slot):
        pass

    feed_items(
        records_gm, tails_gm, s, rows_and_gradients, begin, ahead=AHEAD, workers=config.workers
    )
