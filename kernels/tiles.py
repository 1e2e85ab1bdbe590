"""Which tiles of rows and keys meet: reductions of a mask's intervals, computed once a batch."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels.mask import KeyIntervals, RowIntervals

FAR = 2**30  # behind all rows and keys

Range = tuple[Array, Array]  # begins and ends


class TileBounds(NamedTuple):
    """Which tiles meet, as half-open ranges of block numbers.

    Ranges of a tile are ascending, disjoint, and (0, 0) where empty.

    `key_*[t, r]`: key blocks that rows of query tile t see: r = 0 detached (prefix, sink), 1 near,
    2 the tile itself and what follows it.
    `row_*[t, r]`: row blocks that see a key of key tile t: r = 0 contextual rows, 1 the tile itself
    and near rows, 2 the tail.
    """

    key_lo: Int[Array, "Tq 3"]
    key_hi: Int[Array, "Tq 3"]
    row_lo: Int[Array, "Tk 3"]
    row_hi: Int[Array, "Tk 3"]


def tile_bounds(
    keys: KeyIntervals,
    rows: RowIntervals,
    num_real: int | Int[Array, ""],
    block_q: int,
    block_k: int,
    first_real: int = 0,
) -> TileBounds:
    """Ranges of blocks that meet, for query tiles of `block_q` rows, key tiles of `block_k`.

    The last tile may be short.

    A tile may straddle sequences. Only its first sequence reaches before the tile and only its last
    beyond it, so three ranges do.

    Args:
      first_real, num_real: the rows between them see themselves.
    """
    num_rows = keys.lo0.shape[0]
    row_T = jnp.arange(num_rows, dtype=jnp.int32)
    own = _only(row_T, row_T + 1, (row_T >= first_real) & (row_T < num_real))

    first_T = row_T // block_q * block_q
    near0_T = keys.hi0 == row_T  # slot 0 of a contextual row touches the row itself
    far, before, around = [], [], [own]
    for lo, hi, is_far in (
        (keys.lo0, keys.hi0, ~near0_T),
        (keys.lo1, keys.hi1, jnp.zeros_like(near0_T)),
    ):
        outside = lo < first_T
        far.append(_only(lo, hi, outside & is_far))
        before.append(_only(lo, hi, outside & ~is_far))
        around.append(_only(lo, hi, ~outside))
    key = [_hull(parts, block_q, block_k) for parts in (far, before, around)]

    first_T = row_T // block_k * block_k
    end_T = jnp.minimum(first_T + block_k, num_rows)
    touches = rows.near_lo <= end_T  # always, where rows and keys are those of one batch
    front = [_only(rows.ctx_lo, rows.ctx_hi, rows.ctx_lo < first_T)]
    around = [own, _only(rows.near_lo, rows.near_hi, touches)]
    beyond = [
        _only(rows.tail_lo, rows.tail_hi, rows.tail_hi > end_T),
        _only(rows.ctx_lo, rows.ctx_hi, rows.ctx_hi > end_T),
        _only(rows.near_lo, rows.near_hi, ~touches),
    ]
    row = [_hull(parts, block_k, block_q) for parts in (front, around, beyond)]
    return TileBounds(*_disjoint(key), *_disjoint(row))


def _only(lo: Array, hi: Array, keep: Array) -> Range:
    return jnp.where(keep, lo, 0), jnp.where(keep, hi, 0)


def _hull(parts: list[Range], block: int, other_block: int) -> Range:
    """The smallest range of blocks of `other_block` that holds all intervals of each tile.

    It ends at 0 where there is none.
    """
    lo = jnp.stack([jnp.where(hi > lo, lo, FAR) for lo, hi in parts]).min(0)
    hi = jnp.stack([hi for _, hi in parts]).max(0)
    pad = (0, -lo.shape[0] % block)
    lo = jnp.pad(lo, pad, constant_values=FAR).reshape(-1, block).min(1) // other_block
    hi = -(-jnp.pad(hi, pad).reshape(-1, block).max(1) // other_block)
    return lo, hi


def _disjoint(ranges: list[Range]) -> tuple[Array, ...]:
    """Ranges that may overlap or be empty (lo > hi), to ascending, disjoint ones that hold them.

    They are stacked on the last axis.
    """
    ranges, out = list(ranges), []
    reached = jnp.zeros_like(ranges[0][1])
    for i, (lo, hi) in enumerate(ranges):
        # Where a later range begins before this one's end, this one stops there, so that ranges
        # ascend, and the later one takes the rest.
        for j in range(i + 1, len(ranges)):
            later_lo, later_hi = ranges[j]
            meets = (hi > lo) & (later_hi > later_lo) & (later_lo < hi)
            ranges[j] = later_lo, jnp.where(meets, jnp.maximum(later_hi, hi), later_hi)
            hi = jnp.where(meets, jnp.maximum(later_lo, lo), hi)
        lo = jnp.maximum(lo, reached)
        some = hi > lo
        reached = jnp.where(some, hi, reached)
        out.append((jnp.where(some, lo, 0), jnp.where(some, hi, 0)))
    return tuple(jnp.stack(ends, axis=-1).astype(jnp.int32) for ends in zip(*out, strict=True))


def common_blocks(lo: Array, hi: Array, tile: int, block: int) -> Range:
    """The range of blocks that lie in [lo, hi) of every row of a tile, for each tile."""
    begin = -(-lo.reshape(-1, tile).max(1) // block)
    return begin, jnp.maximum(hi.reshape(-1, tile).min(1) // block, begin)


def hull_blocks(lo: Array, hi: Array, tile: int, block: int) -> Range:
    """The smallest range of blocks that holds [lo, hi) of all rows of a tile, for each tile."""
    some = hi > lo
    begin = jnp.where(some, lo, FAR).reshape(-1, tile).min(1) // block
    end = -(-jnp.where(some, hi, 0).reshape(-1, tile).max(1) // block)
    return jnp.minimum(begin, end), end
