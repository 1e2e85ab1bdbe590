"""One score of an item has one value: ties are those of the embeddings, wherever an item stands.

`tests/gpu` runs the same tests on a GPU.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultra_hstu.quantization import KINDS, dense, quantize
from ultra_hstu.retrieval.metrics import best_items, ranks
from ultra_hstu.retrieval.scores import all_scores, digits, factors, paired_scores

ITEMS, USERS = 101, 40
# width, chunk_items, l2_normalize, jit: chunks that divide the table, that do not, and a whole one
CASES = [
    (1, 17, True, True),
    (3, 102, False, True),
    (16, 10, False, False),
    (50, 4096, True, True),
    (50, 51, True, False),
    (128, 33, False, True),
    (512, 64, True, True),
    (1025, 102, False, True),
]


def vectors(width, rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def ranker(case):
    _, chunk_items, l2_normalize, compiled = case
    run = functools.partial(ranks, l2_normalize=l2_normalize, chunk_items=chunk_items, cutoff=None)
    return jax.jit(run) if compiled else run


def exact_scores(h_UD, table_ID, l2_normalize):
    """In float64, where a sum of float32 products is rounded far below their ties."""
    h, table = np.asarray(h_UD, np.float64), np.asarray(table_ID, np.float64)
    if l2_normalize:
        table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-6)
    return h @ table.T


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ties_are_those_of_the_embeddings(case):
    """Equal embeddings rank the target last; a twin stands before it, unless it is hidden."""
    width, rng, run = case[0], np.random.default_rng(1), ranker(case)
    h = jnp.asarray(vectors(width, USERS))
    target = rng.integers(1, ITEMS + 1, USERS)
    seen = rng.integers(1, ITEMS + 1, (USERS, 20))
    seen[seen == target[:, None]] = 0
    hidden_UI = np.zeros((USERS, ITEMS + 1), bool)
    hidden_UI[np.arange(USERS)[:, None], seen] = True
    alike = jnp.asarray(np.repeat(vectors(width, 1, seed=2), ITEMS + 1, axis=0))
    found = run(h, alike, jnp.asarray(target), jnp.asarray(seen))
    np.testing.assert_array_equal(found, ITEMS - hidden_UI[:, 1:].sum(axis=1))
    for scale in (1.0, 1e-9, 1e9):
        kind_I = rng.permutation(np.arange(ITEMS + 1) % 34)  # each vector stands there three times
        table = (scale * vectors(width, 34, seed=3)[kind_I]).astype(np.float32)
        score_UI = exact_scores(h, table, case[2])
        # Twins are alike by their kind, whatever float64 makes of their scores.
        twin_UI = kind_I[None] == kind_I[target][:, None]
        better_UI = (score_UI > score_UI[np.arange(USERS), target][:, None]) & ~twin_UI
        if width == 1 and case[2]:  # normalised, embeddings are nothing but signs
            break
        expected = ((better_UI | twin_UI) & ~hidden_UI)[:, 1:].sum(axis=1)
        found = run(h, jnp.asarray(table), jnp.asarray(target), jnp.asarray(seen))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_twins(kind):
    """Ranks over a packed table are those over its dense rows; a twin stands before the target."""
    rng = np.random.default_rng(0)
    kind_I = rng.permutation(np.arange(ITEMS + 1) % 51)
    table = quantize(vectors(16, 51)[kind_I], kind)
    h, target = jnp.asarray(vectors(16, USERS, seed=1)), rng.integers(1, ITEMS + 1, USERS)
    found = np.asarray(ranker((16, 17, True, True))(h, table, jnp.asarray(target)))
    unpacked = ranker((16, 64, True, False))(h, dense(table), jnp.asarray(target))
    np.testing.assert_array_equal(found, unpacked)
    assert (kind_I[target[found == 1]] == kind_I[0]).all()  # of these the twin is the padding


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_among_the_best_is_the_rank(kind):
    """`best_items` against `ranks`, in chunks of other sizes: every item's rank is the last place
    of those that score the same, and of these the lower id comes first."""
    rng = np.random.default_rng(4)
    table = quantize(vectors(50, 60)[rng.integers(0, 60, ITEMS + 1)].round(1), kind)
    h = jnp.asarray(vectors(50, 3, seed=5).round(1))
    best_UK, score_UK = best_items(h, table, k=ITEMS, chunk_items=23)
    run = ranker((50, 40, True, True))
    for user, (best_K, score_K) in enumerate(
        zip(np.asarray(best_UK), np.asarray(score_UK), strict=True)
    ):
        assert sorted(best_K.tolist()) == list(range(1, ITEMS + 1))
        pairs = list(zip(-score_K, best_K, strict=True))
        assert pairs == sorted(pairs)
        found = run(jnp.repeat(h[user][None], ITEMS, 0), table, jnp.asarray(best_K))
        last = [np.flatnonzero(score_K == score).max() + 1 for score in score_K]
        np.testing.assert_array_equal(found, last)


def test_zeros_of_either_sign_tie():
    table = jnp.asarray([[0.0], [0.0], [-0.0], [0.0], [-0.0], [-1.0]])
    for sign, expected in ((-1, [5, 1, 2, 3, 4]), (1, [1, 2, 3, 4, 5])):
        for l2_normalize in (False, True):
            best, _ = best_items(sign * jnp.ones((1, 1)), table, k=5, l2_normalize=l2_normalize)
            np.testing.assert_array_equal(best, [expected])


def test_a_score_that_is_nan_is_no_recommendation():
    table = jnp.asarray(vectors(4, 9)).at[jnp.asarray([3, 5])].set(jnp.asarray([[jnp.nan]] * 2))
    best, score = best_items(jnp.ones((1, 4)), table, k=8)
    assert sorted(best[0, :6].tolist()) == [1, 2, 4, 6, 7, 8] and best[0, 6:].tolist() == [0, 0]
    assert np.isneginf(score[0, 6:]).all()


def test_items_out_of_the_table_are_not_found():
    found = ranks(jnp.ones((3, 2)), jnp.asarray(vectors(2, 6)), jnp.asarray([-1, 6, 2**30]))
    np.testing.assert_array_equal(found, 2501)


@pytest.mark.parametrize("width", [1, 2, 7, 50, 256, 257, 1024])
def test_scores_are_as_exact_as_float32(width):
    """Against float64, for vectors of very different sizes; one pair alone gives the same bits."""
    rng = np.random.default_rng(0)
    for unit in (False, True):
        h, e = (
            vectors(width, rows, seed) * np.exp(rng.uniform(-20, 20, (rows, 1)))
            for rows, seed in ((30, 0), (40, 1))
        )
        h, e = h.astype(np.float32), e.astype(np.float32)
        pairs = list(itertools.islice(itertools.product(range(30), range(40)), 0, 1200, 37))
        users, items = map(list, zip(*pairs, strict=True))
        made = [digits(jnp.asarray(x)) for x in (h, e, h[users], e[items])]
        factor_I, factor_P = factors(made[1], made[3], l2_normalize=unit)
        score_UI = np.asarray(all_scores(*made[:2], factor_I))
        want_UI = exact_scores(h, e, unit)
        size_UI = np.linalg.norm(h, axis=1)[:, None] * (1 if unit else np.linalg.norm(e, axis=1))
        assert (np.abs(score_UI - want_UI) <= 2.0**-21 * size_UI).all()
        alone = paired_scores(*made[2:], factor_P)
        np.testing.assert_array_equal(alone, score_UI[users, items])


def test_digits_add_up_to_the_vector():
    """Whole numbers within their bits; what they leave out is below the last digit."""
    x = vectors(50, 20) * np.float32(1e-7)
    made = digits(jnp.asarray(x))
    back = np.zeros(x.shape)
    for s, digit in enumerate(made.digit_XD):
        assert (digit == np.round(digit)).all() and np.abs(digit).max() <= 2**9
        back += np.asarray(made.scale_X, np.float64)[:, None] * np.asarray(digit) * 2.0 ** (-10 * s)
    np.testing.assert_allclose(back, x, rtol=0, atol=2.0**-29 * np.abs(x).max())
