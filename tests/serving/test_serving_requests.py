"""What a request may hold, what it must not, and that requests of a kind are compiled for once."""

import copy
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.ranking import rank_data
from tests.serving.small_serving import MAX_HISTORY, built, full_pass, unchecked
from ultra_hstu import quantization, serving, tasks
from ultra_hstu.nn import key_values
from ultra_hstu.serving.inputs import ROW_SIZES, bucket_size, bucket_sizes

FORM = "ULTRA"


@pytest.fixture(scope="module")
def model():
    return serving.CompiledRanker(built(FORM)[1])


@pytest.fixture(scope="module")
def cache(model):
    return serving.encode_history(model, full_pass(FORM)[0])


def candidates_of(user):
    """The candidates of one of the seven requests, and where they stand among all."""
    _, candidates, _ = full_pass(FORM)
    span = slice(*candidates.offsets[user : user + 2])
    columns = {
        name: np.asarray(getattr(candidates, name))[span]
        for name in ("item_C", "feature_CF", "time_C")
    }
    return serving.Candidates(**columns, offsets=np.array([0, span.stop - span.start])), span


def history_of(user):
    history, _, _ = full_pass(FORM)
    events = history.channels["events"]
    span = slice(*events.offsets[user : user + 2])
    columns = {
        name: getattr(events, name)[span]
        for name in ("item_E", "time_E", "signal_ES", "feature_EF")
    }
    alone = serving.Events(**columns, offsets=np.array([0, span.stop - span.start]))
    return serving.History(
        {"events": alone}, history.context_BC[user : user + 1], history.now_B[user : user + 1]
    )


@pytest.mark.parametrize("user", [0, 1])
def test_a_user_alone(model, user):
    """Scores do not depend on who else is asked about; nor does a user without history."""
    assert (len(history_of(user).channels["events"].item_E) == 0) == (user == 1)
    candidates, span = candidates_of(user)
    got = serving.score(model, serving.encode_history(model, history_of(user)), candidates)
    np.testing.assert_allclose(got, full_pass(FORM)[2][span], atol=1e-5)


def test_candidates_twice_and_in_another_order(model, cache):
    _, candidates, want = full_pass(FORM)
    order = np.concatenate(
        [
            np.tile(np.arange(a, b)[::-1], 2)
            for a, b in zip(candidates.offsets, candidates.offsets[1:], strict=False)
        ]
    )
    columns = {
        name: np.asarray(getattr(candidates, name))[order]
        for name in ("item_C", "feature_CF", "time_C")
    }
    got = serving.score(model, cache, serving.Candidates(**columns, offsets=2 * candidates.offsets))
    np.testing.assert_allclose(got, want[order], atol=1e-5)
    for a, b in zip(candidates.offsets, candidates.offsets[1:], strict=False):
        np.testing.assert_array_equal(got[2 * a : a + b], got[a + b : 2 * b])


def test_no_candidates(model, cache):
    none = serving.Candidates.of([[]] * 7, features=[np.zeros((0, 1), int)] * 7)
    assert serving.score(model, cache, none).shape == (0, 2)
    assert (serving.top_k(model, cache, none, k=2).place_BK == -1).all()


def test_events_from_one_entry_a_user():
    events = serving.Events.of(
        [[], [3, 4]],
        times=[[], [7, 8]],
        signals=[[], [[1, 2], [0, 1]]],
        features=[np.zeros((0, 0)), np.zeros((2, 0))],
    )
    assert (
        events.item_E.tolist() == [3, 4]
        and events.item_E.dtype.kind == "i"
        and events.time_E.tolist() == [7, 8]
        and events.offsets.tolist() == [0, 0, 2]
    )
    assert events.signal_ES.tolist() == [[1, 2], [0, 1]] and events.feature_EF.shape == (2, 0)
    plain = serving.Events.of([[5], []])
    assert (
        plain.time_E.tolist() == [0]
        and plain.signal_ES.shape == (1, 0)
        and plain.offsets.tolist() == [0, 1, 1]
    )
    candidates = serving.Candidates.of([[5, 6], [7]], times=[10, 20])
    assert candidates.time_C.tolist() == [10, 10, 20] and candidates.offsets.tolist() == [0, 2, 3]


