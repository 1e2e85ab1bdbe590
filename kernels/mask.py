"""The one definition of who attends to whom: every row sees at most two intervals of keys, plus itself.

`AttentionMask` names the rules; `intervals` turns them into flat coordinates, and kernels see nothing else. The same rules transposed
(`RowIntervals`: which rows see a key) give a kernel's backward its bounds. Tile bounds are reductions of both, computed once a batch.
"""

import dataclasses
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kernels.jagged import segment_ids

FAR = 2**30  # behind all rows and keys


class KeyIntervals(NamedTuple):
    """Keys of each row, half-open, flat coordinates, int32[T] each; the diagonal is in neither interval, and every real row adds it.

    `near` intervals are in slot 1, detached ones (a prefix, a contextual sink) in slot 0. Contextual rows use both: keys before and after.
    Empty intervals are (0, 0), on padding rows both.
    """

    lo0: Int[Array, " T"]
    hi0: Int[Array, " T"]
    lo1: Int[Array, " T"]
    hi1: Int[Array, " T"]

    def dense(self, num_real: Any) -> Bool[Array, "T T"]:
        """The mask as a matrix, diagonal of the first `num_real` rows included: for references and tests."""
        rows = self.lo0.shape[0]
        key_1T = jnp.arange(rows)[None, :]
        seen = (key_1T >= self.lo0[:, None]) & (key_1T < self.hi0[:, None])
        seen |= (key_1T >= self.lo1[:, None]) & (key_1T < self.hi1[:, None])
        row_T1 = jnp.arange(rows)[:, None]
        return seen | ((row_T1 == key_1T) & (row_T1 < num_real))

    @classmethod
    def from_dense(cls, mask_TT: Any) -> "KeyIntervals":
        """Intervals of any boolean matrix (host only; its diagonal is ignored). ValueError names the first row that needs more than two."""
        mask = np.array(mask_TT, bool)
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
            raise ValueError(f"a mask is a square matrix, got shape {mask.shape}")
        np.fill_diagonal(mask, False)
        edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        out = np.zeros((4, mask.shape[0]), np.int32)
        for row, edge in enumerate(edges):
            lo, hi = np.flatnonzero(edge == 1), np.flatnonzero(edge == -1)
            if len(lo) > 2:
                raise ValueError(
                    f"row {row} attends to {len(lo)} intervals of keys besides itself; the kernels take two at most"
                )
            slots = [0, 1] if len(lo) == 2 else [1]
            for slot, start, stop in zip(slots, lo, hi, strict=False):
                out[2 * slot : 2 * slot + 2, row] = start, stop
        return cls(*(jnp.asarray(x) for x in out))


class RowIntervals(NamedTuple):
    """`KeyIntervals` transposed: the rows that see each key, int32[T] each, empty as (0, 0), the diagonal not included.

    `ctx`: contextual rows in front of the key. `near`: rows from key + 1 on, without a gap. `tail`: full rows and targets further on.
    """

    ctx_lo: Int[Array, " T"]
    ctx_hi: Int[Array, " T"]
    near_lo: Int[Array, " T"]
    near_hi: Int[Array, " T"]
    tail_lo: Int[Array, " T"]
    tail_hi: Int[Array, " T"]


