"""Masks against a definition written row by row in plain Python, straight from the rules."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.hstu_attention.plan import TileSizes, make_plan
from kernels.jagged import Rows
from kernels.mask import AttentionMask, KeyIntervals


def allowed(mask, p, k, c, h, m):
    """May position p see position k, of c contextual, h history and m target tokens?"""
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
# (length, targets, contextual): empty, single, all target, all contextual, no history, and ordinary
# ones
SEQUENCES = [
    (0, 0, 0),
    (1, 0, 0),
    (11, 0, 0),
    (3, 3, 0),
    (4, 0, 4),
    (5, 2, 3),
    (12, 4, 0),
    (13, 0, 2),
    (17, 3, 5),
    (9, 1, 6),
    (2, 1, 1),
]
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
        np.testing.assert_array_equal(
            mask.dense(OFFSETS, ROWS, given_targets, given_contextual), want, err_msg=str(mask)
        )
        lo0, hi0, lo1, hi1 = (
            np.asarray(x) for x in mask.intervals(OFFSETS, ROWS, given_targets, given_contextual)
        )
        for x in (lo0, hi0, lo1, hi1):
            assert x.dtype == np.int32 and x.shape == (ROWS,)
        covered = expand(np.stack([lo0, lo1], 1), np.stack([hi0, hi1], 1), ROWS)
        diagonal = np.diag(np.diag(want))
        np.testing.assert_array_equal(
            covered, want & ~diagonal, err_msg=f"{mask}: not disjoint, or the diagonal is contained"
        )
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
        np.testing.assert_array_equal(
            expand(bounds.key_lo, bounds.key_hi, nk), meets, err_msg=f"{mask} keys of query tiles"
        )
        np.testing.assert_array_equal(
            expand(bounds.row_lo, bounds.row_hi, nq), meets.T, err_msg=f"{mask} rows of key tiles"
        )


def test_known_answer():
    want = np.array(
        [[int(x) for x in row] for row in "100000 110000 111000 011100 111110 111111".split()], bool
    )
    np.testing.assert_array_equal(
        AttentionMask(window=2, full_rows=2).dense(np.array([0, 6]), 6), want
    )


def test_traced_offsets_give_the_same_plan():
    mask = AttentionMask(window=3, full_rows=2, prefix=1)
    tiles = TileSizes(8, 4)

    def planned(offsets, num_targets, num_contextual):
        plan = make_plan(mask, offsets, ROWS, num_targets, num_contextual)
        return plan.storing([tiles], [plan.find(tiles)])

    eager = planned(OFFSETS, TARGETS, CONTEXTUAL)
    traced = jax.jit(planned)(OFFSETS, TARGETS, CONTEXTUAL)
    assert traced.stored_keys == (tiles,)
    jax.tree.map(np.testing.assert_array_equal, eager, traced)
    jax.tree.map(np.testing.assert_array_equal, traced.tile_bounds(8, 4), eager.tile_bounds(8, 4))


def test_row_intervals_are_the_transpose():
    for mask in MASKS[::7]:
        keys = Rows.of(OFFSETS, ROWS, TARGETS, CONTEXTUAL)
        rows = [np.asarray(x) for x in mask.rows_of(keys)]
        seen = expand(np.stack(rows[0::2], 1), np.stack(rows[1::2], 1), ROWS) > 0
        want = np.asarray(mask.dense(OFFSETS, ROWS, TARGETS, CONTEXTUAL)).T
        np.testing.assert_array_equal(seen, want & ~np.diag(np.diag(want)), err_msg=str(mask))


def test_locality():
    """A local row sees its window and copied keys, no more; other rows are as few as promised."""
    for mask in (mask for mask in MASKS if mask.windowed):
        dense = np.asarray(mask.dense(OFFSETS, ROWS, TARGETS, CONTEXTUAL))
        rows = Rows.of(OFFSETS, ROWS, TARGETS, CONTEXTUAL)
        local = mask.locality(rows, int(TARGETS.max()), int(CONTEXTUAL.max()))
        row = np.arange(ROWS)
        is_local = np.asarray(rows.real & ~local.is_far)
        first, last = np.asarray(local.first), np.asarray(local.last)
        np.testing.assert_array_equal(
            is_local, (row >= first) & (row < last) & np.asarray(rows.real), err_msg=str(mask)
        )
        near = (row[None] >= row[:, None] - local.reach) & (row[None] >= first[:, None])
        unseen = dense & ~near & ~np.asarray(local.is_copied)[None]
        assert not unseen[is_local].any(), mask
        window = near & (row[None] < row[:, None])
        assert (dense | ~window)[is_local].all(), mask
        for flags, most in ((local.is_far, local.most_far), (local.is_copied, local.most_copied)):
            counts = np.add.reduceat(np.append(flags, False), OFFSETS[:-1]) * (LENGTHS > 0)
            assert counts.max() <= most, mask
    with pytest.raises(ValueError, match="has no window"):
        AttentionMask().locality(rows, 0, 0)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_what_a_mask_says_of_itself(mask):
    """Without targets and contextual tokens: rows of a key in one piece, and rows that narrow."""
    length = 12
    seen = brute_force(mask, [length], [0], [0], length)
    longer = brute_force(mask, [length + 1], [0], [0], length + 1)[:length, :length]
    if mask.in_one_piece:
        assert (np.abs(np.diff(np.pad(seen.T, ((0, 0), (1, 1))).astype(int))).sum(1) == 2).all()
    same = (seen == longer).all(1)
    assert same[: length - mask.wider_rows].all()
    assert mask.windowed or (seen == np.tril(np.ones_like(seen))).all()


@settings(max_examples=60)
@given(data=st.data())
def test_any_mask_and_batch(data):
    size = st.integers(0, 9)
    mask = AttentionMask(
        data.draw(st.none() | size), data.draw(size), data.draw(size), data.draw(st.booleans())
    )
    lengths = data.draw(st.lists(st.integers(0, 14), min_size=3, max_size=3))
    targets = [data.draw(st.integers(0, n)) for n in lengths]
    contextual = [data.draw(st.integers(0, n - m)) for n, m in zip(lengths, targets, strict=True)]
    want = brute_force(mask, lengths, targets, contextual, 44)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    counts = (np.array(targets, np.int32), np.array(contextual, np.int32))
    np.testing.assert_array_equal(mask.dense(offsets, 44, *counts), want)
    assert mask.num_pairs(lengths, *counts) == want.sum()
    bounds = make_plan(mask, offsets, 44, *counts).tile_bounds(4, 4)
    meets = want.reshape(11, 4, 11, 4).any((1, 3))
    np.testing.assert_array_equal(expand(bounds.key_lo, bounds.key_hi, 11), meets)
    np.testing.assert_array_equal(expand(bounds.row_lo, bounds.row_hi, 11), meets.T)


def test_num_pairs_of_long_sequences_is_exact():
    n = 100_000
    assert AttentionMask().num_pairs([n, n]) == n * (n + 1)
    w = 256
    assert AttentionMask(window=w).num_pairs([n]) == n * (w + 1) - w * (w + 1) // 2


def test_intervals_of_a_matrix():
    mask = AttentionMask(window=4, prefix=2)
    dense = np.asarray(mask.dense(OFFSETS, ROWS, TARGETS))
    np.testing.assert_array_equal(KeyIntervals.from_dense(dense).dense(OFFSETS[-1]), dense)
    every_other = np.tril(np.indices((9, 9)).sum(0) % 2 == 0)
    with pytest.raises(ValueError, match="row 6 attends to 3 intervals"):
        KeyIntervals.from_dense(every_other)
    with pytest.raises(ValueError, match=r"square matrix, got shape \(2, 3\)"):
        KeyIntervals.from_dense(np.ones((2, 3), bool))


def test_masks_are_hashable_and_checked():
    assert len({AttentionMask(window=2), AttentionMask(window=2), AttentionMask()}) == 2
    with pytest.raises(ValueError, match="window must be None or an integer >= 0, got -1"):
        AttentionMask(window=-1)
    with pytest.raises(ValueError, match="prefix must be an integer >= 0, got -2"):
        AttentionMask(prefix=-2)
    with pytest.raises(ValueError, match="full_rows must be an integer >= 0, got True"):
        AttentionMask(full_rows=True)
