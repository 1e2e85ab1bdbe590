"""Triton kernels of `layer_norm`: forward and backward.

A program works on blocks of whole rows: the forward on one block, a program of the backward on
every `programs`-th, so that it holds its part of the sums over rows (gradients of weight and bias)
in registers. Names in capitals are known when a kernel is compiled: T rows of D columns, W the next
power of two, BR rows of a block.

WRITE: the result is written. QUANTIZE: it is written in e4m3, with a factor for each row.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language import constexpr

E4M3_MAX = constexpr(448.0)
SMALLEST = constexpr(1e-12)  # as in kernels.fp8


@triton.jit
@no_type_check
def places(block, column, D: constexpr, BR: constexpr):
    """Where the entries of a block stand in a buffer of rows of D columns."""
    return block.to(tl.int64) * (BR * D) + (tl.arange(0, BR)[:, None] * D + column[None, :])


@triton.jit
@no_type_check
def row_factor(largest):
    """The factor of e4m3 values of a row whose largest magnitude is that."""
    return tl.maximum(largest, SMALLEST) / E4M3_MAX


@triton.jit
@no_type_check
def norm_forward(
    x,
    weight,
    bias,
    y,
    small,
    factor,
    mean,
    rstd,
    T: constexpr,
    D: constexpr,
    W: constexpr,
    BR: constexpr,
    EPS: constexpr,
    AFFINE: constexpr,
    WRITE: constexpr,
    QUANTIZE: constexpr,
):
    row, column = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, W)
    here, inside = row < T, (row < T)[:, None] & (column < D)[None, :]
    place = places(tl.program_id(0), column, D, BR)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    middle = tl.sum(values, 1) / D
    centred = tl.where(inside, values - middle[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / D + EPS)
    out = centred * scale[:, None]
    if AFFINE:
        w = tl.load(weight + column, mask=column < D, other=0.0)
        b = tl.load(bias + column, mask=column < D, other=0.0)
        out = out * w[None, :] + b[None, :]
    if WRITE:
        tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)
    if QUANTIZE:
        out = tl.where(inside, out, 0.0).to(x.dtype.element_ty).to(tl.float32)
        scale8 = row_factor(tl.max(tl.abs(out), 1))
        tl.store(factor + row, scale8, mask=here)
        tl.store(small + place, (out / scale8[:, None]).to(small.dtype.element_ty), mask=inside)
    tl.store(mean + row, middle, mask=here)
    tl.store(rstd + row, scale, mask=here)


@triton.jit
@no_type_check
def norm_backward(
    x,
    weight,
    mean,
    rstd,
    g,
    beside,
    dx,
    d_weight,
    d_bias,
    T: constexpr,
    D: constexpr,
    W: constexpr,
    BR: constexpr,
    PROGRAMS: constexpr,
    STAGES: constexpr,
    AFFINE: constexpr,
    BESIDE: constexpr,
):
    """`beside` is added to dx. d_weight, d_bias: [PROGRAMS, D], a part of the sum each."""
    program = tl.program_id(0)
    column = tl.arange(0, W)
    if AFFINE:
        w = tl.load(weight + column, mask=column < D, other=0.0)
        sum_w = tl.zeros((BR, W), tl.float32)
        sum_b = tl.zeros((BR, W), tl.float32)
    for block in tl.range(program, tl.cdiv(T, BR), PROGRAMS, num_stages=STAGES):
        row = block * BR + tl.arange(0, BR)
        here, inside = row < T, (row < T)[:, None] & (column < D)[None, :]
        place = places(block, column, D, BR)
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        back = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
        middle = tl.load(mean + row, mask=here, other=0.0)
        scale = tl.load(rstd + row, mask=here, other=0.0)
        normed = tl.where(inside, (values - middle[:, None]) * scale[:, None], 0.0)
        if AFFINE:
            sum_w += back * normed
            sum_b += back
            back = back * w[None, :]
        mean_back = tl.sum(back, 1) / D
        mean_both = tl.sum(back * normed, 1) / D
        out = (back - mean_back[:, None] - normed * mean_both[:, None]) * scale[:, None]
        if BESIDE:
            out += tl.load(beside + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, out.to(dx.dtype.element_ty), mask=inside)
    if AFFINE:
        tl.store(d_weight + program * D + column, tl.sum(sum_w, 0), mask=column < D)
        tl.store(d_bias + program * D + column, tl.sum(sum_b, 0), mask=column < D)
