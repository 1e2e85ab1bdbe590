"""Properties of the models.

Causality, layouts, padding, dropout, precision, and one compilation for all batches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden import assert_close
from ultra_hstu.config import ModelConfig
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.retrieval.batch import Batch, Events, HistoryGather
from ultra_hstu.retrieval.model import Recommender

ITEMS, HISTORY, ROWS = 40, 12, 64
SMALL = ModelConfig(
    width=8,
    layers=2,
    heads=2,
    qk_width=4,
    v_width=4,
    ffn_width=8,
    time_buckets=16,
    output_slots=3,
    implementation="reference",
)
MODELS = {
    "hstu": SMALL,
    "production": dataclasses.replace(SMALL, preset="production"),
    "softmax": dataclasses.replace(SMALL, attention="softmax"),
    "no_bias": dataclasses.replace(SMALL, relative_bias=False),
    "sasrec": dataclasses.replace(SMALL, kind="sasrec"),
}
LENGTHS = (7, 0, 12, 1, 5)


def model(name, **changes):
    """A small model whose tables are large enough to matter."""
    built = Recommender(
        dataclasses.replace(MODELS[name], **changes), ITEMS, HISTORY, rngs=nnx.Rngs(0)
    )
    built.item_table[...] *= 30
    if isinstance(built.encoder, HSTU):
        for layer in built.encoder.layers:
            layer.uvqk[...] *= 20
    return built


def batch(lengths=LENGTHS, *, seed=0, padded=False) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    events = int(lengths.sum() + len(lengths))  # one target each
    start = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]]).astype(np.int32)
    source = Events.from_arrays(
        rng.integers(1, ITEMS + 1, events), np.sort(rng.integers(0, 10**6, events))
    )
    length = HISTORY + SMALL.output_slots
    rows, padded_length = (len(lengths) * length, length) if padded else (ROWS, None)
    columns = {"start": start, "stop": start + lengths.astype(np.int32)}
    made = HistoryGather(rows, padded_length)(source, columns, np)
    return jax.tree.map(jnp.asarray, made)


def apply(built):
    """`encode` as a jitted pure function of (parameters, batch, key), and the parameters."""
    graph, params = nnx.split(built, nnx.Param)
    return jax.jit(lambda params, b, key=None: nnx.merge(graph, params).encode(b, key=key)), params


@pytest.mark.parametrize("name", MODELS)
def test_modules_hold_parameters_only(name):
    _, params, rest = nnx.split(model(name), nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["hstu", "production", "no_bias", "sasrec"])
def test_causal_by_gradients(name):
    """A row's output depends on its own row and those before it in its sequence.

    Its gradient is exactly 0 for later rows and other sequences.
    """
    built, b = model(name), batch()
    x = built.embedding(b.item_T, b.sequences)
    graph, params = nnx.split(built.encoder, nnx.Param)
    weight = jnp.asarray(np.random.default_rng(0).normal(size=x.shape[1]), jnp.float32)
    one_row = lambda x, t: (nnx.merge(graph, params)(x, b.sequences) @ weight)[t]  # noqa: E731
    depends = np.asarray(
        jax.jit(jax.vmap(jax.grad(one_row), in_axes=(None, 0)))(x, jnp.arange(sum(LENGTHS)))
    )
    depends = np.any(depends != 0, axis=2)
    user = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    expected = np.tril(user[:, None] == user[None, :])
    np.testing.assert_array_equal(depends[:, : len(user)], expected)
    assert not depends[:, len(user) :].any()


def test_softmax_ablation_is_not_causal():
    """As published, later rows stay in the denominator: the ablation is no causal model."""
    built, b = model("softmax"), batch()
    x = built.embedding(b.item_T, b.sequences)
    grads = jax.grad(lambda x: jnp.sum(built.encoder(x, b.sequences)[2]))(x)
    assert np.any(np.asarray(grads[3:7]) != 0) and not np.any(np.asarray(grads[7:]) != 0)


@pytest.mark.parametrize("name", MODELS)
def test_padded_equals_jagged(name):
    """The fixed-length layout of the published code gives the same outputs and gradients for the
    real rows.
    """
    run, params = apply(model(name))
    jagged, padded = batch(), batch(padded=True)
    real_j, real_p = np.asarray(jagged.weight_T) > 0, np.asarray(padded.weight_T) > 0
    g = jnp.asarray(
        np.random.default_rng(3).normal(size=(int(real_j.sum()), SMALL.width)), jnp.float32
    )

    def value(b, real):
        def total(p):
            out = run(p, b)[np.flatnonzero(real)]
            return jnp.sum(out * g), out

        return jax.jit(jax.grad(total, has_aux=True))(params)

    (grads_j, out_j), (grads_p, out_p) = value(jagged, real_j), value(padded, real_p)
    assert_close(out_j, np.asarray(out_p), 1e-5, "out")
    for a, b in zip(jax.tree.leaves(grads_j), jax.tree.leaves(grads_p), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(b)) + 1e-6))


@pytest.mark.parametrize("name", MODELS)
def test_padding_may_hold_anything(name):
    """Wild values in the rows of padding and NaN in the embedding of item 0 change no real row and
    no gradient.
    """
    run, params = apply(model(name))
    b = batch()
    pad = np.arange(ROWS) >= sum(LENGTHS)
    dirty = dataclasses.replace(
        b,
        item_T=jnp.where(pad, 10**6, b.item_T),
        time_T=jnp.where(pad, -(10**9), b.time_T),
        next_time_T=jnp.where(pad, 10**9, b.next_time_T),
    )
    g = jnp.asarray(
        np.random.default_rng(3).normal(size=(int((~pad).sum()), SMALL.width)), jnp.float32
    )
    value = jax.jit(jax.value_and_grad(lambda p, b: jnp.sum(run(p, b)[: g.shape[0]] * g)))
    clean = value(params, b)
    poisoned = jax.tree.map(lambda x: x, params)
    poisoned["embedding"]["item_table"][...] = (
        params["embedding"]["item_table"][...].at[0].set(jnp.nan)
    )
    for other in (value(params, dirty), value(poisoned, dirty)):
        for x, y in zip(jax.tree.leaves(clean), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(x, y)
    assert np.all(np.asarray(clean[1]["embedding"]["item_table"][0]) == 0)


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_nan_in_padding_rows_of_the_encoder(name):
    """The stack itself cleans its input.

    NaN rows of padding reach neither outputs nor gradients.
    """
    built, b = model(name), batch()
    graph, params = nnx.split(built.encoder, nnx.Param)
    x = built.embedding(b.item_T, b.sequences)
    real = (jnp.arange(ROWS) < sum(LENGTHS))[:, None]
    grad = jax.jit(
        jax.value_and_grad(
            lambda p, x: jnp.sum(jnp.where(real, nnx.merge(graph, p)(x, b.sequences), 0) ** 2)
        )
    )
    for clean, dirty in zip(
        jax.tree.leaves(grad(params, x)),
        jax.tree.leaves(grad(params, jnp.where(real, x, jnp.nan))),
        strict=True,
    ):
        np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_one_compilation_for_all_batches(name):
    """Batches of any lengths, one of them empty, run the same compiled program."""
    run, params = apply(model(name))
    for lengths in (LENGTHS, (12, 12, 12, 12, 12), (0, 0, 0, 0, 0), (1, 1, 1, 1, 1)):
        out = run(params, batch(lengths))
        assert np.all(np.isfinite(out[: sum(lengths)]))
    assert run._cache_size() == 1


@pytest.mark.parametrize("name", ["hstu", "production", "sasrec"])
def test_dropout_is_a_function_of_its_key(name):
    run, params = apply(model(name))
    b, key = batch(), jax.random.key(7)
    count = sum(LENGTHS)
    np.testing.assert_array_equal(run(params, b, key), run(params, b, key))
    others = [run(params, b), run(params, b, jax.random.key(8))]
    assert all(np.any(np.asarray(run(params, b, key)[:count] != other[:count])) for other in others)
    run_without, params = apply(model(name, input_dropout=0.0, linear_dropout=0.0))
    np.testing.assert_array_equal(run_without(params, b, key), run_without(params, b))


@pytest.mark.parametrize("name", ["hstu", "production", "sasrec"])
def test_bfloat16(name):
    """Activations in bfloat16 stay close to float32; gradients are float32.

    Attention runs by its default implementation.
    """
    exact, params = apply(model(name, implementation=None))
    low, _ = apply(model(name, dtype="bfloat16", implementation=None))
    b, count = batch(), sum(LENGTHS)
    out = low(params, b)
    assert out.dtype == jnp.bfloat16
    reference = np.asarray(exact(params, b)[:count])
    error = np.abs(np.asarray(out[:count], np.float32) - reference)
    assert 0 < np.max(error) < 0.05 * np.max(np.abs(reference))
    grads = jax.grad(lambda p: jnp.sum(low(p, b)[:count].astype(jnp.float32)))(params)
    assert all(
        leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads)
    )


@pytest.mark.parametrize("buckets", [0, 16])
def test_without_time_buckets_times_are_not_read(buckets):
    run, params = apply(model("hstu", time_buckets=buckets, implementation="xla"))
    b, count = batch(), sum(LENGTHS)
    warped = dataclasses.replace(b, time_T=0 * b.time_T, next_time_T=0 * b.next_time_T)
    same = np.array_equal(run(params, b)[:count], run(params, warped)[:count])
    assert same == (buckets == 0)


def test_initial_values():
    """As the published code draws them: the spread of every kind of parameter."""
    wide = dataclasses.replace(SMALL, width=64, qk_width=32, v_width=32, time_buckets=4000)
    built = Recommender(wide, 500, 200, rngs=nnx.Rngs(1))
    layer, items = built.encoder.layers[0], np.asarray(built.item_table[...])
    assert (
        0.016 < items.std() < 0.019 and np.abs(items).max() <= 0.04
    )  # N(0, 0.02) cut at two standard deviations
    more = dataclasses.replace(wide, item_std=0.1, uvqk_std=0.06)
    other = Recommender(more, 500, 200, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(other.item_table[...], 5 * items, rtol=1e-6)
    wider = other.encoder.layers[0].uvqk
    np.testing.assert_allclose(wider[...], 3 * layer.uvqk[...], rtol=1e-6)
    spread = {
        "position_table": (built.embedding.position_table, np.sqrt(2 / (203 + 64))),
        "uvqk": (layer.uvqk, 0.02),
        "output": (layer.output, np.sqrt(2 / (64 + 64))),
        "bias.position_table": (layer.bias.position_table, 0.02),
        "bias.time_table": (layer.bias.time_table, 0.02),
    }
    for name, (parameter, std) in spread.items():
        assert abs(np.asarray(parameter[...]).std() / std - 1) < 0.15, name
    assert np.abs(np.asarray(layer.output_bias[...])).max() <= 1 / 8
    sasrec = Recommender(
        dataclasses.replace(wide, kind="sasrec", ffn_width=96), 500, 200, rngs=nnx.Rngs(1)
    ).encoder.layers[0]
    assert abs(np.asarray(sasrec.qkv[...]).std() / np.sqrt(2 / (64 + 192)) - 1) < 0.05
    assert not np.any(np.asarray(sasrec.qkv_bias[...]))


def test_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="heads=3 must divide width=8"):
        Recommender(
            dataclasses.replace(SMALL, kind="sasrec", heads=3), ITEMS, HISTORY, rngs=nnx.Rngs(0)
        )
