"""Tables updated entry by entry, against the rules written out in NumPy over whole tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.parallel import test_parallel_step as meshes
from tests.small_run import with_
from ultra_hstu import effects, optim, tasks
from ultra_hstu.checkpoint import Checkpoints, abstract
from ultra_hstu.config import Config, LossConfig, OptimConfig, from_config_dict
from ultra_hstu.data.feed import Fixed
from ultra_hstu.entry_updates import joined, split
from ultra_hstu.parallel import embedding_sharding
from ultra_hstu.parallel.embedding_sharding import Entries, lookup
from ultra_hstu.parallel.shards import ONE
from ultra_hstu.vocabulary import names

QUICK = {"xla_backend_optimization_level": 0}
STEPS = 3
OPTIM = dict(
    optim__learning_rate=0.02,
    optim__tables_learning_rate=0.05,
    optim__warmup_steps=2,
    optim__weight_decay=0.1,
    optim__clip_norm=2.0,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several for the entries of a batch."""
    monkeypatch.setattr(embedding_sharding, "CHUNK", 16)


def plain_update(config, kind, table, state, grad, read, step):
    """One step of a whole table, row by row; the entries that were not read stay."""
    rate = (
        config.tables_learning_rate
        / config.learning_rate
        * float(optim.learning_rate(config)(step))
    )
    for row in np.unique(read[read >= 0]):
        g = grad[row].astype(np.float64)
        if kind == "rowwise_adagrad":
            state["sum"][row] += np.mean(g**2)
            change = g / (np.sqrt(state["sum"][row]) + 1e-8)
        else:
            b1, b2 = config.beta1, config.beta2
            state["m"][row] = b1 * state["m"][row] + (1 - b1) * g
            state["v"][row] = b2 * state["v"][row] + (1 - b2) * g**2
            m, v = (
                state["m"][row] / (1 - b1 ** (step + 1)),
                state["v"][row] / (1 - b2 ** (step + 1)),
            )
            change = m / (np.sqrt(v) + 1e-8)
        table[row] = table[row] * (1 - rate * config.weight_decay) - rate * change


SMALL = dict(model__layers=1)
CASES = {
    "ranking": with_(meshes.RANKING, **SMALL),
    "sampled": with_(
        meshes.RETRIEVAL, model__layers=2, model__truncate_after=1, model__truncate_length=5
    ),
    "sampled in twos": with_(meshes.RETRIEVAL, loss__rows_per_draw=2, **SMALL),
    "in_batch": with_(meshes.RETRIEVAL, loss__kind="in_batch", **SMALL),
}


def feed_of(config, number=0):
    task = tasks.of(config, meshes.interactions(bool(config.rank.tasks)))
    loader = task.loader("train", batch_users=config.data.batch_users, steps_per_call=STEPS)
    group = next(iter(loader.groups(loader.plan(seed=1))))
    return task.recipe, [group.feed.batch(number) for number in range(STEPS)]


@pytest.mark.parametrize(
    "case, kind",
    [
        ("ranking", "rowwise_adagrad"),
        ("sampled in twos", "lazy_adam"),
        ("in_batch", "rowwise_adagrad"),
    ],
)
def test_against_whole_tables(case, kind):
    """Parameters, losses and norms: dense gradients, clipped, and rules of entries in NumPy."""
    config = with_(CASES[case], parallel__groups=1, optim__tables=kind, **OPTIM)
    recipe, batches = feed_of(config)
    dense, _ = feed_of(with_(config, optim__tables="same", optim__tables_learning_rate=None))
    step = jax.jit(recipe.step, compiler_options=QUICK)
    state = first = recipe.start(0)
    gradients = jax.jit(
        lambda params, batch, key: (
            *jax.value_and_grad(dense.loss)(params, batch, key),
            recipe.reads(recipe.model(params), batch, key),
        ),
        compiler_options=QUICK,
    )
    params, adamw = first.params, optim.adamw(config.optim)
    rest_state = adamw.init(split(params, recipe.tables)[0])
    tables = {name: np.array(one[...]) for name, one in split(params, recipe.tables)[1].items()}
    states = {
        name: {"sum": np.zeros(len(one)), "m": np.zeros(one.shape), "v": np.zeros(one.shape)}
        for name, one in tables.items()
    }
    assert len(tables) == (4 if case == "ranking" else 1)
    for number, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(config.train.seed), number)
        loss, grads, reads = gradients(params, batch, key)
        norm = float(optax.tree.norm(grads))
        grads = jax.tree.map(lambda g, norm=norm: g * min(1.0, 2.0 / norm), grads)
        rest_grads, table_grads = split(grads, recipe.tables)
        rest, variables = split(params, recipe.tables)
        updates, rest_state = adamw.update(rest_grads, rest_state, rest)
        for name, table in tables.items():
            read = np.asarray(reads[tuple(name.split("."))])
            grad = np.asarray(table_grads[name][...])
            unread = np.setdiff1d(np.arange(len(table)), read)
            assert not grad[unread].any()  # what `reads` names is all that a loss reads
            plain_update(config.optim, kind, table, states[name], grad, read, number)
        params = joined(
            optax.apply_updates(rest, updates),
            {name: variables[name].replace(jnp.asarray(one)) for name, one in tables.items()},
        )
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-4)
    if case == "ranking":  # nobody reads these, and they stay to the bit
        item_I = np.asarray(batches[0].channels["events"].item_T)
        read = np.concatenate([np.asarray(b.channels["events"].item_T) for b in batches])
        unread = np.setdiff1d(np.arange(len(tables["embedding.item_table"])), read)
        assert item_I.any()
        before, after = (
            np.asarray(split(one, recipe.tables)[1]["embedding.item_table"][...])
            for one in (first.params, state.params)
        )
        np.testing.assert_array_equal(after[unread], before[unread])


