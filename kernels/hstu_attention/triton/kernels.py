"""Triton kernels of `hstu_attention`: forward, gradient of q (and of the bias tables), of k and v.

`attention.py` launches them. A program owns one tile of one head and walks over the blocks of the
other side that its bounds name. The walk has two loops: one over blocks that every row of the tile
sees, without any mask code, and one over the rest. Loads are masked by the number of real rows, so
that whatever padding holds never enters, and by the head's width, so that odd widths need no padded
copy: products see zeros there.

`no_type_check` keeps the run-time type checks of tests from wrapping what `triton.jit` compiles.

Names in capitals are known when a kernel is compiled. Shapes: BQ query rows, BK keys, WK and WV the
padded widths. `T`, `H`, `K`, `V` are those of the buffers [T, H, width].
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language import constexpr

FAR = constexpr(2**30)
MASKED_SCORE = constexpr(-1e30)  # silu and its derivative are exactly 0 here
BUCKETS_PER_OCTAVE = constexpr(0.6931471805599453 / 0.301)


@triton.jit
@no_type_check
def approximate_tanh(x):
    """tanh(x), one instruction of 11 bits."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
@no_type_check
def gate(score, APPROXIMATE):
    """sigmoid(score); approximate where products are in bfloat16 anyway."""
    if APPROXIMATE:
        opened = 0.5 * approximate_tanh(0.5 * score) + 0.5
    else:
        opened = 1.0 / (1.0 + tl.exp(-score))
    return opened