def test_top_k(model, cache):
    _, candidates, want = full_pass(FORM)
    best = serving.top_k(model, cache, candidates, k=5, weights=(0.5, -1.0))
    value_C = want @ np.array([0.5, -1.0])
    for user, (start, stop) in enumerate(
        zip(candidates.offsets, candidates.offsets[1:], strict=False)
    ):
        order = np.argsort(-value_C[start:stop], kind="stable")[:5]
        assert best.place_BK[user].tolist() == [*order, *[-1] * (5 - len(order))]
        np.testing.assert_allclose(
            best.score_BK[user, : len(order)], value_C[start:stop][order], atol=1e-5
        )
        assert np.isneginf(best.score_BK[user, len(order) :]).all()
    first = serving.top_k(model, cache, candidates, k=1)
    assert first.place_BK[0, 0] == want[: candidates.offsets[1], 0].argmax()


def test_equal_candidates_rank_in_their_order(model, cache):
    same = serving.Candidates.of([[3, 3, 3]] * 7, features=[np.ones((3, 1), int)] * 7)
    assert serving.top_k(model, cache, same, k=3).place_BK.tolist() == [[0, 1, 2]] * 7


def test_equal_logits_have_equal_sums(model):
    """Weighted sums of logits do not depend on where a candidate stands."""
    rng = np.random.default_rng(0)
    for count in (1, 3, 7, 12):
        logit_CK = jnp.asarray(np.repeat(rng.normal(size=(1, count)), 1003, 0), jnp.float32)
        weight_K = jnp.asarray(rng.normal(size=count), jnp.float32)
        place_BK, score_BK = model.programs.best(
            logit_CK, weight_K, jnp.asarray([0, 500, 1003]), k=503
        )
        assert place_BK[0].tolist() == [*range(500), -1, -1, -1]
        assert place_BK[1].tolist() == list(range(503))
        assert len(set(score_BK[1].tolist())) == 1


def test_only_the_newest_events_count(model):
    """Of a history that is too long, and of one that grows too long.

    Such a history moves, and is encoded anew.
    """
    rng = np.random.default_rng(0)
    count = MAX_HISTORY + 5
    columns = dict(
        item_E=rng.integers(1, 31, count),
        time_E=np.arange(count) * 100,
        signal_ES=rng.integers(0, 3, (count, 2)),
        feature_EF=rng.integers(0, 5, (count, 1)),
    )

    def of(span):
        part = {name: values[span] for name, values in columns.items()}
        events = serving.Events(**part, offsets=np.array([0, len(part["item_E"])]))
        return serving.History({"events": events}, np.zeros((1, 0), int), np.array([2000]))

    candidates = candidates_of(0)[0]
    whole, newest = (serving.encode_history(model, of(slice(first, None))) for first in (0, 5))
    np.testing.assert_array_equal(
        serving.score(model, whole, candidates), serving.score(model, newest, candidates)
    )
    grown = serving.append(
        model, serving.encode_history(model, of(slice(0, 10))), of(slice(10, None))
    )
    np.testing.assert_allclose(
        serving.score(model, grown, candidates), serving.score(model, newest, candidates), atol=1e-5
    )


def test_the_example_of_the_docs():
    """docs/cached_scoring.md, as it stands.

    It has two users, four candidates and one more event of the first user.
    """
    text = (Path(__file__).parents[2] / "docs" / "cached_scoring.md").read_text()
    rank = dict(tasks=("is_click",), signals=("is_click",), features=())
    task = tasks.of(rank_data.config(data=dict(max_history=8), rank=rank), rank_data.interactions())
    names = {"task": task, "params": task.recipe.init(0).params, "np": np}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["cache"].history.channels["events"].lengths.tolist() == [4, 1]
    scores = serving.score(names["model"], names["cache"], names["candidates"])
    assert scores.shape == (4, 1) and np.isfinite(scores).all()