class TileBounds(NamedTuple):
    """Which tiles meet, as half-open ranges of block numbers; ranges of a tile are ascending, disjoint, and (0, 0) where empty.

    `key_*[t, r]`: key blocks that rows of query tile t see: r = 0 detached (prefix, sink), 1 near, 2 the tile itself and what follows it.
    `row_*[t, r]`: row blocks that see a key of key tile t: r = 0 contextual rows, 1 the tile itself and near rows, 2 the tail.
    """

    key_lo: Int[Array, "Tq 3"]
    key_hi: Int[Array, "Tq 3"]
    row_lo: Int[Array, "Tk 3"]
    row_hi: Int[Array, "Tk 3"]


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Who attends to whom inside a sequence of c contextual tokens, h history tokens and m targets.

    Every row sees itself. A contextual row sees all contextual and history tokens. A history row sees earlier tokens, a target sees
    contextual and history tokens, never another target; both limited as follows, i being the history index of the row (h for a target).

    Attributes:
      window: None is plain causal; w sees the w newest earlier history tokens (`i - j <= w`).
      full_rows: the newest `full_rows` history rows, and then every target, see everything earlier in spite of the window.
      prefix: the oldest `prefix` tokens of the sequence, contextual ones counted, are seen by all later rows; then a target sees all
        history.
      context_sink: contextual tokens are seen by all later rows; else only where i + 1 <= window (they share one place before the history).

    A contextual sink and a prefix both begin at the sequence's start, so they are one interval and the window is the other: no
    combination of these options needs a third. Masks of other origin go through `KeyIntervals.from_dense`, which rejects what does not fit.
    """

    window: int | None = None
    full_rows: int = 0
    prefix: int = 0
    context_sink: bool = True

    def __post_init__(self) -> None:
        for name in ("window", "full_rows", "prefix"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 0
            ):
                allowed = "None or an integer >= 0" if name == "window" else "an integer >= 0"
                raise ValueError(f"AttentionMask.{name} must be {allowed}, got {value!r}")

    def intervals(
        self, offsets: Any, num_rows: int, num_targets: Any = None, num_contextual: Any = None
    ) -> KeyIntervals:
        """Keys of every row, for jagged `offsets` int32[B+1] (may be traced) in a buffer of `num_rows` rows.

        `num_targets`, `num_contextual`: int32[B] or None (none of them). Where they exceed a sequence's length the result is
        clamped, not checked; `hstu_attention` checks what is concrete.
        """
        return KeyIntervals(
            *_intervals(jnp, self, *_places(jnp, offsets, num_rows, num_targets, num_contextual))
        )

    def row_intervals(
        self, offsets: Any, num_rows: int, num_targets: Any = None, num_contextual: Any = None
    ) -> RowIntervals:
        """Rows that see each key: `intervals` transposed."""
        return RowIntervals(
            *_row_intervals(
                jnp, self, *_places(jnp, offsets, num_rows, num_targets, num_contextual)
            )
        )

    def keys_at(
        self, start_R: Any, position_R: Any, contextual_R: Any, history_R: Any
    ) -> KeyIntervals:
        """Keys of rows given one by one: at `position_R` of a sequence whose first key is number `start_R`, with so many contextual and history
        tokens; from position contextual + history on, targets. A row of a sequence without either sees nothing.
        """
        real_R = jnp.ones_like(start_R, bool)
        return KeyIntervals(
            *_intervals(
                jnp,
                self,
                real_R,
                start_R,
                position_R,
                contextual_R,
                history_R,
                contextual_R + history_R,
            )
        )

    def dense(
        self, offsets: Any, num_rows: int, num_targets: Any = None, num_contextual: Any = None
    ) -> Bool[Array, "T T"]:
        """The mask as a matrix, diagonal included; rows and columns of padding are False. Memory O(T^2): references and tests only."""
        return self.intervals(offsets, num_rows, num_targets, num_contextual).dense(
            jnp.asarray(offsets)[-1]
        )

    def row_pairs(
        self, lengths: Any, num_rows: int, num_targets: Any = None, num_contextual: Any = None
    ) -> Int[np.ndarray, " T"]:
        """How many keys each row of a buffer sees, itself included, on the host; 0 on padding."""
        offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
        lo0, hi0, lo1, hi1 = _intervals(
            np, self, *_places(np, offsets, num_rows, num_targets, num_contextual)
        )
        return (hi0 - lo0) + (hi1 - lo1) + (np.arange(num_rows) < offsets[-1])

    def num_pairs(self, lengths: Any, num_targets: Any = None, num_contextual: Any = None) -> int:
        """Allowed (row, key) pairs of sequences of these `lengths`, exact, on the host: the unit of FLOP counts."""
        offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
        return int(self.row_pairs(lengths, int(offsets[-1]), num_targets, num_contextual).sum())


def _places(
    xp: ModuleType, offsets: Any, num_rows: int, num_targets: Any, num_contextual: Any
) -> tuple[Any, ...]:
    """Per row of the buffer: is it real, its sequence's start, its position, and the sequence's contextual, history and total counts."""
    offsets = xp.asarray(offsets)
    batch = offsets.shape[0] - 1
    row_T = xp.arange(num_rows, dtype=offsets.dtype)
    real_T = row_T < offsets[-1]
    if batch == 0:
        zero_T = xp.zeros_like(row_T)
        return real_T, zero_T, zero_T, zero_T, zero_T, zero_T
    if xp is np:
        segment_T = np.searchsorted(offsets[1:], row_T, side="right")
    else:
        segment_T = segment_ids(offsets, num_rows)
    segment_T = xp.minimum(segment_T, batch - 1)
    length_B = offsets[1:] - offsets[:-1]
    zero_B = xp.zeros_like(length_B)
    targets_B = (
        zero_B
        if num_targets is None
        else xp.clip(xp.asarray(num_targets).astype(offsets.dtype), zero_B, length_B)
    )
    contextual_B = (
        zero_B
        if num_contextual is None
        else xp.clip(xp.asarray(num_contextual).astype(offsets.dtype), zero_B, length_B - targets_B)
    )
    start_T = offsets[:-1][segment_T]
    history_B = length_B - targets_B - contextual_B
    return (
        real_T,
        start_T,
        row_T - start_T,
        contextual_B[segment_T],
        history_B[segment_T],
        length_B[segment_T],
    )


def _tidy(xp: ModuleType, real_T: Any, start_T: Any, *ranges: tuple[Any, Any]) -> list[Any]:
    """Ranges of positions to flat coordinates; empty ones and those of padding rows become (0, 0)."""
    out = []
    for lo, hi in ranges:
        some = real_T & (hi > lo)
        out += [xp.where(some, start_T + lo, 0), xp.where(some, start_T + hi, 0)]
    return out


def _intervals(
    xp: ModuleType, mask: AttentionMask, real: Any, start: Any, p: Any, c: Any, h: Any, n: Any
) -> list[Any]:
    end = c + h
    contextual, target = p < c, p >= end
    upper = xp.minimum(
        p, end
    )  # history rows stop before themselves, targets at the end of the history
    index = upper - c
    zero = xp.zeros_like(p)
    if mask.window is None:
        near, sink = zero, zero
    else:
        near = c + xp.maximum(index - mask.window, 0)
        sees_context = index + 1 <= mask.window
        if mask.prefix:
            near = xp.where(target, c, near)
        sink = xp.where(sees_context | mask.context_sink, c, 0)
        sink = xp.minimum(xp.maximum(sink, mask.prefix), upper)
        merged = near <= sink
        if mask.full_rows:
            merged |= index >= h - mask.full_rows
        near, sink = xp.where(merged, 0, near), xp.where(merged, 0, sink)
    lo0, hi0 = zero, xp.where(contextual, p, sink)
    lo1, hi1 = xp.where(contextual, p + 1, near), xp.where(contextual, end, upper)
    return _tidy(xp, real, start, (lo0, hi0), (lo1, hi1))


def _row_intervals(
    xp: ModuleType, mask: AttentionMask, real: Any, start: Any, k: Any, c: Any, h: Any, n: Any
) -> list[Any]:
    end = c + h
    real = real & (k < end)  # nobody but itself sees a target
    zero = xp.zeros_like(k)
    ctx = (zero, xp.minimum(k, c))
    if mask.window is None:
        near, tail = n, n
    else:
        w = mask.window
        contextual = k < c
        reach = xp.where(
            contextual, c + w, k + w + 1
        )  # first history row that the window has left behind
        seen_by_targets = xp.where(contextual, h + 1 <= w, (k >= end - w) | (mask.prefix > 0))
        always = (k < mask.prefix) | (contextual & mask.context_sink)
        # between a contextual key and the history stand contextual rows, which see it
        near = xp.where(
            always, n, xp.minimum(xp.where(contextual, xp.maximum(reach, c), reach), end)
        )
        tail = xp.where(seen_by_targets, end, n)
        if mask.full_rows:
            tail = c + xp.maximum(h - mask.full_rows, 0)
        tail = xp.maximum(tail, near)
    return _tidy(xp, real, start, ctx, (k + 1, near), (tail, n))


def tile_bounds(
    keys: KeyIntervals,
    rows: RowIntervals,
    num_real: Any,
    block_q: int,
    block_k: int,
    first_real: int = 0,
) -> TileBounds:
    """Ranges of blocks that meet, for query tiles of `block_q` rows and key tiles of `block_k` keys; the last tile may be short.

    A tile may straddle sequences: only its first sequence reaches before the tile and only its last beyond it, so
    three ranges do.

    Args:
      first_real, num_real: the rows between them see themselves.
    """
    num_rows = keys.lo0.shape[0]
    q_tiles, k_tiles = -(-num_rows // block_q), -(-num_rows // block_k)
    row_T = jnp.arange(num_rows, dtype=jnp.int32)
    sees_itself_T = (
        row_T < num_real if first_real == 0 else (row_T >= first_real) & (row_T < num_real)
    )
    own = _only(row_T, row_T + 1, sees_itself_T)

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
    key = [_hull(parts, num_rows, q_tiles, block_q, block_k) for parts in (far, before, around)]

    first_T = row_T // block_k * block_k
    end_T = jnp.minimum(first_T + block_k, num_rows)
    touches = rows.near_lo <= end_T  # always, where rows and keys are those of one batch
    front = [_only(rows.ctx_lo, rows.ctx_hi, rows.ctx_lo < first_T)]
    beyond = [_only(rows.tail_lo, rows.tail_hi, rows.tail_hi > end_T)]
    beyond += [
        _only(rows.ctx_lo, rows.ctx_hi, rows.ctx_hi > end_T),
        _only(rows.near_lo, rows.near_hi, ~touches),
    ]
    row = [
        _hull(front, num_rows, k_tiles, block_k, block_q),
        _hull(
            [own, _only(rows.near_lo, rows.near_hi, touches)], num_rows, k_tiles, block_k, block_q
        ),
        _hull(beyond, num_rows, k_tiles, block_k, block_q),
    ]
    return TileBounds(*_disjoint(key), *_disjoint(row))


def _only(lo: Any, hi: Any, keep: Any) -> tuple[Any, Any]:
    return jnp.where(keep, lo, 0), jnp.where(keep, hi, 0)


def _hull(
    parts: list[tuple[Any, Any]], num_rows: int, tiles: int, block: int, other_block: int
) -> tuple[Any, Any]:
    """Smallest range of blocks of `other_block` that holds all intervals of each tile of `block`; (big, 0) where there is none."""
    pad = (0, tiles * block - num_rows)
    big = FAR
    lo = jnp.stack([jnp.where(hi > lo, lo, big) for lo, hi in parts]).min(0)
    hi = jnp.stack([hi for _, hi in parts]).max(0)
    lo = jnp.pad(lo, pad, constant_values=big).reshape(tiles, block).min(1) // other_block
    hi = -(-jnp.pad(hi, pad).reshape(tiles, block).max(1) // other_block)
    return lo, hi


def _disjoint(ranges: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Ranges that may overlap or be empty (lo > hi), to ascending, disjoint ones that hold them.

    They are stacked on the last axis.
    """
    ranges, out = list(ranges), []
    reached = jnp.zeros_like(ranges[0][1])
    for i in range(len(ranges)):
        lo, hi = ranges[i]
        # Where a later range begins before this one's end, this one stops there, so that ranges
        # ascend, and the later one takes the rest.
        for j in range(i + 1, len(ranges)):
            later_lo, later_hi = ranges[j]
            ranges[j] = later_lo, jnp.where(later_lo < hi, jnp.maximum(later_hi, hi), later_hi)
            hi = jnp.where(later_hi > later_lo, jnp.minimum(hi, jnp.maximum(later_lo, lo)), hi)
        lo = jnp.maximum(lo, reached)
        some = hi > lo
        reached = jnp.where(some, hi, reached)
        out.append((jnp.where(some, lo, 0), jnp.where(some, hi, 0)))
    return (
        jnp.stack([lo for lo, _ in out], axis=-1).astype(jnp.int32),
        jnp.stack([hi for _, hi in out], axis=-1).astype(jnp.int32),
    )


def common_blocks(lo: Any, hi: Any, tile: int, block: int) -> tuple[Any, Any]:
    """Range of blocks that lie in the interval [lo, hi) of every row of a tile, for each tile."""
    begin = -(-lo.reshape(-1, tile).max(1) // block)
    return begin, jnp.maximum(hi.reshape(-1, tile).min(1) // block, begin)


def hull_blocks(lo: Any, hi: Any, tile: int, block: int) -> tuple[Any, Any]:
    """Smallest range of blocks that holds the intervals [lo, hi) of all rows of a tile, for each tile."""
    some = hi > lo
    begin = jnp.where(some, lo, FAR).reshape(-1, tile).min(1) // block
    end = -(-jnp.where(some, hi, 0).reshape(-1, tile).max(1) // block)
    return jnp.minimum(begin, end), end
