"""A last layer of the rows that are read, on the kernels: as near float32 as the whole layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels import dispatch
from kernels.mask import AttentionMask
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.hstu_layer import LAYERS
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.sequences import Sequences

MASK = AttentionMask(window=200, full_rows=90, prefix=40)
LENGTHS, ROWS, WIDTH = [900, 1, 0, 1400, 700], 3072, 128


@pytest.mark.parametrize(
    "implementation, biased, head",
    [("mosaic", False, 64), ("mosaic", False, 256), ("triton", False, 64), ("triton", True, 64)],
)
def test_rows_of_a_last_layer(implementation, biased, head):
    """Targets of every sequence, and some rows of their histories: values and gradients."""
    targets = np.minimum(LENGTHS, 16).astype(np.int32)
    sequences = Sequences.of(LENGTHS, num_rows=ROWS, num_targets=targets)
    ends = np.cumsum(LENGTHS)
    asked = [np.arange(end - count, end) for end, count in zip(ends, targets, strict=True)]
    read_P = jnp.asarray(np.concatenate([*asked, [0, 5, 200, 700, 1500, ROWS]]), jnp.int32)

    def stack(name):
        bias = RelativeBiasTables(2048, 16, rngs=nnx.Rngs(1)) if biased else None
        layer = LAYERS["production"](WIDTH, 2, head, head, bias=bias, rngs=nnx.Rngs(0))
        layer.uvqk[...] *= 3
        return HSTU([layer], 2048, masks=[MASK], implementation=name)

    graph, params = nnx.split(stack(implementation))
    whole_graph = nnx.split(stack("reference"))[0]
    draw = np.random.default_rng(0).standard_normal((2, ROWS, WIDTH), dtype=np.float32)
    x_TD, g_PD = jnp.asarray(draw[0]), jnp.asarray(draw[1][: len(read_P)])

    def some(params, x_TD):
        y_PD = nnx.merge(graph, params).rows(x_TD.astype(jnp.bfloat16), sequences, read_P)
        return jnp.sum(y_PD.astype(jnp.float32) * g_PD), y_PD

    def whole(graph, dtype, params, x_TD):
        y_TD = nnx.merge(graph, params)(x_TD.astype(dtype), sequences)
        y_PD = y_TD.at[read_P].get(mode="fill", fill_value=0)
        return jnp.sum(y_PD.astype(jnp.float32) * g_PD), y_PD

    def run(function):
        return jax.jit(jax.grad(function, (0, 1), has_aux=True))(params, x_TD)

    with dispatch.record() as choices:
        found = run(some)
    ran = {choice.implementation for choice in choices if choice.op == "hstu_attention"}
    assert ran == {implementation}
    plain = run(functools.partial(whole, graph, jnp.bfloat16))
    with jax.default_matmul_precision("float32"):
        wanted = run(functools.partial(whole, whole_graph, jnp.float32))
    for leaves in zip(*map(jax.tree.leaves, (found, plain, wanted)), strict=True):
        got, same, want = (np.asarray(leaf, np.float64) for leaf in leaves)
        error, usual = (np.linalg.norm(x - want) / np.linalg.norm(want) for x in (got, same))
        assert error < 2 * usual + 1e-3