def test_nothing_is_compiled_twice(model, cache):
    """Other histories and other numbers of candidates of the same class.

    The compiled programs are those that there are.
    """
    history, candidates, _ = full_pass(FORM)
    serving.score(model, cache, candidates)
    programs = (model.programs.encode, model.programs.score)
    before = [program._cache_size() for program in programs]
    for users in (6, 5):  # the others have neither events nor candidates
        events, end = history.channels["events"], candidates.offsets[users]
        columns = {
            name: getattr(events, name)[: events.offsets[users]]
            for name in ("item_E", "time_E", "signal_ES", "feature_EF")
        }
        fewer = serving.Events(**columns, offsets=np.minimum(events.offsets, events.offsets[users]))
        some = {
            name: np.asarray(getattr(candidates, name))[:end]
            for name in ("item_C", "feature_CF", "time_C")
        }
        again = serving.CompiledRanker(built(FORM)[1])
        encoded = serving.encode_history(
            again, dataclasses.replace(history, channels={"events": fewer})
        )
        got = serving.score(
            again, encoded, serving.Candidates(**some, offsets=np.minimum(candidates.offsets, end))
        )
        np.testing.assert_allclose(got, full_pass(FORM)[2][:end], atol=1e-5)
    assert [program._cache_size() for program in programs] == before


def test_the_ladder():
    sizes = sorted({bucket_size(n) for n in range(1, 5000)})
    assert sizes[:10] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert all(bucket_size(n) >= n and 2 * bucket_size(n) <= 3 * n for n in range(2, 5000))
    assert bucket_size(0) == 1 and bucket_size(5, ROW_SIZES) == bucket_size(64, ROW_SIZES) == 64
    assert bucket_sizes(16, 300, 8) == [16, 128, 300] and bucket_sizes(16, 9, 8) == [9]


@pytest.mark.parametrize(
    ("kind", "bytes_a_row", "error"),
    [
        ("same", 12, 0),
        ("bfloat16", 12 / 2, 2**-8),
        ("int8", 3 + 8, 0.5 / 127),
        ("fp8", 3 + 8, 2**-4),
    ],
)
def test_kinds_of_keys_and_values(kind, bytes_a_row, error):
    """Errors of a row are at most those of its rounding.

    They are relative to the value, in int8 to the largest value of its row.
    """
    rng = np.random.default_rng(0)
    k, v = (
        jnp.asarray(
            rng.standard_normal((50, 2, width), dtype=np.float32)
            * np.exp(rng.normal(size=(50, 1, 1)))
        )
        for width in (2, 1)
    )
    k = k.at[3].set(0.0).astype(jnp.float32)
    packed = key_values.pack(k, v.astype(jnp.float32), kind)
    assert packed.nbytes == 50 * 2 * bytes_a_row
    for got, want in zip(packed.unpacked(jnp.float32), (k, v), strict=True):
        room = np.abs(want).max(-1, keepdims=True) if kind == "int8" else np.abs(want)
        assert (np.abs(got - want) <= 1.01 * error * room).all()
    again = key_values.pack(*packed.unpacked(jnp.float32), kind)
    for got, want in zip(again.unpacked(jnp.float32), packed.unpacked(jnp.float32), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_small_cache(model, cache):
    """int8, grown by an event of the first user: near the exact scores, in fewer bytes."""
    history, candidates, want = full_pass(FORM)
    small = serving.encode_history(model, history, kind="int8")
    assert small.nbytes < cache.nbytes
    nothing = serving.Events.of(
        [[]] * 7, signals=[np.zeros((0, 2), int)] * 7, features=[np.zeros((0, 1), int)] * 7
    )
    grown = serving.append(model, small, dataclasses.replace(history, channels={"events": nothing}))
    assert grown.channels["events"] is small.channels["events"], "nothing new"
    got = serving.score(model, grown, candidates)
    assert 0 < np.abs(got - want).max() < 0.02 * np.abs(want).max()


def test_item_table_in_host_memory(model):
    """Scores are those of the rows that the table gives back.

    The rows of a request alone go to the device.
    """
    history, candidates, _ = full_pass(FORM)
    ranker = built(FORM)[1]
    served = serving.CompiledRanker(ranker, host_table="int4")
    assert jax.tree.leaves(served.params["embedding"]["item_table"])[0].shape == (1, 8)
    graphdef, params = nnx.split(ranker)
    table = np.asarray(ranker.embedding.item_table[...])
    rounded = nnx.merge(graphdef, params)
    rounded.embedding.item_table = nnx.Param(quantization.quantize_int4(table).dense())
    want = serving.score(rounded, serving.encode_history(rounded, history), candidates)
    got = serving.score(served, serving.encode_history(served, history), candidates)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want - full_pass(FORM)[2]).max() > 1e-3


