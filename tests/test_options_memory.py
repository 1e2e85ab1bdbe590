"""The options that save memory: train, resume, evaluate, serve, export and flops know them.

Meshes are in tests/parallel/test_parallel_step.py, caches in tests/serving/test_cached_users.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from experiments import configs
from tests.ranking import rank_data
from tests.small_run import small_config, with_
from ultra_hstu import flops, optim, serving, tasks
from ultra_hstu.checkpoint import load_state
from ultra_hstu.config import Config, OptimConfig
from ultra_hstu.entry_updates import EntryUpdate, table_optimizer
from ultra_hstu.fields import changed
from ultra_hstu.initial import like_of
from ultra_hstu.library import fit
from ultra_hstu.workdir import Workdir

QUIET = Console(quiet=True)
CONFIG = with_(
    small_config("unused", epochs=1),
    model__layers=1,
    model__relative_bias=False,
    model__implementation="reference",
    model__feed_forward=24,
    model__chunk_rows=7,
    model__remat="selective",
    optim__state_dtype="bfloat16",
    eval__hide="all",
    eval__time="last",
)
DATA = rank_data.interactions(tuple(range(5, 17)))


def test_a_run_trains_goes_on_and_answers(tmp_path):
    """Its answers are those of its evaluation, from state and options as they were stored."""
    result = fit(CONFIG, DATA, tmp_path, console=QUIET)
    with pytest.raises(ValueError, match="another configuration .*\n.*model.feed_forward: 24 -> 8"):
        fit(with_(CONFIG, model__feed_forward=8), DATA, tmp_path, console=QUIET)
    # More devices have shorter shards: so may the run's mini-sequences become.
    again = fit(with_(CONFIG, model__chunk_rows=3), DATA, tmp_path, console=QUIET)
    assert again["best"] == result["best"]
    folder = Workdir(tmp_path)
    task = tasks.of_run(folder)
    _, state, _ = load_state(folder, like_of(task))
    assert "feed_forward" in state.params["encoder"]["layers"][0]
    assert {x.dtype.name for x in jax.tree.leaves(state.opt_state) if x.ndim} == {"bfloat16"}
    rank_U = task.evaluator("test").predict(state.params)
    model = serving.RecommendationModel(str(tmp_path))
    user = int(np.argmin(rank_U))
    events = slice(DATA.offsets[user], DATA.offsets[user + 1] - 1)
    found = model.recommend(DATA.items[events], DATA.timestamps[events], k=DATA.num_items)
    target = DATA.catalog.raw_ids[DATA.items[events.stop]]
    assert [one.item for one in found].index(target) + 1 == rank_U[user]


def test_operations_are_counted():
    counted, without = (
        flops.count(config, 10, items=50)
        for config in (CONFIG, with_(CONFIG, model__feed_forward=None))
    )
    block = 10 * 2 * 16 * 24
    assert counted.projections - without.projections == 2 * block
    assert counted.recomputed - without.recomputed == block


def test_means_in_bfloat16():
    """Half the bytes, and steps of Adam to rounding."""
    plain, short = (optim.adamw(OptimConfig(state_dtype=kind)) for kind in ("float32", "bfloat16"))
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((40, 3), jnp.float32)}
    states = [plain.init(params), short.init(params)]
    for _ in range(20):
        grads = {"w": jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)}
        made = [
            one.update(grads, state, params)
            for one, state in zip((plain, short), states, strict=True)
        ]
        states = [state for _, state in made]
    one, other = (np.asarray(updates["w"]) for updates, _ in made)
    assert 0 < np.abs(one - other).max() < 0.03 * np.abs(one).max()
    sizes = [sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim) for state in states]
    assert sizes[0] == 2 * sizes[1] == 2 * 4 * 120


def test_means_of_tables_in_bfloat16():
    """Those of lazy Adam; what row-wise AdaGrad adds up stays in float32."""
    rng = np.random.default_rng(0)
    table = nnx.Param(jnp.zeros((40, 3), jnp.float32))
    made = []
    for state_dtype in ("float32", "bfloat16"):
        config = OptimConfig(tables="lazy_adam", state_dtype=state_dtype)
        update = EntryUpdate(config, table_optimizer(config), devices=1)
        state, new = update.optimizer.init(table), table
        for step in range(4):
            grad_uD = jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)
            new, state = update(new, state, jnp.arange(40), grad_uD, jnp.int32(step))
        assert {one[...].dtype for one in state} == {jnp.dtype(state_dtype)}
        made.append(np.asarray(new[...]))
        rng = np.random.default_rng(0)
    assert 0 < np.abs(made[0] - made[1]).max() < 0.02 * np.abs(made[0]).max()
    config = OptimConfig(tables="rowwise_adagrad", state_dtype="bfloat16")
    assert table_optimizer(config).init(table)[0][...].dtype == jnp.float32


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_means_that_bfloat16_would_hold_still_are_refused(name):
    config = changed(Config(), optim={"state_dtype": "bfloat16", name: 0.999})
    with pytest.raises(ValueError, match=f"optim.{name}=0.999 moves .*: use at most 0.99, or"):
        config.validate()
    changed(Config(), optim={"state_dtype": "bfloat16", name: 0.99}).validate()


def test_mini_sequences_longer_than_the_shard_are_refused(tmp_path):
    """By the configuration where it says how long a shard is, else once the data does."""
    written = configs.named("long_mst")
    for context in (2, 4, 16):
        config = with_(written, model__heads=16, parallel__context=context)
        if context < 16:
            config.validate()
            continue
        config = with_(config, model__chunk_rows=4097)
        with pytest.raises(
            ValueError,
            match="model.chunk_rows=4097 is longer than the shard of a device, which has 4096 of a "
            "batch's 65536 rows under parallel.data=1 and parallel.context=16: use at most 4096",
        ):
            config.validate()
    config = with_(CONFIG, model__chunk_rows=1000)
    config.validate()
    with pytest.raises(ValueError, match="chunk_rows=1000 is longer .*: use at most 128, or None"):
        fit(config, DATA, tmp_path / "run", console=QUIET)


def test_a_feed_forward_block_is_of_hstu():
    config = changed(Config(), model={"kind": "sasrec", "feed_forward": 8})
    with pytest.raises(ValueError, match="model.feed_forward=8 does nothing under model.kind='sas"):
        config.validate()
    assert dataclasses.replace(Config().model).feed_forward is None
