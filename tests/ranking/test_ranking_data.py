"""Ranking data against plain loops: what signals mean, targets of requests, contents of tokens."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranking import rank_data
from tests.ranking.rank_data import MIXTURE
from tests.small_run import with_
from ultra_hstu.data import signals
from ultra_hstu.model_config import ChannelConfig
from ultra_hstu.ranking import split as requests
from ultra_hstu.ranking.batch import GAP_EDGES
from ultra_hstu.ranking.form import EVERYTHING
from ultra_hstu.ranking.task import RankingTask

FORMS = {
    "merged": {},
    "interleaved": dict(rank=dict(input="interleaved")),
    "supervise all": dict(rank=dict(input="interleaved", supervise="all")),
    "mixture": dict(model=dict(channels=MIXTURE)),
    "interleaved mixture": dict(rank=dict(input="interleaved"), model=dict(channels=MIXTURE)),
    "forwards": dict(rank=dict(positions="forwards")),
}


def with_actions(**actions):
    data = rank_data.interactions()
    return dataclasses.replace(data, actions=data.actions | actions)


def with_contexts():
    """Two contextual features; the first user's second one is unknown."""
    data = rank_data.interactions()
    contexts = {
        "gender": np.array([1, 2, 1, 1, 2, 2], np.int32),
        "age": np.array([0, 3, 1, 2, 3, 1], np.int32),
    }
    return dataclasses.replace(
        data,
        contexts=contexts,
        context_values={"gender": ("", "F", "M"), "age": ("", "1", "18", "25")},
    )


def test_codes_of_signals():
    events = rank_data.interactions().num_events
    ratings = np.resize([0.5, 3, 5], events).astype(np.float32)
    times = np.resize([0, 999, 1000, 7999, 10**9], events).astype(np.int32)
    data = with_actions(
        rating=ratings,
        play_time_ms=times,
        duration_ms=np.resize([0, 1998, 500, 8000, 10], events).astype(np.int32),
    )
    rating, watched, share = (
        signals.signal(data.actions, name) for name in ("rating", "watch_time", "watched_share")
    )
    assert rating.size == 11 and rating.code[:3].tolist() == [1, 6, 10]
    assert watched.size == 17 and watched.code[:5].tolist() == [
        1,
        1,
        2,
        4,
        16,
    ]  # below 1 s, [1, 2), [4, 8), the last bucket
    assert share.size == 11 and share.code[:5].tolist() == [
        0,
        6,
        10,
        10,
        10,
    ]  # no length: none; half; watched longer than it is
    flag = signals.signal(data.actions, "is_click")
    np.testing.assert_array_equal(flag.code, data.actions["is_click"] + 1)
    skill = signals.feature(data, "skill")
    assert skill.size == 5
    np.testing.assert_array_equal(skill.code, data.actions["skill"] - 4)


def test_tasks():
    data = with_actions(
        play_time_ms=np.full(56, 500, np.int32),
        duration_ms=np.resize([0, 1000], 56).astype(np.int32),
    )
    liked = signals.task(data, "rating_at_least_4")
    assert liked.kind == "binary" and liked.weight_E.all()
    np.testing.assert_array_equal(liked.label_E, data.actions["rating"] >= 4)
    stars = signals.task(data, "rating")
    assert stars.kind == "regression"
    np.testing.assert_array_equal(stars.label_E, data.actions["rating"])
    share = signals.task(data, "watched_share")
    np.testing.assert_array_equal(
        share.weight_E, np.resize([0, 1], 56)
    )  # a video without length has no label
    assert (share.label_E[1::2] == 0.5).all()


@pytest.mark.parametrize("kind", ["signal", "feature", "task", "context"])
def test_unknown_names_are_refused_with_those_of_the_source(kind):
    known = {
        "signal": "is_click, rating$",
        "feature": "skill$",
        "task": "is_click, rating, rating_at_least_4$",
        "context": "none$",
    }[kind]
    with pytest.raises(ValueError, match=f"'loved'.*this source has {known}"):
        data = rank_data.interactions()
        getattr(signals, kind)(data.actions if kind == "signal" else data, "loved")