@pytest.mark.parametrize("ids", [[3] * 8, range(8), [-1] * 8, [], [5, -1, 5, 0, 9, 9]], ids=str)
def test_distinct_entries(ids):
    """Every id equal, every id different, and none; looked up, differentiated and named once."""
    table_XD = jnp.asarray(np.random.default_rng(0).normal(size=(10, 4)), jnp.float32)
    number_N = jnp.asarray(list(ids), jnp.int32)

    def total(row_uD, entries):
        found = lookup(dataclasses.replace(entries, row_uD=row_uD), number_N, ONE)
        return jnp.sum(found * (1 + jnp.arange(len(number_N))[:, None])), found

    entries = Entries.of(table_XD, number_N, ONE)
    grad_uD, found = jax.grad(total, has_aux=True)(entries.row_uD, entries)
    np.testing.assert_array_equal(found, np.where(number_N[:, None] < 0, 0, table_XD[number_N]))
    known = [id for id in ids if id >= 0]
    assert [int(x) for x in entries.number_u if x < 10] == sorted(set(known))
    assert len(set(map(int, entries.number_U))) == len(entries.number_U)
    for number, row_D in zip(entries.number_u, grad_uD, strict=True):
        places = [1 + place for place, id in enumerate(ids) if id == int(number)]
        np.testing.assert_array_equal(row_D, np.full(4, sum(places), np.float32))


@pytest.mark.parametrize(
    "case, kind, data, context",
    [("ranking", "rowwise_adagrad", 2, 4), ("sampled", "lazy_adam", 4, 2)],
)
def test_meshes_agree(case, kind, data, context):
    """Tables that all devices divide, and those that each has: the losses of one device."""
    config = with_(CASES[case], optim__tables=kind, optim__clip_norm=2.0, parallel__fsdp=True)
    got = meshes.run(with_(config, parallel__batches="exchanged"), data, context)
    want = meshes.run(with_(config, parallel__fsdp=False), 1, 1)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4)


def test_memory_does_not_grow_with_a_table():
    """What a step holds beside its state: a table of a hundred times the entries adds nothing."""

    def temporaries(items):
        config = with_(CASES["ranking"], parallel__groups=1, optim__tables="rowwise_adagrad")
        recipe, batches = feed_of(config)
        recipe = dataclasses.replace(recipe, sizes=dataclasses.replace(recipe.sizes, items=items))
        state = jax.eval_shape(lambda: recipe.init(0))

        def steps(state, batch):
            once = lambda _, state: recipe.feed_step(state, Fixed(batch), 0)[0]  # noqa: E731
            return jax.lax.fori_loop(0, 2, once, state)

        # The passes that put arrays in place run at any level of optimization.
        program = jax.jit(steps, donate_argnums=0).lower(state, batches[0]).compile(QUICK)
        return program.memory_analysis().temp_size_in_bytes

    small, large = temporaries(10**4), temporaries(10**6)
    assert large < 1.02 * small


def test_a_checkpoint_holds_the_state_of_tables(tmp_path):
    """Steps from a restored state have the bits of those that were not interrupted."""
    config = with_(CASES["ranking"], parallel__groups=1, optim__tables="lazy_adam")
    recipe, batches = feed_of(config)
    step = jax.jit(recipe.step, compiler_options=QUICK)
    state, _ = step(recipe.start(0), batches[0])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    restored = checkpoints.restore(abstract(state)).state
    # The names by which a state is carried to another vocabulary.
    assert "opt_state.tables.1.embedding.item_table" in names(state)
    checkpoints.close()
    ends = [step(step(one, batches[1])[0], batches[2])[0] for one in (state, restored)]
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(one, other)


def test_refusals():
    full = Config(optim=OptimConfig(tables="lazy_adam"), loss=LossConfig(kind="full"))
    with pytest.raises(ValueError, match="'lazy_adam' .* loss.kind='full' reads all: use optim"):
        full.validate()
    with pytest.raises(ValueError, match="no effect under optim.tables=same: set rowwise_adagrad"):
        effects.require_effect(Config(), "optim.tables_learning_rate")


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="optim.tables='adam' is not allowed: use 'same'"):
        from_config_dict({"optim": {"tables": "adam"}})
