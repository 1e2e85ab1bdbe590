"""FLOP counts against XLA's own, loops over masks, and arithmetic on small cases."""

import dataclasses

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.mask import AttentionMask
from kernels.sampled_softmax import xla
from tests.ranking import rank_data
from tests.small_run import with_
from ultra_hstu import flops, tasks
from ultra_hstu.config import Config, DataConfig, LossConfig, ModelConfig, RankConfig
from ultra_hstu.model_config import ChannelConfig
from ultra_hstu.nn.din import DIN
from ultra_hstu.nn.heads import MultiTaskHead
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.retrieval.batch import Events, HistoryGather
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.sequences import Sequences

ROWS, WIDTH = 256, 128
MODEL = ModelConfig(
    width=WIDTH,
    layers=2,
    heads=2,
    qk_width=64,
    v_width=64,
    relative_bias=False,
    implementation="reference",
)
WHOLE = dataclasses.replace(MODEL, attention="softmax")  # whose last layer computes all rows
RANK = RankConfig(tasks=("correct",), targets=4, head_width=32)


def xla_flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def encoder(model):
    """One sequence of contextual tokens: its mask is full, as the dense `reference` is."""
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: HSTU.from_config(model, ROWS, rngs=nnx.Rngs(0)))
    )
    zero_T = jnp.zeros(ROWS, jnp.int32)
    sequences = Sequences(
        jnp.array([0, ROWS]), zero_T == 0, zero_T, zero_T, None, jnp.array([ROWS])
    )
    return (
        lambda params, x_TD: nnx.merge(graphdef, params)(x_TD, sequences),
        params,
        jax.ShapeDtypeStruct((ROWS, model.width), jnp.float32),
    )


@pytest.mark.parametrize("preset", ["research", "production"])
@pytest.mark.parametrize("widths", [(64, 64), (32, 96)], ids=["K = V", "K < V"])
def test_encoder_against_xla(preset, widths):
    """XLA counts element-wise operations too: a few per cent at this width."""
    model = dataclasses.replace(MODEL, preset=preset, qk_width=widths[0], v_width=widths[1])
    run, params, x_TD = encoder(model)
    counted = flops.count(Config(model=model), 0, contextual=ROWS)
    forward = xla_flops(run, params, x_TD)
    assert 1.0 < forward / (counted.projections + counted.attention) < 1.05
    both = xla_flops(
        jax.value_and_grad(
            lambda params, x_TD: jnp.sum(jnp.sin(run(params, x_TD))), argnums=(0, 1)
        ),
        params,
        x_TD,
    )
    # The reference keeps its scores, kernels compute them again: one product less in its backward.
    kept_scores = 2 * model.layers * ROWS**2 * model.heads * model.qk_width
    assert 1.0 < both / (counted.training - kept_scores) < 1.05


@pytest.mark.parametrize("kind, items", [("sampled", 5000), ("full", 200)])
def test_retrieval_loss_against_xla(kind, items, monkeypatch):
    """The loss is a step without the encoder's count. One chunk: XLA counts a loop once."""
    monkeypatch.setattr(xla, "_add_by_columns", xla._add)
    config = Config(
        data=DataConfig(max_history=ROWS, stochastic_length=None),
        model=dataclasses.replace(MODEL, layers=1, output_slots=1),
        loss=LossConfig(kind=kind, negatives=16, chunk_rows=ROWS),
    )
    recipe = Recipe(config, items)
    events = Events.from_arrays(np.arange(ROWS + 1) % items + 1, None)
    columns = {"start": jnp.array([0]), "stop": jnp.array([ROWS])}
    batch = HistoryGather(ROWS)(events, columns)
    params = nnx.split(nnx.eval_shape(lambda: recipe.build(0)))[1]
    step = xla_flops(
        lambda params, key: jax.value_and_grad(recipe.loss)(params, batch, key),
        params,
        jax.random.key(0),
    )
    counted = flops.count(config, ROWS, items=items)
    encoder_only = flops.count(
        config, 0, contextual=ROWS
    )  # dense: causal attention computes the full square here
    kept_scores = 2 * ROWS**2 * MODEL.heads * MODEL.qk_width
    assert 1.0 < step / (encoder_only.training - kept_scores + 3 * counted.loss) < 1.12
    assert counted.corpus == 2 * items * WIDTH


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"window": (3,)},
        {"window": (3, -1), "full_rows": (2, 0)},
        {"window": (2,), "prefix": (3, 4)},
    ],
    ids=str,
)
def test_pairs_against_loops(fields):
    model = dataclasses.replace(MODEL, **fields)
    config = Config(model=model, rank=RANK)
    history, targets, contextual = [9, 0, 5], [2, 3, 0], [1, 1, 1]
    pairs = 0
    for layer in range(2):
        for h, m, c in zip(history, targets, contextual, strict=True):
            window, full_rows, prefix = (
                values[layer % len(values)] if values else None
                for values in (model.window, model.full_rows, model.prefix)
            )
            mask = AttentionMask(None if window == -1 else window, full_rows or 0, prefix or 0)
            seen = mask.dense(np.array([0, h + m + c]), h + m + c, np.array([m]), np.array([c]))
            pairs += int(seen[h + c if layer else 0 :].sum()) / 3  # the last layer: of targets
    counted = flops.count(config, history, targets=targets, contextual=contextual)
    assert counted.attention == pytest.approx(pairs * 2 * 2 * (64 + 64))
    rows = np.mean(np.add(np.add(history, targets), contextual))
    uvqk, output, read = WIDTH * 2 * (128 + 128), 128 * WIDTH, 5 / 3
    first, last = rows * (uvqk + output), rows * uvqk / 2 + read * (uvqk + output)
    assert counted.projections == pytest.approx(2 * (first + last))


