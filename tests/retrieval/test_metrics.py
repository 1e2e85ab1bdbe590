"""Ranks: parity with the public implementation, a plain definition, and what may help no model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden
from ultra_hstu.retrieval.metrics import CUTOFFS, best_items, mean_metrics, ranks


@pytest.fixture(scope="module")
def corpus():
    """The golden corpus as a table of all ids up to 3000 and a mask of those that exist."""
    data = golden.load("metrics")
    table = np.full((3001, 4), np.nan, np.float32)
    table[data["item_ids"]] = data["item_embeddings"]
    exists = np.zeros(3001, bool)
    exists[data["item_ids"]] = True
    return data, jnp.asarray(data["user_embeddings"]), jnp.asarray(table), jnp.asarray(exists)


@pytest.mark.parametrize("chunk_items", [700, 4096])
@pytest.mark.parametrize("name", ["filtered", "unfiltered"])
def test_golden(name, chunk_items, corpus):
    data, users, table, exists = corpus
    seen = jnp.asarray(data["seen_ids"]) if name == "filtered" else None
    found = jax.jit(functools.partial(ranks, chunk_items=chunk_items))(
        users, table, jnp.asarray(data["target_ids"][:, 0]), seen, corpus_I=exists
    )
    np.testing.assert_array_equal(found, data[f"{name}/ranks"])

    means = mean_metrics(found)
    assert set(means) == {"mrr"} | {f"{kind}@{k}" for kind in ("hr", "ndcg") for k in CUTOFFS}
    for metric in set(means) - {"hr@5", "ndcg@5"}:
        assert abs(means[metric] - data[f"{name}/mean/{metric}"]) <= 1e-6, metric
    means = mean_metrics(found[data["target_ratings"][:, 0] >= 4])
    for metric in ("ndcg@10", "hr@10", "hr@50", "mrr"):
        assert abs(means[metric] - data[f"{name}/mean/{metric}_>=4"]) <= 1e-6, metric

    ids, scores = jax.jit(functools.partial(best_items, k=10, chunk_items=chunk_items))(
        users, table, seen, corpus_I=exists
    )
    np.testing.assert_array_equal(ids, data[f"{name}/top10_ids"])
    assert np.all(np.diff(scores, axis=1) < 0)


def test_means_by_their_definition():
    all_ranks = np.random.default_rng(0).integers(1, 300, 50)
    np.testing.assert_allclose(
        mean_metrics(jnp.asarray(all_ranks))["ndcg@5"],
        np.mean((all_ranks <= 5) / np.log2(all_ranks + 1)),
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="no user"):
        mean_metrics(jnp.zeros(0, jnp.int32))


@pytest.mark.parametrize("chunk_items", [1, 13, 64, 100])
@pytest.mark.parametrize("l2_normalize", [True, False])
def test_against_sorting(chunk_items, l2_normalize):
    """Every chunk size, repeated and foreign seen ids; ranks found by sorting."""
    rng = np.random.default_rng(5)
    users, items, width = 30, 63, 5
    h, table = (
        rng.normal(size=(users, width)).astype(np.float32),
        rng.normal(size=(items + 1, width)).astype(np.float32),
    )
    seen = rng.integers(0, items + 1, (users, 20))
    target = rng.integers(1, items + 1, users)
    found = ranks(
        jnp.asarray(h),
        jnp.asarray(table),
        jnp.asarray(target),
        jnp.asarray(seen),
        l2_normalize=l2_normalize,
        cutoff=None,
        chunk_items=chunk_items,
    )
    score = h @ (table / np.linalg.norm(table, axis=1, keepdims=True) if l2_normalize else table).T
    for u in range(users):
        left = [i for i in np.argsort(-score[u]) if i != 0 and i not in seen[u]]
        assert found[u] == (left.index(target[u]) + 1 if target[u] in left else items + 2)
    best, _ = best_items(
        jnp.asarray(h),
        jnp.asarray(table),
        jnp.asarray(seen),
        k=5,
        l2_normalize=l2_normalize,
        chunk_items=chunk_items,
    )
    for u in range(users):
        assert [i for i in np.argsort(-score[u]) if i != 0 and i not in seen[u]][:5] == list(
            best[u]
        )


def test_ties_and_nan_count_against_the_target():
    """One score for every item, or NaN, ranks last; the target never counts against itself.

    `test_ties` has what rounds.
    """
    table = jnp.ones((11, 3))
    target = jnp.asarray([1, 5, 10])
    np.testing.assert_array_equal(ranks(jnp.ones((3, 3)), table, target), 10)
    np.testing.assert_array_equal(ranks(jnp.full((3, 3), jnp.nan), table, target), 10)
    np.testing.assert_array_equal(
        ranks(jnp.ones((3, 3)), table, target, jnp.asarray([[2, 3]] * 3)), 8
    )
    np.testing.assert_array_equal(
        ranks(jnp.ones((3, 3)), table, target, cutoff=9), 10
    )  # beyond the cutoff


def test_not_found():
    h, table = (
        jnp.ones((3, 2)),
        jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32),
    )
    np.testing.assert_array_equal(ranks(h, table, jnp.asarray([0, 0, 0])), 2501)
    np.testing.assert_array_equal(
        ranks(h, table, jnp.asarray([4, 4, 4]), jnp.asarray([[4], [4], [4]])), 2501
    )
    np.testing.assert_array_equal(
        ranks(h, table, jnp.asarray([4, 4, 4]), corpus_I=jnp.arange(6) != 4), 2501
    )


def test_fewer_items_left_than_asked_for():
    ids, scores = best_items(jnp.ones((1, 2)), jnp.ones((4, 2)), jnp.asarray([[1, 2]]), k=3)
    np.testing.assert_array_equal(ids, [[3, 0, 0]])
    assert np.all(np.isneginf(scores[0, 1:]))


def test_memory_does_not_grow_with_the_catalogue():
    def temporary(items):
        spec = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
        args = (
            spec(jnp.float32, 64, 8),
            spec(jnp.float32, items, 8),
            spec(jnp.int32, 64),
            spec(jnp.int32, 64, 10),
        )
        return (
            jax.jit(functools.partial(ranks, chunk_items=512))
            .lower(*args)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert temporary(200_001) <= temporary(5_001) + 4096


def test_ranking_asks_for_full_precision():
    """Products of digits name the highest precision, whatever the default."""
    args = (jnp.ones((2, 3)), jnp.ones((5, 3)), jnp.asarray([1, 2]))
    with jax.default_matmul_precision("bfloat16"):
        text = str(jax.make_jaxpr(ranks)(*args))
    assert text.count("dot_general[") == text.count("Precision.HIGHEST, Precision.HIGHEST") == 6


@pytest.mark.parametrize(
    "call",
    [
        lambda **k: ranks(jnp.ones((1, 2)), jnp.ones((3, 2)), jnp.asarray([1]), **k),
        lambda **k: best_items(jnp.ones((1, 2)), jnp.ones((3, 2)), k=1, **k),
    ],
)
def test_bad_chunk(call):
    with pytest.raises(ValueError, match="chunk_items=0"):
        call(chunk_items=0)
