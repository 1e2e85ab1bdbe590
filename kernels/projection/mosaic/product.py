"""A matrix product on Hopper whose operands and results are parts of rows, in buffers of their own.

`concat(parts of x) @ w + bias + residual`, cut into parts again. Two warpgroups work on tiles of
128 x 128 in turn: while one multiplies, the other writes its last tile. A third one feeds both by
TMA, through one ring of buffers.
"""

import dataclasses
import types
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels.hstu_attention.mosaic.launch import (
    arrive,
    computing,
    feeding,
    fill,
    open_rings,
    put,
    ring,
    row_values,
    wait,
    with_sums,
)
from kernels.hstu_attention.mosaic.schedule import WORKERS

TILE = 128  # rows and columns of a tile
BYTES = 128  # of a row of an operand, in a step
STAGES = 5
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number for each column
CHUNK = 64  # columns that are written at a time


class Scales(NamedTuple):
    """Factors of the rows of x and of the columns of w, float32."""

    rows: Float[Array, " T"]
    columns: Float[Array, " Y"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows, and columns of each part of the operands and of the results."""

    rows: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def product(
    parts: tuple[Float[Array, "T _"], ...],
    w_YX: Float[Array, "Y X"],
    bias_Y: Float[Array, " Y"] | None,
    residual_TY: Float[Array, "T Y"] | None,
    scales: Scales | None,
    *,
    widths: tuple[int, ...],
    dtype: DTypeLike,
) -> list[Array]:
    """The parts of the product, of so many columns each, in `dtype`; sums are in float32.

    Args:
      parts, w_YX: bfloat16, float16 or e4m3. Widths of parts are multiples of 128 bytes, T and the
        widths of the results multiples of 128.
      residual_TY: in `dtype`; with one result alone.
    """
    sizes = Sizes(parts[0].shape[0], tuple(x.shape[1] for x in parts), widths)
    depth = BYTES // parts[0].dtype.itemsize
    steps = sum(sizes.inputs) // depth
    across = sum(widths) // TILE
    tiles = sizes.rows // TILE * across
    operands = {f"x{i}": x for i, x in enumerate(parts)} | {"w": w_YX}
    if bias_Y is not None:
        operands["bias"] = bias_Y.astype(jnp.float32)
    if residual_TY is not None:
        operands["residual"] = residual_TY
    if scales is not None:
        operands |= {"row_scale": scales.rows, "column_scale": scales.columns}
    outs = {
        f"o{i}": jax.ShapeDtypeStruct((sizes.rows, width), dtype) for i, width in enumerate(widths)
    }

    def kernel(wg, gm, s):
        worker = lax.axis_index("worker")
        count = (tiles - worker + WORKERS - 1) // WORKERS

        def place(turn):
            """First row, and number of the tile's columns."""
            tile = worker + turn * WORKERS
            return pl.multiple_of(tile // across * TILE, TILE), lax.rem(tile, across)

        @computing(wg < 2)
        def _compute():
            @pl.when(wg == 0)
            def _():
                open_rings(s, x=STAGES)

            def one_tile(i, carry):
                turn = 2 * i + wg
                row, column = place(turn)
                rows = pl.ds(row, TILE)
                if residual_TY is not None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for c in range(TILE // CHUNK):
                        columns = pl.ds(column * TILE + c * CHUNK, CHUNK)
                        source = gm.residual.at[rows, columns]
                        plgpu.copy_gmem_to_smem(source, s.o.at[wg, c], s.residual_full.at[wg])

                def sums(acc):
                    def one_step(k, carry):
                        slot = lax.rem(turn * steps + k, STAGES)
                        wait(s.x_full, slot)
                        plgpu.wgmma(acc, s.x.at[slot], s.w.at[slot].T)
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            arrive(s.x_empty, lax.rem(turn * steps + k - 1, STAGES))

                        return carry

                    lax.fori_loop(0, steps, one_step, 0)
                    plgpu.wgmma_wait(0)
                    arrive(s.x_empty, lax.rem(turn * steps + steps - 1, STAGES))
                    return acc[...]

                total = with_sums(sums, (TILE, TILE))
                if scales is not None:
                    factor = row_values(gm.row_scale, rows)
                if residual_TY is not None:
                    wait(s.residual_full, wg)
                for c in range(TILE // CHUNK):
                    chunk, shape = total[:, c * CHUNK : (c + 1) * CHUNK], (TILE, CHUNK)
                    columns = pl.ds(column * TILE + c * CHUNK, CHUNK)
                    if scales is not None:
                        chunk = chunk * lax.broadcast_in_dim(factor, shape, [0])
                        chunk = chunk * _of_columns(gm.column_scale, columns, shape)
                    if bias_Y is not None:
                        chunk = chunk + _of_columns(gm.bias, columns, shape)
                    stage = s.o.at[wg, c]
                    if residual_TY is not None:
                        before = plgpu.load(stage, layout=plgpu.Layout.WGMMA)
                        chunk = chunk + before.astype(jnp.float32)
                    put(stage, chunk, TILE // CHUNK - 1)
                    first = 0
                    for number, width in enumerate(widths):
                        within = column * TILE - first

                        @pl.when((within >= 0) & (within < width))
                        def _(number=number, within=within, c=c, stage=stage):
                            out = getattr(gm, f"o{number}")
                            where = pl.ds(within + c * CHUNK, CHUNK)
                            plgpu.copy_smem_to_gmem(stage, out.at[rows, where])

                        first += width
                return carry

            lax.fori_loop(0, (count - wg + 1) // 2, one_tile, 0)
            plgpu.wait_smem_to_gmem(0)

        @feeding(wg == 2)
        def _feed():
            def one_tile(turn, carry):
                row, column = place(turn)
                rows, columns = pl.ds(row, TILE), pl.ds(column * TILE, TILE)
                before = 0
                for number, width in enumerate(sizes.inputs):
                    source = getattr(gm, f"x{number}")

                    def one_step(k, carry, before=before, source=source):
                        slot = lax.rem(turn * steps + before + k, STAGES)
                        wait(s.x_empty, slot)
                        fill(s, "x", source.at[rows, pl.ds(k * depth, depth)], slot)
                        at = pl.ds((before + k) * depth, depth)
                        fill(s, "w", gm.w.at[columns, at], slot, "x_full")
                        return carry

                    lax.fori_loop(0, width // depth, one_step, 0)
                    before += width // depth
                return carry

            lax.fori_loop(0, count, one_tile, 0)

    scratch = dict(
        x=_tiled((STAGES, TILE, depth), parts[0].dtype),
        w=_tiled((STAGES, TILE, depth), parts[0].dtype),
        o=_tiled((2, TILE // CHUNK, TILE, CHUNK), dtype),
        **ring("x", STAGES, filled=2, emptied=1),
    )
    if residual_TY is not None:
        scratch["residual_full"] = plgpu.Barrier(num_arrivals=TILE // CHUNK, num_barriers=2)

    def entry(*refs):
        gm = types.SimpleNamespace(**dict(zip((*operands, *outs), refs, strict=True)))

        def body(**s):
            kernel(lax.axis_index("wg"), gm, types.SimpleNamespace(**s))

        pl.run_scoped(body, **scratch, collective_axes="wg")

    return plgpu.kernel(
        entry,
        out_type=list(outs.values()),
        grid=(WORKERS,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="wg",
        kernel_name="projection_product",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*operands.values())


def _of_columns(values, columns, shape):
    """One number for each column, for all rows."""
    loaded = plgpu.load(values.at[columns], layout=COLUMN, optimized=False)
    return lax.broadcast_in_dim(loaded, shape, [1])


def _tiled(shape, dtype):
    """Shared memory for TMA and wgmma: tiles of 8 rows of 128 bytes, swizzled."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    )
