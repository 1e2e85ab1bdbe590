"""A mixture of logits against its definition in plain NumPy, float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ultra_hstu.nn.dropout import KeyOrNone  # noqa: F401
from ultra_hstu.parallel.shards import ONE
from ultra_hstu.retrieval import mol_scores, negatives
from ultra_hstu.retrieval.mol import MixtureOfLogits
from ultra_hstu.retrieval.mol_loss import mixture_loss
from ultra_hstu.sections import MolConfig

CONFIG = MolConfig(
    user_components=3,
    item_components=2,
    component_width=8,
    hidden_width=12,
    gate_width=10,
    user_ids=5,
)
WIDTH, ITEMS, ROWS, TEMPERATURE = 6, 40, 9, 0.2
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(ITEMS + 1, WIDTH)).astype(np.float32)
TABLE[31:41] = TABLE[11:21]  # items that tie
ROWS_TD = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
CODE_T = RNG.integers(0, 6, ROWS)
POSITIVE_T = RNG.integers(1, ITEMS + 1, ROWS)
WEIGHT_T = np.array([1, 2, 0, 1, 1, 0.5, 0, 1, 1], np.float32)


@functools.cache
def mixture(l2_normalize=True, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    made = MixtureOfLogits(
        config, WIDTH, temperature=TEMPERATURE, l2_normalize=l2_normalize, rngs=nnx.Rngs(0)
    )
    for leaf in jax.tree.leaves(nnx.state(made), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        if leaf.ndim == 1:  # biases, which begin as zeros
            leaf[...] = jnp.asarray(RNG.normal(size=leaf.shape), jnp.float32)
    made.user_hidden[...] *= 30
    return made


def silu(x):
    return x / (1 + np.exp(-x))


def by_hand(made, h_TD, code_T, table_ID, l2_normalize=True):
    """Scores and weights of every row and item, as the paper writes them."""
    p = {name: np.asarray(x[...], np.float64) for name, x in nnx.state(made).items()}
    config = made.config

    def unit(x):
        norm = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
        return x / norm if l2_normalize else x

    def net(name, x, bias=0.0):
        hidden = silu(x @ p[f"{name}_gate"] + p[f"{name}_gate_bias"])
        return hidden @ p[f"{name}_gate_output"] + bias

    h, e = np.asarray(h_TD, np.float64), np.asarray(table_ID, np.float64)
    h = h - h.mean(1, keepdims=True)
    h = h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-6)
    gate, value = np.split(h @ p["user_hidden"] + p["user_hidden_bias"], 2, axis=1)
    f = (silu(gate) * value) @ p["user_output"] + p["user_output_bias"]
    if code_T is not None:
        ids = np.vstack([np.zeros(config.component_width), p["user_table"]])
        f = np.concatenate([f, ids[code_T]], axis=1)
    f = unit(f.reshape(len(h), -1, config.component_width))
    g = (e @ p["item_output"] + p["item_output_bias"]).reshape(len(e), -1, config.component_width)
    logit = np.einsum("tpw,iqw->tipq", f, unit(g)).reshape(len(h), len(e), -1) / TEMPERATURE
    z = net("user", h)[:, None] * net("item", e)[None]
    z = silu(z + net("cross", logit, p["cross_gate_output_bias"]))
    weight = np.exp(z - z.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return (weight * logit).sum(-1), weight


def answering(made, h=ROWS_TD, code=CODE_T):
    of_id = made.of_ids(jnp.asarray(code))
    query = jnp.asarray(h) if of_id is None else jnp.concatenate([jnp.asarray(h), of_id], axis=1)
    return mol_scores.Answering.of(made, query)


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_scores_are_those_of_the_definition(l2_normalize):
    made = mixture(l2_normalize)
    want, _ = by_hand(made, ROWS_TD, CODE_T, TABLE, l2_normalize)
    items = mol_scores.item_part(made, jnp.asarray(TABLE))
    scorer = mol_scores.Mixtures(answering(made))
    got, target = jax.jit(scorer)(items, jax.tree.map(lambda x: x[POSITIVE_T], items))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(target, np.asarray(got)[np.arange(ROWS), POSITIVE_T])
    unlike = by_hand(made, ROWS_TD, 0 * CODE_T, TABLE, l2_normalize)[0]
    assert np.abs(unlike - want)[CODE_T > 0].max() > 0.1 and (unlike == want)[CODE_T == 0].all()


def loss_of(made, chunks=(None, 1024), key=None, drawn=None, dtype=jnp.float32, **rest):
    def loss(params, h_TD, table_ID):
        model = nnx.merge(nnx.graphdef(made), params)
        return mixture_loss(
            model,
            h_TD.astype(dtype),
            jnp.asarray(CODE_T),
            table_ID,
            jnp.arange(ITEMS + 1),
            jnp.asarray(POSITIVE_T),
            jnp.asarray(WEIGHT_T),
            drawn,
            shards=ONE,
            key=key,
            key_T=None if key is None else jax.random.split(key, ROWS),
            chunk_rows=chunks[0],
            chunk_items=chunks[1],
            **rest,
        )

    given = (nnx.state(made), jnp.asarray(ROWS_TD), jnp.asarray(TABLE))
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*given)


def loss_by_hand(made, negative_TR, shift_TR=0.0):
    score, weight = by_hand(made, ROWS_TD, CODE_T, TABLE)
    t = np.arange(ROWS)[:, None]
    own = score[t[:, 0], POSITIVE_T][:, None]
    others = np.where(negative_TR == POSITIVE_T[:, None], -5e4, score[t, negative_TR] - shift_TR)
    share = WEIGHT_T / WEIGHT_T.sum()
    loss = share @ (np.log(np.exp(own - own).sum(1) + np.exp(others - own).sum(1)))
    pi = weight[t[:, 0], POSITIVE_T]
    mean = share @ pi
    entropy = share @ -(pi * np.log(pi + 1e-6)).sum(1)
    loss += made.config.balance * ((mean * np.log(mean + 1e-6)).sum() + entropy)
    ids = np.vstack([np.zeros(8), np.asarray(made.user_table[...])])[CODE_T]
    return loss + made.config.user_penalty * share @ (ids**2).sum(1)


EVERY_TI = np.tile(np.arange(1, ITEMS + 1), (ROWS, 1))
NEGATIVE_TR = RNG.integers(1, ITEMS + 1, (ROWS, 7))
NEGATIVE_TR[0, 3] = POSITIVE_T[0]


def test_losses_are_those_of_the_definition():
    made = mixture(balance=0.5)
    full, _ = loss_of(made)
    np.testing.assert_allclose(full, loss_by_hand(made, EVERY_TI), rtol=2e-5)
    drawn = negatives.Negatives.of(jnp.asarray(NEGATIVE_TR))
    sampled, _ = loss_of(made, drawn=drawn)
    np.testing.assert_allclose(sampled, loss_by_hand(made, NEGATIVE_TR), rtol=2e-5)
    log_q = np.log(RNG.uniform(0.01, 0.1, ITEMS + 1)).astype(np.float32)
    corrected, _ = loss_of(made, drawn=drawn, log_q=jnp.asarray(log_q))
    want = loss_by_hand(made, NEGATIVE_TR, log_q[NEGATIVE_TR] + np.log(7))
    np.testing.assert_allclose(corrected, want, rtol=2e-5)
    fewer = loss_of(made, num_items=jnp.int32(30))[0]
    known = POSITIVE_T <= 30
    assert known.any() and fewer < full
