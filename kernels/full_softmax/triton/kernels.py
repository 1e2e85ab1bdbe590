"""The Triton kernels of `full_softmax`: a program for a tile of rows, and one for a tile of items.

`tiles.py` launches them. No logit leaves a program. The program of rows walks over all items with a
softmax that grows, and gets the gradient of q in the same pass; the program of items computes the
scores again, transposed, and walks over a share of the rows. The slope of the positive is computed
once, in the program of its row, as minus what the other items have of the softmax: where that is
little, exp(score) / sum - 1 would be the difference of two equal numbers.

Items count from 0 here. All buffers are filled up with zeros to whole tiles and to a width WD, so
that loads need no mask. Products of float32 want their second operand with the axis that is summed
over in front, so q and e come transposed, too, where TRANSPOSED.

Names in capitals are known when a kernel is compiled: TP rows and IP items of the buffers, BT rows
and BI items of a tile.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language import constexpr

LOG2E = constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def _tile(base, first, WD, ROWS):
    """[ROWS, WD] of a buffer from row `first` on."""
    near = tl.arange(0, ROWS)[:, None] * WD + tl.arange(0, WD)[None, :]
    return tl.load(base + first.to(tl.int64) * WD + near)


@triton.jit
@no_type_check
def _tile_again(tile, transposed, first, LENGTH, WD, ROWS, TRANSPOSED):
    """The same tile as the second operand of a product over its rows."""
    if TRANSPOSED:
        width = tl.arange(0, WD).to(tl.int64)
        tile = tl.trans(
            tl.load(transposed + width[:, None] * LENGTH + (first + tl.arange(0, ROWS))[None, :])
        )
    return tile


@triton.jit
@no_type_check
def rows(
    q,
    e,
    e_transposed,
    positive,
    score,
    weight,
    bound,
    loss,
    shift,
    slope,
    dq,
    IP: constexpr,
    WD: constexpr,
    BT: constexpr,
    BI: constexpr,
    TRANSPOSED: constexpr,
    PRECISION: constexpr,
):
    """Losses [TP], and the gradient of q [TP, WD] without the part of the positive.

    Of each row, `shift`: weight * softmax is exp2(score * log2(e) - shift), 0 where the weight is
    0; `slope`: the gradient of the positive's score, which comes as `score`. `bound`: one number,
    the items there are.
    """
    tile = tl.program_id(0)
    row = tile * BT + tl.arange(0, BT)
    width = tl.arange(0, WD)
    number = tl.load(bound)
    weight_T = tl.load(weight + row)
    positive_T = tl.load(positive + row)
    q_TD = _tile(q, tile * BT, WD, BT)
    # of all items but the positive, in powers of 2
    top = tl.full([BT], -1e30, tl.float32)
    total = tl.zeros([BT], tl.float32)
    sum_TD = tl.zeros([BT, WD], tl.float32)
    for first in range(0, tl.where(tl.max(weight_T, 0) > 0, number, 0), BI):
        item = first + tl.arange(0, BI)
        e_ID = _tile(e, first, WD, BI)
        score_TI = tl.dot(q_TD, tl.trans(e_ID), input_precision=PRECISION)
        hidden = (item[None, :] == positive_T[:, None]) | (item >= number)[None, :]
        score_TI = tl.where(hidden, -float("inf"), score_TI)
        higher = tl.maximum(top, tl.max(score_TI, 1) * LOG2E)
        factor = tl.exp2(top - higher)
        share_TI = tl.exp2(score_TI * LOG2E - higher[:, None])
        total = total * factor + tl.sum(share_TI, 1)
        e_ID = _tile_again(e_ID, e_transposed, first, IP, WD, BI, TRANSPOSED)
        sum_TD = tl.dot(
            share_TI.to(e_ID.dtype), e_ID, sum_TD * factor[:, None], input_precision=PRECISION
        )
        top = higher
    score_T = tl.load(score + row) * LOG2E
    higher = tl.maximum(top, score_T)
    factor = tl.exp2(top - higher)
    total *= factor
    whole = tl.exp2(score_T - higher) + total
    log_sum = higher + tl.log2(whole)
    counts = weight_T > 0
    tl.store(loss + row, tl.where(counts, (log_sum - score_T) / LOG2E, 0.0))
    tl.store(shift + row, tl.where(counts, log_sum - tl.log2(weight_T), float("inf")))
    tl.store(slope + row, tl.where(counts, -weight_T * total / whole, 0.0))
    dq_TD = (weight_T * factor / whole)[:, None] * sum_TD
    tl.store(dq + row.to(tl.int64)[:, None] * WD + width[None, :], dq_TD.to(dq.dtype.element_ty))


@triton.jit
@no_type_check
def items(
    q,
    q_transposed,
    e,
    positive,
    shift,
    slope,
    last,
    out,
    TP: constexpr,
    IP: constexpr,
    WD: constexpr,
    BT: constexpr,
    BI: constexpr,
    SHARES: constexpr,
    TRANSPOSED: constexpr,
    PRECISION: constexpr,
):
    """The gradient of e, of each of SHARES shares of the rows: [SHARES, IP, WD].

    No row from `last` on counts.
    """
    share, tile = tl.program_id(0) % SHARES, tl.program_id(0) // SHARES
    item = tile * BI + tl.arange(0, BI)
    e_ID = _tile(e, tile * BI, WD, BI)
    sum_ID = tl.zeros([BI, WD], tl.float32)
    blocks = (tl.load(last) + BT - 1) // BT
    for block in range(share * blocks // SHARES, (share + 1) * blocks // SHARES):
        row = block * BT + tl.arange(0, BT)
        q_TD = _tile(q, block * BT, WD, BT)
        shift_T = tl.load(shift + row)
        positive_T = tl.load(positive + row)
        slope_T = tl.load(slope + row)
        score_IT = tl.dot(e_ID, tl.trans(q_TD), input_precision=PRECISION)
        slope_IT = tl.exp2(score_IT * LOG2E - shift_T[None, :])
        slope_IT = tl.where(item[:, None] == positive_T[None, :], slope_T[None, :], slope_IT)
        q_TD = _tile_again(q_TD, q_transposed, block * BT, TP, WD, BT, TRANSPOSED)
        sum_ID = tl.dot(slope_IT.to(q_TD.dtype), q_TD, sum_ID, input_precision=PRECISION)
    tl.store(
        out + (share.to(tl.int64) * IP + item)[:, None] * WD + tl.arange(0, WD)[None, :], sum_ID
    )
