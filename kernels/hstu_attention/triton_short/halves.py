"""Triton kernels for tiles of one causal sequence: forward, and one pass for all gradients.

`attention.py` launches them where a row sees every row before it and nothing else. A tile has two
halves of BQ rows, the early and the late ones, and early rows see no late key: three blocks of
BQ x BQ pairs are computed, of a short sequence one. Blocks of a half with itself compare rows and
keys, the third one has no mask at all, and no interval is read. What a program needs is loaded
before it computes.

Other names in capitals are those of `kernels.py`.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language import constexpr

from kernels.hstu_attention.triton.kernels import MASKED_SCORE, approximate_tanh, gate
from kernels.hstu_attention.triton_short.kernels import _clear, _factors, _load, _store


@triton.jit
@no_type_check
def _weights(q_QK, k_KK, ALPHA, DIAGONAL, APPROXIMATE):
    """(weights, tanh of half of the scores): silu(s) = tanh(s / 2) s / 2 + s / 2.

    DIAGONAL: rows and keys are the same, and a row sees keys up to itself; else it sees all.
    """
    half = tl.dot(q_QK, tl.trans(k_KK)) * (0.5 * ALPHA)
    if DIAGONAL:
        row = tl.arange(0, half.shape[0])
        half = tl.where(row[None, :] <= row[:, None], half, MASKED_SCORE)
    if APPROXIMATE:
        tanh = approximate_tanh(half)
    else:
        tanh = 2.0 * gate(2.0 * half, 0) - 1.0
    return tl.fma(half, tanh, half), tanh


@triton.jit
@no_type_check
def _slopes(q_QK, k_KK, v_KV, g_QV, row_scale, ALPHA, DIAGONAL, ROW_SCALE, APPROXIMATE):
    """(weights, slopes of the scores)."""
    weight, tanh = _weights(q_QK, k_KK, ALPHA, DIAGONAL, APPROXIMATE)
    d_weight = tl.dot(g_QV, tl.trans(v_KV))
    d_score = d_weight * tl.fma(weight, tl.fma(tanh, -0.5, 0.5), tl.fma(tanh, 0.5, 0.5))
    if ROW_SCALE:
        weight *= row_scale[:, None]
        d_score *= row_scale[:, None]
    return weight.to(g_QV.dtype), d_score.to(q_QK.dtype)


@triton.jit
@no_type_check
def _store_scaled(out, sum_QV, row_scale, factor, row, real, H, V, ROW_SCALE):
    if ROW_SCALE:
        sum_QV *= row_scale[:, None]
    _store(out, sum_QV * factor, row, real, H, V)


@triton.jit
@no_type_check
def forward_halves(
    q,
    k,
    v,
    scale,
    tiles,
    out,
    T: constexpr,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    WK: constexpr,
    WV: constexpr,
    BQ: constexpr,
    TILES: constexpr,
    ALPHA: constexpr,
    ROW_SCALE: constexpr,
    APPROXIMATE: constexpr,
):
    """out[T, H, V], zero on padding rows."""
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, end, num_real = tl.load(tiles + tile), tl.load(tiles + tile + 1), tl.load(tiles + TILES)
    begin = first.to(tl.int64) * H  # of pointers: what follows counts from the tile's first row
    q += begin * K + head * K
    k += begin * K + head * K
    v += begin * V + head * V
    to = out + begin * V + head * V
    early, late = tl.arange(0, BQ), BQ + tl.arange(0, BQ)
    real, real_late = first + early < end, first + late < end
    q_QK, k_KK = _load(q, early, real, H, K, WK), _load(k, early, real, H, K, WK)
    v_KV = _load(v, early, real, H, V, WV)
    late_q_QK, late_k_KK = _load(q, late, real_late, H, K, WK), _load(k, late, real_late, H, K, WK)
    late_v_KV = _load(v, late, real_late, H, V, WV)
    row_scale, factor = _factors(scale, first + early, real, ROW_SCALE)
    weight, _ = _weights(q_QK, k_KK, ALPHA, 1, APPROXIMATE)
    sum_QV = tl.dot(weight.to(v_KV.dtype), v_KV)
    _store_scaled(to, sum_QV, row_scale, factor, early, real, H, V, ROW_SCALE)
    if first + BQ < end:
        row_scale, factor = _factors(scale, first + late, real_late, ROW_SCALE)
        weight, _ = _weights(late_q_QK, k_KK, ALPHA, 0, APPROXIMATE)
        sum_QV = tl.dot(weight.to(v_KV.dtype), v_KV)
        weight, _ = _weights(late_q_QK, late_k_KK, ALPHA, 1, APPROXIMATE)
        sum_QV = tl.dot(weight.to(v_KV.dtype), late_v_KV, sum_QV)
        _store_scaled(to, sum_QV, row_scale, factor, late, real_late, H, V, ROW_SCALE)
    _clear(out + head * V, num_real + tile * BQ, T, TILES * BQ, BQ, H, V, WV)


@triton.jit
@no_type_check
def _early_gradients(
    q,
    g,
    scale,
    k_KK,
    v_KV,
    dk_KK,
    dv_KV,
    dq,
    dk,
    dv,
    first,
    early,
    real,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    WK: constexpr,
    WV: constexpr,
    ALPHA: constexpr,
    ROW_SCALE: constexpr,
    APPROXIMATE: constexpr,
):
    """Writes the gradients of the early half, its keys' being the sums so far and its own rows'."""
    q_QK, g_QV = _load(q, early, real, H, K, WK), _load(g, early, real, H, V, WV)
    row_scale, factor = _factors(scale, first + early, real, ROW_SCALE)
    weight, d_score = _slopes(q_QK, k_KK, v_KV, g_QV, row_scale, ALPHA, 1, ROW_SCALE, APPROXIMATE)
    dv_KV = tl.dot(tl.trans(weight), g_QV, dv_KV)
    _store(dv, dv_KV * factor, early, real, H, V)
    dk_KK = tl.dot(tl.trans(d_score), q_QK, dk_KK)
    _store(dk, dk_KK * (factor * ALPHA), early, real, H, K)
    _store(dq, tl.dot(d_score, k_KK) * (factor * ALPHA), early, real, H, K)


@triton.jit
@no_type_check
def backward_halves(
    q,
    k,
    v,
    g,
    scale,
    tiles,
    dq,
    dk,
    dv,
    T: constexpr,
    H: constexpr,
    K: constexpr,
    V: constexpr,
    WK: constexpr,
    WV: constexpr,
    BQ: constexpr,
    TILES: constexpr,
    ALPHA: constexpr,
    ROW_SCALE: constexpr,
    APPROXIMATE: constexpr,
):
    """dq, dk, dv. The late rows go first: so few sums are held at a time.

    Both sides of the branch end with the early half: behind it, that would take more registers.
    """
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, end, num_real = tl.load(tiles + tile), tl.load(tiles + tile + 1), tl.load(tiles + TILES)
    begin = first.to(tl.int64) * H  # of pointers: what follows counts from the tile's first row
    q += begin * K + head * K
    k += begin * K + head * K
    v += begin * V + head * V
    g += begin * V + head * V
    to_dq, to_dk = dq + begin * K + head * K, dk + begin * K + head * K
    to_dv = dv + begin * V + head * V
    early, late = tl.arange(0, BQ), BQ + tl.arange(0, BQ)
    real, real_late = first + early < end, first + late < end
    k_KK, v_KV = _load(k, early, real, H, K, WK), _load(v, early, real, H, V, WV)
    dk_KK, dv_KV = tl.zeros([BQ, WK], tl.float32), tl.zeros([BQ, WV], tl.float32)
    if first + BQ < end:
        q_QK, g_QV = _load(q, late, real_late, H, K, WK), _load(g, late, real_late, H, V, WV)
        late_k_KK = _load(k, late, real_late, H, K, WK)
        late_v_KV = _load(v, late, real_late, H, V, WV)
        row_scale, factor = _factors(scale, first + late, real_late, ROW_SCALE)
        weight, d_score = _slopes(
            q_QK, late_k_KK, late_v_KV, g_QV, row_scale, ALPHA, 1, ROW_SCALE, APPROXIMATE
        )
        late_dv_KV = tl.dot(tl.trans(weight), g_QV)
        _store(to_dv, late_dv_KV * factor, late, real_late, H, V)
        late_dk_KK = tl.dot(tl.trans(d_score), q_QK)
        _store(to_dk, late_dk_KK * (factor * ALPHA), late, real_late, H, K)
        dq_QK = tl.dot(d_score, late_k_KK)
        weight, d_score = _slopes(
            q_QK, k_KK, v_KV, g_QV, row_scale, ALPHA, 0, ROW_SCALE, APPROXIMATE
        )
        dv_KV = tl.dot(tl.trans(weight), g_QV, dv_KV)
        dk_KK = tl.dot(tl.trans(d_score), q_QK, dk_KK)
        dq_QK = tl.dot(d_score, k_KK, dq_QK)
        _store(to_dq, dq_QK * (factor * ALPHA), late, real_late, H, K)
        _early_gradients(
            q, g, scale, k_KK, v_KV, dk_KK, dv_KV, to_dq, to_dk, to_dv, first, early, real,
            H, K, V, WK, WV, ALPHA, ROW_SCALE, APPROXIMATE,
        )  # fmt: skip
    else:
        _early_gradients(
            q, g, scale, k_KK, v_KV, dk_KK, dv_KV, to_dq, to_dk, to_dv, first, early, real,
            H, K, V, WK, WV, ALPHA, ROW_SCALE, APPROXIMATE,
        )  # fmt: skip
    padding, step = num_real + tile * BQ, TILES * BQ
    _clear(dq + head * K, padding, T, step, BQ, H, K, WK)
    _clear(dk + head * K, padding, T, step, BQ, H, K, WK)
    _clear(dv + head * V, padding, T, step, BQ, H, V, WV)
