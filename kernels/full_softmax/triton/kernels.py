"""The Triton kernels of `full_softmax`: a program for a tile of rows, and one for a tile of items.

`tiles.py` launches them. No logit leaves a program. The program of rows walks over all items with a
softmax that grows, and gets the gradient of q in the same pass; the program of items computes the
scores again, transposed, and walks over a share of the rows.

Names in capitals are known when a kernel is compiled: T rows, I entries of the table, D the width,
WD the padded one, BT rows and BI items of a tile.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
@no_type_check
def _load_rows(base, row, real, width, D, WD):
    """Entries of a buffer [..., D], zero where they are not real."""
    return tl.load(
        base + row.to(tl.int64)[:, None] * D + width[None, :],
        mask=real[:, None] & (width < D)[None, :],
        other=0.0,
    )


@triton.jit
@no_type_check
def rows(
    q,
    e,
    positive,
    weight,
    loss,
    log_sum,
    dq,
    T: constexpr,
    I: constexpr,  # noqa: E741
    D: constexpr,
    WD: constexpr,
    BT: constexpr,
    BI: constexpr,
    PRECISION: constexpr,
):
    """Losses [T], the log-sum-exp of the logits [T], and the gradient of q [T, D]."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    width = tl.arange(0, WD)
    weight_T = tl.load(weight + row, mask=row < T, other=0.0)
    counts = weight_T > 0
    q_TD = _load_rows(q, row, counts, width, D, WD)
    positive_T = tl.load(positive + row, mask=counts, other=0)
    # of all items but the positive
    top = tl.full([BT], -1e30, tl.float32)
    total = tl.zeros([BT], tl.float32)
    sum_TD = tl.zeros([BT, WD], tl.float32)
    score = tl.zeros([BT], tl.float32)  # of the positive
    end = tl.where(tl.max(weight_T, 0) > 0, I, 0)
    for first in range(0, end, BI):
        item = first + tl.arange(0, BI)
        e_ID = _load_rows(e, item, item < I, width, D, WD)
        score_TI = tl.dot(q_TD, tl.trans(e_ID), input_precision=PRECISION)
        own = item[None, :] == positive_T[:, None]
        score += tl.sum(tl.where(own, score_TI, 0.0), 1)
        other = ((item > 0) & (item < I))[None, :] & ~own
        score_TI = tl.where(other, score_TI, -float("inf"))
        higher = tl.maximum(top, tl.max(score_TI, 1))
        factor = tl.exp(top - higher)
        share_TI = tl.exp(score_TI - higher[:, None])
        total = total * factor + tl.sum(share_TI, 1)
        sum_TD = tl.dot(
            share_TI.to(e_ID.dtype), e_ID, sum_TD * factor[:, None], input_precision=PRECISION
        )
        top = higher
    higher = tl.maximum(top, score)
    factor = tl.exp(top - higher)
    total *= factor
    whole = tl.exp(score - higher) + total
    # Not as (sum over all) / whole - e_positive: where the positive has nearly all of the softmax,
    # that would be the difference of two equal numbers.
    e_TD = _load_rows(e, positive_T, counts, width, D, WD).to(tl.float32)
    dq_TD = (weight_T / whole)[:, None] * (sum_TD * factor[:, None] - total[:, None] * e_TD)
    tl.store(loss + row, tl.where(counts, higher - score + tl.log(whole), 0.0), mask=row < T)
    tl.store(log_sum + row, higher + tl.log(whole), mask=row < T)
    tl.store(
        dq + row.to(tl.int64)[:, None] * D + width[None, :],
        tl.where(counts[:, None], dq_TD, 0.0).to(dq.dtype.element_ty),
        mask=(row < T)[:, None] & (width < D)[None, :],
    )


@triton.jit
@no_type_check
def items(
    q,
    e,
    positive,
    weight,
    log_sum,
    last,
    out,
    T: constexpr,
    I: constexpr,  # noqa: E741
    D: constexpr,
    WD: constexpr,
    BT: constexpr,
    BI: constexpr,
    SHARES: constexpr,
    PRECISION: constexpr,
):
    """The gradient of e, of each of SHARES shares of the rows: [SHARES, I, D].

    No row from `last` on counts.
    """
    share, tile = tl.program_id(0) % SHARES, tl.program_id(0) // SHARES
    item = tile * BI + tl.arange(0, BI)
    width = tl.arange(0, WD)
    e_ID = _load_rows(e, item, item < I, width, D, WD)
    sum_ID = tl.zeros([BI, WD], tl.float32)
    blocks = (tl.load(last) + BT - 1) // BT
    for block in range(share * blocks // SHARES, (share + 1) * blocks // SHARES):
        row = block * BT + tl.arange(0, BT)
        weight_T = tl.load(weight + row, mask=row < T, other=0.0)
        counts = weight_T > 0
        q_TD = _load_rows(q, row, counts, width, D, WD)
        positive_T = tl.load(positive + row, mask=counts, other=0)
        log_sum_T = tl.load(log_sum + row, mask=counts, other=0.0)
        score_IT = tl.dot(e_ID, tl.trans(q_TD), input_precision=PRECISION)
        share_IT = tl.exp(score_IT - log_sum_T[None, :])
        slope_IT = share_IT - tl.where(item[:, None] == positive_T[None, :], 1.0, 0.0)
        slope_IT = tl.where(counts[None, :], slope_IT * weight_T[None, :], 0.0)
        sum_ID = tl.dot(slope_IT.to(q_TD.dtype), q_TD, sum_ID, input_precision=PRECISION)
    tl.store(
        out + (share.to(tl.int64) * I + item)[:, None] * D + width[None, :],
        tl.where((item > 0)[:, None], sum_ID, 0.0),
        mask=(item < I)[:, None] & (width < D)[None, :],
    )