def test_flags_outside_0_and_1_are_refused():
    data = with_actions(is_click=np.resize([0, 1, 2], 56).astype(np.int32))
    with pytest.raises(ValueError, match="is_click must be 0 or 1, but a value is 2"):
        signals.signal(data.actions, "is_click")
    with pytest.raises(
        ValueError, match="task 'is_click' is binary, but a label is 2: labels must be 0 or 1"
    ):
        signals.task(data, "is_click")


def test_ratings_off_the_scale_are_refused():
    with pytest.raises(ValueError, match="ratings must lie in 0.5..5, but they run from 0 to"):
        signals.signal(with_actions(rating=np.arange(56, dtype=np.float32)).actions, "rating")


def test_a_channel_that_keeps_no_event_is_named(caplog):
    some = {"some": ChannelConfig(signal="rating", at_least=6.0)}
    RankingTask.of(rank_data.config(model=dict(channels=some)), rank_data.interactions())
    assert "model.channels.some keeps none of the 56 events: rating is never 6" in caplog.text


def test_a_channel_of_an_unknown_action_is_refused():
    config = rank_data.config(model=dict(channels={"some": ChannelConfig(signal="loved")}))
    with pytest.raises(
        ValueError,
        match="channels.some.signal='loved' is no action of this source, "
        "which has is_click, rating, skill",
    ):
        RankingTask.of(config, rank_data.interactions())


@pytest.mark.parametrize("supervise", ["targets", "all"])
def test_one_request_a_user_is_drawn_at_the_rate_one_over_n(supervise):
    """Every epoch has one request of each user, each of its n equally often; `train_targets` cuts
    them, and evaluation is as it was.
    """
    rank = dict(targets=4, supervise=supervise, input="interleaved")
    config = rank_data.config(data=dict(max_history=4), rank=rank)
    drawn = with_(config, rank__requests="one")
    data = rank_data.interactions((40, 3, 9))
    parts = requests.chronological(data, 0.1, 0.1)
    every = [requests.training(parts, config, 0, epoch) for epoch in range(400)]
    one = [requests.training(parts, drawn, 0, epoch) for epoch in range(400)]
    for many, few in zip(every, one, strict=True):
        assert few.user.tolist() == [0, 1, 2]
        assert set(zip(few.start, few.stop, few.count, strict=True)) <= set(
            zip(many.start, many.stop, many.count, strict=True)
        )
    # The thirds of the longest history: each begins a third of the requests.
    third = np.bincount([int(few.stop[0] + few.count[0] - 1) // 11 for few in one], minlength=3)
    assert (np.abs(third[:3] / 400 - 1 / 3) < 0.1).all()
    single = requests.training(parts, with_(config, rank__train_targets=1), 0, 0)
    if supervise == "targets":
        assert (single.count == 1).all() and len(single.user) == 32 + 3 + 9
    asked = requests.evaluation(parts, "test", with_(drawn, rank__train_targets=1))
    assert asked.count.max() == 4


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(3, 40), min_size=1, max_size=8),
    targets=st.integers(1, 9),
    max_history=st.integers(1, 30),
    fractions=st.tuples(st.sampled_from([0.0, 0.1, 0.29, 0.4]), st.sampled_from([0.0, 0.1, 0.5])),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    supervise=st.sampled_from(["targets", "all"]),
)
def test_requests_partition_every_part(
    lengths, targets, max_history, fractions, seed, epoch, supervise
):
    """Each event of a part is a target once, after the newest `max_history` events before it."""
    validation, test = fractions
    config = rank_data.config(
        data=dict(max_history=max_history),
        rank=dict(
            targets=targets,
            supervise=supervise,
            input="interleaved",
            validation_fraction=validation,
            test_fraction=test,
        ),
    )
    data = rank_data.interactions(lengths)
    parts = requests.chronological(data, validation, test)
    asked = np.zeros(data.num_events, object)
    for part in ("train", "validation", "test"):
        found = (
            requests.training(parts, config, seed, epoch)
            if part == "train"
            else requests.evaluation(parts, part, config)
        )
        for user, start, stop, count in zip(
            found.user, found.start, found.stop, found.count, strict=True
        ):
            first, last = data.offsets[user], data.offsets[user + 1]
            if part == "train" and supervise == "all":
                assert count == 0 and 0 < stop - start <= max_history
                asked[start:stop] += 1
            else:
                assert 1 <= count <= targets and stop + count <= last
                longest = max_history - (
                    supervise == "all"
                )  # an item in a training stretch has had no more before it
                assert start == max(first, stop - longest)
                asked[stop : stop + count] += 1
            assert first <= start <= stop
        here = np.concatenate(
            [np.arange(low, high) for low, high in zip(*parts.bounds(part), strict=True)]
        )
        assert (asked[here] == 1).all() and asked.sum() == len(here)
        asked[:] = 0
    sizes = [(int(round(n * validation, 6)), int(round(n * test, 6))) for n in lengths]
    assert [
        (t - v, last - t)
        for _, v, t, last in zip(parts.first, parts.validation, parts.test, parts.last, strict=True)
    ] == sizes


