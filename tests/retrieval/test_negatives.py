"""Negatives: range, distribution, and that they are functions of their key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultra_hstu.retrieval.negatives import in_batch_negatives, in_batch_pool, uniform_negatives


def test_uniform_over_the_whole_catalogue():
    ids = np.asarray(uniform_negatives(jax.random.key(0), 500, 200, 11))
    assert ids.shape == (500, 200) and ids.dtype == np.int32
    counts = np.bincount(ids.ravel(), minlength=12)
    assert counts[0] == 0 and len(counts) == 12
    expected = ids.size / 11
    chi2 = np.sum((counts[1:] - expected) ** 2 / expected)
    assert chi2 < 30  # 10 degrees of freedom: exceeded once in 1000 keys
    assert len({tuple(row) for row in ids}) == 500  # fresh for each row


def test_ids_above_2_to_the_24_survive():
    items = 2**24 + 12_345
    ids = np.asarray(uniform_negatives(jax.random.key(1), 100, 1000, items))
    assert ids.min() >= 1 and ids.max() <= items
    assert np.any(ids % 2 == 1) and ids.max() > 2**24


@pytest.mark.parametrize(
    "make",
    [
        lambda key: uniform_negatives(key, 8, 4, 99),
        lambda key: in_batch_negatives(key, in_batch_pool(jnp.arange(60), 99), 8, 4),
    ],
)
def test_function_of_the_key(make):
    np.testing.assert_array_equal(make(jax.random.key(3)), jax.jit(make)(jax.random.key(3)))
    assert np.any(np.asarray(make(jax.random.key(3))) != np.asarray(make(jax.random.key(4))))


def test_in_batch():
    """Drawn as often as they occur in the batch; log_q says how often."""
    items = jnp.asarray([0, 7, 3, 7, 0, 7, 9, 0], jnp.int32)
    pool = in_batch_pool(items, 10)
    share = {3: 0.2, 7: 0.6, 9: 0.2}
    assert int(pool.size) == 5
    ids = np.asarray(in_batch_negatives(jax.random.key(0), pool, 1000, 60))
    found = np.bincount(ids.ravel(), minlength=11) / ids.size
    for item in range(11):
        assert abs(found[item] - share.get(item, 0)) < 0.01
        np.testing.assert_allclose(np.exp(pool.log_q_I[item]), share.get(item, 0), rtol=1e-6)


def test_an_empty_batch_has_no_negatives():
    """Nothing to draw from: id 0, on rows that no loss reads."""
    assert np.all(
        np.asarray(
            in_batch_negatives(jax.random.key(0), in_batch_pool(jnp.zeros(4, jnp.int32), 10), 3, 2)
        )
        == 0
    )
