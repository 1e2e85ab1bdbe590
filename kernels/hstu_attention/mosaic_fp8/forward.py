"""The forward kernel with products in float8 (e4m3) on Hopper.

It is the forward of `mosaic` with operands of 8 bits. Sums, and what leaves, are as there. Tensor
cores transpose 16-bit operands only, so V comes transposed, made beforehand; and they want P's four
neighbouring keys in a thread that has two pairs of keys, eight apart: since a sum may take its keys
in any order, V's keys are permuted instead of P's.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels.hstu_attention.mosaic import schedule
from kernels.hstu_attention.mosaic.forward import AHEAD, RECORDS, TILE
from kernels.hstu_attention.mosaic.items import draw_items, feed_items, record_scratch
from kernels.hstu_attention.mosaic.launch import (
    ROW,
    arrive,
    fill,
    launch,
    loaded,
    open_rings,
    put,
    ring,
    swizzled,
    wait,
    with_sums,
)
from kernels.hstu_attention.mosaic.padding import row_scales
from kernels.hstu_attention.mosaic.schedule import WorkList, part_slots
from kernels.hstu_attention.mosaic.split_tiles import write_sums
from kernels.hstu_attention.plan import AttentionPlan
from kernels.typing import THK, THV

FP8 = jnp.float8_e4m3fn
# Of P: weights from 2 ** -8 to 112 keep three bits after the first; scores above 112 count as 112.
WEIGHT_SCALE = 4.0
BLOCK_K = 128  # keys a step, and bytes of a row of transposed V in shared memory
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number for each key

# Key that stands at each place of a group of 16: place 4 t + i is byte i of thread t's operand,
# made of the two pairs of neighbours that thread t has of the scores.
ORDER = np.array([2 * (place // 4) + place % 2 + 8 * (place % 4 // 2) for place in range(16)])


class Float8Operands(NamedTuple):
    """What the kernel reads. T is padded to whole tiles; padding is zero throughout.

    Attributes:
      q, k, v: e4m3. The keys of each group of 16 of v are in `ORDER`.
      q_scale, k_scale, v_scale: float32 factors of the operands.
    """

    q: THK
    k: THK
    v: Float[Array, "H V T"]
    q_scale: Float[Array, "H T"]
    k_scale: Float[Array, "H T"]
    v_scale: Float[Array, " H"]


def work_list(heads: int) -> WorkList:
    return WorkList.forward(heads, BLOCK_K, schedule.WORKERS)


def as_operand(weights):
    """e4m3 scores' registers as a left operand.

    Two neighbouring pairs of keys become four bytes in a row.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(
            weights.shape, weights.dtype, layout=plgpu.Layout.WGMMA_8BIT
        ),
    )
    def joined(_, x):
        registers = np.empty(mgpu.WGMMA_LAYOUT_8BIT.registers_shape(x.shape), dtype=object)
        for i in np.ndindex(registers.shape):
            pair = [x.registers[i[0], 2 * i[1] + j, *i[2:]] for j in range(2)]
            registers[i] = mgpu.utils.vector_concat(pair)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=None
        )

    return joined(weights)


def _tiled(shape):
    """Shared memory of 8-bit numbers for TMA and wgmma; rows of 64 or 128 bytes."""
    row = min(shape[-1], 128)
    return plgpu.SMEM(
        shape, FP8, transforms=(plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(row))
    )


def _stages(k_width: int, v_width: int) -> tuple[int, int]:
    """(depth of the rings of keys and values, slots of queries) that fit shared memory."""
    return (2, 1) if max(k_width, v_width) > 128 else (4, 2)


