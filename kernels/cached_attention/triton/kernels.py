"""The Triton kernel of `cached_attention`: one program for a tile of rows, a head and a share of the keys. Host side in `triton.py`.

A program walks over the blocks of keys that all its rows see in full without any mask code, and over the rest with it. Rows times keys is a sum over
keys: with few rows the keys are split among programs, whose sums are added afterwards.

Shapes: BR rows, BK keys, WK and WV the padded widths. `R`, `S`, `H`, `K`, `V` are those of the buffers [R or S, H, width].
"""

from typing import no_type_check

import triton
import triton.language as tl

from kernels.hstu_attention.triton.kernels import _gate

MASKED_SCORE = tl.constexpr(-1e30)  # silu is exactly 0 here


@triton.jit
@no_type_check
def _rows(
    base,
    start,
    near,
    width,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
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
def _step(
    sum_RV, q_RK, k, v, block, near, lo0, hi0, lo1, hi1,
    BK: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    ALPHA: tl.constexpr, PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    start = block * BK
    k_KK = _rows(k, start, near, tl.arange(0, WK), S, H, K, WK, FULL)
    v_KV = _rows(v, start, near, tl.arange(0, WV), S, H, V, WV, FULL)
    score = tl.dot(q_RK, tl.trans(k_KK), input_precision=PRECISION) * ALPHA
    if not FULL:
        key = (start + near)[None, :]
        seen = ((key >= lo0[:, None]) & (key < hi0[:, None])) | (
            (key >= lo1[:, None]) & (key < hi1[:, None])
        )
        score = tl.where(seen, score, MASKED_SCORE)
    weight = score * _gate(score, APPROXIMATE)
    return tl.dot(weight.to(v_KV.dtype), v_KV, sum_RV, input_precision=PRECISION)


@triton.jit
@no_type_check
def forward(
    q, k, v, own_k, own_v, blocks, keys_lo0, keys_hi0, keys_lo1, keys_hi1, out,
    R: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, OUTS: tl.constexpr, OWN: tl.constexpr, ALPHA: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """out[OUTS, R, H, V]: what each of SPLITS shares of the keys gives; the last one of OUTS has what rows' own keys give, and none of the others where OUTS is more.

    `blocks` [tiles, 6] as `triton.Blocks` names them.
    """
    split, head, tile = (
        tl.program_id(0) % OUTS,
        tl.program_id(0) // OUTS % H,
        tl.program_id(0) // (OUTS * H),
    )
    far, near, key_width, value_width = (
        tl.arange(0, BR),
        tl.arange(0, BK),
        tl.arange(0, WK),
        tl.arange(0, WV),
    )
    row = tile * BR + far
    real = row < R
    lo0, hi0 = (
        tl.load(keys_lo0 + row, mask=real, other=0),
        tl.load(keys_hi0 + row, mask=real, other=0),
    )
    lo1, hi1 = (
        tl.load(keys_lo1 + row, mask=real, other=0),
        tl.load(keys_hi1 + row, mask=real, other=0),
    )
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
            sum_RV += (score_R * _gate(score_R, False))[:, None] * own_RV.to(tl.float32)
    masked = (h0 - l0) + (f0 - l1) + (h1 - f1)
    for i in range(split * masked // SPLITS, tl.minimum((split + 1) * masked // SPLITS, masked)):
        block = l0 + i
        block = tl.where(block >= h0, block - h0 + l1, block)
        block = tl.where((i >= h0 - l0) & (block >= f0), block - f0 + f1, block)
        sum_RV = _step(
            sum_RV, q_RK, k + head * K, v + head * V, block, near, lo0, hi0, lo1, hi1,
            BK, S, H, K, V, WK, WV, ALPHA, PRECISION, APPROXIMATE, False,
        )  # fmt: skip
    for block in range(
        f0 + split * (f1 - f0) // SPLITS, tl.minimum(f0 + (split + 1) * (f1 - f0) // SPLITS, f1)
    ):
        sum_RV = _step(
            sum_RV, q_RK, k + head * K, v + head * V, block, near, lo0, hi0, lo1, hi1,
            BK, S, H, K, V, WK, WV, ALPHA, PRECISION, APPROXIMATE, True,
        )  # fmt: skip
    out_pointers = (
        out + ((split * R + row).to(tl.int64) * (H * V) + head * V)[:, None] + value_width[None, :]
    )
    tl.store(
        out_pointers,
        (sum_RV * SCALE).to(out.dtype.element_ty),
        mask=real[:, None] & (value_width[None, :] < V),
    )