def test_new_users_are_never_learned_from():
    data, config = rank_data.interactions([40] * 8), rank_data.config(rank=dict(targets=7))
    parts = requests.new_users(data, 0.25, 0.1, 0.2)
    times = data.timestamps[data.offsets[:-1]]
    *learned, a, b, c, d = np.argsort(times, kind="stable").tolist()
    sizes = {
        part: (parts.bounds(part)[1] - parts.bounds(part)[0]).tolist() for part in requests.PARTS
    }
    assert [sizes["train"][u] for u in (*learned, a, b, c, d)] == [40] * 4 + [36, 36, 0, 0]
    assert [sizes["validation"][u] for u in (*learned, a, b, c, d)] == [0] * 4 + [4, 4, 0, 0]
    assert [sizes["test"][u] for u in (*learned, a, b, c, d)] == [0] * 6 + [8, 8]
    found = requests.evaluation(parts, "test", config)
    reach = np.minimum(found.stop - data.offsets[found.user], config.data.max_history)
    assert ((found.stop - found.start) == reach).all() and reach.min() > 0


def test_training_requests_are_a_function_of_seed_and_epoch():
    config = rank_data.config(rank=dict(targets=7))
    parts = requests.chronological(rank_data.interactions([40] * 9), 0.1, 0.1)
    stops = lambda seed, epoch: requests.training(parts, config, seed, epoch).stop.tolist()  # noqa: E731
    assert stops(1, 2) == stops(1, 2)
    assert stops(1, 2) != stops(1, 3) and stops(1, 2) != stops(2, 2)


def rows_by_hand(data, config, user, history, targets):
    """The tokens of one sequence, one dict a row."""
    names = config.rank
    signal = {name: signals.signal(data.actions, name).code for name in names.signals}
    feature = {name: signals.feature(data, name).code for name in names.features}
    backwards = names.supervise == "targets" and names.positions == "backwards"
    times = (
        np.zeros(data.num_events, int)
        if data.timestamps is None
        else data.timestamps - data.timestamps.min()
    )
    request_time = times[(history + targets)[0]]
    rows = []
    before = 0
    for name in names.contextual:
        code = data.contexts[name][user]
        rows.append(
            dict(
                context_T=code + before if code else 0,
                time_T=request_time,
                next_time_T=request_time,
            )
        )
        before += len(data.context_values[name]) - 1
    for place, event in enumerate(history):
        after = (history[place + 1 :] + targets[:1])[:1]
        item = dict(
            item_T=data.items[event],
            feature_TF=[feature[name][event] for name in names.features],
            time_T=times[event],
        )
        action = dict(
            signal_TS=[signal[name][event] for name in names.signals], time_T=times[event]
        )
        item["gap_T"] = (
            1 + sum(times[event] - times[history[place - 1]] >= edge for edge in GAP_EDGES)
            if place
            else 0
        )
        position = len(history) - place if backwards else place + 1
        next_time = times[after[0]] if after else times[event]
        if names.input == "merged":
            rows.append(item | action | dict(next_time_T=next_time, position_T=position))
        else:
            rows.append(item | dict(next_time_T=times[event], position_T=position))
            rows.append(action | dict(next_time_T=next_time, position_T=position))
    for event in targets:
        gap = (
            1 + sum(times[event] - times[history[-1]] >= edge for edge in GAP_EDGES)
            if history
            else 0
        )
        features = [feature[name][event] for name in names.features]
        time = times[event]
        rows.append(
            dict(
                item_T=data.items[event],
                feature_TF=features,
                time_T=time,
                next_time_T=time,
                gap_T=gap,
            )
            | dict(position_T=0 if backwards else len(history) + 1)
        )
    return rows


