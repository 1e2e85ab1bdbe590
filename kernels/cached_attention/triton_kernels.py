"""The Triton kernel of `cached_attention`: one program for a tile of rows, a head and a share of the keys. Host side in `triton.py`.

A program finds the blocks of keys that its rows see from their intervals, so nothing is planned on the host. It walks over those that all its rows see
in full without any mask code, and over the rest with it. Rows times keys is a sum over keys: with few rows the keys are split among programs, whose
sums are added afterwards.

Shapes: BR rows, BK keys, WK and WV the padded widths. `R`, `S`, `H`, `K`, `V` are those of the buffers [R or S, H, width].
"""

from typing import no_type_check

import triton
import triton.language as tl

from kernels.hstu_attention.triton_kernels import _gate

FAR = tl.constexpr(2**30)
MASKED_SCORE = tl.constexpr(-1e30)  # silu is exactly 0 here


@triton.jit
@no_type_check
def _hull(lo, hi, BK: tl.constexpr):
    """The blocks that hold all intervals [lo, hi); (0, 0) if all are empty."""
    some = hi > lo
    last = (tl.max(tl.where(some, hi, 0), 0) + BK - 1) // BK
    return tl.minimum(tl.min(tl.where(some, lo, FAR), 0) // BK, last), last


@triton.jit
@no_type_check
def _keys(base, start, near, width, S: tl.constexpr, H: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, FULL: tl.constexpr):
    """Rows [start, ...) of one head, zero beyond the buffer and the head's width."""
    pointers = base + start.to(tl.int64) * (H * W) + (near[:, None] * (H * W) + width[None, :])
    if FULL:
        if W == WIDE:
            x = tl.load(pointers)
        else:
            x = tl.load(pointers, mask=width[None, :] < W, other=0.0)
    else:
        x = tl.load(pointers, mask=(start + near < S)[:, None] & (width[None, :] < W), other=0.0)
    return x


@triton.jit
@no_type_check
def _step(
    sum_RV, q_RK, k, v, block, near, lo0, hi0, lo1, hi1,
    BK: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    ALPHA: tl.constexpr, PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    start = block * BK
    k_KK = _keys(k, start, near, tl.arange(0, WK), S, H, K, WK, FULL)
    v_KV = _keys(v, start, near, tl.arange(0, WV), S, H, V, WV, FULL)
    score = tl.dot(q_RK, tl.trans(k_KK), input_precision=PRECISION) * ALPHA
    if not FULL:
        key = (start + near)[None, :]
        seen = ((key >= lo0[:, None]) & (key < hi0[:, None])) | ((key >= lo1[:, None]) & (key < hi1[:, None]))
        score = tl.where(seen, score, MASKED_SCORE)
    weight = score * _gate(score, APPROXIMATE)
    return tl.dot(weight.to(v_KV.dtype), v_KV, sum_RV, input_precision=PRECISION)


@triton.jit
@no_type_check
def forward(
    q, k, v, keys_lo0, keys_hi0, keys_lo1, keys_hi1, out,
    R: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, ALPHA: tl.constexpr, PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """out[SPLITS, R, H, V], float32: what each share of the keys gives."""
    split, head, tile = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS % H, tl.program_id(0) // (SPLITS * H)
    row, near = tile * BR + tl.arange(0, BR), tl.arange(0, BK)
    real = row < R
    lo0, hi0 = tl.load(keys_lo0 + row, mask=real, other=0), tl.load(keys_hi0 + row, mask=real, other=0)
    lo1, hi1 = tl.load(keys_lo1 + row, mask=real, other=0), tl.load(keys_hi1 + row, mask=real, other=0)
    l0, h0 = _hull(lo0, hi0, BK)
    l1, h1 = _hull(lo1, hi1, BK)
    if (h0 > l1) & (h1 > l0):  # they overlap: one range
        l1, h1 = tl.minimum(l0, l1), tl.maximum(h0, h1)
        l0, h0 = l1, l1
    # What slot 1 of every row has in common.
    f0 = tl.minimum(tl.maximum((tl.max(tl.where(real, lo1, 0), 0) + BK - 1) // BK, l1), h1)
    f1 = tl.maximum(tl.minimum(tl.min(tl.where(real, hi1, FAR), 0) // BK, h1), f0)

    row_width, value_width = tl.arange(0, WK), tl.arange(0, WV)
    q_pointers = q + (row.to(tl.int64) * (H * K) + head * K)[:, None] + row_width[None, :]
    q_RK = tl.load(q_pointers, mask=real[:, None] & (row_width[None, :] < K), other=0.0)
    sum_RV = tl.zeros([BR, WV], tl.float32)
    masked = (h0 - l0) + (f0 - l1) + (h1 - f1)
    for i in range(split * masked // SPLITS, (split + 1) * masked // SPLITS):
        block = l0 + i
        block = tl.where(block >= h0, block - h0 + l1, block)
        block = tl.where((i >= h0 - l0) & (block >= f0), block - f0 + f1, block)
        sum_RV = _step(
            sum_RV, q_RK, k + head * K, v + head * V, block, near, lo0, hi0, lo1, hi1,
            BK, S, H, K, V, WK, WV, ALPHA, PRECISION, APPROXIMATE, False,
        )  # fmt: skip
    for block in range(f0 + split * (f1 - f0) // SPLITS, f0 + (split + 1) * (f1 - f0) // SPLITS):
        sum_RV = _step(
            sum_RV, q_RK, k + head * K, v + head * V, block, near, lo0, hi0, lo1, hi1,
            BK, S, H, K, V, WK, WV, ALPHA, PRECISION, APPROXIMATE, True,
        )  # fmt: skip
    out_pointers = out + ((split * R + row).to(tl.int64) * (H * V) + head * V)[:, None] + value_width[None, :]
    tl.store(out_pointers, sum_RV, mask=real[:, None] & (value_width[None, :] < V))
