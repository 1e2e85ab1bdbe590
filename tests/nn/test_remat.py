"""Rematerialisation and mini-sequences.

The same values and gradients from less memory, and attention runs once.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from kernels.hstu_attention import make_plan
from kernels.hstu_attention.mosaic import attention as mosaic
from kernels.mask import AttentionMask
from tests.golden import assert_close
from tests.nn.small_encoder import ROWS, batch, encoder, inputs
from ultra_hstu.nn.hstu_layer import ProductionLayer
from ultra_hstu.nn.remat import policy_of, run_layer

MODES = ["none", "selective"]


def loss_and_gradients(key=None, **options):
    """A jitted function of (parameters, x), and its arguments."""
    graph, params = nnx.split(encoder(**{"linear_dropout": 0.3} | options), nnx.Param)
    sequences = batch()

    def loss(params, x):
        out = nnx.merge(graph, params)(x, sequences, key)
        return jnp.sum(jnp.where(sequences.real_T[:, None], out, 0) ** 2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), (params, inputs())


def compare(one, other, tolerance):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        assert_close(a, np.asarray(b), tolerance, jax.tree_util.keystr(path))


@pytest.mark.parametrize("preset", ["production", "research"])
def test_same_values_and_gradients(preset):
    results = []
    for mode in MODES:
        run, args = loss_and_gradients(
            jax.random.key(3), preset=preset, remat=mode, implementation="xla", relative_bias=True
        )
        results.append(run(*args))
    for other in results[1:]:
        compare(other, results[0], 1e-5)


@functools.cache
def whole():
    run, args = loss_and_gradients(jax.random.key(5), feed_forward=32)
    return run(*args)


@pytest.mark.parametrize("chunk_rows", [7, 16, 64])
def test_mini_sequences(chunk_rows):
    """Any number of rows at one time, tails included, with dropout and rematerialisation on top."""
    for mode in ("none", "selective") if chunk_rows == 7 else ("selective",):
        run, args = loss_and_gradients(
            jax.random.key(5), feed_forward=32, chunk_rows=chunk_rows, remat=mode
        )
        compare(run(*args), whole(), 1e-5)


def test_other_modes_are_refused():
    jaxtyping.config.update("jaxtyping_disable", True)  # as outside of tests
    try:
        with pytest.raises(ValueError, match="remat='full' must be one of none, selective"):
            policy_of("full")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_mini_sequences_shrink_the_temporaries():
    """The widest value of a layer exists for one chunk at a time."""
    sizes = {}
    for chunk_rows in (None, 8):
        run, args = loss_and_gradients(chunk_rows=chunk_rows, remat="selective")
        text = run.lower(*args).as_text()
        sizes[chunk_rows] = text.count(
            f"tensor<{ROWS}x36xf32>"
        )  # the input of the output projection: 3 x 12 columns
    assert sizes[None] > 0 == sizes[8]


def primitives(jaxpr):
    """How often each primitive stands in a jaxpr and all that it calls, by name."""
    count = collections.Counter()
    for eqn in jaxpr.eqns:
        count[
            str(eqn.params.get("name", eqn.primitive.name))
            if eqn.primitive.name == "mpmd_map"
            else eqn.primitive.name
        ] += 1
        for inner in jaxprs_in_params(eqn.params):
            count += primitives(inner)
    return count


@pytest.mark.parametrize(
    ("implementation", "primitive", "expected"),
    [
        # a loop over tiles forward and one backward
        ("xla", "while", {"none": 4, "selective": 4}),
        # forward 2 projections, scores, values; backward two products for each. Again: projection
        # and scores
        ("reference", "dot_general", {"none": 24, "selective": 28}),
    ],
)
def test_attention_is_not_run_again(implementation, primitive, expected):
    for mode in MODES:
        run, args = loss_and_gradients(
            remat=mode, implementation=implementation, linear_dropout=0.0
        )
        assert primitives(jax.make_jaxpr(run)(*args).jaxpr)[primitive] == expected[mode], mode


def test_the_hopper_kernel_is_not_run_again():
    rows, width = 256, 64
    layer = ProductionLayer(width, 1, 64, 64, rngs=nnx.Rngs(0))
    plan = make_plan(
        AttentionMask(window=32, full_rows=16), jnp.asarray([0, 100, 250], jnp.int32), rows
    )

    def loss(x, scale):
        def attend(q, k, v, *, alpha, bias):
            return mosaic.attention(q, k, v, plan, alpha=alpha, scale=scale, bias=bias)

        def run(x):
            return run_layer(lambda layer, x: layer(x, attend), layer, x, policy_of("selective"))

        return jnp.sum(run(run(x)).astype(jnp.float32))

    count = primitives(
        jax.make_jaxpr(jax.grad(loss))(
            jnp.zeros((rows, width), jnp.bfloat16), jnp.float32(0.01)
        ).jaxpr
    )
    assert count["hstu_forward"] == count["hstu_backward_dkv"] == count["hstu_backward_dq"] == 2


def residual_bytes(mode, layers, **options):
    """Bytes kept for the backward pass; differences of depths leave out what does not grow."""
    graph, params = nnx.split(
        encoder(layers=layers, implementation="xla", remat=mode, **options), nnx.Param
    )
    sequences = batch()
    run = lambda x: jax.vjp(lambda x: nnx.merge(graph, params)(x, sequences), x)[1]  # noqa: E731
    saved = jax.eval_shape(run, inputs().astype(jnp.bfloat16))
    return sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(saved)
        if leaf.shape[:1] == (ROWS,) and leaf.ndim > 1
    )


def test_what_is_kept():
    """Selective keeps input and attention output in bfloat16, and two float32 statistics a norm."""

    def each(mode, **options):
        deep, shallow = (residual_bytes(mode, layers, **options) for layers in (5, 3))
        return (deep - shallow) / 2 / ROWS

    assert each("selective") == 2 * 8 + 2 * 12 + 4 * 4
    assert each("none") > 4 * each("selective")
    block = each("selective", feed_forward=32) - each("selective")
    assert block == 2 * 8 + 2 * 4  # its input, and the statistics of its norm
    assert each("none", feed_forward=32) - each("none") > 4 * block
