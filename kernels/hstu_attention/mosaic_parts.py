"""Sums the parts of split tiles: what their items left in float32 becomes rows of the result. In a fixed order, so
the same bits every time.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jaxtyping import Array, Float, Int


def write_sums(parts: Int[Array, "splits 4"], slots: Float[Array, "slots tile V"], result: jax.Ref, heads: int) -> None:
    """Writes the sum of each split tile's slots into its rows of `result` [T, heads, V], a reference that is
    updated in place.

    `parts` and the meaning of slots: `mosaic_schedule.Schedule`.
    """
    tile, width = slots.shape[1:]
    rows, columns = 64, 64  # of a thread block, one warpgroup

    def kernel(parts_gm, slots_gm, result_gm):
        part = lax.axis_index("part")
        row, column = lax.axis_index("row") * rows, lax.axis_index("column") * columns
        count = parts_gm[part, 3]

        @pl.when(count > 0)
        def _():
            first = parts_gm[part, 2]

            def load(i):
                place = slots_gm.at[first + i * heads, pl.ds(row, rows), pl.ds(column, columns)]
                return plgpu.load(place, layout=plgpu.Layout.WGMMA, optimized=False)

            total = lax.fori_loop(1, count, lambda i, total: total + load(i), load(0))
            place = result_gm.at[pl.ds(parts_gm[part, 0] * tile + row, rows), parts_gm[part, 1], pl.ds(column, columns)]
            place[...] = total.astype(result_gm.dtype)

    plgpu.kernel(
        kernel,
        grid=(parts.shape[0], tile // rows, width // columns),
        grid_names=("part", "row", "column"),
        num_threads=1,
        thread_name="wg",
        kernel_name="hstu_parts",
    )(parts, slots, result)
