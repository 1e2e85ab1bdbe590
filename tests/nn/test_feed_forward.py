"""Feed-forward blocks, in one piece and in mini-sequences: HSTU's optional one and SASRec's."""

import dataclasses

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden import assert_close
from tests.nn.small_encoder import ROWS, SEQUENCES, WIDTH, batch, encoder, inputs
from tests.test_flops import products
from ultra_hstu import flops
from ultra_hstu.config import Config, ModelConfig
from ultra_hstu.nn.feed_forward import FeedForward
from ultra_hstu.nn.sasrec import SASRec

HIDDEN = 32
SASREC = ModelConfig(kind="sasrec", width=WIDTH, layers=2, heads=2, ffn_width=HIDDEN)


def test_the_block_by_hand():
    block = FeedForward(WIDTH, HIDDEN, rngs=nnx.Rngs(0))
    block.hidden_bias[...] += 0.3
    block.output_bias[...] -= 0.2
    x = np.asarray(inputs(), np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
    hidden = normed @ np.asarray(block.hidden[...]) + 0.3
    want = x + hidden / (1 + np.exp(-hidden)) @ np.asarray(block.output[...]) - 0.2
    assert_close(block(inputs()), want, 1e-5, "block")


def test_without_it_a_layer_is_as_it_was():
    """The same parameters are drawn, and a block that adds nothing changes nothing."""
    plain, other = encoder(), encoder(feed_forward=HIDDEN)
    for layer, wider in zip(plain.layers, other.layers, strict=True):
        wider.uvqk[...], wider.output[...] = layer.uvqk[...], layer.output[...]
        wider.feed_forward.output[...] *= 0
    sequences = batch()
    np.testing.assert_array_equal(plain(inputs(), sequences), other(inputs(), sequences))
    assert "feed_forward" not in str(nnx.state(plain))


def sasrec(**options):
    """A jitted function of (parameters, x) with dropout, and its arguments."""
    config = dataclasses.replace(SASREC, **options)
    graph, params = nnx.split(SASRec.from_config(config, 20, rngs=nnx.Rngs(0)))
    sequences = batch([(0, sum(parts), 0) for parts in SEQUENCES])

    def loss(params, x_TD):
        out_TD = nnx.merge(graph, params)(x_TD, sequences, jax.random.key(2))
        return jnp.sum(jnp.sin(jnp.where(sequences.real_T[:, None], out_TD, 0)))

    return jax.value_and_grad(loss, argnums=(0, 1)), (params, inputs())


@pytest.mark.parametrize("remat", ["none", "selective"])
def test_sasrec_in_mini_sequences(remat):
    """Values and gradients of all rows at once, dropout included; no hidden layer of all rows."""
    whole, args = sasrec()
    run, _ = sasrec(remat=remat, chunk_rows=7)
    got, want = jax.jit(run)(*args), jax.jit(whole)(*args)
    jax.tree.map(lambda x, y: assert_close(x, np.asarray(y), 1e-5, "chunked"), got, want)
    texts = [jax.jit(one).lower(*args).as_text() for one in (whole, run)]
    counts = [text.count(f"tensor<{ROWS}x{HIDDEN}xf32>") for text in texts]
    assert counts[0] > 0 == counts[1]


@pytest.mark.parametrize("options", [{}, {"remat": "selective"}, {"chunk_rows": 7}], ids=str)
def test_operations_of_sasrec_in_its_program(options):
    """What training computes twice is what `flops` says."""
    run, args = sasrec(linear_dropout=0.0, **options)
    counted = flops.count(Config(model=dataclasses.replace(SASREC, **options)), ROWS)
    plain, _ = sasrec(linear_dropout=0.0)
    again = products(jax.make_jaxpr(run)(*args).jaxpr) - products(
        jax.make_jaxpr(plain)(*args).jaxpr
    )
    # Dense attention: as kernels, whose scores are counted in any case, but over the whole square.
    scores = 2 * 2 * len(SEQUENCES) * 20**2 * WIDTH if "remat" in options else 0
    assert again == counted.recomputed + scores