def history_of(channel, data, user, stop, start):
    """The events of a channel before `stop`, by looking at each."""
    if channel is None:
        return list(range(start, stop))
    events = range(data.offsets[user], stop)
    kept = [
        e
        for e in events
        if not channel.signal or data.actions[channel.signal][e] >= channel.at_least
    ]
    return kept[-channel.max_history :]


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("form", FORMS)
def test_batches_against_loops(form, part):
    """Every token of every batch, made on the device and on the host; some users lack a history."""
    config = rank_data.config(**FORMS[form])
    config = dataclasses.replace(
        config, rank=dataclasses.replace(config.rank, contextual=("gender", "age"))
    )
    data = with_contexts()
    source = RankingTask.of(config, data)
    loader = source.loader(part, batch_users=4, steps_per_call=2)
    plan = loader.plan(seed=3, epoch=1)
    found = (
        requests.training(source.parts, config, 3, 1)
        if part == "train"
        else requests.evaluation(source.parts, part, config)
    )
    supervised = part == "train" and config.rank.supervise == "all"
    tasks = [signals.task(data, name) for name in config.rank.tasks]
    empty_histories = 0
    for step, examples in enumerate(plan.place_SB):
        columns = {name: values[0] for name, values in plan.columns(np.array([step])).items()}
        host = loader.gather(source.events, columns, np)
        device = jax.tree.map(np.asarray, loader.gather(jax.device_put(source.events), columns))
        for one, other in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        for name, tokens in host.channels.items():
            expected, offsets, predicted = [], [0], []
            for place, example in enumerate(examples):
                if example >= 0:
                    user, start, stop, count = (
                        int(column[example]) for column in dataclasses.astuple(found)
                    )
                    history = history_of(config.model.channels.get(name), data, user, stop, start)
                    targets = list(range(stop, stop + count))
                    empty_histories += not history
                    first = len(expected)
                    expected += rows_by_hand(data, config, user, history, targets)
                    if supervised:
                        predicted += [
                            (len(predicted) + i, first + 2 + 2 * i, event, user)
                            for i, event in enumerate(history)
                        ]
                    else:
                        predicted += [
                            (place * 3 + i, len(expected) - count + i, event, user)
                            for i, event in enumerate(targets)
                        ]
                offsets.append(len(expected))
            np.testing.assert_array_equal(tokens.offsets, offsets)
            for column in dataclasses.fields(tokens):
                got = getattr(tokens, column.name)
                if column.name.endswith(("_T", "_TS", "_TF")):
                    assert not got[len(expected) :].any()
                    for t, row in enumerate(expected):
                        np.testing.assert_array_equal(
                            got[t],
                            row.get(column.name, 0 * got[t]),
                            err_msg=f"{column.name}[{t}] of {name}",
                        )
            slots = [slot for slot, *_ in predicted]
            np.testing.assert_array_equal(tokens.row_P[slots], [row for _, row, _, _ in predicted])
            np.testing.assert_array_equal(host.user_P[slots], [user for *_, user in predicted])
            for k, task in enumerate(tasks):
                np.testing.assert_array_equal(
                    host.label_PK[slots, k], [task.label_E[event] for _, _, event, _ in predicted]
                )
                assert (host.weight_PK[slots, k] == 1).all() and host.weight_PK[:, k].sum() == len(
                    slots
                )
    assert empty_histories or part == "validation" or supervised