def test_interleaved_input_has_two_rows_an_event():
    merged = flops.count(Config(model=WHOLE, rank=RANK), 100, targets=4)
    interleaved = flops.count(
        Config(model=WHOLE, rank=dataclasses.replace(RANK, input="interleaved")), 100, targets=4
    )
    assert interleaved.projections / merged.projections == pytest.approx(204 / 104)
    assert interleaved.attention / merged.attention == pytest.approx(
        (200 * 201 / 2 + 4 * 201) / (100 * 101 / 2 + 4 * 101)
    )
    assert interleaved.head == merged.head == 4 * 2 * (WIDTH * 32 + 32)


def test_truncation_lowers_the_upper_layers_only():
    config = Config(model=WHOLE, rank=RANK)
    cut = with_(config, model__truncate_after=1, model__truncate_length=20)
    whole, short = (
        flops.count(config, 100, targets=4, contextual=2),
        flops.count(config, 20, targets=4, contextual=2),
    )
    mixed = flops.count(cut, 100, targets=4, contextual=2)
    for part in ("projections", "attention", "attention_backward"):
        assert getattr(mixed, part) == pytest.approx(
            (getattr(whole, part) + getattr(short, part)) / 2
        )
    assert flops.count(cut, 10, targets=4) == flops.count(
        config, 10, targets=4
    )  # shorter than the cut


def test_channels_add_up_and_share_one_head():
    one = Config(model=MODEL, rank=RANK)
    two = with_(
        one, model__channels={"long": ChannelConfig(layers=1), "short": ChannelConfig(layers=2)}
    )
    counted = flops.count(two, [0, 0], targets=4, channels={"long": [50, 70], "short": [5, 9]})
    long = flops.count(with_(one, model__layers=1), [50, 70], targets=4)
    parts = flops.Flops(*np.add(long, flops.count(one, [5, 9], targets=4)))
    assert (counted.projections, counted.attention) == (parts.projections, parts.attention)
    assert counted.head == 4 * 2 * 32 * (2 * WIDTH + 1)
    own = {
        "long": ChannelConfig(layers=3, window=(8,), truncate_after=1, truncate_length=20),
        "short": ChannelConfig(layers=2, width=64),
    }
    found = flops.count(
        with_(one, model__channels=own), 0, targets=4, channels={"long": 50, "short": 9}
    )
    local = with_(
        one, model__layers=3, model__window=(8,),
        model__truncate_after=1, model__truncate_length=20,
    )  # fmt: skip
    thin = flops.count(with_(one, model__width=64), 9, targets=4)
    parts = flops.Flops(*np.add(flops.count(local, 50, targets=4), thin))
    assert found.attention == parts.attention
    assert found.projections == parts.projections + 2 * 13 * WIDTH * 64
    assert found.head == 4 * 2 * 32 * (WIDTH + 64 + 1)
    with pytest.raises(
        ValueError,
        match=r"channels \['long'\] are not those of model.channels, \['long', 'short'\]",
    ):
        flops.count(two, 0, channels={"long": 1})


