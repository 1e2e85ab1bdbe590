"""Work lists of the Hopper kernels: which tile meets which blocks, heaviest first.

A list is an int32 array of records, one a work item; thread blocks draw items from a counter, so
the order is all the scheduling there is. A tile that would outlast the rest is split into several
items. The same code makes the forward's list (tiles of query rows, blocks of keys) and the
backward's (tiles of keys, blocks of query rows).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kernels.hstu_attention import tuning
from kernels.hstu_attention.mosaic.padding import TAIL, rounded_up, tail_start
from kernels.hstu_attention.plan import AttentionPlan, Derived
from kernels.tiles import FAR, common_blocks, hull_blocks
from kernels.typing import PerRow

WORKERS = 132  # thread blocks that run at a time: one on each SM of an H100 or H200
RECORD = 32  # int32 in a record: 128 bytes, the alignment of a tensor copy into shared memory
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
    LATE,
    EARLY,
) = range(21)

Records = Int[Array, "items 32"]
Parts = Int[Array, "splits 4"]
Bounds = Int[Array, "6 T"]
TileRanges = Int[Array, "tiles 3"]
Interval = tuple[PerRow, PerRow]  # begins and ends


class Schedule(NamedTuple):
    """A list of work, and what its kernel masks with.

    Attributes:
      records: one an item, unused ones with tile -1 at the end, at least one. Block i of the COUNT
        blocks of an item is block `i + SHIFT0` of the buffer, from CUT1 on `i + SHIFT1`, from CUT2
        on `i + SHIFT2`. It needs no mask inside [FULL, FULL_END) of any of the three, and only the
        first interval of `bounds` outside both [OTHER, OTHER_END). SLOT is where a partial sum
        goes, -1 for a tile that is not split. Where items come in turns, LATE is 1 if the second
        half of the tile sees nothing of the first block, EARLY if the first half sees nothing of
        the last one.
      parts: of each split tile its number, head, first slot and number of slots; unused ones have
        no slots. The slots of a tile are as far apart as there are heads.
      bounds: for each row (or key) the ends of three disjoint intervals of keys (or rows); T is
        rounded up to whole tiles. The row itself is in one of them, in the first wherever that
        joins something.
      tail: first row of the last tile that holds a real row: NaN may stand beside numbers there.
    """

    records: Records
    parts: Parts
    bounds: Bounds
    tail: Int[Array, " 1"]


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Sizes of the backward.

    Attributes:
      tile: keys of a work item.
      block_q: rows a step.
      stages: of the ring of rows and their gradients.
      passes: 1 adds up dQ in memory while dK and dV are made; 2 makes it in a pass of its own,
        deterministic.
    """

    tile: int
    block_q: int
    stages: int
    passes: int = 1


@dataclasses.dataclass(frozen=True)
class WorkList(Derived[Schedule]):
    """The schedule of a kernel, for a number of heads.

    `forward` lists tiles of query rows over blocks of keys, `backward` tiles of keys over blocks of
    query rows.
    """

    kind: Literal["forward", "backward"]
    tile: int
    block: int
    heads: int

    @staticmethod
    def forward(heads: int, block_k: int) -> "WorkList":
        return WorkList("forward", TAIL, block_k, heads)

    @staticmethod
    def backward(heads: int, config: BackwardConfig) -> "WorkList":
        return WorkList("backward", config.tile, config.block_q, heads)

    @property
    def by_sequence(self) -> bool:
        """Whether all heads but the last take one sequence after another: tiles of 64 keys.

        Those add so much to dQ, and read so much, that the L2 cache holds few sequences.
        """
        return self.kind == "backward" and self.tile < TAIL

    def make(self, plan: AttentionPlan) -> Schedule:
        return make_schedules(plan, [self])[0]


