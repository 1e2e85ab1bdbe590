"""The ranking model leaks nothing: no prediction reads its own action or another target.

Gradients show it, and so does changing the data.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.mask import AttentionMask
from tests.ranking import rank_data
from tests.ranking.rank_data import MIXTURE
from tests.small_run import with_
from ultra_hstu import tasks
from ultra_hstu.config import from_config_dict
from ultra_hstu.model_config import ChannelConfig
from ultra_hstu.nn.divisor import Divisor
from ultra_hstu.nn.embeddings import CodeEmbedding
from ultra_hstu.nn.heads import MultiTaskHead
from ultra_hstu.nn.truncation import Truncation
from ultra_hstu.ranking.form import EVERYTHING
from ultra_hstu.ranking.task import RankingTask

FORMS = {
    "merged": {},
    "interleaved": dict(rank=dict(input="interleaved")),
    "interleaved research": dict(
        rank=dict(input="interleaved"), model=dict(preset="research", relative_bias=True)
    ),
    "supervise all": dict(rank=dict(input="interleaved", supervise="all")),
    "softmax": dict(
        rank=dict(input="interleaved", supervise="all"),
        model=dict(attention="masked_softmax", relative_bias=True, window=(6,)),
    ),
    "din": dict(rank=dict(contextual=("age",)), model=dict(kind="din", ffn_width=8)),
    "semi-local, truncated": dict(
        model=dict(window=(2,), full_rows=(1,), truncate_after=1, truncate_length=4)
    ),
    "mixture": dict(model=dict(channels=MIXTURE)),
    "contextual": dict(rank=dict(contextual=("age", "region"))),
    "contextual, interleaved": dict(rank=dict(contextual=("age", "region"), input="interleaved")),
    "clicks": dict(
        model=dict(
            channels={
                "engagement": ChannelConfig(
                    signal="is_click", at_least=1.0, max_history=20, layers=1
                )
            }
        )
    ),
}
DATA = dataclasses.replace(
    rank_data.interactions((20, 9, 14)),
    contexts={"age": np.array([3, 0, 1], np.int32), "region": np.array([2, 2, 1], np.int32)},
    context_values={"age": ("", "1", "2", "3"), "region": ("", "north", "south")},
)


def task_of(form, data=DATA) -> RankingTask:
    fields = FORMS[form]
    model = {"layers": 2} | fields.get("model", {})  # what one layer hides, two may tell
    return tasks.of(rank_data.config(**fields | {"model": model}), data)


@functools.cache
def built(form):
    """A task, initial parameters with tables large enough to matter, and its compiled logits."""
    task = task_of(form)
    params = task.recipe.init(0).params
    for table in (
        params["embedding"]["item_table"],
        params["embedding"]["signals"]["table"],
        params["embedding"]["features"]["table"],
    ):
        table[...] = 20 * table[...]
    return task, params, jax.jit(task.recipe.logits)


def predictions(form, data=DATA, part="train", epoch=0):
    """Event -> its logits, over all requests of a part."""
    _, params, logits = built(form)
    task = task_of(form, data)
    loader = task.loader(part, batch_users=4, steps_per_call=1)
    plan, found = loader.plan(seed=0, epoch=epoch), {}
    for step in range(len(plan)):
        columns = plan.columns(np.array([step]))
        batch = loader.gather(
            task.events, {name: column[0] for name, column in columns.items()}, np
        )
        logit_PK = np.asarray(logits(params, batch))
        if loader.gather.supervise_history:
            spans = zip(
                columns[f"start/{EVERYTHING}"][0], columns[f"stop/{EVERYTHING}"][0], strict=True
            )
            events = list(enumerate(e for start, stop in spans for e in range(start, stop)))
        else:
            events = [
                (b * loader.gather.targets + i, first + i)
                for b, (first, count) in enumerate(
                    zip(columns["target"][0], columns["count"][0], strict=True)
                )
                for i in range(count)
            ]
        found |= {event: logit_PK[p] for p, event in events}
        assert np.all(batch.weight_PK[[p for p, _ in events]] == 1)
    return found


def changes(before, after, *, exact=True):
    """The events whose prediction is another."""
    assert before.keys() == after.keys()
    same = np.array_equal if exact else functools.partial(np.allclose, rtol=1e-4, atol=1e-5)
    return {e for e in before if not same(before[e], after[e])}


def with_changed(data, event, **changes):
    """The data with other values of one event's columns."""
    actions = {name: values.copy() for name, values in data.actions.items()}
    items = data.items.copy()
    for name, value in changes.items():
        if name == "item":
            items[event] = value
        else:
            actions[name][event] = value
    return dataclasses.replace(data, items=items, actions=actions)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "clicks"])
