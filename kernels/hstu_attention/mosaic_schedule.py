"""Work lists of the Hopper kernels: which tile meets which blocks, split where one tile would outlast the rest,
heaviest first.

A list is an int32 array of records, one a work item; thread blocks draw items from a counter, so the order is all
the scheduling there is. The same code makes the forward's list (tiles of query rows, blocks of keys) and the
backward's (tiles of keys, blocks of query rows).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from kernels.hstu_attention.plan import AttentionPlan

TAIL = 128  # rows of the last, partly filled tile that are passed separately, with padding rows zeroed
WORKERS = 132  # thread blocks that run at a time: one on each SM of an H100 or H200
RECORD = 32  # int32 in a record: 128 bytes, the alignment that a tensor copy wants of each slot in shared memory
(
    TILE,
    HEAD,
    COUNT,
    SLOT,
    CUT1,
    CUT2,
    SHIFT0,
    SHIFT1,
    SHIFT2,
    FULL0,
    FULL_END0,
    FULL1,
    FULL_END1,
    FULL2,
    FULL_END2,
    OTHER0,
    OTHER_END0,
    OTHER1,
    OTHER_END1,
) = range(19)


class Schedule(NamedTuple):
    """Attributes:
    records: `[items, 32]`, unused ones with tile -1 at the end, at least one.
      Block i of the COUNT blocks of an item is block `i + SHIFT0` of the buffer, from CUT1 on `i + SHIFT1`, from
      CUT2 on `i + SHIFT2`; It needs no mask inside [FULL, FULL_END) of any of the three, and of `bounds` only the
      first interval outside both [OTHER, OTHER_END). SLOT is where a partial sum goes, -1 for a tile that is not split.
    parts: `[splits, 4]`: tile, head, first slot and number of slots of each split tile, unused ones with no slots.
    The slots of a tile are
      one number of heads apart.
    bounds: what the kernel masks with, `[6, T]`, T rounded up to whole tiles: for each row (or key) the ends of
    three disjoint intervals of
      keys (or rows). Its own place is in one of them, in the first wherever that joins something.
    tail: `[1]`, first row of the last tile that holds a real row: where NaN may stand beside numbers.
    """

    records: Int[Array, "items 32"]
    parts: Int[Array, "splits 4"]
    bounds: Int[Array, "6 T"]
    tail: Int[Array, " 1"]


def rounded_up(rows: int) -> int:
    return -(-rows // TAIL) * TAIL


def forward_name(heads: int, block_k: int, workers: int) -> str:
    return f"mosaic forward, {heads} heads, {block_k} keys, {workers} workers"


def backward_name(heads: int, tile: int, block_q: int, workers: int) -> str:
    return f"mosaic backward, {heads} heads, {tile} keys, {block_q} rows, {workers} workers"


def forward_schedule(plan: AttentionPlan, heads: int, block_k: int, workers: int) -> Schedule:
    """Tiles of 128 query rows over blocks of keys.

    Taken from `plan.stored` if it is there (see `mosaic_hopper.prepare`).
    """
    stored = plan.stored.get(forward_name(heads, block_k, workers))
    if stored is not None:
        return stored
    rows = rounded_up(plan.num_rows)
    lo0, hi0, lo1, hi1 = (jnp.pad(x, (0, rows - plan.num_rows)) for x in plan.keys)
    row = jnp.arange(rows, dtype=jnp.int32)
    real = row < plan.num_real
    some0, some1 = hi0 > lo0, hi1 > lo1
    joins0, left, right = some0 & (hi0 == row), some1 & (hi1 == row), some1 & (lo1 == row + 1)
    joined = joins0 | left | right
    own_lo, own_hi = jnp.where(real, row, 0), jnp.where(real, row + 1, 0)
    near_lo = jnp.where(left, lo1, jnp.where(joins0, lo0, own_lo))
    near_hi = jnp.where(right, hi1, own_hi)
    alone = ~joined & some1  # a target: its history comes first, itself last
    ranges = (
        (jnp.where(alone, lo1, near_lo), jnp.where(alone, hi1, near_hi)),
        (jnp.where(joins0, 0, lo0), jnp.where(joins0, 0, hi0)),
        (
            jnp.where(alone, own_lo, jnp.where(left | right, 0, lo1)),
            jnp.where(alone, own_hi, jnp.where(left | right, 0, hi1)),
        ),
    )
    bounds = plan.tile_bounds(TAIL, block_k)
    records, parts = make_items(bounds.key_lo, bounds.key_hi, ranges, TAIL, block_k, heads, workers)
    return Schedule(records, parts, jnp.stack([x for pair in ranges for x in pair]), _tail(plan))


def backward_schedule(plan: AttentionPlan, heads: int, tile: int, block_q: int, workers: int) -> Schedule:
    """Tiles of `tile` keys over blocks of query rows.

    Taken from `plan.stored` if it is there.
    """
    stored = plan.stored.get(backward_name(heads, tile, block_q, workers))
    if stored is not None:
        return stored
    rows = rounded_up(plan.num_rows)
    ctx_lo, ctx_hi, near_lo, near_hi, tail_lo, tail_hi = (jnp.pad(x, (0, rows - plan.num_rows)) for x in plan.rows)
    key_T = jnp.arange(rows, dtype=jnp.int32)
    real = key_T < plan.num_real
    # In a partial sum the rows stand apart from the keys, whose own rows are empty: nothing to join.
    apart = (near_hi > near_lo) & (near_lo != key_T + 1)
    near_lo = jnp.where(apart, near_lo, jnp.where(real, key_T, 0))
    near_hi = jnp.where(apart, near_hi, jnp.where(real, jnp.maximum(near_hi, key_T + 1), 0))
    bounds = plan.tile_bounds(block_q, tile)
    ranges = ((near_lo, near_hi), (ctx_lo, ctx_hi), (tail_lo, tail_hi))
    records, parts = make_items(bounds.row_lo, bounds.row_hi, ranges, tile, block_q, heads, workers)
    return Schedule(records, parts, jnp.stack([x for pair in ranges for x in pair]), _tail(plan))


def _tail(plan: AttentionPlan) -> Array:
    return (plan.num_real // TAIL * TAIL).astype(jnp.int32).reshape(1)


def clean_tail(x: Array, plan: AttentionPlan) -> Array:
    """The last tile of `x` [T, ...] that holds a real row, padding rows zeroed: 0 * NaN would be NaN in a product."""
    first = jnp.minimum(_tail(plan)[0], x.shape[0] - TAIL)
    rows = lax.dynamic_slice_in_dim(x, first, TAIL)
    real = (first + jnp.arange(TAIL) < plan.num_real).reshape((TAIL,) + (1,) * (x.ndim - 1))
    return jnp.where(real, rows, jnp.zeros((), x.dtype))


def row_scales(scale: Array, plan: AttentionPlan, rows: int) -> Array:
    """float32[rows]: the factor of each row, 0 in padding, where the caller's may be NaN."""
    scale_T = jnp.pad(jnp.broadcast_to(scale, (plan.num_rows,)), (0, rows - plan.num_rows))
    return jnp.where(jnp.arange(rows) < plan.num_real, scale_T, 0.0)