def make_schedules(plan: AttentionPlan, wanted: Sequence[WorkList]) -> list[Schedule]:
    """Lists for the same heads, made in fewer operations than one after another."""
    met = [
        (_forward_tiles if each.kind == "forward" else _backward_tiles)(plan, each)
        for each in wanted
    ]
    rows, keys = (plan.first_row, rounded_up(plan.num_rows)), (0, rounded_up(plan.num_keys))
    ranges = [
        [end // each.tile for end in (rows if each.kind == "forward" else keys)] for each in wanted
    ]
    most = max(blocks.lo.shape[0] for blocks, _ in met)
    padded = [
        jax.tree.map(lambda x: jnp.pad(x, ((0, most - x.shape[0]), (0, 0))), blocks)
        for blocks, _ in met
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *padded)
    pack = functools.partial(
        _pack,
        heads=wanted[0].heads,
        may_split=may_split(plan),
        heads_together=heads_together(plan),
    )
    by_sequence = [each.by_sequence for each in wanted]
    orders = jnp.asarray(by_sequence) if any(by_sequence) else None
    items = zip(*jax.vmap(pack)(stacked, jnp.asarray(ranges, jnp.int32), orders), strict=True)
    return [
        Schedule(*item, bounds, tail_start(plan))
        for item, (_, bounds) in zip(items, met, strict=True)
    ]


class MetBlocks(NamedTuple):
    """Which blocks each tile meets.

    Attributes:
      lo, hi: three ascending, disjoint ranges of blocks.
      classes: the ranges of blocks that need no mask (FULL) or more than one interval (OTHER), and
        where items come in turns LATE and EARLY.
    """

    lo: TileRanges
    hi: TileRanges
    classes: Int[Array, "tiles _"]


def _met_blocks(
    lo: TileRanges,
    hi: TileRanges,
    intervals: tuple[Interval, Interval, Interval],
    wanted: WorkList,
    blocks: range,
    halves: bool,
) -> tuple[MetBlocks, Bounds]:
    """The blocks of all tiles, and the bounds of `Schedule`.

    Args:
      lo, hi: ranges of blocks of each tile.
      intervals: of each row of the tiles.
      blocks: those that there are.
      halves: whether LATE and EARLY are wanted.
    """
    tile, block = wanted.tile, wanted.block
    tiles = intervals[0][0].shape[0] // tile
    lo, hi = (jnp.pad(x, ((0, tiles - x.shape[0]), (0, 0))) for x in (lo, hi))
    # A tile that meets nothing takes a block all the same, of its own rows where it is padding,
    # masked: its result is written, as zeros.
    own = jnp.clip(jnp.arange(tiles, dtype=jnp.int32) * tile // block, blocks[0], blocks[-1])
    nothing = (hi <= lo).all(1)
    first = jnp.arange(3)[None, :] == 0
    lo = jnp.where(first & nothing[:, None], own[:, None], lo)
    hi = jnp.where(first & nothing[:, None], own[:, None] + 1, hi)
    full = [x for begin, end in intervals for x in common_blocks(begin, end, tile, block)]
    other = [x for begin, end in intervals[1:] for x in hull_blocks(begin, end, tile, block)]
    unseen = _unseen_ends(lo, hi, intervals, tile, block) if halves else []
    return MetBlocks(lo, hi, jnp.stack([*full, *other, *unseen], axis=1)), jnp.stack(
        [x for pair in intervals for x in pair]
    )


def _unseen_ends(
    lo: TileRanges,
    hi: TileRanges,
    intervals: tuple[Interval, Interval, Interval],
    tile: int,
    block: int,
) -> list[Int[Array, " tiles"]]:
    """LATE and EARLY of each tile, 0 where it meets one block."""
    some = hi > lo
    first, last = jnp.where(some, lo, FAR).min(1), jnp.where(some, hi, 0).max(1) - 1
    hulls = [hull_blocks(begin, end, tile // 2, block) for begin, end in intervals]
    # a half that sees nothing: (FAR, 0)
    begin_h = jnp.stack([jnp.where(end > begin, begin, FAR) for begin, end in hulls]).min(0)
    end_h = jnp.stack([end for _, end in hulls]).max(0)
    several = last > first
    late, early = begin_h[1::2] > first, end_h[::2] <= last
    return [(several & unseen).astype(jnp.int32) for unseen in (late, early)]


def _forward_tiles(plan: AttentionPlan, wanted: WorkList) -> tuple[MetBlocks, Bounds]:
    rows = rounded_up(plan.num_rows)
    lo0, hi0, lo1, hi1 = (jnp.pad(x, (0, rows - plan.num_rows)) for x in plan.keys)
    row = jnp.arange(rows, dtype=jnp.int32)
    if not plan.own_keys:
        row = jnp.full(rows, -2, jnp.int32)  # no interval ends or begins there
    real = (row >= 0) & (row < plan.num_real)
    some0, some1 = hi0 > lo0, hi1 > lo1
    joins0, left, right = some0 & (hi0 == row), some1 & (hi1 == row), some1 & (lo1 == row + 1)
    joined = joins0 | left | right
    own_lo, own_hi = jnp.where(real, row, 0), jnp.where(real, row + 1, 0)
    near_lo = jnp.where(left, lo1, jnp.where(joins0, lo0, own_lo))
    near_hi = jnp.where(right, hi1, own_hi)
    alone = ~joined & some1  # a target: its history comes first, itself last
    intervals = (
        (jnp.where(alone, lo1, near_lo), jnp.where(alone, hi1, near_hi)),
        (jnp.where(joins0, 0, lo0), jnp.where(joins0, 0, hi0)),
        (
            jnp.where(alone, own_lo, jnp.where(left | right, 0, lo1)),
            jnp.where(alone, own_hi, jnp.where(left | right, 0, hi1)),
        ),
    )
    bounds = plan.tile_bounds(wanted.tile, wanted.block)
    blocks = range(-(-plan.num_keys // wanted.block))
    return _met_blocks(bounds.key_lo, bounds.key_hi, intervals, wanted, blocks, in_turns(plan))


def _backward_tiles(plan: AttentionPlan, wanted: WorkList) -> tuple[MetBlocks, Bounds]:
    rows = rounded_up(plan.num_rows)
    ctx_lo, ctx_hi, near_lo, near_hi, tail_lo, tail_hi = (
        jnp.pad(x, (0, rows - plan.num_rows)) for x in plan.rows
    )
    key_T = jnp.arange(rows, dtype=jnp.int32)
    real = key_T < plan.num_real
    apart = (near_hi > near_lo) & (near_lo != key_T + 1)
    if plan.first_row:  # the keys before it have no row of their own to join
        real &= (key_T >= plan.first_row) & plan.own_keys
        apart = (near_hi > near_lo) & (apart | ~real)
    near_lo = jnp.where(apart, near_lo, jnp.where(real, key_T, 0))
    near_hi = jnp.where(apart, near_hi, jnp.where(real, jnp.maximum(near_hi, key_T + 1), 0))
    bounds = plan.tile_bounds(wanted.block, wanted.tile)
    intervals = ((near_lo, near_hi), (ctx_lo, ctx_hi), (tail_lo, tail_hi))
    blocks = range(plan.first_row // wanted.block, rows // wanted.block)
    return _met_blocks(bounds.row_lo, bounds.row_hi, intervals, wanted, blocks, in_turns(plan))


def may_split(plan: AttentionPlan) -> bool:
    """Whether some tile may be worth splitting.

    Where every row sees a window, or sequences are short, none is heavy and nothing is to be
    summed.
    """
    light = plan.mask.windowed or tuning.is_short(plan)
    return not (light and plan.rows_in_one_piece)


def in_turns(plan: AttentionPlan) -> bool:
    """Whether thread blocks take items in fixed turns, instead of drawing them.

    Drawing takes as long as a light item. Items are sorted, so that no thread block gets more work
    than another by more than the heaviest item.
    """
    return not may_split(plan)


def heads_together(plan: AttentionPlan) -> bool:
    """Whether the heads of a tile follow one another, instead of the tiles of a head.

    The heads of a row stand side by side in memory, which gives them out best together.
    """
    return not may_split(plan)


def part_slots(plan: AttentionPlan, wanted: WorkList) -> int:
    """How many slots for partial sums there are, for all heads together."""
    tiles = rounded_up(plan.num_rows) // wanted.tile
    return _capacity(tiles, wanted.heads, may_split(plan))[1] * wanted.heads


def _capacity(tiles: int, heads: int, split: bool) -> tuple[int, int]:
    """What `_pack` can need for each head, at most: (split tiles, slots for their sums).

    There is at least one slot.
    """
    if not split:
        return 0, 1
    splits = min(tiles, 4 * WORKERS // (3 * heads) + 1)
    return splits, 7 * WORKERS // (2 * heads) + 1 + splits


def _pack(
    x: MetBlocks,
    tile_range: Int[Array, " 2"],
    by_sequence: Bool[Array, ""] | None,
    *,
    heads: int,
    may_split: bool,
    heads_together: bool,
) -> tuple[Records, Parts]:
    """Every tile in its range is done once a head, in pieces if it is heavy and `may_split`."""
    tiles, (first_tile, end_tile) = x.lo.shape[0], tile_range
    splits, slots = _capacity(tiles, heads, may_split)
    exists = (jnp.arange(tiles) >= first_tile) & (jnp.arange(tiles) < end_tile)
    size = x.hi - x.lo
    count = size.sum(1)
    overhead = 2  # what beginning and ending an item costs, in blocks
    # blocks that each worker should do
    share = (jnp.where(exists, count + overhead, 0).sum() * heads) // WORKERS
    # A tile is split when it alone is most of a worker's share, into pieces small enough to be
    # packed.
    piece = jnp.maximum(share // 3, 4 * overhead)
    pieces = jnp.where(4 * count > 3 * jnp.maximum(share, 4 * overhead), -(-count // piece), 1)
    pieces = jnp.where(exists, pieces if may_split else 1, 0)
    split = pieces > 1
    before = _sum_before(pieces)
    first_slot = _sum_before(jnp.where(split, pieces, 0))

    item = jnp.arange(tiles + slots - splits, dtype=jnp.int32)
    tile = jnp.maximum(_count_up_to(before, item) - 1, 0)
    tile = jnp.minimum(tile, end_tile - 1)
    num_items = pieces.sum()
    used = item < num_items
    part = item - before[tile]
    begin = (part * count[tile]) // pieces[tile]
    end = ((part + 1) * count[tile]) // pieces[tile]
    slot = jnp.where(split[tile], first_slot[tile] + part, -1)
    cut1 = size[:, 0]
    cut2 = cut1 + size[:, 1]
    # CUT1, CUT2, SHIFT0, SHIFT1, SHIFT2: of the tile, then of its piece
    shifts = jnp.stack([cut1, cut2, x.lo[:, 0], x.lo[:, 1] - cut1, x.lo[:, 2] - cut2], axis=1)[tile]
    moved = shifts + jnp.stack([-begin, -begin, begin, begin, begin], axis=1)
    # TILE, HEAD, COUNT, SLOT
    own = jnp.stack([jnp.where(used, tile, -1), jnp.zeros_like(tile), end - begin, slot], axis=1)
    table = jnp.concatenate([own, moved, x.classes[tile]], axis=1)
    table = jnp.pad(table, ((0, 0), (0, RECORD - table.shape[1]))).astype(jnp.int32)

    order = jnp.argsort(jnp.where(used, begin - end, 1), stable=True)
    # The last head's order decides how evenly the work ends.
    by_end = order
    if by_sequence is not None:
        ends = jnp.where(used & by_sequence, x.hi.max(1)[tile], FAR)
        by_end = order[jnp.argsort(ends[order], stable=True)]
    number = jnp.arange(item.shape[0] * heads + 1, dtype=jnp.int32)
    column = jnp.arange(RECORD)[None, :]
    if heads_together:
        head, at = (number % heads)[:, None], order[number // heads]
        last = (number >= num_items * heads)[:, None]
    else:
        # Head after head: what runs at a time then reads keys and values of one or two heads, which
        # the L2 cache holds.
        head, nth = (number // num_items)[:, None], number % num_items
        at = order[nth]
        if by_sequence is not None:
            at = jnp.where(head[:, 0] < heads - 1, by_end[nth], at)
        last = head >= heads
    records = table[at]
    records = jnp.where((column == TILE) & last, -1, jnp.where(column == HEAD, head, records))
    records = jnp.where((column == SLOT) & (records >= 0), records * heads + head, records)

    number = jnp.arange(splits * heads, dtype=jnp.int32)
    head, nth = number % heads, number // heads  # split tile
    tile = _count_up_to(_sum_before(split.astype(jnp.int32)) + split, nth)
    there = tile < tiles
    tile = jnp.where(there, tile, 0)
    parts = jnp.stack(
        [tile, head, first_slot[tile] * heads + head, jnp.where(there, pieces[tile], 0)], axis=1
    )
    return records, parts.astype(jnp.int32)


# Up to so many numbers, comparing each with each, one kernel, is faster than a scan or a search,
# which are several.
SMALL = 2048


def _sum_before(x: Int[Array, " n"]) -> Int[Array, " n"]:
    """Sum of the numbers before each."""
    if x.shape[0] > SMALL:
        return jnp.cumsum(x) - x
    index = jnp.arange(x.shape[0])
    return jnp.where(index[None, :] < index[:, None], x[None, :], 0).sum(1)


def _count_up_to(ascending: Int[Array, " n"], values: Int[Array, " m"]) -> Int[Array, " m"]:
    """How many of `ascending` are at most each of `values`, which ascend too."""
    if ascending.shape[0] > SMALL:
        return jnp.searchsorted(ascending, values, side="right", method="scan_unrolled").astype(
            jnp.int32
        )
    return (ascending[None, :] <= values[:, None]).sum(1, dtype=jnp.int32)