def test_no_prediction_reads_its_own_action(form):
    """Another action leaves predictions up to its own the same, by bits; some later ones change.

    In a mixture a click decides what is in a channel, so rows move: equal up to rounding.
    """
    for part, event in (("train", 4), ("train", 24), ("validation", 14)):
        other = with_changed(
            DATA,
            event,
            rating=6 - DATA.actions["rating"][event] or 1,
            is_click=1 - DATA.actions["is_click"][event],
        )
        before, after = predictions(form, part=part), predictions(form, other, part)
        changed = changes(before, after, exact=form != "mixture")
        last = DATA.offsets[np.searchsorted(DATA.offsets, event, side="right")]
        assert event in before and all(event < e < last for e in changed)
        assert changed


@pytest.mark.parametrize("form", ["merged", "interleaved", "mixture", "din"])
def test_targets_do_not_see_one_another(form):
    """Another item as a target changes no other prediction of its request.

    Validation targets are 12, 13, 14 and 15.
    """
    other = with_changed(
        DATA,
        13,
        item=DATA.items[13] % rank_data.ITEMS + 1,
        skill=5 if DATA.actions["skill"][13] != 5 else 6,
    )
    changed = changes(predictions(form, part="validation"), predictions(form, other, "validation"))
    assert changed == {13, 15}  # 15 is of the next request, which has 13 in its history


@pytest.mark.parametrize("form", ["merged", "interleaved", "supervise all", "mixture"])
def test_signals_reach_only_later_predictions_by_gradients(form):
    """d logit_p / d (weight of row t's signals) is nonzero exactly where t's action precedes p."""
    task, params, _ = built(form)
    model = task.recipe.model(params)
    loader = task.loader("train", batch_users=4, steps_per_call=1)
    batch = next(iter(loader.groups(loader.plan(seed=0)))).feed.batch(0)
    used_P = np.asarray(batch.weight_PK)[:, 0] > 0
    for place, name in enumerate(sorted(batch.channels)):
        tokens = batch.channels[name]
        signal_TD = math.sqrt(8) * model.embedding.signals(tokens.signal_TS)
        x_TD = model.embedding(tokens) - signal_TD

        def logits(scale_T, tokens=tokens, x_TD=x_TD, signal_TD=signal_TD, name=name, place=place):
            x = x_TD + scale_T[:, None] * signal_TD
            h_PD = model.encoders[name].rows(x, tokens.sequences, tokens.row_P)
            others = jnp.ones((h_PD.shape[0], 8 * (len(batch.channels) - 1)))
            return model.head(
                jnp.concatenate([others[:, : 8 * place], h_PD, others[:, 8 * place :]], axis=1)
            )[:, 0]

        reads_PT = np.asarray(jax.jit(jax.jacobian(logits))(jnp.ones(x_TD.shape[0])))[used_P] != 0
        segment_T = np.searchsorted(
            np.asarray(tokens.offsets), np.arange(x_TD.shape[0]), side="right"
        )
        row_P, has_signal_T = (
            np.asarray(tokens.row_P)[used_P],
            np.asarray(tokens.signal_TS).any(axis=1),
        )
        expected = (segment_T[row_P][:, None] == segment_T[None, :]) & (
            np.arange(x_TD.shape[0])[None, :] < row_P[:, None]
        )
        np.testing.assert_array_equal(reads_PT, expected & has_signal_T[None, :])
        assert reads_PT.any() and not has_signal_T[row_P].any()


def test_a_mixture_reads_each_channel_by_its_signal():
    """A channel of clicks: the rating of an event without a click changes no prediction."""
    before, clicked = predictions("clicks"), DATA.actions["is_click"][:8] == 1
    for event in (int(np.argmax(clicked)), int(np.argmin(clicked))):
        after = predictions(
            "clicks", with_changed(DATA, event, rating=6 - DATA.actions["rating"][event] or 1)
        )
        assert bool(changes(before, after)) == bool(clicked[event])


def test_channels_have_their_own_depth_and_share_tables():
    model = task_of("mixture").recipe.build(0)
    assert {name: len(encoder.layers) for name, encoder in model.encoders.items()} == {
        "consumption": 1,
        "engagement": 2,
    }
    assert (
        model.encoders["consumption"].length == 6 + 3
        and model.encoders["engagement"].length == 4 + 3
    )
    assert model.head.hidden.shape == (16, 8)


