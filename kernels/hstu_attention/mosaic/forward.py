"""The forward kernel on Hopper.

A thread block stays on its SM and draws work items until none is left. Two warpgroups compute 64
query rows each, a third feeds them by TMA. docs/attention_kernel.md explains warps, barriers and
buffers.
"""

import dataclasses
import itertools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.hstu_attention import tuning
from kernels.hstu_attention.mosaic.items import (
    WorkItem,
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
    loaded,
    open_rings,
    ring,
    row_values,
    swizzled,
    wait,
    with_sums,
    write_chunks,
)
from kernels.hstu_attention.mosaic.padding import TAIL, clean_tails
from kernels.hstu_attention.mosaic.schedule import WorkList, in_turns
from kernels.hstu_attention.plan import AttentionPlan, AttentionSpec
from kernels.typing import SHK, SHV, THK, THV

TILE = TAIL  # query rows of a work item: two warpgroups of 64
RECORDS = 4  # of work items, in shared memory at a time
# Blocks before the end of an item at which the next one is drawn: late, or the last ones are shared
# badly.
AHEAD = 4


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Sizes of the forward.

    Attributes:
      block_k: keys a step.
      stages: depth of the rings of keys and values.
      q_slots: with 2 the next tile's queries load early.
    """

    block_k: int
    stages: int
    q_slots: int = 2


def forward_config(spec: AttentionSpec, plan: AttentionPlan) -> ForwardConfig:
    """Sizes from the table of measurements where it has this call, else what fits shared memory."""
    widest = max(spec.k_width, spec.v_width)
    if widest > 128:
        config = ForwardConfig(block_k=64, stages=2, q_slots=1)
    elif in_turns(plan):
        config = ForwardConfig(block_k=64, stages=4)  # half a tile leaves out a whole block
    else:
        config = ForwardConfig(block_k=128, stages=2 if widest > 64 else 4)
    found = tuning.find("mosaic", spec, plan)
    return config if found is None else dataclasses.replace(config, **found["forward"])


def forward(
    q: THK,
    k: SHK,
    v: SHV,
    plan: AttentionPlan,
    scale: Float[Array, "..."],
    alpha: float,
    config: ForwardConfig,
) -> THV:
    """Output of padded buffers (lengths a multiple of 128)."""
    rows, heads, width = q.shape
    width_v = v.shape[-1]
    dtype, first = q.dtype, plan.first_row
    block_k, stages = config.block_k, config.stages
    scale_in_rows = scale.ndim == 1

    def kernel(wg, gm, s):
        @computing(wg < 2)
        def _compute():
            open_rings(s, q=config.q_slots, k=stages, v=stages, rec=RECORDS)
            my_o = s.o.at[wg]

            def queries(slot):
                return s.q.at[lax.rem(slot, config.q_slots), pl.ds(wg * 64, 64)]

            def weights(scores, item, i, nearest):
                half = scores * (0.5 * alpha)
                # silu(x) = h tanh(h) + h with h = x / 2: one special-function instruction
                p = half * jnp.tanh(half) + half
                (p,) = item.masked(i, block_k, first_row(item), (p,), nearest)
                return p.astype(dtype)

            def first_row(item):  # the record behind the last has tile -1
                return jnp.maximum(item.tile, 0) * TILE + wg * 64

            def one_item(slot, step, p, nearest):
                """From the weights `p` of the item's first block to those of the next item's."""
                item, count = WorkItem(gm, s, slot), WorkItem(gm, s, slot).count
                begin, end = item.span(wg, gm.in_turns)
                next_slot = lax.rem(slot + 1, RECORDS)
                after = WorkItem(gm, s, next_slot)

                def next_bounds():
                    wait(s.rec_full, next_slot)
                    return after.bounds(first_row(after))

                # Records that come in turns are there: their bounds are read meanwhile.
                read = next_bounds() if gm.in_turns else None

                def accumulate(acc):
                    def scores_beside_values(my_q, now, more, p, row_before, before=None):
                        """Scores of block `now` of the ring.

                        Meanwhile weights `p` meet the values of the block `before`, whose first key
                        is `row_before`.
                        """
                        if before is None:
                            before = lax.rem(now + stages - 1, stages)
                        pl.when(more)(lambda: wait(s.k_full, now))
                        if gm.in_turns:
                            wait(s.v_full, before)
                            clean_rows(s.v.at[before], row_before, gm.real[0])

                        def products(s_acc):
                            plgpu.wgmma(s_acc, my_q, s.k.at[now].T)
                            if not gm.in_turns:
                                wait(s.v_full, before)
                            plgpu.wgmma(acc, p, s.v.at[before])
                            return loaded(s_acc, 1)

                        scores = with_sums(products, (64, block_k))
                        pl.when(more)(lambda: arrive(s.k_empty, now))
                        return scores, before

                    def one_block(i, p):
                        scores, before = scores_beside_values(
                            queries(slot),
                            lax.rem(step + i, stages),
                            True,
                            p,
                            item.block(i - 1) * block_k if gm.in_turns else None,
                        )
                        p_next = weights(scores, item, i, nearest)
                        plgpu.wgmma_wait(0)
                        arrive(s.v_empty, before)
                        return p_next

                    last = lax.fori_loop(begin + 1, end, one_block, p)
                    arrive(s.q_empty, lax.rem(slot, config.q_slots))
                    # The next item begins while this one ends. Behind the last, what is computed
                    # goes nowhere.
                    if not gm.in_turns:
                        wait(s.rec_full, next_slot)
                    more = after.tile >= 0
                    pl.when(more)(lambda: wait(s.q_full, lax.rem(next_slot, config.q_slots)))
                    nearest_next = read if gm.in_turns else after.bounds(first_row(after))
                    first_next, now, before = jnp.int32(0), lax.rem(step + count, stages), None
                    row_before = None
                    if gm.in_turns:
                        row_before = item.block(end - 1) * block_k
                        first_next = jnp.where(more, after.span(wg, True)[0], 0)
                        pass_over(s, "k", stages, step + end, step + count + first_next)
                        now = lax.rem(step + count + first_next, stages)
                        before = lax.rem(step + end - 1, stages)
                    scores, before = scores_beside_values(
                        queries(next_slot), now, more, last, row_before, before
                    )
                    p_next = weights(scores, after, first_next, nearest_next)
                    out = acc[...]
                    arrive(s.v_empty, before)
                    if gm.in_turns:
                        pass_over(s, "v", stages, step + end, step + count + first_next)
                    return out, p_next, nearest_next

                out, p, nearest = with_sums(accumulate, (64, width_v))
                part, head, row0 = item.slot, item.head, first_row(item)
                arrive(s.rec_empty, slot)
                if scale_in_rows:
                    scale = row_values(gm.factor, pl.ds(row0 - first, 64))
                    scale = lax.broadcast_in_dim(scale, (64, 64), [0])
                else:
                    scale = gm.factor[0]
                write_chunks(
                    out,
                    scale,
                    part,
                    itertools.cycle([my_o.at[0], my_o.at[1]]),
                    1 if width_v > 64 else 0,
                    lambda columns: gm.o.at[pl.ds(row0 - first, 64), head, columns],
                    lambda columns: gm.o_part.at[part, pl.ds(wg * 64, 64), columns],
                )
                return next_slot, step + count, p, nearest

            item = WorkItem(gm, s, 0)
            wait(s.rec_full, 0)

            @pl.when(item.tile >= 0)
            def _all_items():
                nearest = item.bounds(first_row(item))
                wait(s.q_full, 0)
                zero = first = jnp.int32(0)
                if gm.in_turns:
                    first = item.span(wg, True)[0]  # at most 1, and no ring is shorter than 2
                    pass_over(s, "k", stages, 0, first)
                    pass_over(s, "v", stages, 0, first)
                wait(s.k_full, first)

                def first_scores(s_acc):
                    plgpu.wgmma(s_acc, queries(0), s.k.at[first].T)
                    return s_acc[...]

                scores = with_sums(first_scores, (64, block_k))
                arrive(s.k_empty, first)
                lax.while_loop(
                    lambda carry: WorkItem(gm, s, carry[0]).tile >= 0,
                    lambda carry: one_item(*carry),
                    (zero, zero, weights(scores, item, first, nearest), nearest),
                )
                plgpu.wait_smem_to_gmem(0)

        @feeding(wg == 2)
        def _feed():
            tails = None if gm.in_turns else gm.tails
            tail_first = None if gm.in_turns else gm.tail_first[0]

            def queries(item, slot):
                q_slot = lax.rem(slot, config.q_slots)
                wait(s.q_empty, q_slot)
                q_rows = gm.q.at[pl.ds(item.tile * TILE - first, TILE), item.head]
                fill(s, "q", q_rows, q_slot)

            def keys_and_values(item, step, i):
                row = item.block(i) * block_k
                now = lax.rem(step + i, stages)
                wait(s.k_empty, now)
                fill(s, "k", gm.k.at[pl.ds(row, block_k), item.head], now)
                wait(s.v_empty, now)
                into, full = s.v.at[now], s.v_full.at[now]
                load_rows(gm.v, tails, row, block_k, item.head, tail_first, into, full)

            feed_items(gm, s, keys_and_values, queries, ahead=AHEAD)

    (out,) = launch(
        kernel,
        "hstu_forward",
        plan,
        WorkList.forward(heads, block_k),
        dict(q=q, k=k, v=v),
        plan.row_scales(scale, rows) if scale_in_rows else scale.reshape(1),
        tails=None if in_turns(plan) else clean_tails(plan, v),
        scratch=dict(
            q=swizzled((config.q_slots, TILE, width), dtype),
            k=swizzled((stages, block_k, width), dtype),
            v=swizzled((stages, block_k, width_v), dtype),
            o=swizzled((2, 2, 64, 64), dtype),
            **record_scratch(RECORDS),
            **ring("q", config.q_slots),
            **ring("k", stages),
            **ring("v", stages),
        ),
        results={"o": jax.ShapeDtypeStruct((rows, heads, width_v), dtype)},
    )
    return out