def _common(lo: Array, hi: Array, tile: int, block: int) -> tuple[Array, Array]:
    """Range of blocks that lie in the interval of every row of a tile."""
    begin = -(-lo.reshape(-1, tile).max(1) // block)
    return begin, jnp.maximum(hi.reshape(-1, tile).min(1) // block, begin)


def _hull(lo: Array, hi: Array, tile: int, block: int) -> tuple[Array, Array]:
    """Smallest range of blocks that holds the intervals of all rows of a tile."""
    some = hi > lo
    begin = jnp.where(some, lo, 2**30).reshape(-1, tile).min(1) // block
    end = -(-jnp.where(some, hi, 0).reshape(-1, tile).max(1) // block)
    return jnp.minimum(begin, end), end


def capacity(tiles: int, heads: int, workers: int) -> tuple[int, int]:
    """(tiles that may be split, slots for their partial sums) for each head: what `make_items` can need at most."""
    splits = min(tiles, 4 * workers // (3 * heads) + 1)
    return splits, 7 * workers // (2 * heads) + 1 + splits


def make_items(lo: Array, hi: Array, ranges: Any, tile: int, block: int, heads: int, workers: int) -> tuple[Array, Array]:
    """Records and parts for `workers` thread blocks.

    Args:
      lo, hi: `[tiles, 3]`, ascending disjoint ranges of blocks that each tile meets.
      ranges: three intervals `(lo [T], hi [T])` for each row of the tiles.
      tile, block: their sizes.
      heads: every tile is done once a head.
    """
    tiles = ranges[0][0].shape[0] // tile
    lo, hi = (jnp.pad(x, ((0, tiles - x.shape[0]), (0, 0))) for x in (lo, hi))
    # A tile that meets nothing is padding; it takes a block of its own rows, masked, so that its result is written,
    # as zeros.
    own = jnp.arange(tiles, dtype=jnp.int32) * tile // block
    nothing = (hi <= lo).all(1)
    lo = lo.at[:, 0].set(jnp.where(nothing, own, lo[:, 0]))
    hi = hi.at[:, 0].set(jnp.where(nothing, own + 1, hi[:, 0]))
    count = (hi - lo).sum(1)
    overhead = 2  # what beginning and ending an item costs, in blocks
    share = ((count + overhead).sum() * heads) // workers  # blocks that each worker should do
    # A tile is split when it alone is most of a worker's share, into pieces small enough to be packed.
    piece = jnp.maximum(share // 3, 4 * overhead)
    pieces = jnp.where(4 * count > 3 * jnp.maximum(share, 4 * overhead), -(-count // piece), 1)
    splits, slots = capacity(tiles, heads, workers)
    full = [x for begin, end in ranges for x in _common(begin, end, tile, block)]
    other = [x for begin, end in ranges[1:] for x in _hull(begin, end, tile, block)]
    return _pack(lo, hi, [*full, *other], heads, count, pieces, splits, slots)


def _pack(lo: Any, hi: Any, classes: list[Array], heads: int, count: Any, pieces: Any, splits: int, slots: int) -> tuple[Array, Array]:
    tiles = lo.shape[0]
    capacity = tiles + slots - splits
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
    nothing = jnp.zeros((capacity,), jnp.int32)
    columns: list[Any] = [nothing] * RECORD
    columns[TILE] = jnp.where(used, tile, -1)
    columns[COUNT], columns[SLOT] = end - begin, slot
    cut1 = size[:, 0]
    cut2 = cut1 + size[:, 1]
    columns[CUT1], columns[CUT2] = cut1[tile] - begin, cut2[tile] - begin
    for i, shift in enumerate((lo[:, 0], lo[:, 1] - cut1, lo[:, 2] - cut2)):
        columns[SHIFT0 + i] = shift[tile] + begin
    for i, column in enumerate(classes):
        columns[FULL0 + i] = column[tile]

    order = jnp.argsort(jnp.where(used, begin - end, 1), stable=True)
    # Head after head: what runs at a time then reads keys and values of one or two heads, which the L2 cache holds.
    number = jnp.arange(capacity * heads + 1, dtype=jnp.int32)
    head, at = number // total[-1], order[number % total[-1]]
    columns = [column[at] for column in columns]
    columns[TILE] = jnp.where(head < heads, columns[TILE], -1)
    columns[HEAD] = head
    columns[SLOT] = jnp.where(columns[SLOT] < 0, -1, columns[SLOT] * heads + head)
    records = jnp.stack(columns, axis=1).astype(jnp.int32)

    number = jnp.arange(splits * heads, dtype=jnp.int32)
    head, rank = number % heads, number // heads
    tile = jnp.searchsorted(jnp.cumsum(split), rank + 1, method="scan_unrolled").astype(jnp.int32)  # the rank-th split one
    there = tile < tiles
    tile = jnp.where(there, tile, 0)
    parts = jnp.stack([tile, head, first_slot[tile] * heads + head, jnp.where(there, pieces[tile], 0)], axis=1)
    return records, parts.astype(jnp.int32)
