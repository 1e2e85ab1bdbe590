"""Mini-sequences against the plain call: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranking import rank_data
from ultra_hstu import tasks
from ultra_hstu.nn.mini_sequence import chunked

ROWS, WIDTH, HIDDEN = 23, 6, 40


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def network(weights):
    def run(x_TD, scale_T):
        h_TF = jax.nn.silu(x_TD @ weights["in"]) * scale_T[:, None]
        return {"y": h_TF @ weights["out"], "sum": jnp.sum(h_TF, axis=1)}

    return run


def loss(weights, x_TD, scale_T, chunk_rows):
    out = chunked(network(weights), x_TD, scale_T, chunk_rows=chunk_rows)
    return jnp.sum(jnp.sin(out["y"])) + jnp.sum(out["sum"] ** 2)


@pytest.fixture(scope="module")
def case():
    weights = {"in": normal(0, WIDTH, HIDDEN), "out": normal(1, HIDDEN, 3)}
    return weights, normal(2, ROWS, WIDTH), normal(3, ROWS)


@settings(max_examples=12)
@given(chunk_rows=st.integers(1, ROWS + 2))
def test_any_chunk_size_gives_the_same_values_and_gradients(case, chunk_rows):
    plain = network(case[0])(*case[1:])
    pieces = chunked(network(case[0]), *case[1:], chunk_rows=chunk_rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), pieces, plain)
    want = jax.grad(loss, argnums=(0, 1, 2))(*case, None)
    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)(*case, chunk_rows)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max())
        ),
        got,
        want,
    )


def test_rows_of_a_short_tail_are_not_padded():
    """Rows of zeros would give a gradient of 0 * inf."""
    x_TD = jnp.abs(normal(0, 10, 3)) + 0.1
    gradient = jax.grad(lambda x_TD: jnp.sum(chunked(jnp.log, x_TD, chunk_rows=4)))(x_TD)
    np.testing.assert_allclose(gradient, 1 / x_TD, rtol=1e-6)


def test_none_and_long_chunks_are_the_plain_call(case):
    """Called once, on all rows, outside any loop."""
    for chunk_rows in (None, ROWS, ROWS + 100):
        seen = []
        chunked(
            lambda x_TD, seen=seen: seen.append(x_TD.shape) or x_TD, case[1], chunk_rows=chunk_rows
        )
        assert seen == [(ROWS, WIDTH)]
    assert chunked(lambda x_TD: x_TD + 1, jnp.zeros((0, 3)), chunk_rows=4).shape == (0, 3)


@pytest.mark.parametrize("inside", [False, True], ids=["closed over in bfloat16", "cast inside"])
def test_gradients_of_weights_add_up_in_float32(inside):
    """4096 gradients of 1 in bfloat16 stop growing at 256."""
    weight = jnp.ones((), jnp.float32 if inside else jnp.bfloat16)
    x_T = jnp.ones(4096, jnp.bfloat16)

    @jax.jit
    def total(weight):
        return jnp.sum(
            chunked(lambda x: x * weight.astype(jnp.bfloat16), x_T, chunk_rows=1).astype(
                jnp.float32
            )
        )

    gradient = jax.grad(total)(weight)
    assert gradient.dtype == weight.dtype
    assert float(gradient) == 4096


def test_memory_falls_with_the_chunk():
    """Bytes of temporaries in the compiled forward and backward of a wide hidden layer.

    Inputs and gradients are the same.
    """
    rows, hidden = 4096, 512
    weights = {"in": jnp.zeros((8, hidden)), "out": jnp.zeros((hidden, 3))}
    args = (weights, jnp.zeros((rows, 8)), jnp.zeros(rows))

    def temporaries(chunk_rows):
        step = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=3)
        return step.lower(*args, chunk_rows).compile().memory_analysis().temp_size_in_bytes

    hidden_bytes = rows * hidden * 4
    plain, eighth, tail = temporaries(None), temporaries(rows // 8), temporaries(rows // 8 + 1)
    assert plain > hidden_bytes
    assert eighth < plain / 4
    assert tail < plain / 4


@pytest.mark.parametrize("bad", [0, -1, True, 2.0])
def test_bad_chunks(bad):
    with pytest.raises((ValueError, TypeError), match="chunk_rows"):
        chunked(lambda x: x, jnp.zeros((4, 2)), chunk_rows=bad)


def test_bad_rows():
    with pytest.raises(ValueError, match="same number of rows"):
        chunked(lambda x, y: x, jnp.zeros((4, 2)), jnp.zeros(5), chunk_rows=2)
    with pytest.raises(ValueError, match="a row for each of its 2 rows"):
        chunked(lambda x: x.sum(0, keepdims=True), jnp.zeros((4, 3)), chunk_rows=2)


def test_ranking_step_in_chunks():
    """A ranking model works on 7 rows at a time: the same loss and gradients, tails included."""
    values = []
    for chunk_rows in (None, 7):
        config = rank_data.config(
            model=dict(chunk_rows=chunk_rows, preset="research", implementation="reference")
        )
        task = tasks.of(config, rank_data.interactions())
        loader = task.loader("train", batch_users=4, steps_per_call=1)
        batch = next(iter(loader.groups(loader.plan()))).feed.batch(0)
        params = task.recipe.init(0).params
        values.append(
            jax.jit(jax.value_and_grad(task.recipe.loss))(params, batch, jax.random.key(0))
        )
    assert float(values[0][0]) == pytest.approx(float(values[1][0]), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()) + 1e-9
        ),
        *(v[1] for v in values),
    )
