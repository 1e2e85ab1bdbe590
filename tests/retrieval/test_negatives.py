"""Negatives: range, distribution, and that they are functions of their key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultra_hstu.parallel.shards import ONE, Shards
from ultra_hstu.retrieval.loss import softmax_loss
from ultra_hstu.retrieval.negatives import (
    check_draws,
    drawn_from,
    drawn_uniformly,
    in_batch_negatives,
    in_batch_pool,
    log_frequency,
    uniform_negatives,
)


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
        lambda key: in_batch_negatives(key, in_batch_pool(jnp.arange(60)), 8, 4),
    ],
)
def test_function_of_the_key(make):
    np.testing.assert_array_equal(make(jax.random.key(3)), jax.jit(make)(jax.random.key(3)))
    assert np.any(np.asarray(make(jax.random.key(3))) != np.asarray(make(jax.random.key(4))))


def test_in_batch():
    """Drawn as often as they occur in the batch."""
    items = jnp.asarray([0, 7, 3, 7, 0, 7, 9, 0], jnp.int32)
    pool = in_batch_pool(items)
    share = {3: 0.2, 7: 0.6, 9: 0.2}
    assert int(pool.size) == 5
    ids = np.asarray(in_batch_negatives(jax.random.key(0), pool, 1000, 60))
    found = np.bincount(ids.ravel(), minlength=11) / ids.size
    for item in range(11):
        assert abs(found[item] - share.get(item, 0)) < 0.01


def test_an_empty_batch_has_no_negatives():
    """Nothing to draw from: id 0, on rows that no loss reads."""
    assert np.all(
        np.asarray(
            in_batch_negatives(jax.random.key(0), in_batch_pool(jnp.zeros(4, jnp.int32)), 3, 2)
        )
        == 0
    )


def test_log_frequency():
    """The share of the training targets; padding is none, and no item has a share of 0."""
    count_I = np.array([7, 3, 0, 1, 4])
    expected = np.array([3, 1, 1, 4]) / 9
    np.testing.assert_allclose(np.exp(log_frequency(count_I)[1:]), expected, rtol=1e-6)


def test_in_batch_negatives_stand_for_the_catalogue():
    """Over many batches, `exp(loss)` is on average that of the softmax over all items.

    `exp(loss) = 1 + sum over negatives of exp(s - s_positive) / (R q)`, an unbiased estimate of
    the same sum over all other items if q is the items' frequency in training. The share of an
    item in its own batch does not do: the estimate is then the sum over the batch's items.
    """
    items, batches, pool_size, draws = 12, 400, 8, 64
    rng = np.random.default_rng(0)
    count_I = np.concatenate([[0], rng.integers(20, 60, items)])
    targets = np.repeat(np.arange(items + 1), count_I)
    pools = np.stack([rng.choice(targets, pool_size) for _ in range(batches)]).astype(np.int32)
    table = jnp.asarray(rng.normal(size=(items + 1, 4)), jnp.float32)
    h, positive = jnp.asarray(rng.normal(size=(1, 4)), jnp.float32), jnp.asarray([5])
    options = dict(temperature=1.0, l2_normalize=False, chunk_rows=1)

    def loss(key, item_P, log_q):
        negative = in_batch_negatives(key, in_batch_pool(item_P), 1, draws)
        return softmax_loss(h, table, positive, jnp.ones(1), negative, log_q=log_q, **options)[0]

    keys = jax.random.split(jax.random.key(0), batches)
    log_q = jnp.asarray(log_frequency(count_I))
    found = jax.jit(jax.vmap(loss, (0, 0, None)))(keys, jnp.asarray(pools), log_q)
    full = softmax_loss(h, table, positive, jnp.ones(1), **options)[0]
    mean, deviation = np.exp(found).mean(), np.exp(found).std() / np.sqrt(batches)
    assert abs(mean - np.exp(full)) < 4 * deviation < 0.2 * np.exp(full)
    shares = np.stack([np.bincount(pool, minlength=items + 1) for pool in pools]) / pool_size
    of_batch = jax.jit(jax.vmap(loss))(keys, jnp.asarray(pools), jnp.log(shares.astype(np.float32)))
    assert np.exp(of_batch).mean() < 0.8 * np.exp(full)


@pytest.mark.parametrize(
    ("rows_per_draw", "where", "message"),
    [
        (4, dict(groups=2), "rows_per_draw=4 needs as many parallel.data.*2 groups share"),
        (32, dict(shards=Shards(context=4, striped=True)), "rows_per_draw=32.*blocks of 16 rows"),
        (64, dict(shards=Shards(context=4)), "blocks of 32 rows.*parallel.context=4"),
    ],
)
def test_draws_that_meshes_would_not_share_alike(rows_per_draw, where, message):
    where = dict(shards=ONE, groups=1) | where
    with pytest.raises(ValueError, match=message):
        check_draws(rows_per_draw, 128, **where)
    check_draws(1, 128, **where)
    check_draws(rows_per_draw, 128, ONE, 1)


def test_rows_share_a_draw():
    """The first row's key draws for all of them; ids are those of independent draws from it."""
    key_T = jax.random.split(jax.random.key(2), 12)
    found = drawn_uniformly(key_T, 5, 99, rows_per_draw=4)
    np.testing.assert_array_equal(
        found.draw(found.rows[::4], found.shared), uniform_negatives(key_T[::4], 3, 5, 99)
    )
    pool = in_batch_pool(jnp.arange(60))
    found = drawn_from(pool, key_T, 5, rows_per_draw=4)
    np.testing.assert_array_equal(
        found.draw(found.rows[::4], found.shared), in_batch_negatives(key_T[::4], pool, 3, 5)
    )
