"""Attention over sharded rows equals that of one device: every strategy, mask and gradient, on 8 CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels.hstu_attention import RelativeBias, hstu_attention
from kernels.mask import AttentionMask
from ultra_hstu.parallel import context_parallel_attention, make_mesh
from ultra_hstu.parallel.layout import Layout

ROWS, HEADS, WIDTH = 256, 8, 8
BATCHES = {  # lengths: empty ones, ones longer than a shard of 32 rows, padding behind
    "mixed": (0, 1, 7, 97, 60, 0, 25),
    "one": (256,),
    "short": (3,) * 30,
    "nothing": (0, 0),
}
MASKS = {
    "causal": AttentionMask(),
    "window": AttentionMask(window=9),
    "wide": AttentionMask(window=75),
    "full rows": AttentionMask(window=9, full_rows=6),
    "prefix": AttentionMask(window=9, prefix=6),
    "all": AttentionMask(window=20, full_rows=5, prefix=4, context_sink=False),
}
STRATEGIES = ("gather", "ring", "ulysses", "halo")


@functools.cache
def case(name):
    rng = np.random.default_rng(0)
    lengths = np.asarray(BATCHES[name], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    arrays = {x: rng.standard_normal((ROWS, HEADS, WIDTH), dtype=np.float32) for x in "qkvg"}
    for x in "qkv":
        arrays[x][offsets[-1] :] = np.nan
    arrays["g"][offsets[-1] :] = 0
    counts = {"num_targets": np.minimum(lengths // 4, 5).astype(np.int32), "num_contextual": np.minimum(lengths // 5, 3).astype(np.int32)}
    return arrays, offsets, counts


def results(attend, arrays):
    """Output and gradients."""

    def run(q, k, v):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(jnp.asarray(arrays["g"]))

    return [np.asarray(x) for x in jax.jit(run)(*(jnp.asarray(arrays[x]) for x in "qkv"))]


@functools.cache
def expected(name, mask, counted):
    arrays, offsets, counts = case(name)
    attend = functools.partial(
        hstu_attention, offsets=offsets, mask=MASKS[mask], alpha=0.3, scale=1 / 64, implementation="reference", **(counts if counted else {})
    )
    return results(lambda q, k, v: attend(q, k, v), arrays)


def check(got, want):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * max(np.abs(b).max(), 1e-3), rtol=0, err_msg=name)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch", ["mixed", "one"])
def test_equals_one_device(strategy, mask, batch):
    if strategy == "halo" and MASKS[mask].window is None:
        return
    arrays, offsets, counts = case(batch)
    mesh = make_mesh(context=8)
    attend = functools.partial(
        context_parallel_attention, offsets=offsets, mesh=mesh, strategy=strategy, mask=MASKS[mask], alpha=0.3, scale=1 / 64, **counts
    )
    check(results(attend, arrays), expected(batch, mask, True))
