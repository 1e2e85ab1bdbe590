"""The forward kernel with products in float8 (e4m3) on Hopper.

It is the forward of `mosaic` with operands of 8 bits. Sums, and what leaves, are as there. Tensor
cores transpose 16-bit operands only, so V comes transposed, made beforehand; and they want P's four
neighbouring keys in a thread that has two pairs of keys, eight apart: since a sum may take its keys
in any order, V's keys are permuted instead of P's.
"""

import itertools
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

from kernels.hstu_attention.mosaic.forward import AHEAD, RECORDS, TILE
from kernels.hstu_attention.mosaic.items import draw_items, feed_items, record_scratch
from kernels.hstu_attention.mosaic.launch import (
    arrive,
    computing,
    feeding,
    fill,
    launch,
    loaded,
    open_rings,
    ring,
    row_values,
    swizzled,
    wait,
    with_sums,
    write_chunks,
)
from kernels.hstu_attention.mosaic.schedule import WorkList
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
    return WorkList.forward(heads, BLOCK_K)


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

    def kernel(wg, gm, s):
        @computing(wg < 2)
        def _compute():
            open_rings(s, q=q_slots, k=stages, v=stages, rec=RECORDS)
            my_o = s.o.at[wg]

            def one_item(item, slot, step, begun, ahead):
                row0 = item.tile * TILE + wg * 64
                row_scale = row_values(gm.q_scale, item.head, pl.ds(row0, 64)) * (0.5 * alpha)
                nearest = item.bounds(row0)

                def weights(scores, i):
                    """P of block i, from scores of 8-bit operands."""
                    scales = s.k_scale.at[lax.rem(step + i, stages)]
                    key_scale = plgpu.load(scales, layout=COLUMN)
                    shape = (64, BLOCK_K)
                    half = scores * lax.broadcast_in_dim(row_scale, shape, [0])
                    half = half * lax.broadcast_in_dim(key_scale, shape, [1])
                    # silu(0) = 0
                    (half,) = item.masked(i, BLOCK_K, row0, (half,), nearest)
                    half = half.astype(jnp.float16)  # two to a register and an instruction
                    scaled = half * WEIGHT_SCALE
                    return as_operand((scaled * jnp.tanh(half) + scaled).astype(FP8))

                q_slot = lax.rem(slot, q_slots)
                my_q = s.q.at[q_slot, pl.ds(wg * 64, 64)]
                wait(s.q_full, q_slot)

                def accumulate(acc):
                    first = lax.rem(step, stages)
                    wait(s.k_full, first)

                    def first_scores(s_acc):
                        plgpu.wgmma(s_acc, my_q, s.k.at[first].T)
                        return s_acc[...]

                    p = weights(
                        with_sums(first_scores, (64, BLOCK_K)),
                        jnp.int32(0),
                    )
                    arrive(s.k_empty, first)

                    def one_block(i, p):
                        """Scores of block i, while the weights of block i - 1 meet their values."""
                        now, before = lax.rem(step + i, stages), lax.rem(step + i - 1, stages)
                        wait(s.k_full, now)

                        def products(s_acc):
                            plgpu.wgmma(s_acc, my_q, s.k.at[now].T)
                            wait(s.v_full, before)
                            plgpu.wgmma(acc, p, s.v.at[before].T)
                            return loaded(s_acc, 1)

                        p_next = weights(with_sums(products, (64, BLOCK_K)), i)
                        arrive(s.k_empty, now)
                        plgpu.wgmma_wait(0)
                        arrive(s.v_empty, before)
                        return p_next

                    count = item.count
                    p = lax.fori_loop(1, count, one_block, p)
                    arrive(s.q_empty, q_slot)
                    last = lax.rem(step + count - 1, stages)
                    wait(s.v_full, last)
                    plgpu.wgmma(acc, p, s.v.at[last].T)
                    out = acc[...]
                    arrive(s.v_empty, last)
                    return out

                out = with_sums(accumulate, (64, width_v))
                part, head = item.slot, item.head
                arrive(s.rec_empty, slot)
                factor = row_values(gm.factor, pl.ds(row0, 64)) * gm.v_scale[head]
                write_chunks(
                    out,
                    lax.broadcast_in_dim(factor, (64, 64), [0]),
                    part,
                    itertools.cycle([my_o.at[0], my_o.at[1]]),
                    1 if width_v > 64 else 0,
                    lambda columns: gm.o.at[pl.ds(row0, 64), head, columns],
                    lambda columns: gm.o_part.at[part, pl.ds(wg * 64, 64), columns],
                )
                return ahead()

            draw_items(gm, s, one_item)
            plgpu.wait_smem_to_gmem(0)

        @feeding(wg == 2)
        def _feed():

            def queries(item, slot):
                q_slot = lax.rem(slot, q_slots)
                wait(s.q_empty, q_slot)
                q_rows = gm.q.at[pl.ds(item.tile * TILE, TILE), item.head]
                fill(s, "q", q_rows, q_slot)

            def keys_and_values(item, step, i):
                keys, head = pl.ds(item.block(i) * BLOCK_K, BLOCK_K), item.head
                now = lax.rem(step + i, stages)
                wait(s.k_empty, now)
                fill(s, "k", gm.k.at[keys, head], now)
                fill(s, "k_scale", gm.k_scale.at[head, keys], now, "k_full")
                wait(s.v_empty, now)
                fill(s, "v", gm.v.at[head, :, keys], now)

            feed_items(gm, s, keys_and_values, queries, ahead=AHEAD)

    (out,) = launch(
        kernel,
        "hstu_forward_fp8",
        plan,
        work_list(heads),
        x._asdict() | {"v_scale": x.v_scale / WEIGHT_SCALE},
        plan.row_scales(scale, rows),
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
        results={"o": jax.ShapeDtypeStruct((rows, heads, width_v), dtype)},
    )
    return out
