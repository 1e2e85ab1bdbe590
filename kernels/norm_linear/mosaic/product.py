"""Matrix products on Hopper whose operands and results are parts of rows, in buffers of their own.

`concat(parts of x) @ w.T + bias + residual`, cut into parts again; operands of 8 bits have a factor
for each row of x and one for each column of the result. A third warpgroup feeds two others by TMA.

`held`, for few columns of x: a thread block keeps 256 rows of w in shared memory and rows of x pass
by. Its two warpgroups work on 64 rows each in turn, so that one multiplies while the other writes.
`streamed`, for many: both read all of w again for every 128 rows of x, and work on them together.
"""

import dataclasses
import functools
import types
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels import device
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

ROWS, COLUMNS = 64, 256  # of a warpgroup's accumulator
BYTES = 128  # of a row of an operand, in a step
HELD_BYTES = 512  # of a row of w, at most, where w is held
STAGES = 4  # slots of a ring of operands
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number for each column
CHUNK, CHUNKS = 64, COLUMNS // 64  # columns that are written at a time; so often for a tile
OUTS = 2  # chunks that may be on their way to memory


class Scales(NamedTuple):
    """Factors of the rows of x and of the rows of w, float32."""

    rows: Float[Array, " T"]
    columns: Float[Array, " Y"]


@dataclasses.dataclass(frozen=True)
class Call:
    """What of a product is static.

    Attributes:
      rows, depth: T; columns of x of a step.
      inputs, outputs: columns of each part of x, and of each result.
    """

    rows: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    depth: int
    biased: bool
    residual: bool
    scaled: bool
    dtype: DTypeLike  # of the results
    operands: DTypeLike

    @property
    def steps(self) -> int:
        return sum(self.inputs) // self.depth

    @property
    def vectors(self) -> tuple[str, ...]:
        """What has one number a column: its names in memory."""
        return ("column_scale",) * self.scaled + ("bias",) * self.biased

    @property
    def held(self) -> bool:
        return self.steps * BYTES <= HELD_BYTES and len(self.inputs) == 1 and not self.residual


def refusal(dtype: DTypeLike, rows: int, widths: tuple[int, ...]) -> str | None:
    """Why no product of such rows can run here, or None.

    Args:
      dtype: of the results.
      widths: of x and of the results, whose gradient is a product, too.
    """
    current = device.current()
    if not current.is_hopper:
        return f"mosaic needs a Hopper GPU (H100, H200), the device is {current.kind!r}; use 'xla'"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"mosaic takes bfloat16 or float16, got {jnp.dtype(dtype).name}; use 'xla'"
    if rows == 0 or rows % (2 * ROWS) or any(width % COLUMNS for width in widths):
        return (
            f"mosaic takes rows in multiples of {2 * ROWS} and widths of {COLUMNS}, "
            f"got {rows} rows of {widths}; use 'xla'"
        )
    return None


@functools.partial(jax.jit, static_argnames=("widths", "dtype"))  # lowered once, not once a layer
def product(
    parts: tuple[Float[Array, "T _"], ...],
    w_YX: Float[Array, "Y X"],
    bias_Y: Float[Array, " Y"] | None = None,
    residual_TY: Float[Array, "T Y"] | None = None,
    scales: Scales | None = None,
    *,
    widths: tuple[int, ...],
    dtype: DTypeLike,
) -> list[Array]:
    """The parts of the product, of so many columns each, in `dtype`; sums are in float32.

    Args:
      parts, w_YX: of one dtype, 16 bits or e4m3. T and the widths of parts are multiples of 128,
        those of results multiples of 256.
      residual_TY: in `dtype`, beside one result alone.
    """
    depth = BYTES // parts[0].dtype.itemsize
    call = Call(
        parts[0].shape[0],
        tuple(x.shape[1] for x in parts),
        widths,
        depth,
        bias_Y is not None,
        residual_TY is not None,
        scales is not None,
        dtype,
        parts[0].dtype,
    )
    operands = {f"x{i}": x for i, x in enumerate(parts)} | {"w": w_YX}
    if bias_Y is not None:
        operands["bias"] = bias_Y.astype(jnp.float32)
    if residual_TY is not None:
        operands["residual"] = residual_TY
    if scales is not None:
        operands |= {"row_scale": scales.rows, "column_scale": scales.columns}
    outs = {
        f"o{i}": jax.ShapeDtypeStruct((call.rows, width), dtype) for i, width in enumerate(widths)
    }
    kernel, scratch = (_held if call.held else _streamed)(call)

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
        kernel_name="linear_held" if call.held else "linear_streamed",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*operands.values())


