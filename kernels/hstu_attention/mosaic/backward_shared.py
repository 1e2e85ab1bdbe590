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
    WorkList,
)
from kernels.hstu_attention.plan import AttentionPlan
from kernels.typing import SHK, SHV, THK, THV

RECORDS = 2  # of work items, in shared memory at a time
AHEAD = 2  # blocks before the end of an item at which the next one is drawn


class BackwardInputs(NamedTuple):
    """What the kernels of the backward read.

    Attributes:
      q, k, v, do: padded buffers; their rows are whole tiles.
      tails: `clean_tails` of q, k and do; None for kernels that clean what they have loaded.
      factor: on all outputs.
    """

    q: THK
    k: SHK
    v: SHV
    do: THV
    tails: jax.Ref | None
    plan: AttentionPlan
    factor: Float[Array, " 1"]
    alpha: float

    @property
    def tensors(self) -> dict[str, Float[Array, "_ H _"]]:
        return dict(q=self.q, k=self.k, v=self.v, do=self.do)


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


def finished_dq(dq_ref: jax.Ref, x: BackwardInputs) -> THK:
    """dQ as it leaves, of what was added up in float32."""
    return (dq_ref[...] * (0.5 * x.alpha * x.factor)[:, None, None]).astype(x.q.dtype)


def launch_over_keys(
    kernel,
    name: str,
    x: BackwardInputs,
    config: BackwardConfig,
    *,
    buffers,
    barriers,
    dq: jax.Ref | None = None,
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
    dtype, tile = x.q.dtype, config.tile
    rows = (config.stages, config.block_q)
    keys = (key_slots, tile) if key_slots else (tile,)
    return launch(
        kernel,
        name,
        x.plan,
        WorkList.backward(x.q.shape[1], config),
        x.tensors,
        x.factor,
        dq=dq,
        tails=x.tails,
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
        results={
            "dk": jax.ShapeDtypeStruct(x.k.shape, dtype),
            "dv": jax.ShapeDtypeStruct(x.v.shape, dtype),
        },
    )


def load_rows_and_gradients(gm, s, config, first):
    """A function of (item, step, i) that loads rows of an item's block i, and their gradients.

    q and do begin with row `first`; `gm.tails` has q, k and do.
    """
    block_q, width = config.block_q, gm.q.shape[2]
    tails = getattr(gm, "tails", None)
    tail_first = None if tails is None else gm.tail_first[0]

    def load_block(item, step, i):
        now = lax.rem(step + i, config.stages)
        row, full = item.block(i) * block_q, s.row_full.at[now]
        wait(s.row_empty, now)
        for rows, into, column in ((gm.q, s.q, 0), (gm.do, s.do, 2 * width)):
            place = (row, block_q, item.head, tail_first, into.at[now], full, column, first)
            load_rows(rows, tails, *place)

    return load_block


def feed(gm, s, config, first):
    """Loads keys and values of each item, and its row blocks through a ring.

    Arguments are those of `load_rows_and_gradients`.
    """
    tile, width, tail_first = config.tile, gm.q.shape[2], gm.tail_first[0]
    load_block = load_rows_and_gradients(gm, s, config, first)

    def keys_and_values(item):
        wait(s.kv_empty)
        row = item.tile * tile
        fill(s, "v", gm.v.at[pl.ds(row, tile), item.head], full="kv_full")
        load_rows(gm.k, gm.tails, row, tile, item.head, tail_first, s.k, s.kv_full, width)

    def rows_and_gradients(item, step, i):
        load_block(item, step, i)
        # The first rows do not wait for the last item's keys to leave.
        pl.when(i == jnp.minimum(item.count, 2) - 1)(lambda: keys_and_values(item))

    feed_items(gm, s, rows_and_gradients, lambda item, slot: None, ahead=AHEAD)
