"""fp8 projections against an emulation in numpy that knows e4m3 from its bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.fp8 import linear, quantize, scaled_product
from tests.golden import assert_close
from tests.nn.small_encoder import batch, encoder, inputs

ROWS, IN, OUT = 24, 40, 16


def e4m3_numbers():
    """All finite values that are not negative.

    4 bits of exponent with bias 7, 3 of mantissa, subnormals, and no infinity.
    """
    exponent, mantissa = np.divmod(np.arange(127), 8)
    return np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )


def to_e4m3(x):
    """The nearest e4m3 number; where two are equally near, the one with an even last bit."""
    table = e4m3_numbers()
    above = np.clip(np.searchsorted(table, np.abs(x)), 1, 126)
    low, high = table[above - 1], table[above]
    middle = (low + high) / 2
    up = (np.abs(x) > middle) | ((np.abs(x) == middle) & (above % 2 == 0))
    return np.sign(x) * np.where(up, high, low)


def emulated(x, w):
    """The product in float64 of operands rounded by rows and columns.

    Scales and quotients in float32, as on the device.
    """
    x, w = np.asarray(x, np.float32), np.asarray(w, np.float32)
    x_scale = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-12)) / np.float32(448)
    w_scale = np.maximum(np.abs(w).max(0, keepdims=True), np.float32(1e-12)) / np.float32(448)
    return to_e4m3(x / x_scale).astype(np.float64) @ to_e4m3(w / w_scale) * x_scale * w_scale


def operands(dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, IN)) * np.exp(
        2 * rng.normal(size=(ROWS, 1))
    )  # rows of very different size
    w = rng.normal(size=(IN, OUT)) * np.exp(rng.normal(size=(1, OUT)))
    return jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32)


def test_the_emulation_knows_the_format():
    table = e4m3_numbers()
    assert table[-1] == 448 and table[1] == 2**-9 and len(table) == 127
    np.testing.assert_array_equal(
        to_e4m3(np.array([1.0, -1.06, 1.0625, 1.1875, 447.0, 0.0])),
        [1.0, -1.0, 1.0, 1.25, 448.0, 0.0],
    )
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 50
    np.testing.assert_array_equal(
        to_e4m3(values), np.asarray(jnp.asarray(values).astype(jnp.float8_e4m3fn), np.float32)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_product(dtype):
    """The roundings are those of the emulation, so that only float32 sums differ.

    The error is that of e4m3, so operands are rounded at all.
    """
    x, w = operands(dtype)
    got, exact = (
        np.asarray(jax.jit(scaled_product)(x, w), np.float64),
        np.asarray(x, np.float64) @ np.asarray(w, np.float64),
    )
    want = emulated(x, w)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64))
    assert np.max(np.abs(got - want) / size) < 2e-6
    error = np.abs(got - exact) / size
    assert np.max(error) < 2 * 2.0**-4 and np.mean(error) > 1e-3


def test_scales_follow_rows_and_columns():
    """Powers of two in front of a row or a column change no rounding."""
    x, w = operands()
    row, column = 2.0 ** np.arange(ROWS)[:, None], 2.0 ** -np.arange(OUT)[None, :]
    scaled = scaled_product(x * jnp.asarray(row, x.dtype), w * jnp.asarray(column, w.dtype))
    np.testing.assert_allclose(scaled, np.asarray(scaled_product(x, w)) * row * column, rtol=1e-6)


def test_rows_of_zeros_and_of_nan():
    x, w = operands()
    clean = np.asarray(scaled_product(x, w))
    out = np.asarray(scaled_product(x.at[3].set(0).at[5].set(jnp.nan), w))
    assert not np.any(out[3]) and np.all(np.isnan(out[5]))
    others = np.arange(ROWS)[(np.arange(ROWS) != 3) & (np.arange(ROWS) != 5)]
    np.testing.assert_array_equal(out[others], clean[others])
    values, scale = quantize(x, axis=1)
    assert np.max(np.abs(np.asarray(values, np.float32)), axis=1).tolist() == [
        448.0
    ] * ROWS and scale.shape == (ROWS, 1)


def test_bias_and_residual_are_added_before_the_one_rounding():
    x, w = operands()
    residual = jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, OUT)) * 100, jnp.bfloat16)
    bias = jnp.asarray(np.random.default_rng(3).normal(size=OUT), jnp.float32)
    out = linear(x, w, bias, residual_TY=residual, precision="fp8")
    sums = (
        np.asarray(scaled_product(x, w)) + np.asarray(bias)[None] + np.asarray(residual, np.float32)
    )
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.asarray(sums).astype(jnp.bfloat16))


def test_gradients_are_those_of_the_product_without_rounding():
    x, w = operands()
    g = jnp.asarray(np.random.default_rng(4).normal(size=(ROWS, OUT)), jnp.float32)
    (d_x, d_w) = jax.jit(jax.grad(lambda x, w: jnp.sum(scaled_product(x, w) * g), argnums=(0, 1)))(
        x, w
    )
    low, w64 = (
        np.asarray(g.astype(jnp.bfloat16), np.float64),
        np.asarray(w.astype(jnp.bfloat16), np.float64),
    )
    assert d_x.dtype == jnp.bfloat16 and d_w.dtype == jnp.float32
    assert_close(d_w, np.asarray(x, np.float64).T @ low, 1e-5, "w")
    assert_close(d_x, low @ w64.T, 2.0**-8, "x")


def test_fp8_gradients_round_the_gradient_by_rows_and_w_by_its_rows():
    x, w = operands()
    g = jnp.asarray(np.random.default_rng(4).normal(size=(ROWS, OUT)), jnp.float32)

    def total(x, w):
        return jnp.sum(scaled_product(x, w, "fp8") * g)

    d_x, d_w = jax.jit(jax.grad(total, argnums=(0, 1)))(x, w)
    low = g.astype(jnp.bfloat16)
    np.testing.assert_array_equal(d_x, scaled_product(low, w.T).astype(jnp.bfloat16))
    assert_close(d_w, np.asarray(x, np.float64).T @ np.asarray(low, np.float64), 1e-5, "w")
    with pytest.raises(ValueError, match="gradient='fp8' must be 'same', or 'fp8' beside"):
        linear(x, w, gradient="fp8")


@pytest.mark.parametrize("preset", ["production", "research"])
def test_stack(preset):
    """A stack with fp8 projections is near the stack without them, and not equal to it.

    Gradients are finite float32.
    """
    sequences = batch()
    real_T1 = sequences.real_T[:, None]
    built = {
        name: encoder(preset=preset, projection=name, implementation="xla")
        for name in ("same", "fp8")
    }
    graphs = {name: nnx.split(model, nnx.Param) for name, model in built.items()}

    def value(name):
        graph, params = graphs[name]

        def total(params):
            out = nnx.merge(graph, params)(inputs().astype(jnp.bfloat16), sequences)
            return jnp.sum(jnp.where(real_T1, out, 0).astype(jnp.float32) ** 2), jnp.where(
                real_T1, out, 0
            )

        return jax.jit(jax.grad(total, has_aux=True))(params)

    (grads, out), (_, plain) = value("fp8"), value("same")
    assert out.dtype == jnp.bfloat16
    size = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float32))))  # noqa: E731
    assert 1e-3 < size(out - plain) / size(plain) < 0.1
    assert all(
        leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads)
    )
