"""Sums the parts of split tiles: what their items left in float32 becomes rows of the result.

The order is fixed, so the bits are the same every time.
"""

from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jaxtyping import Array, Float, Int

ROWS, COLUMNS = 64, 64  # of a thread block, one warpgroup


def write_sums(
    parts: Int[Array, "splits 4"],
    pairs: Sequence[tuple[Float[Array, "slots tile _"], Float[Array, "T H _"]]],
    heads: int,
    first_row: int = 0,
) -> list[Float[Array, "T H _"]]:
    """The results with the rows of split tiles filled in.

    One kernel does this for all pairs, in place; there is none where no tile may be split.

    Args:
      parts: of `schedule.Schedule`, which also says what slots are.
      pairs: slots and the result that they belong to.
      first_row: the row that results begin with.
    """
    if not parts.shape[0]:
        return [result for _, result in pairs]
    tile = pairs[0][0].shape[1]
    widths = [slots.shape[2] for slots, _ in pairs]

    def kernel(parts_gm, *refs):
        part, row = lax.axis_index("part"), lax.axis_index("row") * ROWS
        count = parts_gm[part, 3]

        @pl.when(count > 0)
        def _():
            first = parts_gm[part, 2]
            chunk, before = lax.axis_index("chunk"), 0
            for slots_gm, result_gm, width in zip(
                refs[: len(pairs)], refs[len(pairs) :], widths, strict=True
            ):
                mine = (chunk >= before) & (chunk < before + width // COLUMNS)

                @pl.when(mine)
                def _(slots_gm=slots_gm, result_gm=result_gm, column=(chunk - before) * COLUMNS):
                    def load(i):
                        place = slots_gm.at[
                            first + i * heads, pl.ds(row, ROWS), pl.ds(column, COLUMNS)
                        ]
                        return plgpu.load(place, layout=plgpu.Layout.WGMMA, optimized=False)

                    total = lax.fori_loop(1, count, lambda i, total: total + load(i), load(0))
                    rows = pl.ds(parts_gm[part, 0] * tile + row - first_row, ROWS)
                    result_gm.at[rows, parts_gm[part, 1], pl.ds(column, COLUMNS)][...] = (
                        total.astype(result_gm.dtype)
                    )

                before += width // COLUMNS

    results = [jax.new_ref(result) for _, result in pairs]
    plgpu.kernel(
        kernel,
        grid=(parts.shape[0], tile // ROWS, sum(widths) // COLUMNS),
        grid_names=("part", "row", "chunk"),
        num_threads=1,
        thread_name="wg",
        kernel_name="hstu_parts",
    )(parts, *(slots for slots, _ in pairs), *results)
    return [result[...] for result in results]
