"""The softmax ablation against a dense softmax over the keys that a mask allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hstu_attention import RelativeBias
from kernels.hstu_attention.plan import make_plan
from kernels.hstu_attention.softmax import softmax_attention
from kernels.mask import AttentionMask

ROWS, ALPHA = 160, 0.7  # three tiles of the CPU's 64 rows
LENGTHS, TARGETS, CONTEXTUAL = (70, 0, 1, 75), (3, 0, 1, 2), (2, 0, 0, 1)
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
REAL = OFFSETS[-1]


@pytest.mark.parametrize(
    ("mask", "biased"),
    [(AttentionMask(), False), (AttentionMask(window=5, full_rows=2, prefix=3), True)],
    ids=["full", "local, biased"],
)
def test_against_a_dense_softmax(mask, biased):
    """Values and every gradient; padding holds NaN, and comes out 0."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(ROWS, 2, d)), jnp.float32) for d in (4, 4, 3))
    g = jnp.asarray(rng.normal(size=v.shape), jnp.float32).at[REAL:].set(0)
    tables = {
        "position": jnp.asarray(rng.normal(size=159), jnp.float32),
        "time": jnp.asarray(rng.normal(size=20), jnp.float32),
    }
    times = jnp.asarray(np.sort(rng.integers(0, 9000, ROWS)), jnp.int32)
    counts = (np.array(TARGETS), np.array(CONTEXTUAL))
    plan = make_plan(mask, OFFSETS, ROWS, *counts)
    allowed_TT = mask.dense(OFFSETS, ROWS, *counts)

    def bias_of(tables):
        return RelativeBias(tables["position"], tables["time"], times, times) if biased else None

    def dense(q, k, v, tables):
        score_HTT = ALPHA * jnp.einsum("qhd,khd->hqk", q, k)
        if biased:
            score_HTT += bias_of(tables).dense(ROWS)[None]
        weight_HTT = jax.nn.softmax(jnp.where(allowed_TT, score_HTT, -1e30), axis=-1)
        out = jnp.einsum("hqk,khd->qhd", jnp.where(allowed_TT, weight_HTT, 0), v)
        return jnp.sum(out * g), out

    def blockwise(q, k, v, tables):
        q, k, v = (x.at[REAL:].set(jnp.nan) for x in (q, k, v))
        out = softmax_attention(q, k, v, plan, alpha=ALPHA, bias=bias_of(tables))
        return jnp.sum(out * g), out

    wanted, got = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, tables)
        for f in (dense, blockwise)
    )
    for want, found in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    assert not np.asarray(got[0][1][REAL:]).any()