def test_merged_and_interleaved_hold_the_same_events():
    """Items in the same order; the signals of an event in its own token or in the one behind."""
    batches = []
    for form in ("merged", "interleaved"):
        config = rank_data.config(**FORMS[form])
        task = RankingTask.of(config, rank_data.interactions())
        loader = task.loader("train", batch_users=4, steps_per_call=1)
        plan = loader.plan(seed=5, epoch=2)
        batches.append(
            [next(iter(loader.groups(plan, step))).feed.batch(0) for step in range(len(plan))]
        )
    assert len(batches[0]) == len(batches[1])
    for merged, interleaved in zip(*batches, strict=True):
        one, two = (
            jax.tree.map(np.asarray, batch.channels[EVERYTHING]) for batch in (merged, interleaved)
        )
        np.testing.assert_array_equal(one.item_T[one.item_T > 0], two.item_T[two.item_T > 0])
        has_signal = lambda tokens: tokens.signal_TS.any(axis=1)  # noqa: E731
        np.testing.assert_array_equal(
            one.signal_TS[has_signal(one)], two.signal_TS[has_signal(two)]
        )
        np.testing.assert_array_equal(
            np.flatnonzero(has_signal(two)) - 1,
            np.flatnonzero((two.item_T > 0) & np.append(has_signal(two)[1:], False)),
        )
        np.testing.assert_array_equal(
            one.position_T[one.item_T > 0], two.position_T[two.item_T > 0]
        )
        np.testing.assert_array_equal(merged.label_PK, interleaved.label_PK)


@pytest.mark.parametrize("form", FORMS)
def test_streamed_and_device_feeds_give_the_same_batches(form):
    batches = []
    for placement in ("device", "stream"):
        config = rank_data.config(**FORMS[form])
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, placement=placement)
        )
        loader = RankingTask.of(config, rank_data.interactions()).loader(
            "train", batch_users=4, steps_per_call=2
        )
        assert loader.streamed == (placement == "stream")
        plan = loader.plan(seed=1, epoch=2)
        batches.append(
            [
                jax.tree.map(np.asarray, g.feed.batch(i))
                for g in loader.groups(plan)
                for i in range(g.steps)
            ]
        )
    assert len(batches[0]) == len(batches[1]) == len(plan)
    for one, other in zip(*batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_every_epoch_has_its_own_requests_and_one_shape():
    config = rank_data.config()
    loader = RankingTask.of(config, rank_data.interactions()).loader(
        "train", batch_users=4, steps_per_call=2
    )
    shapes, starts = set(), set()
    for epoch in range(6):
        plan = loader.plan(seed=0, epoch=epoch)
        starts.add(tuple(sorted(plan.examples.columns["target"].tolist())))
        shapes |= {
            str([leaf.shape for leaf in jax.tree.leaves(group.feed)])
            for group in loader.groups(plan)
        }
    assert len(shapes) == 1 and len(starts) > 1


def test_a_part_without_events_is_refused():
    config = rank_data.config(rank=dict(validation_fraction=0.0))
    with pytest.raises(
        ValueError, match="no user has validation events: raise rank.validation_fraction"
    ):
        RankingTask.of(config, rank_data.interactions()).loader(
            "validation", batch_users=4, steps_per_call=2
        )


@pytest.mark.parametrize("form", ["merged", "interleaved", "mixture", "interleaved mixture"])
@pytest.mark.parametrize("time", ["request", "last"])
def test_all_targets_of_a_request_are_asked_about_at_one_time(form, time):
    """As if they had happened then: at the time of the first, or of the event before it."""
    sections = FORMS[form]
    rank = dict(targets=6, test_fraction=0.3) | sections.get("rank", {})
    config = rank_data.config(rank=rank, model=sections.get("model", {}))
    data = rank_data.interactions()
    tests = RankingTask.of(config, data)
    moments = data.timestamps.copy()
    first_U, last_U = tests.parts.bounds("test")
    for first, last in zip(first_U, last_U, strict=True):
        moments[first:last] = moments[first if time == "request" else first - 1]
    assert (moments != data.timestamps).any()

    def batch(task):
        table = task.examples("test")
        gather = task.gather(False, (256,) * table.lengths.shape[1], len(table.lengths))
        return gather(task.events, table.columns, np)

    then = batch(RankingTask.of(config, dataclasses.replace(data, timestamps=moments)))
    now = batch(RankingTask.of(with_(config, eval__time=time), data))
    jax.tree.map(np.testing.assert_array_equal, now, then)


def test_training_asks_about_each_target_at_its_own_time():
    config, data = rank_data.config(), rank_data.interactions()
    for time in ("target", "request", "last"):
        task = RankingTask.of(with_(config, eval__time=time), data)
        assert "now" not in task.examples("train")(0, 0).columns
        assert ("now" in task.examples("validation").columns) == (time != "target")