@triton.jit
@no_type_check
def entry_of(row, key, POSITIONS):
    """Entry of the position table, its ends for distances beyond."""
    return tl.minimum(tl.maximum(POSITIONS // 2 + key - row, 0), POSITIONS - 1)


@triton.jit
@no_type_check
def octaves_of(x):
    """log2(x), one instruction, right to 2^-22."""
    return tl.inline_asm_elementwise(
        "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
@no_type_check
def bucket_of(row_time, key_time, starts, BUCKETS):
    """The bucket of a gap, exact.

    The logarithm finds the nearest edge, integers decide on which side of it the gap lies.
    """
    gap = tl.abs(row_time - key_time)
    octaves = octaves_of(tl.maximum(gap, 1).to(tl.float32))
    nearest = (octaves * BUCKETS_PER_OCTAVE + 0.5).to(tl.int32)
    nearest = tl.minimum(nearest, BUCKETS - 1)
    return tl.maximum(nearest - (gap < tl.load(starts + nearest)).to(tl.int32), 0)


@triton.jit
@no_type_check
def _load(base, block, num_real, BLOCK, H, W, WIDE, FULL):
    """Rows [block * BLOCK, ...) of one head, zero beyond the real rows and the head's width."""
    offset, width = tl.arange(0, BLOCK), tl.arange(0, WIDE)
    pointers = (
        base + block.to(tl.int64) * (BLOCK * H * W) + (offset[:, None] * (H * W) + width[None, :])
    )
    if FULL:
        if W == WIDE:
            x = tl.load(pointers)
        else:
            x = tl.load(pointers, mask=width[None, :] < W, other=0.0)
    else:
        inside = (block * BLOCK + offset < num_real)[:, None]
        if W != WIDE:
            inside = inside & (width[None, :] < W)
        x = tl.load(pointers, mask=inside, other=0.0)
    return x


@triton.jit
@no_type_check
def _store(base, x, block, T, H, W):
    offset, width = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    pointers = (
        base
        + block.to(tl.int64) * (x.shape[0] * H * W)
        + (offset[:, None] * (H * W) + width[None, :])
    )
    inside = (block * x.shape[0] + offset < T)[:, None] & (width[None, :] < W)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _ranges(bounds_lo, bounds_hi, tile, all_lo, all_hi, BLOCK):
    """The blocks of a tile: (l0, h0, l1, f0, f1, h1, l2, h2), the bounds of three ranges.

    Blocks [f0, f1) of the middle range need no mask: they lie in [all_lo, all_hi), which every row
    (or key) of the tile sees.
    """
    l0, h0 = tl.load(bounds_lo + tile * 3), tl.load(bounds_hi + tile * 3)
    l1, h1 = tl.load(bounds_lo + tile * 3 + 1), tl.load(bounds_hi + tile * 3 + 1)
    l2, h2 = tl.load(bounds_lo + tile * 3 + 2), tl.load(bounds_hi + tile * 3 + 2)
    f0 = tl.minimum(tl.maximum((all_lo + BLOCK - 1) // BLOCK, l1), h1)
    f1 = tl.maximum(tl.minimum(all_hi // BLOCK, h1), f0)
    return l0, h0, l1, f0, f1, h1, l2, h2


@triton.jit
@no_type_check
def _count(ranges, FULL):
    """How many blocks need no mask, or one."""
    l0, h0, l1, f0, f1, h1, l2, h2 = ranges
    if FULL:
        count = f1 - f0
    else:
        count = (h0 - l0) + (f0 - l1) + (h1 - f1) + (h2 - l2)
    return count


@triton.jit
@no_type_check
def _pick(i, ranges, FULL):
    """Number i of the blocks [f0, f1), or of the masked [l0, h0), [l1, f0), [f1, h1), [l2, h2)."""
    l0, h0, l1, f0, f1, h1, l2, _ = ranges
    if FULL:
        block = f0 + i
    else:
        block = l0 + i
        block = tl.where(block >= h0, block - h0 + l1, block)
        past = i - (h0 - l0)
        block = tl.where(past >= f0 - l1, past - (f0 - l1) + f1, block)
        past = past - (f0 - l1)
        block = tl.where(past >= h1 - f1, past - (h1 - f1) + l2, block)
    return block


@triton.jit
@no_type_check
def row_intervals(keys, row, real):
    """The two intervals of keys of each row, from pointers to their four ends."""
    lo0 = tl.load(keys[0] + row, mask=real, other=0)
    hi0 = tl.load(keys[1] + row, mask=real, other=0)
    lo1 = tl.load(keys[2] + row, mask=real, other=0)
    hi1 = tl.load(keys[3] + row, mask=real, other=0)
    return lo0, hi0, lo1, hi1


@triton.jit
@no_type_check
def seen_pairs(row, key, intervals, num_real, AXIS):
    """Who sees whom; rows stand along the axis that is not `AXIS`."""
    lo0, hi0, lo1, hi1 = intervals
    row, key = tl.expand_dims(row, AXIS), tl.expand_dims(key, 1 - AXIS)
    return (
        ((key >= tl.expand_dims(lo0, AXIS)) & (key < tl.expand_dims(hi0, AXIS)))
        | ((key >= tl.expand_dims(lo1, AXIS)) & (key < tl.expand_dims(hi1, AXIS)))
        | ((key == row) & (row < num_real))
    )


@triton.jit
@no_type_check
def _begin_rows(order, num_real_ptr, bounds, keys, query_times, H, BQ, BK, ORDERED, BUCKETS):
    """What both kernels over query tiles know of a tile.

    (tile, head, near, row, real, row_time, num_real, its intervals, its ranges of blocks);
    `near` is an arange over keys.
    """
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    if ORDERED:
        tile = tl.load(order + tile)
    num_real = tl.load(num_real_ptr)
    near = tl.arange(0, BK)
    row = tile * BQ + tl.arange(0, BQ)
    real = row < num_real
    intervals = row_intervals(keys, row, real)
    all_lo, all_hi = tl.max(intervals[2], 0), tl.min(tl.where(real, intervals[3], FAR), 0)
    ranges = _ranges(bounds[0], bounds[1], tile, all_lo, all_hi, BK)
    row_time = row
    if BUCKETS:
        row_time = tl.load(query_times + row, mask=real, other=0)
    return tile, head, near, row, real, row_time, num_real, intervals, ranges


@triton.jit
@no_type_check
def forward(
    q,
    k,
    v,
    scale,
    num_real_ptr,
    order,
    bounds_lo,
    bounds_hi,
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
    ALPHA: constexpr,
    ROW_SCALE: constexpr,
    ORDERED: constexpr,
    POSITIONS: constexpr,
    BUCKETS: constexpr,
    PRECISION: constexpr,
    APPROXIMATE: constexpr,
):
    """out[T, H, V], zero on padding rows."""
    bounds, keys = (bounds_lo, bounds_hi), (keys_lo0, keys_hi0, keys_lo1, keys_hi1)
    tile, head, near, row, real, row_time, num_real, intervals, ranges = _begin_rows(
        order, num_real_ptr, bounds, keys, query_times, H, BQ, BK, ORDERED, BUCKETS
    )
    q_QK = _load(q + head * K, tile, num_real, BQ, H, K, WK, False)
    sum_QV = tl.zeros([BQ, WV], tl.float32)
    for FULL in tl.static_range(2):
        for i in range(_count(ranges, FULL)):
            block = _pick(i, ranges, FULL)
            key = block * BK + near
            k_KK = _load(k + head * K, block, num_real, BK, H, K, WK, FULL)
            v_KV = _load(v + head * V, block, num_real, BK, H, V, WV, FULL)
            score = tl.dot(q_QK, tl.trans(k_KK), input_precision=PRECISION) * ALPHA
            if POSITIONS:
                score += tl.load(position_table + entry_of(row[:, None], key[None, :], POSITIONS))
            if BUCKETS:
                key_time = tl.load(times + key, mask=key < num_real, other=0)
                bucket = bucket_of(row_time[:, None], key_time[None, :], starts, BUCKETS)
                score += tl.load(time_table + bucket)
            if not FULL:
                seen = seen_pairs(row, key, intervals, num_real, 1)
                score = tl.where(seen, score, MASKED_SCORE)
            weight = score * gate(score, APPROXIMATE)
            sum_QV = tl.dot(weight.to(v_KV.dtype), v_KV, sum_QV, input_precision=PRECISION)
    if ROW_SCALE:
        sum_QV *= tl.load(scale + row, mask=real, other=0.0)[:, None]
    else:
        sum_QV *= tl.load(scale)
    sum_QV = tl.where(real[:, None], sum_QV, 0.0)
    _store(out + head * V, sum_QV, tile, T, H, V)


@triton.jit
@no_type_check
def backward_queries(
    q,
    k,
    v,
    g,
    scale,
    num_real_ptr,
    order,
    bounds_lo,
    bounds_hi,
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
    d_tables,
    T: constexpr,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    WK: constexpr,
    WV: constexpr,
    BQ: constexpr,
    BK: constexpr,
    ALPHA: constexpr,
    ROW_SCALE: constexpr,
    ORDERED: constexpr,
    POSITIONS: constexpr,
    BUCKETS: constexpr,
    PRECISION: constexpr,
    APPROXIMATE: constexpr,
    COPIES: constexpr,
):
    """dq[T, H, K], and gradients of the tables.

    Those are added to one of `COPIES` copies d_tables[COPIES, POSITIONS + BUCKETS], so that adds to
    one address are rare.
    """
    bounds, keys = (bounds_lo, bounds_hi), (keys_lo0, keys_hi0, keys_lo1, keys_hi1)
    tile, head, near, row, real, row_time, num_real, intervals, ranges = _begin_rows(
        order, num_real_ptr, bounds, keys, query_times, H, BQ, BK, ORDERED, BUCKETS
    )
    if ROW_SCALE:
        row_scale = tl.load(scale + row, mask=real, other=0.0)
    else:
        row_scale = tl.where(real, tl.load(scale), 0.0)
    d_tables += tl.program_id(0) % COPIES * (POSITIONS + BUCKETS)
    q_QK = _load(q + head * K, tile, num_real, BQ, H, K, WK, False)
    g_QV = _load(g + head * V, tile, num_real, BQ, H, V, WV, False)
    sum_QK = tl.zeros([BQ, WK], tl.float32)
    for FULL in tl.static_range(2):
        for i in range(_count(ranges, FULL)):
            block = _pick(i, ranges, FULL)
            key = block * BK + near
            k_KK = _load(k + head * K, block, num_real, BK, H, K, WK, FULL)
            v_KV = _load(v + head * V, block, num_real, BK, H, V, WV, FULL)
            score = tl.dot(q_QK, tl.trans(k_KK), input_precision=PRECISION) * ALPHA
            d_weight = tl.dot(g_QV, tl.trans(v_KV), input_precision=PRECISION)
            seen = (row < num_real)[:, None] & (key < num_real)[None, :]
            if POSITIONS:
                entry = entry_of(row[:, None], key[None, :], POSITIONS)
                score += tl.load(position_table + entry)
            if BUCKETS:
                key_time = tl.load(times + key, mask=key < num_real, other=0)
                bucket = bucket_of(row_time[:, None], key_time[None, :], starts, BUCKETS)
                score += tl.load(time_table + bucket)
            if not FULL:
                seen = seen_pairs(row, key, intervals, num_real, 1)
                score = tl.where(seen, score, MASKED_SCORE)
            open_gate = gate(score, APPROXIMATE)
            d_score = d_weight * (open_gate + score * open_gate * (1.0 - open_gate))
            if POSITIONS or BUCKETS:
                d_bias = d_score * row_scale[:, None]
            if POSITIONS:
                tl.atomic_add(d_tables + entry, d_bias, mask=seen, sem="relaxed")
            if BUCKETS:
                tl.atomic_add(d_tables + POSITIONS + bucket, d_bias, mask=seen, sem="relaxed")
            sum_QK = tl.dot(d_score.to(k_KK.dtype), k_KK, sum_QK, input_precision=PRECISION)
    sum_QK = tl.where(real[:, None], sum_QK * (row_scale * ALPHA)[:, None], 0.0)
    _store(dq + head * K, sum_QK, tile, T, H, K)


@triton.jit
@no_type_check
def backward_keys(
    q,
    k,
    v,
    g,
    scale,
    num_real_ptr,
    order,
    bounds_lo,
    bounds_hi,
    keys_lo0,
    keys_hi0,
    keys_lo1,
    keys_hi1,
    near_lo,
    near_hi,
    position_table,
    time_table,
    starts,
    times,
    query_times,
    dk,
    dv,
    T: constexpr,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    WK: constexpr,
    WV: constexpr,
    BQ: constexpr,
    BK: constexpr,
    ALPHA: constexpr,
    ROW_SCALE: constexpr,
    ORDERED: constexpr,
    POSITIONS: constexpr,
    BUCKETS: constexpr,
    PRECISION: constexpr,
    APPROXIMATE: constexpr,
):
    """dk[T, H, K] and dv[T, H, V].

    Scores are kept transposed, keys in rows, so that both products take them as they are.
    """
    keys = (keys_lo0, keys_hi0, keys_lo1, keys_hi1)
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    if ORDERED:
        tile = tl.load(order + tile)
    num_real = tl.load(num_real_ptr)
    far, near = tl.arange(0, BQ), tl.arange(0, BK)
    key = tile * BK + near
    real_key = key < num_real
    all_lo = tl.max(tl.load(near_lo + key, mask=real_key, other=0), 0)
    all_hi = tl.min(tl.load(near_hi + key, mask=real_key, other=FAR), 0)
    ranges = _ranges(bounds_lo, bounds_hi, tile, all_lo, all_hi, BQ)
    key_time = key
    if BUCKETS:
        key_time = tl.load(times + key, mask=real_key, other=0)
    k_KK = _load(k + head * K, tile, num_real, BK, H, K, WK, False)
    v_KV = _load(v + head * V, tile, num_real, BK, H, V, WV, False)
    dk_KK = tl.zeros([BK, WK], tl.float32)
    dv_KV = tl.zeros([BK, WV], tl.float32)
    for FULL in tl.static_range(2):
        for i in range(_count(ranges, FULL)):
            block = _pick(i, ranges, FULL)
            row = block * BQ + far
            real = row < num_real
            q_QK = _load(q + head * K, block, num_real, BQ, H, K, WK, FULL)
            g_QV = _load(g + head * V, block, num_real, BQ, H, V, WV, FULL)
            score = tl.dot(k_KK, tl.trans(q_QK), input_precision=PRECISION) * ALPHA
            d_weight = tl.dot(v_KV, tl.trans(g_QV), input_precision=PRECISION)
            if POSITIONS:
                score += tl.load(position_table + entry_of(row[None, :], key[:, None], POSITIONS))
            if BUCKETS:
                row_time = tl.load(query_times + row, mask=real, other=0)
                bucket = bucket_of(row_time[None, :], key_time[:, None], starts, BUCKETS)
                score += tl.load(time_table + bucket)
            if not FULL:
                seen = seen_pairs(row, key, row_intervals(keys, row, real), num_real, 0)
                score = tl.where(seen, score, MASKED_SCORE)
            open_gate = gate(score, APPROXIMATE)
            weight = score * open_gate
            d_score = d_weight * (open_gate + weight * (1.0 - open_gate))
            if ROW_SCALE:
                row_scale = tl.load(scale + row, mask=real, other=0.0)[None, :]
                weight *= row_scale
                d_score *= row_scale
            dv_KV = tl.dot(weight.to(g_QV.dtype), g_QV, dv_KV, input_precision=PRECISION)
            dk_KK = tl.dot(d_score.to(q_QK.dtype), q_QK, dk_KK, input_precision=PRECISION)
    factor = 1.0
    if not ROW_SCALE:
        factor = tl.load(scale)
    dk_KK = tl.where(real_key[:, None], dk_KK * (factor * ALPHA), 0.0)
    dv_KV = tl.where(real_key[:, None], dv_KV * factor, 0.0)
    _store(dk + head * K, dk_KK, tile, T, H, K)
    _store(dv + head * V, dv_KV, tile, T, H, V)
