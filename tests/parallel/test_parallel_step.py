"""A training step under a mesh equals the step of one device.

Losses, gradients, evaluation, for every kind of run; on 8 CPU devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments import configs
from tests.ranking import rank_data
from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.config import from_config_dict, to_config_dict
from ultra_hstu.data.feed import OF_GROUPS, StreamedFeed, feed_specs
from ultra_hstu.model_config import ChannelConfig
from ultra_hstu.parallel.collectives import collectives
from ultra_hstu.parallel.embedding_sharding import lookup
from ultra_hstu.parallel.mesh import make_mesh, put
from ultra_hstu.parallel.shards import Shards
from ultra_hstu.step import run_steps

STEPS, GROUPS = 3, 8
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile
RETRIEVAL = with_(
    small_config("unused", steps_per_call=STEPS),
    data__batch_tokens=128,
    model__implementation="reference",
    model__relative_bias=False,
    parallel__groups=GROUPS,
)
RANKING = rank_data.config(
    data=dict(batch_users=8, batch_tokens=256),
    model=dict(implementation="reference", input_dropout=0.2, linear_dropout=0.2),
    rank=dict(contextual=("gender",)),
    train=dict(epochs=2, protocol="chronological", eval_users=8, steps_per_call=STEPS),
)
RANKING = with_(RANKING, parallel__groups=GROUPS)
MIXTURE = {
    "all": ChannelConfig(max_history=6, layers=2, truncate_after=1, truncate_length=3),
    "clicks": ChannelConfig(
        signal="is_click", at_least=1.0, max_history=4, layers=2, width=12, window=(-1,)
    ),
}


@functools.cache
def interactions(ranking):
    if ranking:
        data = rank_data.interactions((9, 3, 20, 5, 12, 7, 30, 17, 11))
        return dataclasses.replace(
            data,
            contexts={"gender": (np.arange(9) % 3).astype(np.int32)},
            context_values={"gender": ("", "F", "M")},
        )
    rng = np.random.default_rng(0)
    return rank_data.interactions(rng.integers(3, 13, 60))


def run(config, data, context, evaluated=False):
    """Losses and gradient norms of the first steps, and metrics after them."""
    config = with_(config, parallel__data=data, parallel__context=context)
    config.validate()
    task = tasks.of(config, interactions(bool(config.rank.tasks)))
    loader = task.loader("train", batch_users=config.data.batch_users, steps_per_call=STEPS)
    group = next(iter(loader.groups(loader.plan(seed=1))))
    steps = jax.jit(functools.partial(run_steps, task.recipe), compiler_options=QUICK)
    state, history = steps(task.recipe.start(0), group.feed, np.int32(group.steps))
    metrics = task.evaluator("test")(state.params) if evaluated else {}
    return {name: np.asarray(values)[: group.steps] for name, values in history.items()} | metrics


def check(got, want):
    assert got.keys() == want.keys() and len(want["loss"]) > 1
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)


ULTRA = dict(
    model__layers=2,
    model__window=(3,),
    model__full_rows=(2,),
    model__truncate_after=1,
    model__truncate_length=5,
    model__divide_by="length",
    model__remat="selective",
    model__chunk_rows=10,
    loss__chunk_rows=12,
    data__stochastic_length=1.5,
    optim__tables="rowwise_adagrad",
    eval__hide="all",
)


@functools.cache
def on_one_device():
    return run(with_(RETRIEVAL, **ULTRA), 1, 1, evaluated=True)


@pytest.mark.parametrize("data, context", [(8, 1), (1, 8), (2, 4)])
def test_meshes_agree(data, context):
    """Losses, then metrics, are the same with the pieces that retrieval has, all at once.

    So they are where each device of a group reads users of its own.
    """
    evaluated = (data, context) == (2, 4)
    batches = "exchanged" if evaluated else "replicated"
    want = on_one_device()
    check(
        run(with_(RETRIEVAL, **ULTRA, parallel__batches=batches), data, context, evaluated),
        want if evaluated else {name: want[name] for name in ("loss", "grad_norm")},
    )


OTHERS = {
    "ring over blocks, exchanged, fsdp, in-batch negatives": (
        2,
        4,
        with_(
            RETRIEVAL,
            model__layers=1,
            model__divide_by="length",
            model__feed_forward=24,
            loss__kind="in_batch",
            parallel__fsdp=True,
            parallel__batches="exchanged",
        ),
    ),
    "ulysses, relative bias, full softmax, streamed, gathered": (
        4,
        2,
        with_(
            RETRIEVAL,
            model__layers=1,
            model__relative_bias=True,
            model__divide_by="length",
            loss__kind="full",
            data__placement="stream",
            parallel__batches="gathered",
        ),
    ),
    "negatives that rows share": (
        1,
        8,
        with_(RETRIEVAL, model__layers=1, loss__rows_per_draw=4, parallel__groups=1),
    ),
    "sasrec, chunks": (
        8,
        1,
        with_(
            RETRIEVAL,
            model__kind="sasrec",
            model__ffn_width=16,
            model__layers=1,
            model__remat="selective",
            model__chunk_rows=5,
        ),
    ),
    "din, fsdp": (
        8,
        1,
        with_(RANKING, model__kind="din", model__ffn_width=16, parallel__fsdp=True),
    ),
    "mixture of transducers, without signals, streamed, exchanged": (
        2,
        4,
        with_(
            RANKING,
            rank__signals=(),
            data__placement="stream",
            parallel__batches="exchanged",
            model__channels=MIXTURE,
            model__window=(2,),
            model__full_rows=(1,),
            model__prefix=(2,),
            model__divide_by="length",
        ),
    ),
    "interleaved, every item supervised, gather, chunks, clipped gradients, stochastic length": (
        1,
        8,
        with_(
            RANKING,
            rank__input="interleaved",
            rank__supervise="all",
            rank__contextual=(),
            parallel__strategy="gather",
            model__divide_by="length",
            model__chunk_rows=10,
            model__layers=1,
            optim__clip_norm=1.0,
            data__stochastic_length=1.5,
            data__subsequence="random",
        ),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_runs_agree(name):
    data, context, config = OTHERS[name]
    evaluated = config.rank.input == "interleaved"
    check(run(config, data, context, evaluated), run(config, 1, 1, evaluated))


def test_streamed_columns_of_no_width():
    """The signals of a run without any: a slice of them in a loop ends XLA for CPUs."""
    mesh, everywhere = make_mesh(8, 1), PartitionSpec()
    columns = {"none": np.zeros((2, 16, 0), np.int32), "some": np.ones((2, 16), np.int32)}
    feed = StreamedFeed(put(columns, mesh, OF_GROUPS))

    def total(feed, steps):
        zeros = jax.tree.map(jnp.zeros_like, feed.batch(0))

        def add(i, sums):
            return jax.tree.map(jnp.add, sums, feed.batch(i))

        return jax.lax.fori_loop(0, steps, add, zeros)

    run = jax.shard_map(
        total,
        mesh=mesh,
        in_specs=(feed_specs(feed), everywhere),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    found = jax.jit(run)(feed, np.int32(2))
    assert found["none"].shape == (16, 0) and (found["some"] == 2).all()


def test_mini_sequences_over_ulysses():
    """The configuration at a small size, in chunks with a tail, equals all rows on one device."""
    written = configs.named("long_mst")
    assert written.model.chunk_rows and (written.parallel.strategy, written.parallel.context) == (
        "ulysses",
        2,
    )
    small = dict(
        width=16,
        layers=1,
        qk_width=8,
        v_width=8,
        dtype="float32",
        implementation="reference",
        chunk_rows=10,
        feed_forward=64,
    )
    config = with_(
        written,
        **{f"model__{name}": value for name, value in small.items()},
        data__max_history=10,
        data__batch_users=8,
        data__batch_tokens=128,
        train__steps_per_call=STEPS,
        loss__negatives=16,
        parallel__groups=4,
    )
    plain = with_(config, model__chunk_rows=None, model__remat="none", parallel__strategy="auto")
    check(run(config, 4, 2), run(plain, 1, 1))


def program(config, data, context):
    config = with_(config, parallel__data=data, parallel__context=context)
    task = tasks.of(config, interactions(False))
    loader = task.loader("train", batch_users=config.data.batch_users, steps_per_call=1)
    feed = next(iter(loader.groups(loader.plan()))).feed
    step = jax.jit(task.recipe.feed_step).lower(
        jax.eval_shape(lambda: task.recipe.init(0)), feed, np.int32(0)
    )
    return collectives(step.compile(QUICK).as_text(), data * context)


def test_what_a_step_sends():
    """No activations are gathered: four times the rows, and nothing more is sent.

    Here a device looks up as many rows as the tables have entries.
    """
    config = with_(RETRIEVAL, model__window=(3,), model__full_rows=(2,), model__layers=1)
    short, long = (program(with_(config, data__batch_tokens=rows), 1, 8) for rows in (1024, 4096))
    assert sum(one.bytes for one in long) == sum(one.bytes for one in short)
    table = 128 * config.model.width  # the catalogue, for lookups and loss
    assert (
        max(one.elements for one in long if one.kind in ("all-gather", "reduce-scatter")) <= table
    )


def test_what_a_lookup_sends():
    """Devices exchange the looked-up entries of a long table, and the whole of a short one."""
    spread, width = PartitionSpec(("data", "context")), 4

    def sent(rows, count):
        look = functools.partial(lookup, shards=Shards(8))
        run = jax.shard_map(
            look, mesh=make_mesh(8, 1), in_specs=(spread, spread), out_specs=spread, check_vma=False
        )
        shapes = (
            jax.ShapeDtypeStruct((rows, width), jnp.float32),
            jax.ShapeDtypeStruct((count,), jnp.int32),
        )
        return collectives(jax.jit(run).lower(*shapes).compile(QUICK).as_text(), 8)

    asked = [one.bytes for one in sent(4096, 1600) if one.kind == "all-to-all"]
    assert len(asked) == 2 and sum(asked) == pytest.approx(
        1.25 * 200 * (width + 1) * 4 * 7 / 8, rel=0.05
    )
    (whole,) = sent(200, 1600)
    assert whole.kind == "all-gather" and whole.bytes == pytest.approx(
        200 * width * 4 * 7 / 8, rel=0.05
    )


def test_fsdp_gathers_a_layer_at_a_time():
    """Each of a layer's two matrices is gathered once forward and once backward."""
    config = with_(RETRIEVAL, parallel__fsdp=True, model__layers=1)

    def gathered(config):
        return sum(
            one.kind == "all-gather" and one.elements in (16 * 64, 16 * 16)
            for one in program(config, 8, 1)
        )

    assert (
        gathered(config) == gathered(with_(config, parallel__fsdp=False)) + 4
    )  # a table of positions has as many elements


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_lookup(shape):
    """Entries and gradients are those of the whole table, for any numbers of entries.

    All numbers may belong to one device.
    """
    rng, shards, rows = np.random.default_rng(0), Shards(*shape), 64
    table_XD = rng.standard_normal((rows, 4), dtype=np.float32)
    spread = PartitionSpec(("data", "context"))

    def loss(table_XD, row_T, look):
        return jnp.sum(jnp.sin(look(table_XD, row_T)) * (1 + row_T[:, None]))

    def on_device(table_XD, row_t):
        found = lookup(table_XD, row_t, shards)
        return found, jax.grad(loss)(table_XD, row_t, lambda table, row: lookup(table, row, shards))

    run = jax.jit(
        jax.shard_map(
            on_device,
            mesh=make_mesh(*shape),
            in_specs=(spread, spread),
            out_specs=(spread, spread),
            check_vma=False,
        )
    )
    whole = lambda table, row: lookup(table, row, Shards())  # noqa: E731
    few = (rng.integers(-1, rows, 80), np.full(80, 3), np.full(80, -1), rng.integers(0, 9, 80))
    for row_T in (*few, rng.integers(-1, rows, 800)):
        row_T = jnp.asarray(row_T, jnp.int32)
        found, gradient = run(table_XD, row_T)
        np.testing.assert_array_equal(found, np.where(row_T[:, None] >= 0, table_XD[row_T], 0))
        np.testing.assert_allclose(
            gradient, jax.grad(loss)(jnp.asarray(table_XD), row_T, whole), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(data=0), "parallel.data=0 must be greater than 0"),
        (dict(data=3, groups=8), "parallel.groups=8 must be a multiple of parallel.data=3"),
        (
            dict(context=2, strategy="halo"),
            r"'halo' with model.window=\(\), a full mask, .*: use 'ring'",
        ),
        (
            dict(context=4, strategy="ulysses"),
            "'ulysses' with model.heads=2 cannot be used with parallel.context=4: use a multiple",
        ),
        (
            dict(context=2, strategy="broadcast"),
            "parallel.strategy='broadcast' is not allowed: use 'auto', 'gather'",
        ),
    ],
)
def test_bad_configurations(options, message):
    values = to_config_dict(with_(RETRIEVAL, parallel__groups=None)).to_dict()
    values["parallel"] |= options
    with pytest.raises(ValueError, match=message):
        from_config_dict(values)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(model__kind="sasrec"),
            "model.kind='sasrec' cannot be used with parallel.context=2: use 'hstu', or context=1",
        ),
        (
            dict(model__attention="masked_softmax"),
            "model.attention='masked_softmax' cannot be used with parallel.context=2: use 'silu'",
        ),
        (
            dict(model__relative_bias=True, parallel__strategy="ring"),
            "a relative bias and parallel.strategy='ring' .*: use 'ulysses'",
        ),
        (
            dict(model__window=(3,), parallel__layout="striped"),
            "'halo' with parallel.layout='striped' .*: use 'contiguous'",
        ),
    ],
)
def test_bad_combinations(fields, message):
    with pytest.raises(ValueError, match=message):
        with_(RETRIEVAL, parallel__context=2, **fields).validate()


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(parallel__data=2, parallel__context=2),
            "data=2 x context=2 must be the number of devices, 8",
        ),
        (
            dict(parallel__data=8, data__batch_users=12),
            "batches of 12 examples, packed in parallel.groups=8",
        ),
        (
            dict(parallel__data=2, parallel__context=4, data__batch_tokens=130),
            "65 rows cannot be divided among 4 of the parallel.groups=8",
        ),
        (
            dict(parallel__context=8, data__batch_tokens=88),
            "T=88 rows are not a multiple of 2 \\* 8 context shards",
        ),
        (
            dict(parallel__data=8, parallel__fsdp=True, model__width=12),
            "parallel.data=8, but .*uvqk.* has 12",
        ),
    ],
)
def test_bad_meshes(fields, message):
    config = with_(RETRIEVAL, **fields)
    config.validate()
    with pytest.raises(ValueError, match=message):
        run(config, config.parallel.data, config.parallel.context)