def test_channels_have_options_of_their_own():
    model = dict(channels=rank_data.OWN_OPTIONS, window=(3,), divide_by="kept")
    built = tasks.of(rank_data.config(model=model), DATA).recipe.build(0)
    consumption, engagement = built.encoders["consumption"], built.encoders["engagement"]
    assert consumption.layer_masks == (AttentionMask(3, full_rows=1),) * 2
    assert engagement.layer_masks == (AttentionMask(), AttentionMask(2, prefix=1))
    assert (consumption.truncation, engagement.truncation) == (Truncation(1, 3), None)
    assert consumption.divisor == Divisor(6 + 3, 3 + 3, "kept")
    assert engagement.divisor == Divisor(4 + 3, 4 + 3, "kept")
    assert {name: leaf.shape for name, leaf in built.inputs.items()} == {"consumption": (8, 12)}
    assert built.head.hidden.shape == (8 + 12, 8)


@pytest.mark.parametrize("form", ["merged", "interleaved", "mixture", "din"])
def test_a_request_alone_is_the_same_as_in_a_batch(form):
    """Batches of one request, without neighbours, against batches of four."""
    task, params, logits = built(form)
    together = predictions(form, part="test")
    loader = task.loader("test", batch_users=1, steps_per_call=1)
    plan = loader.plan()
    for group in loader.groups(plan):
        columns = plan.columns(np.array([group.first]))
        first, count = int(columns["target"][0, 0]), int(columns["count"][0, 0])
        logit_PK = np.asarray(logits(params, group.feed.batch(0)))
        np.testing.assert_allclose(
            logit_PK[:count], [together[first + i] for i in range(count)], rtol=2e-4, atol=2e-5
        )


def test_a_target_without_history_has_a_prediction():
    """Of a user's first event nothing is known but the item and its features."""
    logits = [predictions("merged", epoch=epoch)[0] for epoch in range(3)]
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5)


def test_codes_are_embedded_and_summed():
    embed = CodeEmbedding((3, 4), 5, rngs=nnx.Rngs(0))
    table = np.asarray(embed.table[...])
    x_TD = np.asarray(embed(jnp.array([[0, 0], [1, 0], [2, 3], [0, 1]])))
    np.testing.assert_allclose(
        x_TD, [0 * table[0], table[0], table[1] + table[4], table[2]], rtol=1e-6
    )
    assert not np.asarray(
        CodeEmbedding((), 5, rngs=nnx.Rngs(0))(jnp.zeros((2, 0), jnp.int32))
    ).any()


def test_head_against_numpy():
    head = MultiTaskHead(6, 4, 2, rngs=nnx.Rngs(1))
    h_PD = np.random.default_rng(0).normal(size=(3, 6))
    normed = (h_PD - h_PD.mean(1, keepdims=True)) / np.sqrt(h_PD.var(1, keepdims=True) + 1e-6)
    hidden = normed @ np.asarray(head.hidden[...])
    expected = (hidden / (1 + np.exp(-hidden))) @ np.asarray(head.output[...])
    np.testing.assert_allclose(head(jnp.asarray(h_PD, jnp.bfloat16)), expected, atol=0.1)
    np.testing.assert_allclose(head(jnp.asarray(h_PD, jnp.float32)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"train__protocol": "published"},
            "train.protocol='published' cannot be used for ranking: use 'chronological'",
        ),
        (
            {"data__layout": "padded"},
            "data.layout='padded' cannot be used for ranking: use 'jagged'",
        ),
        ({"model__kind": "sasrec"}, "model.kind='sasrec' cannot be used for ranking: use 'hstu'"),
        (
            {"model__attention": "softmax"},
            "model.attention='softmax' cannot be used for ranking: use 'masked_softmax'",
        ),
        (
            {"model__kind": "din", "rank__input": "interleaved"},
            "rank.input='interleaved' cannot be used for ranking: use 'merged'",
        ),
        (
            {"rank__train_targets": 9},
            "rank.train_targets=9 must be at most rank.targets=",
        ),
        (
            {"rank__supervise": "all"},
            "rank.input='merged' cannot be used with rank.supervise='all', .* holds its action",
        ),
        (
            {"rank__supervise": "all", "rank__input": "interleaved", "model__channels": MIXTURE},
            "model.channels=.* cannot be used with rank.supervise='all'",
        ),
        (
            {
                "rank__supervise": "all",
                "rank__input": "interleaved",
                "model__layers": 2,
                "model__truncate_after": 1,
                "model__truncate_length": 4,
            },
            "model.truncate_after=1 cannot be used with rank.supervise='all'",
        ),
        (
            {"rank__supervise": "all", "rank__input": "interleaved", "rank__contextual": ("age",)},
            r"rank.contextual=\('age',\) cannot be used with rank.supervise='all'",
        ),
        (
            {"rank__tasks": ("rating", "rating")},
            r"rank.tasks=\('rating', 'rating'\) names one twice",
        ),
        ({"rank__tasks": ()}, "the chronological split are for ranking; name rank.tasks"),
    ],
)
def test_configurations_that_cannot_rank_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(dataclasses.asdict(with_(rank_data.config(), **fields)))
