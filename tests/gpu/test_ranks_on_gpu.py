"""Ties and scores on a GPU, and that they are those of a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.retrieval.test_ties import (  # noqa: F401 - collected here, too
    ITEMS,
    USERS,
    test_a_place_among_the_best_is_the_rank,
    test_a_score_that_is_nan_is_no_recommendation,
    test_quantised_twins,
    test_scores_are_as_exact_as_float32,
    test_ties_are_those_of_the_embeddings,
    test_zeros_of_either_sign_tie,
    vectors,
)
from ultra_hstu.retrieval.metrics import best_items, ranks


@pytest.mark.parametrize("precision", ["highest", "tensorfloat32", "bfloat16"])
def test_the_same_ranks_as_on_a_cpu(precision):
    """Whatever the precision of other products is."""
    found = []
    for platform in ("gpu", "cpu"):
        device = jax.devices(platform)[0]
        h, table = (jax.device_put(vectors(50, n), device) for n in (USERS, ITEMS + 1))
        target = jax.device_put(jnp.arange(1, USERS + 1), device)
        with jax.default_matmul_precision(precision):
            found.append((ranks(h, table, target), best_items(h, table, k=20)[0]))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
