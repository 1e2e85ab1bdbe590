"""The Triton kernel of `cached_attention`: a program for a tile of rows, a head, a share of keys.

`attention.py` launches it. A program walks over the blocks of keys that all its rows see in full
without any mask code, and over the rest with it. Rows times keys is a sum over keys: with few rows
the keys are split among programs, whose sums are added afterwards.

Names in capitals are known when a kernel is compiled. Shapes: BR rows, BK keys, WK and WV the
padded widths. `R`, `S`, `H`, `K`, `V` are those of the buffers [R or S, H, width].
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language import constexpr

from kernels.hstu_attention.triton.kernels import gate, row_intervals

MASKED_SCORE = constexpr(-1e30)  # silu is exactly 0 here


@triton.jit
@no_type_check
def _rows(
    base,
    start,
    near,
    width,
    ROWS,
    H,
    W,
    WIDE,
    FULL,
):
    """Rows [start, ...) of one head, zero beyond the buffer and the head's width."""
    pointers = base + start.to(tl.int64) * (H * W) + (near[:, None] * (H * W) + width[None, :])
    if FULL:
        if W == WIDE:
            x = tl.load(pointers)
        else:
            x = tl.load(pointers, mask=width[None, :] < W, other=0.0)
    else:
        x = tl.load(pointers, mask=(start + near < ROWS)[:, None] & (width[None, :] < W), other=0.0)
    return x


@triton.jit
@no_type_check
def forward(
    q,
    k,
    v,
    own_k,
    own_v,
    blocks,
    keys_lo0,
    keys_hi0,
    keys_lo1,
    keys_hi1,
    out,
    R: constexpr,
    S: constexpr,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    WK: constexpr,
    WV: constexpr,
    BR: constexpr,
    BK: constexpr,
    SPLITS: constexpr,
    OUTS: constexpr,
    OWN: constexpr,
    ALPHA: constexpr,
    SCALE: constexpr,
    PRECISION: constexpr,
    APPROXIMATE: constexpr,
):
    """out[OUTS, R, H, V]: what each of SPLITS shares of the keys gives.

    The last of OUTS has what rows' own keys give; where OUTS is more than SPLITS, nothing else.
    `blocks` [tiles, 6] are `attention.KeyBlocks`.
    """
    split, head = tl.program_id(0) % OUTS, tl.program_id(0) // OUTS % H
    tile = tl.program_id(0) // (OUTS * H)
    far, near = tl.arange(0, BR), tl.arange(0, BK)
    key_width, value_width = tl.arange(0, WK), tl.arange(0, WV)
    row = tile * BR + far
    real = row < R
    intervals = row_intervals((keys_lo0, keys_hi0, keys_lo1, keys_hi1), row, real)
    blocks += tile * 6
    l0, h0, l1, h1 = tl.load(blocks), tl.load(blocks + 1), tl.load(blocks + 2), tl.load(blocks + 3)
    f0, f1 = tl.load(blocks + 4), tl.load(blocks + 5)

    q_RK = _rows(q + head * K, tile * BR, far, key_width, R, H, K, WK, False)
    sum_RV = tl.zeros([BR, WV], tl.float32)
    if OWN:
        if split == OUTS - 1:
            own_RK = _rows(own_k + head * K, tile * BR, far, key_width, R, H, K, WK, False)
            own_RV = _rows(own_v + head * V, tile * BR, far, value_width, R, H, V, WV, False)
            score_R = tl.sum(q_RK.to(tl.float32) * own_RK.to(tl.float32), 1) * ALPHA
            sum_RV += (score_R * gate(score_R, False))[:, None] * own_RV.to(tl.float32)
    for FULL in tl.static_range(2):
        # the first of these blocks, and how many
        first = f0 if FULL else 0
        count = f1 - f0 if FULL else (h0 - l0) + (f0 - l1) + (h1 - f1)
        for i in range(
            first + split * count // SPLITS,
            tl.minimum(first + (split + 1) * count // SPLITS, first + count),
        ):
            block = i
            if not FULL:
                block = l0 + i
                block = tl.where(block >= h0, block - h0 + l1, block)
                block = tl.where((i >= h0 - l0) & (block >= f0), block - f0 + f1, block)
            start = block * BK
            k_KK = _rows(k + head * K, start, near, tl.arange(0, WK), S, H, K, WK, FULL)
            v_KV = _rows(v + head * V, start, near, tl.arange(0, WV), S, H, V, WV, FULL)
            score = tl.dot(q_RK, tl.trans(k_KK), input_precision=PRECISION) * ALPHA
            if not FULL:
                lo0, hi0, lo1, hi1 = intervals
                key = (start + near)[None, :]
                seen = ((key >= lo0[:, None]) & (key < hi0[:, None])) | (
                    (key >= lo1[:, None]) & (key < hi1[:, None])
                )
                score = tl.where(seen, score, MASKED_SCORE)
            weight = score * gate(score, APPROXIMATE)
            sum_RV = tl.dot(weight.to(v_KV.dtype), v_KV, sum_RV, input_precision=PRECISION)
    out_pointers = (
        out + ((split * R + row).to(tl.int64) * (H * V) + head * V)[:, None] + value_width[None, :]
    )
    tl.store(
        out_pointers,
        (sum_RV * SCALE).to(out.dtype.element_ty),
        mask=real[:, None] & (value_width[None, :] < V),
    )