def test_rows_of_a_request(model):
    table = np.random.default_rng(0).standard_normal((300, 8), dtype=np.float32)
    sizes = {"float32": 32, "bfloat16": 16, "int8": 8 + 8, "int4": 4 + 4}
    for kind, size in sizes.items():
        host = quantization.host_table(table, kind)
        assert quantization.row_bytes(host) == size
        served = copy.copy(model)
        served.table = host
        rows, (first, second) = served.take_items(
            np.array([7, 30, 7], np.int32), np.array([3], np.int32)
        )
        assert first.tolist() == [2, 3, 2] and second.tolist() == [1]
        filled = np.asarray(rows)
        # Row 0 is padding.
        assert filled.shape == (65, 8) and not filled[0].any()
        np.testing.assert_allclose(
            filled[1:4], table[[3, 7, 30]], atol=0.3 if kind == "int4" else 0.02
        )
        many = np.arange(3, 90, dtype=np.int32)
        assert served.take_items(many)[0].shape == (97, 8)
        served.reserve_items(10**6)
        for ids in (many, np.array([7, 30, 7, 3], np.int32)):  # of one size: nothing is compiled
            again, _ = served.take_items(ids)
            assert again.shape == (385, 8)  # as many as the table has
        np.testing.assert_array_equal(again[1:4], filled[1:4])
    with pytest.raises(ValueError, match="host_table='int2' must be one of"), unchecked():
        quantization.host_table(table, "int2")


def with_events(**changes):
    history, _, _ = full_pass(FORM)
    return dataclasses.replace(
        history, channels={"events": dataclasses.replace(history.channels["events"], **changes)}
    )


