"""The last layer of some rows: the values and gradients of the whole layer, for fewer products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from kernels.mask import AttentionMask
from tests.nn.small_encoder import CONFIG, LENGTH, ROWS, WIDTH, batch, inputs
from tests.test_flops import products
from ultra_hstu.nn.divisor import Divisor
from ultra_hstu.nn.hstu import HSTU, reads_few
from ultra_hstu.nn.hstu_layer import LAYERS
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.nn.truncation import Truncation
from ultra_hstu.parallel.mesh import make_mesh
from ultra_hstu.parallel.shards import ONE, Shards

QUICK = {"xla_backend_optimization_level": 0}
# Sequences are (2, 13, 3), (0, 0, 0), (1, 5, 2), (0, 3, 0), (2, 0, 2): contextual tokens, history
# and targets of several, one twice, padding, and none.
READ = np.array([31, 17, 0, 5, 17, 14, 20, 21, 40, ROWS, ROWS + 7, 24, 32, 2, 28, 30], np.int32)
LENGTHS = Divisor(LENGTH, LENGTH, "length")
MASKS = {
    "causal": AttentionMask(),
    "window": AttentionMask(window=3),
    "window 0": AttentionMask(window=0),
    "full rows": AttentionMask(window=3, full_rows=4),
    "prefix": AttentionMask(window=3, prefix=3),
    "no sink": AttentionMask(window=4, context_sink=False),
    "all": AttentionMask(window=2, full_rows=3, prefix=4, context_sink=False),
}


def stack(
    mask,
    *,
    layers=1,
    preset="production",
    implementation="xla",
    rate=0.0,
    biased=False,
    feed_forward=None,
    **options,
):
    sizes = (WIDTH, CONFIG.heads, CONFIG.qk_width, CONFIG.v_width)
    layers = [
        LAYERS[preset](
            *sizes,
            bias=RelativeBiasTables(LENGTH, 16, rngs=nnx.Rngs(number)) if biased else None,
            dropout_rate=rate,
            feed_forward=feed_forward,
            rngs=nnx.Rngs(number),
        )
        for number in range(layers)
    ]
    for layer in layers:
        layer.uvqk[...] *= 3
        if biased:
            layer.bias.position_table[...] *= 50
    return HSTU(layers, LENGTH, masks=[mask], implementation=implementation, **options)


def value_and_gradients(run, params, x_TD, g_PD):
    def loss(params, x_TD):
        y_PD = run(params, x_TD)
        return jnp.sum(y_PD * g_PD), y_PD

    (_, y_PD), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_TD)
    return y_PD, *grads


@pytest.mark.parametrize(
    "mask, options",
    [
        *((mask, {}) for mask in MASKS),
        ("all", dict(preset="research", biased=True, divisor=LENGTHS)),
        ("causal", dict(preset="research", implementation="reference", rate=0.4)),
        (
            "all",
            dict(
                layers=2,
                truncation=Truncation(1, 4),
                divisor=LENGTHS,
                remat="selective",
                rate=0.4,
                feed_forward=12,
            ),
        ),
    ],
)
def test_rows_and_gradients(mask, options):
    """Of contextual tokens, history rows and targets, with dropout, truncation and remat."""
    built = stack(MASKS[mask], **options)
    sequences, x_TD = batch(rows=4 * ROWS), inputs(rows=4 * ROWS)
    read_P = READ[:11] if "truncation" in options else READ  # its buffer has 45 rows
    real_P = read_P < 33
    graph, params = nnx.split(built, nnx.Param)
    g_PD = jnp.where(real_P[:, None], inputs(1, len(read_P)), 0)
    key = jax.random.key(3) if options.get("rate") else None

    def some(params, x_TD):
        return nnx.merge(graph, params).rows(x_TD, sequences, jnp.asarray(read_P), key)

    def all_of_them(params, x_TD):
        whole_TD = nnx.merge(graph, params)(x_TD, sequences, key)
        return jnp.where(real_P[:, None], whole_TD[read_P % len(x_TD)], 0)

    run = jax.jit(value_and_gradients, static_argnums=0, compiler_options=QUICK)
    got = run(some, params, x_TD, g_PD)
    want = run(all_of_them, params, x_TD, g_PD)
    for one, other in zip(
        jax.tree.leaves((got[0][real_P], *got[1:])),
        jax.tree.leaves((want[0][real_P], *want[1:])),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5 * np.abs(other).max())
    assert not np.any(np.asarray(got[0])[read_P >= 4 * ROWS])


def test_products_of_a_last_layer():
    """Keys and values of all rows, the rest of what is read; a quarter at most is read so."""
    rows, wanted = 4 * ROWS, len(READ)
    assert reads_few(wanted, rows) and not reads_few(wanted, 4 * wanted - 1)
    built = stack(MASKS["causal"], layers=2, implementation="reference")
    graph, params = nnx.split(built, nnx.Param)

    def count(read_P):
        run = lambda params, x_TD: nnx.merge(graph, params).rows(x_TD, batch(rows=rows), read_P)  # noqa: E731
        return products(jax.make_jaxpr(run)(params, inputs(rows=rows)).jaxpr)

    heads, qk, v = CONFIG.heads, CONFIG.qk_width, CONFIG.v_width
    uvqk, keys, output = (
        2 * WIDTH * heads * (qk + v),
        WIDTH * heads * (qk + v),
        3 * heads * v * WIDTH,
    )
    layer = 2 * (rows * (uvqk + output) + rows**2 * heads * (qk + v))
    # `reference` is dense, and stands queries and keys in one line.
    line = rows + wanted
    last = 2 * (rows * keys + wanted * (uvqk + output) + line**2 * heads * (qk + v))
    assert count(jnp.asarray(READ)) == layer + last
    assert count(jnp.arange(rows // 2)) == 2 * layer


@pytest.mark.parametrize(
    "mask, shards",
    [
        ("all", Shards(context=4)),
        ("causal", Shards(context=2, striped=True)),
    ],
)
def test_rows_that_visit_shards(mask, shards):
    """Of a sharded buffer: the same rows and gradients, whatever the strategy of whole layers."""
    read_P = READ[:13]  # the shards cannot divide them
    built = stack(MASKS[mask], rate=0.4, implementation="reference")
    sequences, x_TD = batch(rows=4 * ROWS), inputs(rows=4 * ROWS)
    graph, params = nnx.split(built, nnx.Param)
    filled = jnp.pad(inputs(1, 13), ((0, -13 % shards.context), (0, 0)))

    def loss(shards, params, x_tD, g_pD):
        model, key = nnx.merge(graph, params), jax.random.key(3)
        y_pD = model.rows(x_tD, sequences.on(shards), jnp.asarray(read_P), key)
        return jnp.sum(y_pD * g_pD), y_pD

    def on_device(params, x_tD, g_pD):
        step = jax.value_and_grad(functools.partial(loss, shards), (0, 1), has_aux=True)
        (_, y_pD), (d_params, d_x_tD) = step(params, x_tD, g_pD)
        return y_pD, jax.lax.psum(d_params, "context"), d_x_tD

    rows, everywhere = PartitionSpec("context"), PartitionSpec()
    order = np.asarray(shards.layout(len(x_TD)).permutation())
    run = jax.shard_map(
        on_device,
        mesh=make_mesh(1, shards.context, devices=jax.devices()[: shards.context]),
        in_specs=(everywhere, rows, rows),
        out_specs=(rows, everywhere, rows),
        check_vma=False,
    )
    y_PD, d_params, d_x_TD = jax.jit(run, compiler_options=QUICK)(params, x_TD[order], filled)
    got = (y_PD[:13], d_params, d_x_TD[np.argsort(order)])
    (_, y_PD), grads = jax.jit(
        jax.value_and_grad(functools.partial(loss, ONE), (0, 1), has_aux=True)
    )(params, x_TD, filled[:13])
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves((y_PD, *grads)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5 * np.abs(other).max())
