"""Triton kernels of `gate`: forward and backward.

Rows, blocks and partial sums are as in `kernels.layer_norm.triton.kernels`; D is the width of u and
of a, and the output has three parts of so many columns where JOINED. APART: they are buffers of
their own, and a itself is the second one unless it is MASKED by dropout.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language import constexpr

from kernels.layer_norm.triton.kernels import places, row_factor


@triton.jit
@no_type_check
def _kept(value, keep, place, inside, FACTOR, MASKED):
    """`value` after dropout."""
    if MASKED:
        kept = tl.load(keep + place, mask=inside, other=0) != 0
        value = tl.where(kept, value * FACTOR, 0.0)
    return value


@triton.jit
@no_type_check
def gate_forward(
    u,
    a,
    weight,
    bias,
    keep,
    y,
    y_a,
    y_product,
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
    JOINED: constexpr,
    MASKED: constexpr,
    FACTOR: constexpr,
    WRITE: constexpr,
    APART: constexpr,
    QUANTIZE: constexpr,
):
    block, column = tl.program_id(0), tl.arange(0, W)
    row = block * BR + tl.arange(0, BR)
    here, inside = row < T, (row < T)[:, None] & (column < D)[None, :]
    place = places(block, column, D, BR)
    attended = tl.load(a + place, mask=inside, other=0.0).to(tl.float32)
    opened = tl.load(u + place, mask=inside, other=0.0).to(tl.float32)
    opened = opened * tl.sigmoid(opened)
    middle = tl.sum(attended, 1) / D
    centred = tl.where(inside, attended - middle[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / D + EPS)
    normed = centred * scale[:, None]
    if AFFINE:
        w = tl.load(weight + column, mask=column < D, other=0.0)
        b = tl.load(bias + column, mask=column < D, other=0.0)
        normed = normed * w[None, :] + b[None, :]
    out = opened * normed
    if JOINED:
        place = places(block, column, 3 * D, BR)
        first = _kept(opened, keep, place, inside, FACTOR, MASKED)
        second = _kept(attended, keep, place + D, inside, FACTOR, MASKED)
        out = _kept(out, keep, place + 2 * D, inside, FACTOR, MASKED)
        if WRITE:
            if APART:
                one = places(block, column, D, BR)
                tl.store(y + one, first.to(y.dtype.element_ty), mask=inside)
                if MASKED:
                    tl.store(y_a + one, second.to(y.dtype.element_ty), mask=inside)
                tl.store(y_product + one, out.to(y.dtype.element_ty), mask=inside)
            else:
                tl.store(y + place, first.to(y.dtype.element_ty), mask=inside)
                tl.store(y + place + D, second.to(y.dtype.element_ty), mask=inside)
                tl.store(y + place + 2 * D, out.to(y.dtype.element_ty), mask=inside)
        if QUANTIZE:
            first = first.to(u.dtype.element_ty).to(tl.float32)
            second = second.to(u.dtype.element_ty).to(tl.float32)
            out = tl.where(inside, out, 0.0).to(u.dtype.element_ty).to(tl.float32)
            largest = tl.maximum(tl.maximum(tl.abs(first), tl.abs(second)), tl.abs(out))
            scale8 = row_factor(tl.max(largest, 1))
            tl.store(factor + row, scale8, mask=here)
            first = (first / scale8[:, None]).to(small.dtype.element_ty)
            tl.store(small + place, first, mask=inside)
            second = (second / scale8[:, None]).to(small.dtype.element_ty)
            tl.store(small + place + D, second, mask=inside)
            out = (out / scale8[:, None]).to(small.dtype.element_ty)
            tl.store(small + place + 2 * D, out, mask=inside)
    else:
        out = _kept(out, keep, place, inside, FACTOR, MASKED)
        if WRITE:
            tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)
        if QUANTIZE:
            out = tl.where(inside, out, 0.0).to(u.dtype.element_ty).to(tl.float32)
            scale8 = row_factor(tl.max(tl.abs(out), 1))
            tl.store(factor + row, scale8, mask=here)
            tl.store(small + place, (out / scale8[:, None]).to(small.dtype.element_ty), mask=inside)
    tl.store(mean + row, middle, mask=here)
    tl.store(rstd + row, scale, mask=here)


@triton.jit
@no_type_check
def gate_backward(
    u,
    a,
    weight,
    bias,
    keep,
    mean,
    rstd,
    g,
    du,
    da,
    d_weight,
    d_bias,
    T: constexpr,
    D: constexpr,
    W: constexpr,
    BR: constexpr,
    PROGRAMS: constexpr,
    STAGES: constexpr,
    AFFINE: constexpr,
    JOINED: constexpr,
    MASKED: constexpr,
    FACTOR: constexpr,
):
    """d_weight, d_bias: [PROGRAMS, D], a part of the sum each."""
    program = tl.program_id(0)
    column = tl.arange(0, W)
    if AFFINE:
        w = tl.load(weight + column, mask=column < D, other=0.0)
        b = tl.load(bias + column, mask=column < D, other=0.0)
        sum_w = tl.zeros((BR, W), tl.float32)
        sum_b = tl.zeros((BR, W), tl.float32)
    for block in tl.range(program, tl.cdiv(T, BR), PROGRAMS, num_stages=STAGES):
        row = block * BR + tl.arange(0, BR)
        here, inside = row < T, (row < T)[:, None] & (column < D)[None, :]
        place = places(block, column, D, BR)
        attended = tl.load(a + place, mask=inside, other=0.0).to(tl.float32)
        before = tl.load(u + place, mask=inside, other=0.0).to(tl.float32)
        if JOINED:
            place_g = places(block, column, 3 * D, BR)
            back_u = tl.load(g + place_g, mask=inside, other=0.0).to(tl.float32)
            back_u = _kept(back_u, keep, place_g, inside, FACTOR, MASKED)
            back_a = tl.load(g + place_g + D, mask=inside, other=0.0).to(tl.float32)
            back_a = _kept(back_a, keep, place_g + D, inside, FACTOR, MASKED)
            place_g += 2 * D
        else:
            place_g = place
        back = tl.load(g + place_g, mask=inside, other=0.0).to(tl.float32)
        back = _kept(back, keep, place_g, inside, FACTOR, MASKED)
        middle = tl.load(mean + row, mask=here, other=0.0)
        scale = tl.load(rstd + row, mask=here, other=0.0)
        normed = tl.where(inside, (attended - middle[:, None]) * scale[:, None], 0.0)
        sigmoid = tl.sigmoid(before)
        opened = before * sigmoid
        d_normed = back * opened
        if AFFINE:
            back = back * (normed * w[None, :] + b[None, :])
            sum_w += d_normed * normed
            sum_b += d_normed
            d_normed = d_normed * w[None, :]
        else:
            back = back * normed
        mean_back = tl.sum(d_normed, 1) / D
        mean_both = tl.sum(d_normed * normed, 1) / D
        d_a = (d_normed - mean_back[:, None] - normed * mean_both[:, None]) * scale[:, None]
        if JOINED:
            back += back_u
            d_a += back_a
        d_u = back * sigmoid * (1.0 + before * (1.0 - sigmoid))
        tl.store(du + place, d_u.to(du.dtype.element_ty), mask=inside)
        tl.store(da + place, d_a.to(da.dtype.element_ty), mask=inside)
    if AFFINE:
        tl.store(d_weight + program * D + column, tl.sum(sum_w, 0), mask=column < D)
        tl.store(d_bias + program * D + column, tl.sum(sum_b, 0), mask=column < D)