def spoilt(values, place, value, dtype=None):
    values = np.array(values, dtype)
    values[place] = value
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: "history", "history must be serving.UserHistory, got str"),
        (
            lambda h: dataclasses.replace(h, channels={}),
            r"has the channels \[\], the model \['events'\]",
        ),
        (lambda h: dataclasses.replace(h, now_B=h.now_B[:0]), "holds no users"),
        (
            lambda h: dataclasses.replace(h, now_B=h.now_B.astype(np.int64) * 10**5),
            r"now_B\[0\] is .* not in -2147483648..2147483647",
        ),
        (
            lambda h: dataclasses.replace(h, context_BC=np.zeros((7, 2), int)),
            r"context_BC must have the shape \[7, 0\], got \[7, 2\]",
        ),
        (
            lambda h: with_events(item_E=spoilt(h.channels["events"].item_E, 4, 31)),
            r"item_E\[4\] is 31, not in 1..30: .*leave unknown ones out",
        ),
        (
            lambda h: with_events(item_E=spoilt(h.channels["events"].item_E, 2, 0)),
            r"item_E\[2\] is 0, not in 1..30",
        ),
        (
            lambda h: with_events(item_E=h.channels["events"].item_E.astype(float)),
            "item_E must hold integers, got float64",
        ),
        (
            lambda h: with_events(item_E=h.channels["events"].item_E[1:]),
            r"item_E must have the shape \[\d+\]",
        ),
        (
            lambda h: with_events(signal_ES=spoilt(h.channels["events"].signal_ES, (1, 1), 3)),
            r"signal_ES\[1, 1\] is 3, not in 0..2",
        ),
        (
            lambda h: with_events(feature_EF=h.channels["events"].signal_ES),
            r"feature_EF must have the shape \[\d+, 1\]",
        ),
        (
            lambda h: with_events(offsets=h.channels["events"].offsets[::-1]),
            "offsets must start at 0 and never fall",
        ),
    ],
)
def test_bad_histories_are_named(model, change, message):
    with pytest.raises(ValueError, match=message), unchecked():
        serving.encode_history(model, change(full_pass(FORM)[0]))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            dict(item_C=lambda x: spoilt(x, 3, -1)),
            {},
            r"candidates.item_C\[3\] is -1, not in 1..30",
        ),
        (
            dict(feature_CF=lambda x: x[:, :0]),
            {},
            r"candidates.feature_CF must have the shape \[29, 1\], got \[29, 0\]",
        ),
        (dict(time_C=lambda x: x / 1.0), {}, "candidates.time_C must hold integers, got float64"),
        (
            dict(offsets=lambda x: x[:-1]),
            {},
            r"candidates.offsets must have the shape \[8\], got \[7\]",
        ),
        ({}, dict(micro_batch=0), "micro_batch=0 must be an integer of at least 1"),
        ({}, dict(micro_batch=2.5), "micro_batch=2.5 must be an integer"),
        ({}, dict(micro_batch=True), "micro_batch=True must be"),
        ({}, dict(implementation="mosaic"), "no implementation is called 'mosaic'"),
    ],
)
def test_bad_candidates_are_named(model, cache, change, options, message):
    _, candidates, _ = full_pass(FORM)
    changed = dataclasses.replace(
        candidates, **{name: spoil(getattr(candidates, name)) for name, spoil in change.items()}
    )
    with pytest.raises(ValueError, match=message), unchecked():
        serving.score(model, cache, changed, **options)


def test_other_bad_calls_are_named(model, cache):
    history, candidates, _ = full_pass(FORM)
    with pytest.raises(ValueError, match="k=0 must be an integer of at least 1"), unchecked():
        serving.top_k(model, cache, candidates, k=0)
    with pytest.raises(ValueError, match="weights must be 2 finite numbers"), unchecked():
        serving.top_k(model, cache, candidates, k=1, weights=(1.0,))
    with (
        pytest.raises(ValueError, match="candidates must be serving.Candidates, got list"),
        unchecked(),
    ):
        serving.score(model, cache, [1, 2])
    with (
        pytest.raises(ValueError, match="kind='int2' must be one of same, bfloat16, int8, fp8"),
        unchecked(),
    ):
        serving.encode_history(model, history, kind="int2")
    with (
        pytest.raises(ValueError, match="model must be a Ranker or a CompiledRanker, got dict"),
        unchecked(),
    ):
        serving.encode_history({}, history)
    with pytest.raises(ValueError, match="cache must be serving.Cache, got dict"), unchecked():
        serving.score(model, {}, candidates)
    with pytest.raises(ValueError, match="new_events has 1 users, the cache 7"), unchecked():
        serving.append(model, cache, history_of(0))
    with pytest.raises(ValueError, match="times of .1. events, but items of .2."), unchecked():
        serving.Events.of([[1, 2]], times=[[5]])


def test_a_cache_of_another_model_is_refused(model, cache):
    _, candidates, _ = full_pass(FORM)
    other = serving.CompiledRanker(built("merged")[1])
    with pytest.raises(ValueError, match="made by a model of another configuration"):
        serving.score(other, cache, candidates)
    task, _, _ = built(FORM)
    with pytest.raises(ValueError, match="made with other parameters"):
        serving.append(task.recipe.build(1), cache, full_pass(FORM)[0])
    copy = dataclasses.replace(
        cache, mark=np.array(cache.mark)
    )  # as after a journey through other memory
    assert len(serving.score(model, copy, candidates)) == 29
