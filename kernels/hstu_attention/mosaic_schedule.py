"""Work lists of the Hopper kernels: which tile meets which blocks, split where one tile would outlast the rest, heaviest first.

A list is an int32 array of records, one a work item; thread blocks draw items from a counter, so the order is all the scheduling there is.
The same code makes the forward's list (tiles of query rows, blocks of keys) and the backward's (tiles of keys, blocks of query rows).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

TAIL = 128  # rows of the last, partly filled tile that are passed separately, with padding rows zeroed
RECORD = 16  # int32 in a record: 64 bytes, what one bulk copy moves
TILE, HEAD, COUNT, SLOT, CUT1, CUT2, SHIFT0, SHIFT1, SHIFT2, FULL0, FULL_END0, FULL1, FULL_END1, FULL2, FULL_END2, SPARE = range(RECORD)


class Schedule(NamedTuple):
    """Attributes:
    records: `[items, 16]`, unused ones with tile -1 at the end, at least one.
      Block i of the COUNT blocks of an item is block `i + SHIFT0` of the buffer, from CUT1 on `i + SHIFT1`, from CUT2 on `i + SHIFT2`;
      it needs no mask inside [FULL, FULL_END) of any of the three; SLOT is where a partial sum goes, -1 for a tile that is not split.
    parts: `[splits, 4]`: tile, head, first slot and number of slots of each split tile, unused ones with no slots.
    num_slots: slots for partial sums.
    """

    records: Int[Array, "items 16"]
    parts: Int[Array, "splits 4"]
    num_slots: int


def make_schedule(
    lo: Int[Array, "tiles 3"],
    hi: Int[Array, "tiles 3"],
    full: tuple[tuple[Any, Any], ...],
    heads: int,
    workers: int,
    overhead: int,
) -> Schedule:
    """A list for `workers` thread blocks.

    Args:
      lo, hi: ascending disjoint ranges of blocks that each tile meets; every tile meets one at least.
      full: up to three ranges of blocks, `(begin [tiles], end [tiles])`, that the whole tile sees without a mask.
      heads: every tile is done once a head.
      workers: thread blocks that run at a time.
      overhead: what beginning and ending an item costs, in blocks.
    """
    tiles = lo.shape[0]
    count = (hi - lo).sum(1)
    share = ((count + overhead).sum() * heads) // workers  # blocks that each worker should do
    # A tile is split when it alone is most of a worker's share, into pieces small enough to be packed.
    piece = jnp.maximum(share // 3, 4 * overhead)
    pieces = jnp.where(4 * count > 3 * jnp.maximum(share, 4 * overhead), -(-count // piece), 1)
    splits = min(tiles, 4 * workers // (3 * heads) + 1)
    slots = 7 * workers // (2 * heads) + 1 + splits
    return _pack(lo, hi, full, heads, count, pieces, splits, slots)


def _pack(lo: Any, hi: Any, full: Any, heads: int, count: Any, pieces: Any, splits: int, slots: int) -> Schedule:
    tiles = lo.shape[0]
    capacity = tiles + slots
    total = jnp.cumsum(pieces)
    item = jnp.arange(capacity, dtype=jnp.int32)
    tile = jnp.minimum(jnp.searchsorted(total, item, side="right", method="scan_unrolled").astype(jnp.int32), tiles - 1)
    used = item < total[-1]
    part = item - (total - pieces)[tile]
    begin = (part * count[tile]) // pieces[tile]
    end = ((part + 1) * count[tile]) // pieces[tile]
    split = pieces > 1
    first_slot = jnp.cumsum(jnp.where(split, pieces, 0)) - pieces
    slot = jnp.where(split[tile], first_slot[tile] + part, -1)

    size = hi - lo
    columns = [None] * RECORD
    columns[TILE] = jnp.where(used, tile, -1)
    columns[COUNT], columns[SLOT] = end - begin, slot
    cut1 = size[:, 0]
    cut2 = cut1 + size[:, 1]
    columns[CUT1], columns[CUT2] = cut1[tile] - begin, cut2[tile] - begin
    for i, shift in enumerate((lo[:, 0], lo[:, 1] - cut1, lo[:, 2] - cut2)):
        columns[SHIFT0 + i] = shift[tile] + begin
    nothing = jnp.zeros((capacity,), jnp.int32)
    for i, (f, e) in enumerate(((FULL0, FULL_END0), (FULL1, FULL_END1), (FULL2, FULL_END2))):
        columns[f], columns[e] = (full[i][0][tile], full[i][1][tile]) if i < len(full) else (nothing, nothing)

    order = jnp.argsort(jnp.where(used, begin - end, 1), stable=True)
    columns[HEAD] = columns[SPARE] = nothing
    records = jnp.stack(columns, axis=1).astype(jnp.int32)[order]
    head = jnp.arange(heads, dtype=jnp.int32)
    records = jnp.broadcast_to(records[:, None, :], (capacity, heads, RECORD))
    records = records.at[:, :, HEAD].set(jnp.broadcast_to(head[None, :], (capacity, heads)))
    records = records.at[:, :, SLOT].set(jnp.where(records[:, :, SLOT] < 0, -1, records[:, :, SLOT] * heads + head[None, :]))
    last = jnp.full((1, RECORD), -1, jnp.int32)
    records = jnp.concatenate([records.reshape(-1, RECORD), last])

    rank = jnp.cumsum(split) - 1
    where = jnp.where(split, rank, splits)
    part_tile = jnp.zeros((splits,), jnp.int32).at[where].set(jnp.arange(tiles, dtype=jnp.int32), mode="drop")
    part_count = jnp.zeros((splits,), jnp.int32).at[where].set(pieces.astype(jnp.int32), mode="drop")
    part_first = first_slot[part_tile].astype(jnp.int32)
    parts = jnp.stack([part_tile, jnp.zeros_like(part_tile), part_first, part_count], axis=1)
    parts = jnp.broadcast_to(parts[:, None, :], (splits, heads, 4))
    parts = parts.at[:, :, 1].set(jnp.broadcast_to(head[None, :], (splits, heads)))
    parts = parts.at[:, :, 2].set(parts[:, :, 2] * heads + head[None, :])
    return Schedule(records, parts.reshape(-1, 4), slots * heads)
