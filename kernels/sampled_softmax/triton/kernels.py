"""The Triton kernels of `sampled_softmax`: a program for a row, and a program for an item.

`chunks.py` launches them. Every embedding is read once, where it lies, in the dtype of q: the
program of a row computes its scores, the softmax as it grows, and the gradient of q in one pass
over its negatives. The gradient of an item is the sum over its occurrences, which were sorted by
item before: no additions in memory, and the same bits on every run.

Names in capitals are known when a kernel is compiled: D the width, WD the padded one, X columns of
ids (the positive and R negatives), BX or BN of them at one time.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
@no_type_check
def rows(
    q,
    e,
    ids,
    weight,
    shift,
    logit,
    log_sum,
    slope,
    loss,
    dq,
    X: constexpr,
    D: constexpr,
    WD: constexpr,
    BX: constexpr,
    SHIFTED: constexpr,
    COLLISION: constexpr,
):
    """Logits [C, X], and the gradient of q [C, D].

    Of each row, the log-sum-exp of its logits, the slope of the positive's, and its loss. Rows of
    weight 0 have a loss of 0, a gradient of 0, and no logits.
    """
    row = tl.program_id(0).to(tl.int64)
    width = tl.arange(0, WD)
    inside = width < D
    w = tl.load(weight + row)
    if w > 0:
        ids += row * X
        logit += row * X
        q_D = tl.load(q + row * D + width, mask=inside, other=0.0).to(tl.float32)
        positive = tl.load(ids)
        e_D = tl.load(e + positive.to(tl.int64) * D + width, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(q_D * e_D, 0)
        tl.store(logit, score)
        top = score
        total = score * 0.0  # of the negatives
        sum_D = tl.zeros([WD], tl.float32)
        for first in range(1, X, BX):
            column = first + tl.arange(0, BX)
            real = column < X
            id_X = tl.load(ids + column, mask=real, other=0)
            e_XD = tl.load(
                e + id_X.to(tl.int64)[:, None] * D + width[None, :],
                mask=real[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            score_X = tl.sum(q_D[None, :] * e_XD, 1)
            if SHIFTED:
                score_X -= tl.load(shift + id_X)
            score_X = tl.where(id_X == positive, COLLISION, score_X)
            tl.store(logit + column, score_X, mask=real)
            score_X = tl.where(real, score_X, -float("inf"))
            higher = tl.maximum(top, tl.max(score_X, 0))
            factor = tl.exp(top - higher)
            share_X = tl.exp(score_X - higher)
            total = total * factor + tl.sum(share_X, 0)
            sum_D = sum_D * factor + tl.sum(share_X[:, None] * e_XD, 0)
            top = higher
        # The slope of the positive is not exp(score) / whole - 1: where it has nearly all of the
        # softmax, that would be the difference of two equal numbers.
        whole = tl.exp(score - top) + total
        tl.store(slope + row, -w * total / whole)
        tl.store(log_sum + row, top + tl.log(whole))
        tl.store(loss + row, top - score + tl.log(whole))
        dq_D = (w / whole) * (sum_D - total * e_D)
        tl.store(dq + row * D + width, dq_D.to(dq.dtype.element_ty), mask=inside)
    else:
        tl.store(log_sum + row, 0.0)
        tl.store(slope + row, 0.0)
        tl.store(loss + row, 0.0)
        tl.store(dq + row * D + width, tl.zeros([WD], dq.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def items(
    q,
    order,
    slope,
    begin,
    so_far,
    out,
    X: constexpr,
    D: constexpr,
    WD: constexpr,
    BN: constexpr,
):
    """so_far [I + 1, D] plus, for each item, the sum of slope * q over its occurrences.

    Occurrence o of `slope` [C * X] is one of row o // X; those of item i are
    `order[begin[i]:begin[i + 1]]`.
    """
    item = tl.program_id(0)
    width = tl.arange(0, WD)
    inside = width < D
    first, last = tl.load(begin + item), tl.load(begin + item + 1)
    out_D = item.to(tl.int64) * D + width
    sum_D = tl.load(so_far + out_D, mask=inside, other=0.0)
    for place in range(first, last, BN):
        place_N = place + tl.arange(0, BN)
        real = place_N < last
        occurrence_N = tl.load(order + place_N, mask=real, other=0)
        slope_N = tl.load(slope + occurrence_N, mask=real, other=0.0)
        q_ND = tl.load(
            q + (occurrence_N // X).to(tl.int64)[:, None] * D + width[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        sum_D += tl.sum(slope_N[:, None] * q_ND, 0)
    tl.store(out + out_D, sum_D, mask=inside)
