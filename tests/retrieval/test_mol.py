"""A mixture of logits against its definition in plain NumPy, float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ultra_hstu.parallel.shards import ONE
from ultra_hstu.retrieval import mol_scores, negatives
from ultra_hstu.retrieval.metrics import ranks
from ultra_hstu.retrieval.mol import EXACT, Dropped, MixtureOfLogits, fast, kept
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
    flat = nnx.to_flat_state(nnx.state(made))
    p = {"_".join(path): np.asarray(x[...], np.float64) for path, x in flat}
    config = made.config

    def unit(x):
        norm = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
        return x / norm if l2_normalize else x

    def net(name, x, bias=0.0):
        hidden = silu(x @ p[f"{name}_gate_hidden"] + p[f"{name}_gate_hidden_bias"])
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
    query = jnp.concatenate([jnp.asarray(h), made.of_ids(jnp.asarray(code))], axis=1)
    return jax.jit(functools.partial(mol_scores.Answering.of, made))(query)


def parts_of(made, table):
    return jax.jit(functools.partial(mol_scores.item_part, made))(jnp.asarray(table))


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_scores_are_those_of_the_definition(l2_normalize):
    made = mixture(l2_normalize)
    want, _ = by_hand(made, ROWS_TD, CODE_T, TABLE, l2_normalize)
    items = parts_of(made, TABLE)
    scorer = mol_scores.Mixtures(answering(made))
    own = jax.tree.map(lambda x: x[POSITIVE_T], items)
    got, target = jax.jit(lambda *given: scorer(*given))(items, own)
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
    cheap = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)), compiler_options=cheap)(*given)


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
    fewer, _ = loss_of(made, num_items=jnp.int32(30))
    np.testing.assert_allclose(fewer, loss_by_hand(made, EVERY_TI[:, :30]), rtol=2e-5)


def close(one, other, rtol=2e-5):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max())


@pytest.mark.parametrize("kind", ["sampled", "full"])
def test_gradients_are_those_of_differences(kind, monkeypatch):
    """Along one direction through all parameters and items, of the definition in float64."""
    made = mixture(balance=0.5)
    drawn = negatives.Negatives.of(jnp.asarray(NEGATIVE_TR)) if kind == "sampled" else None
    ids = NEGATIVE_TR if kind == "sampled" else EVERY_TI
    _, (d_params, d_rows, d_table) = loss_of(made, drawn=drawn)
    assert not d_rows[2].any() and np.abs(d_rows[0]).min() > 0
    rng, values = np.random.default_rng(3), []
    way = jax.tree.map(lambda x: rng.normal(size=x.shape), (d_params, d_table))
    for size in (-1e-3, 1e-3):
        params = jax.tree.map(lambda x, d, size=size: x + size * d, nnx.state(made), way[0])
        monkeypatch.setattr(f"{__name__}.TABLE", TABLE + size * way[1])
        values.append(loss_by_hand(nnx.merge(nnx.graphdef(made), params), ids))
        monkeypatch.undo()
    leaves = zip(jax.tree.leaves((d_params, d_table)), jax.tree.leaves(way), strict=True)
    got = sum(np.vdot(x, d) for x, d in leaves)
    np.testing.assert_allclose(got, (values[1] - values[0]) / 2e-3, rtol=2e-3)


def test_sampled_is_full_where_all_items_are_drawn_and_chunks_change_nothing():
    """With the same weights dropped; a chunk of rows, or of items, is of any size."""
    made, key = mixture(gate_dropout=0.4, item_dropout=0.3), jax.random.key(5)
    every = negatives.Negatives.of(jnp.asarray(EVERY_TI))
    full = loss_of(made, key=key)
    assert abs(full[0] - loss_by_hand(made, EVERY_TI)) > 1e-3
    # Rows that share negatives have the words of their own.
    shared = dataclasses.replace(every, rows_per_draw=3)
    for other in (
        loss_of(made, (4, 16), key=key),
        loss_of(made, key=key, drawn=every),
        loss_of(made, (3, 1024), key=key, drawn=shared),
    ):
        close(other, full)
    low = loss_of(made, key=key, dtype=jnp.bfloat16)
    np.testing.assert_allclose(low[0], full[0], rtol=2e-2)


def test_what_is_dropped():
    number = jnp.arange(50)
    each = Dropped(number.astype(jnp.uint32)[:, None], number[None], 0.2)
    keep = np.asarray(kept(each, 32))
    assert abs(keep.mean() - 0.8) < 0.003
    for axis in range(3):  # rows, items and logits are alike
        means = keep.mean(axis=tuple({0, 1, 2} - {axis}))
        assert np.abs(means - 0.8).max() < 0.05


def test_memory_is_that_of_chunks():
    """By the compiler: a full softmax over 20,000 items, in float32."""
    made, rows, items = mixture(), 256, 20_000
    logits = made.config.user_components * made.config.item_components

    def loss(table_ID, h_TD, weight_T):
        ids = jnp.ones(rows, jnp.int32)
        number_I = jnp.arange(items + 1)
        return mixture_loss(
            made, h_TD, ids, table_ID, number_I, ids, weight_T, None,
            shards=ONE, key=None, key_T=None, chunk_rows=32, chunk_items=256,
        )  # fmt: skip

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in
              ((items + 1, WIDTH), (rows, WIDTH), (rows,)))  # fmt: skip
    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 0.2 * (4 * rows * items * logits)


@functools.cache
def catalogue():
    """Of 300 items the last hundred are those before; weights are spread, or on few logits."""
    rng = np.random.default_rng(4)
    table = rng.normal(size=(301, WIDTH)).astype(np.float32)
    table[201:] = table[101:201]
    spread = mixture()
    few = nnx.clone(spread)
    few.cross_gate.hidden[...] = jnp.eye(6, 10) * 5.0
    few.cross_gate.output[...] = jnp.eye(10, 6) * 5.0
    few.user_gate.output[...] *= 0
    return table, {"spread": spread, "few": few}


@functools.partial(jax.jit, static_argnames=("k", "rounds", "candidates"))
def best(users, items, seen, corpus, **options):
    return mol_scores.best(users, items, seen, corpus_I=corpus, **options)


@pytest.mark.parametrize("weights", ["spread", "few"])
def test_the_best_are_those_of_all_items(weights):
    """To the bit, ties and hidden items among them; proven where weights are on few logits."""
    table, mixtures = catalogue()
    made = mixtures[weights]
    items, users = parts_of(made, table), answering(made)
    rng = np.random.default_rng(6)
    given = users, items, jnp.asarray(rng.integers(0, 301, (ROWS, 30))), rng.random(301) < 0.9
    want = best(*given, k=300, rounds=())
    score, _ = by_hand(made, ROWS_TD, CODE_T, table)
    tied = 0
    for user in range(ROWS):
        count = int((np.asarray(want[0][user]) > 0).sum())
        ids, found = np.asarray(want[0][user, :count]), np.asarray(want[1][user, :count])
        seen = np.asarray(given[2][user]).tolist()
        assert sorted(ids) == [i for i in range(1, 301) if given[3][i] and i not in seen]
        np.testing.assert_allclose(found, score[user, ids], rtol=1e-4, atol=1e-4)
        pairs = [*zip(-found, ids, strict=True)]
        assert pairs == sorted(pairs)
        tied += len(found) - len(set(found.tolist()))
    assert tied > 50
    for k, rounds in ((5, (20, 100)), (8, (299,))):
        got = best(*given, k=k, rounds=rounds)
        jax.tree.map(lambda x, y, k=k: np.testing.assert_array_equal(x, y[:, :k]), got, want)
    proved = jax.jit(functools.partial(mol_scores.proved, k=5, count=60))
    proven = proved(*given[:3], corpus_I=given[3])[1]
    assert proven.mean() > 0.5 if weights == "few" else not proven.all()
    some = best(*given, k=5, candidates=120)
    recall = np.mean([np.isin(x, y[:5]).mean() for x, y in zip(some[0], want[0], strict=True)])
    assert 0.6 < recall <= 1
    with pytest.raises(ValueError, match="candidates=4 must be at least k=5"):
        best(*given, k=5, candidates=4)


def test_ranks_are_places_among_the_best():
    """In chunks of any size: a target that ties stands behind all of its score."""
    table, mixtures = catalogue()
    made = mixtures["spread"]
    items, users = parts_of(made, table), answering(made)
    nothing = jnp.zeros((ROWS, 1), jnp.int32)
    ids, found = map(np.asarray, best(users, items, nothing, None, k=300, rounds=()))
    for first, chunk_items in ((101, 7), (1, 301)):
        target_U = np.arange(first, first + ROWS)
        got = jax.jit(
            lambda users, items, target_U, size=chunk_items: ranks(
                mol_scores.Mixtures(users), items, target_U, chunk_items=size, cutoff=None
            )
        )(users, items, target_U)
        for user in range(ROWS):
            place = np.flatnonzero(ids[user] == target_U[user])[0]
            assert got[user] == (found[user] >= found[user, place]).sum()


def test_exact_and_fast_arithmetic_agree():
    made = mixture()
    exact, plain = (
        jax.jit(lambda e_ID, how=how: made.items(e_ID, how))(TABLE)
        for how in (EXACT, fast(jnp.float32))
    )
    close(exact, plain, 1e-5)