def _held(call):
    """Kernel and shared memory of a product whose w stays."""
    slices = sum(call.outputs) // COLUMNS
    sharing = WORKERS // slices  # thread blocks of a slice of w
    tiles, steps = call.rows // ROWS, call.steps

    def kernel(wg, gm, s):
        worker = lax.axis_index("worker")
        number, column = worker // slices, lax.rem(worker, slices) * COLUMNS
        count = jnp.where(number < sharing, (tiles - number + sharing - 1) // sharing, 0)

        def rows_of(turn):
            return pl.ds(pl.multiple_of((number + turn * sharing) * ROWS, ROWS), ROWS)

        @computing(wg < 2)
        def _compute():
            mine = wg * STAGES  # this warpgroup's ring
            for slot in range(STAGES):
                arrive(s.x_empty, mine + slot)
            wait(s.w_full)

            def one_tile(i, carry):
                rows = rows_of(2 * i + wg)
                factor = row_values(gm.row_scale, rows) if call.scaled else None

                def sums(acc):
                    slots = [mine + lax.rem(i * steps + k, STAGES) for k in range(steps)]
                    for k, slot in enumerate(slots):
                        wait(s.x_full, slot)
                        plgpu.wgmma(acc, s.x.at[slot], s.w.at[k].T)
                        if k > 0:
                            plgpu.wgmma_wait(1)
                            arrive(s.x_empty, slots[k - 1])
                    plgpu.wgmma_wait(0)
                    arrive(s.x_empty, slots[-1])
                    return acc[...]

                total = with_sums(sums, (ROWS, COLUMNS))
                _write(call, gm, s, wg, total, rows, column, 0, factor)
                return carry

            lax.fori_loop(0, (count - wg + 1) // 2, one_tile, 0)
            plgpu.wait_smem_to_gmem(0)

        @feeding(wg == 2)
        def _feed():
            for k in range(steps):
                w_rows = pl.ds(pl.multiple_of(column, COLUMNS), COLUMNS)
                source = gm.w.at[w_rows, pl.ds(k * call.depth, call.depth)]
                plgpu.copy_gmem_to_smem(source, s.w.at[k], s.w_full)
            _fill_vectors(call, gm, s, column, 0, s.w_full)

            def one_tile(turn, carry):
                whose, i = lax.rem(turn, 2) * STAGES, turn // 2
                for k in range(steps):
                    slot = whose + lax.rem(i * steps + k, STAGES)
                    wait(s.x_empty, slot)
                    source = gm.x0.at[rows_of(turn), pl.ds(k * call.depth, call.depth)]
                    fill(s, "x", source, slot)
                return carry

            lax.fori_loop(0, count, one_tile, 0)

    return kernel, dict(
        x=_tiled((2 * STAGES, ROWS, call.depth), call.operands),
        w=_tiled((steps, COLUMNS, call.depth), call.operands),
        o=_tiled((2, OUTS, ROWS, CHUNK), call.dtype),
        w_full=plgpu.Barrier(num_arrivals=steps + len(call.vectors)),
        **ring("x", 2 * STAGES, filled=1, emptied=1),
        **{name: plgpu.SMEM((1, COLUMNS), jnp.float32) for name in call.vectors},
    )


def _streamed(call):
    """Kernel and shared memory of a product that reads w again for every tile of rows."""
    across, steps = sum(call.outputs) // COLUMNS, call.steps
    tiles = call.rows // (2 * ROWS) * across
    ahead = 2 if len(call.vectors) < 2 else 1  # slots of vectors, as shared memory allows

    def kernel(wg, gm, s):
        worker = lax.axis_index("worker")
        count = (tiles - worker + WORKERS - 1) // WORKERS

        def place(turn):
            """First row and column."""
            tile = worker + turn * WORKERS
            return tile // across * (2 * ROWS), lax.rem(tile, across) * COLUMNS

        @computing(wg < 2)
        def _compute():
            open_rings(s, x=STAGES)
            if call.vectors:
                open_rings(s, vector=ahead)

            def one_tile(turn, carry):
                row, column = place(turn)
                rows = pl.ds(pl.multiple_of(row + wg * ROWS, ROWS), ROWS)
                factor = row_values(gm.row_scale, rows) if call.scaled else None
                if call.residual:
                    _fetch_residual(gm, s, wg, rows, column, 0)

                def sums(acc):
                    def one_step(k, carry):
                        now = turn * steps + k
                        slot = lax.rem(now, STAGES)
                        wait(s.x_full, slot)
                        plgpu.wgmma(acc, s.x.at[slot, pl.ds(wg * ROWS, ROWS)], s.w.at[slot].T)
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            arrive(s.x_empty, lax.rem(now - 1, STAGES))

                        return carry

                    lax.fori_loop(0, steps, one_step, 0)
                    plgpu.wgmma_wait(0)
                    arrive(s.x_empty, lax.rem(turn * steps + steps - 1, STAGES))
                    return acc[...]

                total = with_sums(sums, (ROWS, COLUMNS))
                slot = lax.rem(turn, ahead)
                if call.vectors:
                    wait(s.vector_full, slot)
                _write(call, gm, s, wg, total, rows, column, slot, factor)
                if call.vectors:
                    arrive(s.vector_empty, slot)
                return carry

            lax.fori_loop(0, count, one_tile, 0)
            plgpu.wait_smem_to_gmem(0)

        @feeding(wg == 2)
        def _feed():
            def one_tile(turn, carry):
                row, column = place(turn)
                rows = pl.ds(pl.multiple_of(row, 2 * ROWS), 2 * ROWS)
                w_rows = pl.ds(pl.multiple_of(column, COLUMNS), COLUMNS)
                if call.vectors:
                    slot = lax.rem(turn, ahead)
                    wait(s.vector_empty, slot)
                    _fill_vectors(call, gm, s, column, slot, s.vector_full.at[slot])
                before = 0
                for number, width in enumerate(call.inputs):
                    source = getattr(gm, f"x{number}")

                    def one_step(k, carry, before=before, source=source):
                        slot = lax.rem(turn * steps + before + k, STAGES)
                        wait(s.x_empty, slot)
                        here = pl.ds(k * call.depth, call.depth)
                        fill(s, "x", source.at[rows, here], slot)
                        here = pl.ds((before + k) * call.depth, call.depth)
                        fill(s, "w", gm.w.at[w_rows, here], slot, "x_full")
                        return carry

                    lax.fori_loop(0, width // call.depth, one_step, 0)
                    before += width // call.depth
                return carry

            lax.fori_loop(0, count, one_tile, 0)

    scratch = dict(
        x=_tiled((STAGES, 2 * ROWS, call.depth), call.operands),
        w=_tiled((STAGES, COLUMNS, call.depth), call.operands),
        o=_tiled((2, OUTS, ROWS, CHUNK), call.dtype),
        **ring("x", STAGES, filled=2, emptied=2),
        **{name: plgpu.SMEM((ahead, COLUMNS), jnp.float32) for name in call.vectors},
    )
    if call.vectors:
        scratch |= ring("vector", ahead, filled=len(call.vectors), emptied=2)
    if call.residual:
        scratch["residual_full"] = plgpu.Barrier(num_barriers=2 * OUTS)
    return kernel, scratch


def _fill_vectors(call, gm, s, column, slot, full):
    """Copies what has one number for each of a tile's columns."""
    columns = pl.ds(pl.multiple_of(column, COLUMNS), COLUMNS)
    for name in call.vectors:
        plgpu.copy_gmem_to_smem(getattr(gm, name).at[columns], getattr(s, name).at[slot], full)


def _fetch_residual(gm, s, wg, rows, column, first):
    """Copies the residual of chunks of a tile to where its results are written from."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for c in range(OUTS):
        source = gm.residual.at[rows, pl.ds(column + (first + c) * CHUNK, CHUNK)]
        plgpu.copy_gmem_to_smem(source, s.o.at[wg, c], s.residual_full.at[OUTS * wg + c])


def _write(call, gm, s, wg, total, rows, column, slot, factor):
    """Scales, adds and writes a warpgroup's sums, 64 columns at a time."""

    def of_columns(name, c):
        values = plgpu.load(getattr(s, name).at[slot, pl.ds(c * CHUNK, CHUNK)], layout=COLUMN)
        return lax.broadcast_in_dim(values, (ROWS, CHUNK), [1])

    for c in range(CHUNKS):
        chunk, stage = total[:, c * CHUNK : (c + 1) * CHUNK], s.o.at[wg, c % OUTS]
        if call.scaled:
            chunk = chunk * lax.broadcast_in_dim(factor, (ROWS, CHUNK), [0])
            chunk = chunk * of_columns("column_scale", c)
        if call.biased:
            chunk = chunk + of_columns("bias", c)
        if call.residual:
            if c and c % OUTS == 0:
                _fetch_residual(gm, s, wg, rows, column, c)
            wait(s.residual_full, OUTS * wg + c % OUTS)
            before = plgpu.load(stage, layout=plgpu.Layout.WGMMA)
            chunk = chunk + before.astype(jnp.float32)
        put(stage, chunk, OUTS - 1)
        first = 0
        for number, width in enumerate(call.outputs):
            within = column - first

            @pl.when((within >= 0) & (within < width))
            def _(number=number, within=within, c=c, stage=stage):
                out = getattr(gm, f"o{number}")
                plgpu.copy_smem_to_gmem(stage, out.at[rows, pl.ds(within + c * CHUNK, CHUNK)])

            first += width


def _tiled(shape, dtype):
    """Shared memory for TMA and wgmma: tiles of 8 rows of 128 bytes, swizzled."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    )