def forward(
    x: Float8Operands,
    plan: AttentionPlan,
    scale: Float[Array, "..."],
    alpha: float,
    dtype: DTypeLike,
) -> THV:
    """Output, of whole tiles. Warps and barriers are those of `mosaic.forward`."""
    rows, heads, width = x.q.shape
    width_v = x.v.shape[1]
    stages, q_slots = _stages(width, width_v)
    work, workers = plan.find(work_list(heads)), schedule.WORKERS
    scales = row_scales(scale, plan, rows)
    v_scale = x.v_scale / WEIGHT_SCALE

    def kernel(
        q_gm,
        k_gm,
        v_gm,
        q_scale_gm,
        k_scale_gm,
        v_scale_gm,
        bounds_gm,
        scale_gm,
        records_gm,
        counters_gm,
        o_gm,
        part_gm,
        s,
    ):
        wg = lax.axis_index("wg")

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            open_rings(s, q=q_slots, k=stages, v=stages, rec=RECORDS)
            my_o = s["o"].at[wg]

            def one_item(item, slot, step, begun, ahead):
                row0 = item.tile * TILE + wg * 64
                row_scale = plgpu.load(
                    q_scale_gm.at[item.head, pl.ds(row0, 64)], layout=ROW, optimized=False
                ) * (0.5 * alpha)
                nearest = item.bounds(bounds_gm, row0)

                def weights(scores, i):
                    """P of block i, from scores of 8-bit operands."""
                    scales = s["k_scale"].at[lax.rem(step + i, stages)]
                    key_scale = plgpu.load(scales, layout=COLUMN)
                    shape = (64, BLOCK_K)
                    half = scores * lax.broadcast_in_dim(row_scale, shape, [0])
                    half = half * lax.broadcast_in_dim(key_scale, shape, [1])
                    # silu(0) = 0
                    (half,) = item.masked(i, BLOCK_K, bounds_gm, row0, (half,), nearest)
                    half = half.astype(jnp.float16)  # two to a register and an instruction
                    scaled = half * WEIGHT_SCALE
                    return as_operand((scaled * jnp.tanh(half) + scaled).astype(FP8))

                q_slot = lax.rem(slot, q_slots)
                my_q = s["q"].at[q_slot, pl.ds(wg * 64, 64)]
                wait(s, "q_full", q_slot)

                def accumulate(acc):
                    first = lax.rem(step, stages)
                    wait(s, "k_full", first)

                    def first_scores(s_acc):
                        plgpu.wgmma(s_acc, my_q, s["k"].at[first].T)
                        return s_acc[...]

                    p = weights(
                        with_sums(first_scores, (64, BLOCK_K)),
                        jnp.int32(0),
                    )
                    arrive(s, "k_empty", first)

                    def one_block(i, p):
                        """Scores of block i, while the weights of block i - 1 meet their values."""
                        now, before = lax.rem(step + i, stages), lax.rem(step + i - 1, stages)
                        wait(s, "k_full", now)

                        def products(s_acc):
                            plgpu.wgmma(s_acc, my_q, s["k"].at[now].T)
                            wait(s, "v_full", before)
                            plgpu.wgmma(acc, p, s["v"].at[before].T)
                            return loaded(s_acc, 1)

                        p_next = weights(with_sums(products, (64, BLOCK_K)), i)
                        arrive(s, "k_empty", now)
                        plgpu.wgmma_wait(0)
                        arrive(s, "v_empty", before)
                        return p_next

                    count = item.count
                    p = lax.fori_loop(1, count, one_block, p)
                    arrive(s, "q_empty", q_slot)
                    last = lax.rem(step + count - 1, stages)
                    wait(s, "v_full", last)
                    plgpu.wgmma(acc, p, s["v"].at[last].T)
                    out = acc[...]
                    arrive(s, "v_empty", last)
                    return out

                out = with_sums(accumulate, (64, width_v))
                part, head = item.slot, item.head
                arrive(s, "rec_empty", slot)
                factor = (
                    plgpu.load(scale_gm.at[pl.ds(row0, 64)], layout=ROW, optimized=False)
                    * v_scale_gm[head]
                )
                factor = lax.broadcast_in_dim(factor, (64, 64), [0])
                for c in range(width_v // 64):
                    chunk = out[:, c * 64 : (c + 1) * 64] * factor

                    @pl.when(part < 0)
                    def _(chunk=chunk, c=c):
                        stage = my_o.at[c % 2]
                        put(stage, chunk, 1 if width_v > 64 else 0)
                        target = o_gm.at[pl.ds(row0, 64), head, pl.ds(c * 64, 64)]
                        plgpu.copy_smem_to_gmem(stage, target)

                    @pl.when(part >= 0)
                    def _(chunk=chunk, c=c):
                        part_gm.at[part, pl.ds(wg * 64, 64), pl.ds(c * 64, 64)][...] = chunk

                return ahead()

            draw_items(s, one_item)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _feed():
            plgpu.set_max_registers(24, action="decrease")

            def queries(item, slot):
                q_slot = lax.rem(slot, q_slots)
                wait(s, "q_empty", q_slot)
                q_rows = q_gm.at[pl.ds(item.tile * TILE, TILE), item.head]
                fill(s, "q", q_rows, q_slot)

            def keys_and_values(item, step, i):
                keys, head = pl.ds(item.block(i) * BLOCK_K, BLOCK_K), item.head
                now = lax.rem(step + i, stages)
                wait(s, "k_empty", now)
                fill(s, "k", k_gm.at[keys, head], now)
                fill(s, "k_scale", k_scale_gm.at[head, keys], now, "k_full")
                wait(s, "v_empty", now)
                fill(s, "v", v_gm.at[head, :, keys], now)

            load = (keys_and_values, queries)
            feed_items(records_gm, counters_gm, s, *load, ahead=AHEAD, workers=workers)

    slots = part_slots(plan, TILE, heads, workers)
    out, parts = launch(
        kernel,
        "hstu_forward_fp8",
        (x.q, x.k, x.v, x.q_scale, x.k_scale, v_scale, work.bounds, scales, work.records),
        jax.new_ref(jnp.zeros((1,), jnp.int32)),
        scratch=dict(
            q=_tiled((q_slots, TILE, width)),
            k=_tiled((stages, BLOCK_K, width)),
            v=_tiled((stages, width_v, BLOCK_K)),
            k_scale=plgpu.SMEM((stages, BLOCK_K), jnp.float32),
            o=swizzled((2, 2, 64, 64), dtype),
            **record_scratch(RECORDS),
            **ring("q", q_slots),
            **ring("k", stages, filled=2),
            **ring("v", stages),
        ),
        out_type=[
            jax.ShapeDtypeStruct((rows, heads, width_v), dtype),
            jax.ShapeDtypeStruct((slots, TILE, width_v), jnp.float32),
        ],
        workers=workers,
    )
    (out,) = write_sums(work.parts, [(parts, out)], heads)
    return out
