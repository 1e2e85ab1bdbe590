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
        keys = (keys_lo0 + first, keys_hi0 + first, keys_lo1 + first, keys_hi1 + first)
        lo0, hi0, lo1, hi1 = row_intervals(keys, row, real)
        intervals = (lo0 - first, hi0 - first, lo1 - first, hi1 - first)
        q_QK = _load(q + begin * K + head * K, row, real, H, K, WK)
        row_time = row
        if BUCKETS:
            row_time = tl.load(query_times + first + row, mask=real, other=0)
        last = tl.max(tl.maximum(tl.where(real, row + 1, 0), tl.maximum(hi0, hi1) - first), 0)
        sum_QV = tl.zeros([BQ, WV], tl.float32)
        for key0 in range(0, last, BK):
            key = key0 + tl.arange(0, BK)
            real_key = first + key < end
            k_KK = _load(k + begin * K + head * K, key, real_key, H, K, WK)
            v_KV = _load(v + begin * V + head * V, key, real_key, H, V, WV)
            score = tl.dot(q_QK, tl.trans(k_KK), input_precision=PRECISION) * ALPHA
            if POSITIONS:
                score += tl.load(position_table + entry_of(row[:, None], key[None, :], POSITIONS))
            if BUCKETS:
                key_time = tl.load(times + first + key, mask=real_key, other=0)
                bucket = bucket_of(row_time[:, None], key_time[None, :], starts, BUCKETS)
                score += tl.load(time_table + bucket)
            seen = seen_pairs(row, key, intervals, end - first, 1)
            score = tl.where(seen, score, MASKED_SCORE)
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
    ALPHA: constexpr,
    ROW_SCALE: constexpr,
    POSITIONS: constexpr,
    BUCKETS: constexpr,
    PRECISION: constexpr,
    APPROXIMATE: constexpr,
    COPIES: constexpr,
):
    """dq, dk, dv, and gradients of the tables in one of `COPIES` copies, as `backward_queries`.

    A program has a whole tile: its rows stay, its keys come in blocks.
    """
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, end, num_real = tl.load(tiles + tile), tl.load(tiles + tile + 1), tl.load(tiles + TILES)
    begin = first.to(tl.int64) * H  # of pointers: what follows counts from the tile's first row
    row = tl.arange(0, BQ)
    real = first + row < end
    keys = (keys_lo0 + first, keys_hi0 + first, keys_lo1 + first, keys_hi1 + first)
    lo0, hi0, lo1, hi1 = row_intervals(keys, row, real)
    intervals = (lo0 - first, hi0 - first, lo1 - first, hi1 - first)
    q_QK = _load(q + begin * K + head * K, row, real, H, K, WK)
    g_QV = _load(g + begin * V + head * V, row, real, H, V, WV)
    row_time = row
    if BUCKETS:
        row_time = tl.load(query_times + first + row, mask=real, other=0)
    factor = 1.0
    if ROW_SCALE:
        row_scale = tl.load(scale + first + row, mask=real, other=0.0)[:, None]
    else:
        factor = tl.load(scale)
    d_tables += tl.program_id(0) % COPIES * (POSITIONS + BUCKETS)
    dq_QK = tl.zeros([BQ, WK], tl.float32)
    for key0 in range(0, end - first, BK):
        key = key0 + tl.arange(0, BK)
        real_key = first + key < end
        k_KK = _load(k + begin * K + head * K, key, real_key, H, K, WK)
        v_KV = _load(v + begin * V + head * V, key, real_key, H, V, WV)
        score = tl.dot(q_QK, tl.trans(k_KK), input_precision=PRECISION) * ALPHA
        d_weight = tl.dot(g_QV, tl.trans(v_KV), input_precision=PRECISION)
        if POSITIONS:
            entry = entry_of(row[:, None], key[None, :], POSITIONS)
            score += tl.load(position_table + entry)
        if BUCKETS:
            key_time = tl.load(times + first + key, mask=real_key, other=0)
            bucket = bucket_of(row_time[:, None], key_time[None, :], starts, BUCKETS)
            score += tl.load(time_table + bucket)
        seen = seen_pairs(row, key, intervals, end - first, 1)
        score = tl.where(seen, score, MASKED_SCORE)
        open_gate = gate(score, APPROXIMATE)
        weight = score * open_gate
        d_score = d_weight * (open_gate + weight * (1.0 - open_gate))
        if ROW_SCALE:
            weight *= row_scale
            d_score *= row_scale
        if POSITIONS:
            tl.atomic_add(d_tables + entry, d_score * factor, mask=seen, sem="relaxed")
        if BUCKETS:
            buckets = d_tables + POSITIONS + bucket
            tl.atomic_add(buckets, d_score * factor, mask=seen, sem="relaxed")
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