def products(jaxpr):
    """Operations of a program's matrix products; a loop counts as often as it runs."""
    total = 0
    needed = {var for var in jaxpr.outvars if not isinstance(var, jax.extend.core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not (eqn.effects or any(var in needed for var in eqn.outvars)):
            continue  # its result is not used: no compiled program holds it
        needed |= {var for var in eqn.invars if not isinstance(var, jax.extend.core.Literal)}
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += (
                2 * eqn.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
            )
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(
            products(inner) for inner in jax.extend.core.jaxprs_in_params(eqn.params)
        )
    return total


@pytest.mark.parametrize("chunk_rows", [None, 100], ids=["whole", "chunks and a tail"])
@pytest.mark.parametrize("remat", ["none", "selective"])
@pytest.mark.parametrize(
    ("preset", "feed_forward"),
    [("production", None), ("production", 4 * WIDTH), ("research", 4 * WIDTH)],
)
def test_recomputation(remat, chunk_rows, preset, feed_forward):
    """Exact, in the traced program: kernels keep no scores, `reference` does unless told not to."""
    options = dict(remat=remat, chunk_rows=chunk_rows, feed_forward=feed_forward)
    model = dataclasses.replace(MODEL, **options, preset=preset)
    run, params, x_TD = encoder(model)
    step = jax.make_jaxpr(
        jax.value_and_grad(lambda params, x_TD: jnp.sum(jnp.sin(run(params, x_TD))), argnums=(0, 1))
    )(params, x_TD)
    counted = flops.count(Config(model=model), 0, contextual=ROWS)
    kept_scores = (
        0 if remat == "selective" else 2 * model.layers * ROWS**2 * model.heads * model.qk_width
    )
    assert products(step.jaxpr) == counted.training - kept_scores


@pytest.mark.parametrize("form", ["merged", "interleaved", "truncated", "mixture"])
def test_ranking_model_against_its_program(form):
    """Every product of a forward pass of the real model.

    Dense attention computes the square of a buffer's rows, padding included: so do the counts here.
    """
    sections = {
        "merged": {},
        "interleaved": dict(rank=dict(input="interleaved")),
        "truncated": dict(model=dict(truncate_after=1, truncate_length=2)),
        "mixture": dict(model=dict(channels=rank_data.MIXTURE)),
    }[form]
    sections["model"] = dict(implementation="reference", layers=2) | sections.get("model", {})
    config = rank_data.config(**sections)
    task = tasks.of(config, rank_data.interactions())
    loader = task.loader("train", batch_users=4, steps_per_call=1)
    batch = next(iter(loader.groups(loader.plan()))).feed.batch(0)
    program = jax.make_jaxpr(lambda params: task.recipe.logits(params, batch))(
        task.recipe.init(0).params
    )

    def full(rows, layers):
        """A stack of this depth on so many rows; each row sees all."""
        whole = with_(
            config,
            model__truncate_after=None,
            model__truncate_length=None,
            model__channels={},
            model__layers=layers,
        )
        return flops.count(whole, 0, contextual=rows)

    wanted = 4 * config.rank.targets

    def last(rows):
        """A last layer that reads the targets alone; keys, to whole tiles, and queries in line."""
        uvqk, output = 8 * 2 * 2 * (4 + 4), 3 * 8 * 8
        products = rows * uvqk / 2 + wanted * (uvqk + output)
        return 2 * (products + (-(-rows // 128) * 128 + wanted) ** 2 * 2 * (4 + 4))

    def whole(rows, layers):
        counted = full(rows, layers)
        return counted.projections + counted.attention

    head = flops.count(
        config, 0, targets=wanted, channels={name: 0 for name in config.model.channels}
    ).head
    depths = [channel.layers for channel in config.model.channels.values()] or [2]
    if form == "truncated":  # capacity for 2 events and the targets of 4 requests: no few rows
        rows, kept = loader.gather.rows[0], 4 * (2 + config.rank.targets)
        encoders = whole(rows, 1) + whole(kept, 1)
    else:
        encoders = sum(
            whole(rows, depth - 1) * (depth > 1) + last(rows)
            for rows, depth in zip(loader.gather.rows, depths, strict=True)
        )
    assert products(program.jaxpr) == head + encoders


def test_target_attention_against_its_program():
    """A forward pass of DIN is exact; a loop over every place of a history is what it computes."""
    model, history, targets = dataclasses.replace(MODEL, kind="din", ffn_width=24), 40, 5
    layer = DIN.from_config(model, history, rngs=nnx.Rngs(0))
    sequences = Sequences.of([history + targets], num_targets=[targets])
    graphdef, params = nnx.split(layer)

    def run(params, x_TD):
        return nnx.merge(graphdef, params).rows(x_TD, sequences, history + jnp.arange(targets))

    x_TD = jnp.zeros((history + targets, WIDTH))
    counted = flops.count(Config(model=model, rank=RANK), history, targets=targets)
    program = jax.make_jaxpr(run)(params, x_TD)
    assert products(program.jaxpr) == counted.projections + counted.attention
    loss = lambda *inputs: jnp.sum(jnp.sin(run(*inputs)))  # noqa: E731
    step = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(params, x_TD)
    encoder_only = counted.training - 3 * counted.head
    assert 0.9 * encoder_only < products(step.jaxpr) <= encoder_only


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_head_against_its_program(chunk_rows):
    """A training step of the head of three tasks on the outputs of two encoders."""
    config = with_(
        Config(model=MODEL, rank=RANK),
        model__preset="production",
        model__chunk_rows=chunk_rows,
        model__channels={"a": ChannelConfig(), "b": ChannelConfig()},
    )
    config = with_(config, rank__tasks=("x", "y", "z"))
    head = MultiTaskHead(2 * WIDTH, RANK.head_width, 3, chunk_rows=chunk_rows, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(head)
    loss = lambda params, h_PD: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(h_PD)))  # noqa: E731
    step = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(
        params, jnp.zeros((10, 2 * WIDTH))
    )
    counted = flops.count(config, 0, targets=10, channels={"a": 0, "b": 0})
    assert products(step.jaxpr) == 3 * counted.head + (
        0 if chunk_rows is None else 10 * 2 * RANK.head_width * 2 * WIDTH
    )
    plain = flops.count(
        with_(config, model__chunk_rows=None), 0, targets=10, channels={"a": 0, "b": 0}
    )
    assert counted.recomputed == (0 if chunk_rows is None else 10 * 2 * RANK.head_width * 2 * WIDTH)
    assert plain.recomputed == 0


def test_training_is_three_projections_and_three_and_a_half_attentions():
    plain = flops.count(Config(model=MODEL, rank=RANK), 50, targets=4)
    assert plain.recomputed == 0
    assert plain.training == pytest.approx(
        3 * (plain.projections + plain.head) + 3.5 * plain.attention
    )  # K = V


def test_cost_exponent():
    """The exponent is between that of projections, 1, and that of attention, 2.

    A window takes the squares away; an exact power law is found exactly.
    """
    causal, error = flops.cost_exponent(Config(model=MODEL), 2000)
    local, _ = flops.cost_exponent(Config(model=dataclasses.replace(MODEL, window=(16,))), 2000)
    short, _ = flops.cost_exponent(Config(model=MODEL), 50)
    assert 1 < short < causal < 2 and error < 0.5
    assert local == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="max_length=1 must be at least 2"):
        flops.cost_exponent(Config(), 1)


def test_bad_lengths():
    with pytest.raises(ValueError, match="targets=-1 must be at least 0"):
        flops.count(Config(), 3, targets=-1)
    with pytest.raises(ValueError, match="arrays of one size"):
        flops.count(Config(), [1, 2, 3], targets=[1, 2])


def test_paper_scale():
    """ULTRA-HSTU's Table 2: inference at length 16384 falls from 4.692 to 0.436 TFLOP, 10.8 times.

    Widths and truncation are not published. With the layer sizes of its open configurations (D =
    512, H = 4, K = V = 128) both models have the same order of magnitude, see
    docs/sampling_and_precision.md.
    """
    model = ModelConfig(
        width=512, layers=10, heads=4, qk_width=128, v_width=128, preset="production"
    )
    plain = flops.count(Config(model=model), 16384)
    ultra_model = dataclasses.replace(
        model, layers=18, window=(256,), full_rows=(256,), truncate_after=3, truncate_length=3072
    )
    ultra = flops.count(Config(model=ultra_model), 16384)
    assert 0.5 < plain.inference / 4.692e12 < 2
    assert 0.5 < ultra.inference / 0.436e12 < 2
    assert 5 < plain.inference / ultra.inference < 20
