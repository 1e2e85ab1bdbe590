"""Triton kernels of short sequences: forward, and one pass for all gradients.

`attention.py` launches them. A tile has whole sequences: rows [tiles[i], tiles[i + 1]), at most as
many as a program of the backward holds. So no pair is missed and none visited twice, and every
gradient is written once, in a fixed order; only those of the bias tables are added in memory.

Names in capitals are known when a kernel is compiled, as in `triton/kernels.py`. BQ rows and BK
keys a step; TILES there are.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language import constexpr

from kernels.hstu_attention.triton.kernels import (
    MASKED_SCORE,
    bucket_of,
    entry_of,
    gate,
    row_intervals,
    seen_pairs,
)


@triton.jit
@no_type_check
def _load(base, row, inside, H, W, WIDE):
    """Rows of one head, zero where not `inside` and beyond the head's width."""
    width = tl.arange(0, WIDE)
    inside = inside[:, None]
    if W != WIDE:
        inside = inside & (width[None, :] < W)
    return tl.load(base + row[:, None] * (H * W) + width[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def _store(base, x, row, inside, H, W):
    width = tl.arange(0, x.shape[1])
    inside = inside[:, None] & (width[None, :] < W)
    pointers = base + row[:, None] * (H * W) + width[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _clear(base, first, T, step, BLOCK, H, W, WIDE):
    """Zeros in blocks of padding rows, from row `first` on, `step` apart."""
    zeros = tl.zeros([BLOCK, WIDE], tl.float32)
    for row0 in range(first, T, step):
        row = row0 + tl.arange(0, BLOCK)
        _store(base, zeros, row.to(tl.int64), row < T, H, W)


@triton.jit
@no_type_check
def _intervals(keys, first, row, real):
    """Intervals of keys of a tile's rows, counted from the tile's first row."""
    lo0, hi0, lo1, hi1 = row_intervals(keys, first + row, real)
    return lo0 - first, hi0 - first, lo1 - first, hi1 - first


@triton.jit
@no_type_check
def _times(times, row, real, BUCKETS):
    found = row
    if BUCKETS:
        found = tl.load(times + row, mask=real, other=0)
    return found


@triton.jit
@no_type_check
def _scores(
    q_QK, k_KK, row, key, row_time, key_time, seen, tables, ALPHA, POSITIONS, BUCKETS, PRECISION
):
    """(scores with their bias, entries of the position table, buckets of the time table)."""
    score = tl.dot(q_QK, tl.trans(k_KK), input_precision=PRECISION) * ALPHA
    entry, bucket = score, score
    if POSITIONS:
        entry = entry_of(row[:, None], key[None, :], POSITIONS)
        score += tl.load(tables[0] + entry)
    if BUCKETS:
        bucket = bucket_of(row_time[:, None], key_time[None, :], tables[2], BUCKETS)
        score += tl.load(tables[1] + bucket)
    return tl.where(seen, score, MASKED_SCORE), entry, bucket


@triton.jit
@no_type_check
def _slopes(score, g_QV, v_KV, row_scale, ROW_SCALE, PRECISION, APPROXIMATE):
    """(weights, slopes of the scores)."""
    d_weight = tl.dot(g_QV, tl.trans(v_KV), input_precision=PRECISION)
    open_gate = gate(score, APPROXIMATE)
    weight = score * open_gate
    d_score = d_weight * (open_gate + weight * (1.0 - open_gate))
    if ROW_SCALE:
        weight *= row_scale[:, None]
        d_score *= row_scale[:, None]
    return weight, d_score


@triton.jit
@no_type_check
def _add_to_tables(d_tables, d_bias, entry, bucket, seen, POSITIONS, BUCKETS):
    if POSITIONS:
        tl.atomic_add(d_tables + entry, d_bias, mask=seen, sem="relaxed")
    if BUCKETS:
        tl.atomic_add(d_tables + POSITIONS + bucket, d_bias, mask=seen, sem="relaxed")


@triton.jit
@no_type_check
def _factors(scale, row, real, ROW_SCALE):
    """(factors of rows, factor of all)."""
    row_scale, factor = row.to(tl.float32), 1.0
    if ROW_SCALE:
        row_scale = tl.load(scale + row, mask=real, other=0.0)
    else:
        factor = tl.load(scale)
    return row_scale, factor


@triton.jit
@no_type_check
def forward(
    q,
    k,
    v,
    scale,
    tiles,
    keys_lo0,
    keys_hi0,
    keys_lo1,
    keys_hi1,
    position_table,
    time_table,
    starts,
    times,
    query_times,
    out,
    T: constexpr,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    WK: constexpr,
    WV: constexpr,
    BQ: constexpr,
    BK: constexpr,
    TILES: constexpr,
    PIECES: constexpr,
    ALPHA: constexpr,
    ROW_SCALE: constexpr,
    POSITIONS: constexpr,
    BUCKETS: constexpr,
    PRECISION: constexpr,
    APPROXIMATE: constexpr,
):
    """out[T, H, V], zero on padding rows. A program has one of `PIECES` blocks of a tile's rows."""
    number, head = tl.program_id(0) // H, tl.program_id(0) % H
    tile, piece = number // PIECES, number % PIECES
    first, end, num_real = tl.load(tiles + tile), tl.load(tiles + tile + 1), tl.load(tiles + TILES)
    if first + piece * BQ < end:
        begin = first.to(tl.int64) * H  # of pointers: what follows counts from the tile's first row
        row = piece * BQ + tl.arange(0, BQ)
        real = first + row < end
        keys, tables = (
            (keys_lo0, keys_hi0, keys_lo1, keys_hi1),
            (position_table, time_table, starts),
        )
        intervals = _intervals(keys, first, row, real)
        q_QK = _load(q + begin * K + head * K, row, real, H, K, WK)
        row_time = _times(query_times, first + row, real, BUCKETS)
        last = tl.maximum(tl.where(real, row + 1, 0), tl.maximum(intervals[1], intervals[3]))
        k += begin * K + head * K
        v += begin * V + head * V
        sum_QV = tl.zeros([BQ, WV], tl.float32)
        # A block is loaded while the one before is worked on, the first one before all else.
        key = tl.arange(0, BK)
        k_next = _load(k, key, first + key < end, H, K, WK)
        v_next = _load(v, key, first + key < end, H, V, WV)
        stop = tl.max(last, 0)
        for key0 in range(0, stop, BK):
            key = key0 + tl.arange(0, BK)
            real_key = first + key < end
            k_KK, v_KV = k_next, v_next
            more = (first + key + BK < end) & (key0 + BK < stop)
            k_next = _load(k, key + BK, more, H, K, WK)
            v_next = _load(v, key + BK, more, H, V, WV)
            key_time = _times(times, first + key, real_key, BUCKETS)
            seen = seen_pairs(row, key, intervals, end - first, 1)
            score, _, _ = _scores(
                q_QK,
                k_KK,
                row,
                key,
                row_time,
                key_time,
                seen,
                tables,
                ALPHA,
                POSITIONS,
                BUCKETS,
                PRECISION,
            )
            weight = score * gate(score, APPROXIMATE)
            sum_QV = tl.dot(weight.to(v_KV.dtype), v_KV, sum_QV, input_precision=PRECISION)
        if ROW_SCALE:
            sum_QV *= tl.load(scale + first + row, mask=real, other=0.0)[:, None]
        else:
            sum_QV *= tl.load(scale)
        _store(out + begin * V + head * V, sum_QV, row, real, H, V)
    _clear(out + head * V, num_real + number * BQ, T, TILES * PIECES * BQ, BQ, H, V, WV)


@triton.jit
@no_type_check
def backward(
    q,
    k,
    v,
    g,
    scale,
    tiles,
    keys_lo0,
    keys_hi0,
    keys_lo1,
    keys_hi1,
    position_table,
    time_table,
    starts,
    times,
    query_times,
    dq,
    dk,
    dv,
    d_tables,
    T: constexpr,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    WK: constexpr,
    WV: constexpr,
    BQ: constexpr,
    BK: constexpr,
    TILES: constexpr,
    PIECES: constexpr,
    ALPHA: constexpr,
    ROW_SCALE: constexpr,
    POSITIONS: constexpr,
    BUCKETS: constexpr,
    PRECISION: constexpr,
    APPROXIMATE: constexpr,
    COPIES: constexpr,
):
    """dq, dk, dv, and gradients of the tables, added to one of `COPIES` copies.

    A program has a whole tile (`PIECES` is 1): its rows stay, its keys come in blocks.
    """
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, end, num_real = tl.load(tiles + tile), tl.load(tiles + tile + 1), tl.load(tiles + TILES)
    begin = first.to(tl.int64) * H  # of pointers: what follows counts from the tile's first row
    keys, tables = (keys_lo0, keys_hi0, keys_lo1, keys_hi1), (position_table, time_table, starts)
    d_tables += tl.program_id(0) % COPIES * (POSITIONS + BUCKETS)
    row = tl.arange(0, BQ)
    real = first + row < end
    intervals = _intervals(keys, first, row, real)
    q_QK = _load(q + begin * K + head * K, row, real, H, K, WK)
    g_QV = _load(g + begin * V + head * V, row, real, H, V, WV)
    row_time = _times(query_times, first + row, real, BUCKETS)
    row_scale, factor = _factors(scale, first + row, real, ROW_SCALE)
    dq_QK = tl.zeros([BQ, WK], tl.float32)
    k += begin * K + head * K
    v += begin * V + head * V
    for key0 in range(0, end - first, BK):
        key = key0 + tl.arange(0, BK)
        real_key = first + key < end
        k_KK, v_KV = _load(k, key, real_key, H, K, WK), _load(v, key, real_key, H, V, WV)
        key_time = _times(times, first + key, real_key, BUCKETS)
        seen = seen_pairs(row, key, intervals, end - first, 1)
        score, entry, bucket = _scores(
            q_QK,
            k_KK,
            row,
            key,
            row_time,
            key_time,
            seen,
            tables,
            ALPHA,
            POSITIONS,
            BUCKETS,
            PRECISION,
        )
        weight, d_score = _slopes(score, g_QV, v_KV, row_scale, ROW_SCALE, PRECISION, APPROXIMATE)
        _add_to_tables(d_tables, d_score * factor, entry, bucket, seen, POSITIONS, BUCKETS)
        d_score = d_score.to(q_QK.dtype)
        dv_VK = tl.dot(tl.trans(g_QV), weight.to(g_QV.dtype), input_precision=PRECISION)
        dk_KK = tl.dot(tl.trans(q_QK), d_score, input_precision=PRECISION)
        dq_QK = tl.dot(d_score, k_KK, dq_QK, input_precision=PRECISION)
        _store(dk + begin * K + head * K, tl.trans(dk_KK) * (factor * ALPHA), key, real_key, H, K)
        _store(dv + begin * V + head * V, tl.trans(dv_VK) * factor, key, real_key, H, V)
    _store(dq + begin * K + head * K, dq_QK * (factor * ALPHA), row, real, H, K)
    padding, step = num_real + tile * BK, TILES * BK
    _clear(dq + head * K, padding, T, step, BK, H, K, WK)
    _clear(dk + head * K, padding, T, step, BK, H, K, WK)
    _clear(dv + head * V, padding, T, step, BK, H, V, WV)


@triton.jit
@no_type_check
def backward_in_parts(
    q,
    k,
    v,
    g,
    scale,
    tiles,
    keys_lo0,
    keys_hi0,
    keys_lo1,
    keys_hi1,
    ctx_lo,
    ctx_hi,
    near_hi,
    tail_hi,
    position_table,
    time_table,
    starts,
    times,
    query_times,
    dq,
    dk,
    dv,
    d_tables,
    T: constexpr,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    WK: constexpr,
    WV: constexpr,
    BQ: constexpr,
    BK: constexpr,
    TILES: constexpr,
    PIECES: constexpr,
    ALPHA: constexpr,
    ROW_SCALE: constexpr,
    POSITIONS: constexpr,
    BUCKETS: constexpr,
    PRECISION: constexpr,
    APPROXIMATE: constexpr,
    COPIES: constexpr,
):
    """`backward` for tiles that are too much for a program.

    One of two programs has `PIECES` blocks of a tile's rows in turn and sums dq over the keys; the
    other has blocks of its keys (as many as rows) and sums dk and dv over the rows.
    """
    half: constexpr = TILES * PIECES * H
    number, head = tl.program_id(0) % half // H, tl.program_id(0) % H
    tile, piece = number // PIECES, number % PIECES
    first, end, num_real = tl.load(tiles + tile), tl.load(tiles + tile + 1), tl.load(tiles + TILES)
    begin = first.to(tl.int64) * H  # of pointers: what follows counts from the tile's first row
    keys, tables = (keys_lo0, keys_hi0, keys_lo1, keys_hi1), (position_table, time_table, starts)
    q += begin * K + head * K
    k += begin * K + head * K
    v += begin * V + head * V
    g += begin * V + head * V
    some, sums_rows = first + piece * BQ < end, tl.program_id(0) >= half
    if some & (tl.program_id(0) < half):
        d_tables += tl.program_id(0) % COPIES * (POSITIONS + BUCKETS)
        row = piece * BQ + tl.arange(0, BQ)
        real = first + row < end
        intervals = _intervals(keys, first, row, real)
        q_QK, g_QV = _load(q, row, real, H, K, WK), _load(g, row, real, H, V, WV)
        row_time = _times(query_times, first + row, real, BUCKETS)
        row_scale, factor = _factors(scale, first + row, real, ROW_SCALE)
        last = tl.maximum(tl.where(real, row + 1, 0), tl.maximum(intervals[1], intervals[3]))
        dq_QK = tl.zeros([BQ, WK], tl.float32)
        stop = tl.max(last, 0)
        key = tl.arange(0, BK)
        k_next = _load(k, key, first + key < end, H, K, WK)
        v_next = _load(v, key, first + key < end, H, V, WV)
        for key0 in range(0, stop, BK):
            key = key0 + tl.arange(0, BK)
            real_key = first + key < end
            k_KK, v_KV = k_next, v_next
            more = (first + key + BK < end) & (key0 + BK < stop)
            k_next = _load(k, key + BK, more, H, K, WK)
            v_next = _load(v, key + BK, more, H, V, WV)
            key_time = _times(times, first + key, real_key, BUCKETS)
            seen = seen_pairs(row, key, intervals, end - first, 1)
            score, entry, bucket = _scores(
                q_QK,
                k_KK,
                row,
                key,
                row_time,
                key_time,
                seen,
                tables,
                ALPHA,
                POSITIONS,
                BUCKETS,
                PRECISION,
            )
            _, d_score = _slopes(score, g_QV, v_KV, row_scale, ROW_SCALE, PRECISION, APPROXIMATE)
            _add_to_tables(d_tables, d_score * factor, entry, bucket, seen, POSITIONS, BUCKETS)
            dq_QK = tl.dot(d_score.to(k_KK.dtype), k_KK, dq_QK, input_precision=PRECISION)
        _store(dq + begin * K + head * K, dq_QK * (factor * ALPHA), row, real, H, K)
    if some & sums_rows:
        key = piece * BQ + tl.arange(0, BQ)
        real_key = first + key < end
        k_KK, v_KV = _load(k, key, real_key, H, K, WK), _load(v, key, real_key, H, V, WV)
        key_time = _times(times, first + key, real_key, BUCKETS)
        far = tl.load(ctx_lo + first + key, mask=real_key, other=0) - first
        some_far = tl.load(ctx_hi + first + key, mask=real_key, other=0) - first > far
        far = tl.where(some_far & real_key, far, key)
        last = tl.where(real_key, key + 1, 0)
        last = tl.maximum(last, tl.load(near_hi + first + key, mask=real_key, other=0) - first)
        last = tl.maximum(last, tl.load(tail_hi + first + key, mask=real_key, other=0) - first)
        last = tl.maximum(last, tl.load(ctx_hi + first + key, mask=real_key, other=0) - first)
        dk_KK, dv_VK = tl.zeros([WK, BQ], tl.float32), tl.zeros([WV, BQ], tl.float32)
        factor = 1.0
        for row0 in range(tl.min(far, 0) // BK * BK, tl.max(last, 0), BK):
            row = row0 + tl.arange(0, BK)
            real = first + row < end
            intervals = _intervals(keys, first, row, real)
            q_QK, g_QV = _load(q, row, real, H, K, WK), _load(g, row, real, H, V, WV)
            row_time = _times(query_times, first + row, real, BUCKETS)
            row_scale, factor = _factors(scale, first + row, real, ROW_SCALE)
            seen = seen_pairs(row, key, intervals, end - first, 1)
            score, _, _ = _scores(
                q_QK,
                k_KK,
                row,
                key,
                row_time,
                key_time,
                seen,
                tables,
                ALPHA,
                POSITIONS,
                BUCKETS,
                PRECISION,
            )
            weight, d_score = _slopes(
                score, g_QV, v_KV, row_scale, ROW_SCALE, PRECISION, APPROXIMATE
            )
            weight, d_score = weight.to(g_QV.dtype), d_score.to(q_QK.dtype)
            dv_VK = tl.dot(tl.trans(g_QV), weight, dv_VK, input_precision=PRECISION)
            dk_KK = tl.dot(tl.trans(q_QK), d_score, dk_KK, input_precision=PRECISION)
        dk_KK = tl.trans(dk_KK) * (factor * ALPHA)
        _store(dk + begin * K + head * K, dk_KK, key, real_key, H, K)
        _store(dv + begin * V + head * V, tl.trans(dv_VK) * factor, key, real_key, H, V)
    padding, step = num_real + number * BQ, TILES * PIECES * BQ
    if sums_rows:
        _clear(dk + head * K, padding, T, step, BQ, H, K, WK)
        _clear(dv + head * V, padding, T, step, BQ, H, V, WV)
    else:
        _clear(dq + head * K, padding, T, step, BQ, H, K, WK)
