"""Masks against a definition written row by row in plain Python, straight from the rules."""

import itertools

import numpy as np
import pytest

from kernels.hstu_attention.plan import make_plan
from kernels.mask import AttentionMask


def allowed(mask, p, k, c, h, m):
    """May position p of a sequence of c contextual, h history and m target tokens see position k?"""
    if p == k:
        return True
    if p < c:
        return k < c + h
    if k >= c + h or k >= p:
        return False
    is_target = p >= c + h
    i = h if is_target else p - c
    if mask.window is None:
        return True
    if mask.full_rows > 0 and (is_target or i >= h - mask.full_rows):
        return True
    if k < mask.prefix:
        return True
    if k < c:
        return mask.context_sink or i + 1 <= mask.window
    if is_target and mask.prefix > 0:
        return True
    return i - (k - c) <= mask.window


def brute_force(mask, lengths, targets, contextual, num_rows):
    out = np.zeros((num_rows, num_rows), bool)
    start = 0
    for n, m, c in zip(lengths, targets, contextual, strict=True):
        for p in range(n):
            for k in range(n):
                out[start + p, start + k] = allowed(mask, p, k, c, n - m - c, m)
        start += n
    return out


WINDOWS = [None, 0, 1, 3, 7]
MASKS = [
    AttentionMask(window=w, full_rows=f, prefix=g, context_sink=s)
    for w, f, g, s in itertools.product(WINDOWS, [0, 2, 5], [0, 1, 4], [True, False])
]
# (length, targets, contextual): empty, single, all target, all contextual, no history, and ordinary ones
SEQUENCES = [(0, 0, 0), (1, 0, 0), (11, 0, 0), (3, 3, 0), (4, 0, 4), (5, 2, 3), (12, 4, 0), (13, 0, 2), (17, 3, 5), (9, 1, 6), (2, 1, 1)]
ROWS = sum(n for n, _, _ in SEQUENCES) + 6
LENGTHS, TARGETS, CONTEXTUAL = (np.array(x, np.int32) for x in zip(*SEQUENCES, strict=True))
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)


def expand(lo, hi, size):
    """Half-open ranges [..., R] to how often each of `size` places is covered."""
    place = np.arange(size)
    inside = (place >= np.asarray(lo)[..., None]) & (place < np.asarray(hi)[..., None])
    return inside.sum(-2)


@pytest.mark.parametrize("counts", ["plain", "targets", "contextual", "both"])
def test_dense_and_intervals_and_pairs_match_the_rules(counts):
    targets = TARGETS if counts in ("targets", "both") else np.zeros_like(TARGETS)
    contextual = CONTEXTUAL if counts in ("contextual", "both") else np.zeros_like(CONTEXTUAL)
    given_targets = targets if counts in ("targets", "both") else None
    given_contextual = contextual if counts in ("contextual", "both") else None
    for mask in MASKS:
        want = brute_force(mask, LENGTHS, targets, contextual, ROWS)
        np.testing.assert_array_equal(mask.dense(OFFSETS, ROWS, given_targets, given_contextual), want, err_msg=str(mask))
        lo0, hi0, lo1, hi1 = (np.asarray(x) for x in mask.intervals(OFFSETS, ROWS, given_targets, given_contextual))
        for x in (lo0, hi0, lo1, hi1):
            assert x.dtype == np.int32 and x.shape == (ROWS,)
        covered = expand(np.stack([lo0, lo1], 1), np.stack([hi0, hi1], 1), ROWS)
        diagonal = np.diag(np.diag(want))
        np.testing.assert_array_equal(covered, want & ~diagonal, err_msg=f"{mask}: not disjoint, or the diagonal is contained")
        assert mask.num_pairs(LENGTHS, given_targets, given_contextual) == want.sum()


@pytest.mark.parametrize("blocks", [(8, 8), (4, 16), (16, 4), (1, 1), (7, 5), (128, 128)])
def test_tile_bounds_cover_exactly_what_meets(blocks):
    block_q, block_k = blocks
    nq, nk = -(-ROWS // block_q), -(-ROWS // block_k)
    for mask in MASKS:
        dense = np.asarray(mask.dense(OFFSETS, ROWS, TARGETS, CONTEXTUAL))
        padded = np.zeros((nq * block_q, nk * block_k), bool)
        padded[:ROWS, :ROWS] = dense
        meets = padded.reshape(nq, block_q, nk, block_k).any((1, 3))
        bounds = make_plan(mask, OFFSETS, ROWS, TARGETS, CONTEXTUAL).tile_bounds(block_q, block_k)
        for lo, hi in ((bounds.key_lo, bounds.key_hi), (bounds.row_lo, bounds.row_hi)):
            some = np.asarray(hi > lo)
            assert (np.asarray(lo)[~some] == 0).all() and (np.asarray(hi)[~some] == 0).all()
            for r in range(2):  # ascending
                later = some[:, r] & some[:, r + 1]
                assert (np.asarray(hi)[:, r] <= np.asarray(lo)[:, r + 1])[later].all()
        np.testing.assert_array_equal(expand(bounds.key_lo, bounds.key_hi, nk), meets, err_msg=f"{mask} keys of query tiles")
        np.testing.assert_array_equal(expand(bounds.row_lo, bounds.row_hi, nq), meets.T, err_msg=f"{mask} rows of key tiles")
