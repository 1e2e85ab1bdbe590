"""A Triton kernel over rows that lie in parts: it joins them, rounds them, sums over rows.

Rows, blocks and partial sums are as in `kernels.layer_norm.triton.kernels`. There are one, two or
four PARTS of widths D0 to D3; D is their sum, W a power of two that the widest fits. WRITE: the
joined rows are written. QUANTIZE: they are written in e4m3, with a factor for each row.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language import constexpr

from kernels.layer_norm.triton.kernels import places, row_factor


@triton.jit
@no_type_check
def _load(part, block, here, column, D: constexpr, BR: constexpr):
    inside = here[:, None] & (column < D)[None, :]
    return tl.load(part + places(block, column, D, BR), mask=inside, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _store(
    joined,
    small,
    value,
    scale8,
    block,
    here,
    column,
    FIRST: constexpr,
    WIDTH: constexpr,
    D: constexpr,
    BR: constexpr,
    WRITE: constexpr,
    QUANTIZE: constexpr,
):
    inside = here[:, None] & (column < WIDTH)[None, :]
    place = places(block, column, D, BR) + FIRST
    if WRITE:
        tl.store(joined + place, value.to(joined.dtype.element_ty), mask=inside)
    if QUANTIZE:
        tl.store(small + place, (value / scale8[:, None]).to(small.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def join_rows(
    g0,
    g1,
    g2,
    g3,
    joined,
    small,
    factor,
    sums0,
    sums1,
    sums2,
    sums3,
    T: constexpr,
    D: constexpr,
    W: constexpr,
    BR: constexpr,
    PROGRAMS: constexpr,
    STAGES: constexpr,
    PARTS: constexpr,
    D0: constexpr,
    D1: constexpr,
    D2: constexpr,
    D3: constexpr,
    WRITE: constexpr,
    QUANTIZE: constexpr,
):
    """sums0 to sums3: [PROGRAMS, width of the part], a part of the sum over rows each."""
    program = tl.program_id(0)
    column = tl.arange(0, W)
    sum0 = tl.zeros((BR, W), tl.float32)
    sum1 = tl.zeros((BR, W), tl.float32)
    sum2 = tl.zeros((BR, W), tl.float32)
    sum3 = tl.zeros((BR, W), tl.float32)
    for block in tl.range(program, tl.cdiv(T, BR), PROGRAMS, num_stages=STAGES):
        row = block * BR + tl.arange(0, BR)
        here = row < T
        x0 = _load(g0, block, here, column, D0, BR)
        sum0 += x0
        if PARTS > 1:
            x1 = _load(g1, block, here, column, D1, BR)
            sum1 += x1
        if PARTS > 2:
            x2 = _load(g2, block, here, column, D2, BR)
            x3 = _load(g3, block, here, column, D3, BR)
            sum2 += x2
            sum3 += x3
        scale8 = tl.zeros((BR,), tl.float32)
        if QUANTIZE:
            largest = tl.abs(x0)
            if PARTS > 1:
                largest = tl.maximum(largest, tl.abs(x1))
            if PARTS > 2:
                largest = tl.maximum(largest, tl.maximum(tl.abs(x2), tl.abs(x3)))
            scale8 = row_factor(tl.max(largest, 1))
            tl.store(factor + row, scale8, mask=here)
        _store(joined, small, x0, scale8, block, here, column, 0, D0, D, BR, WRITE, QUANTIZE)
        if PARTS > 1:
            _store(joined, small, x1, scale8, block, here, column, D0, D1, D, BR, WRITE, QUANTIZE)
        if PARTS > 2:
            place: constexpr = D0 + D1
            _store(
                joined, small, x2, scale8, block, here, column, place, D2, D, BR, WRITE, QUANTIZE
            )
            last: constexpr = D0 + D1 + D2
            _store(joined, small, x3, scale8, block, here, column, last, D3, D, BR, WRITE, QUANTIZE)
    tl.store(sums0 + program * D0 + column, tl.sum(sum0, 0), mask=column < D0)
    if PARTS > 1:
        tl.store(sums1 + program * D1 + column, tl.sum(sum1, 0), mask=column < D1)
    if PARTS > 2:
        tl.store(sums2 + program * D2 + column, tl.sum(sum2, 0), mask=column < D2)
        tl.store(sums3 + program * D3 + column, tl.sum(sum3, 0), mask=column < D3)
