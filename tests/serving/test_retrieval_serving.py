"""Retrieval serving: batches, exact answers over chunks, hidden items, buckets, memory."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.checkpoint import Checkpoints, load_params
from ultra_hstu.quantization import KINDS, quantize, unpacked
from ultra_hstu.retrieval.metrics import best_items
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.serving.recommend import SMALLEST_HIDDEN, SMALLEST_K
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("serving")
    train(small_config(root / "data", epochs=1), root / "run", console=Console(quiet=True))
    return root / "run"


@pytest.fixture(scope="module")
def model(folder):
    return RecommendationModel(str(folder), max_users=4)


def histories(count, seed=0, longest=25):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        length = int(rng.integers(1, longest))
        yield rng.integers(1, 121, length), np.sort(rng.integers(0, 10**6, length))


def same(one, other):
    assert [item.item for item in one] == [item.item for item in other]
    assert [item.score for item in one] == pytest.approx([item.score for item in other], abs=1e-5)


def test_a_batch_of_different_lengths_answers_as_each_alone(model):
    queries = [model.query(items, times, k=5 + i) for i, (items, times) in enumerate(histories(11))]
    answers = model.best(model.encode(queries), queries)
    assert [len(answer) for answer in answers] == list(range(5, 16))
    for query, answer in zip(queries, answers, strict=True):
        same(answer, model.best(model.encode([query]), [query])[0])


def test_answers_are_those_of_all_scores(model):
    """Against the whole score vector, made without chunks or hidden ids."""
    query = model.query([3, 14, 15, 92, 14], k=20)
    vector_D = model.encode([query])[0]
    table_ID = np.asarray(unpacked(model.params)["embedding"]["item_table"][...])
    score_I = (
        table_ID / np.maximum(np.linalg.norm(table_ID, axis=1, keepdims=True), 1e-6)
    ) @ vector_D
    score_I[[0, 3, 14, 15, 92]] = -np.inf
    order = np.argsort(-score_I, kind="stable")[:20]
    answer = model.best(vector_D[None], [query])[0]
    assert [item.item for item in answer] == model.catalog.decode(order).tolist()
    assert [item.score for item in answer] == pytest.approx(score_I[order].tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_go_to_the_lower_id_across_chunks(kind):
    """Twenty vectors, five times each, in shuffled places: chunks of 16 cut the groups apart."""
    rng = np.random.default_rng(0)
    place_I = rng.permutation(np.repeat(np.arange(20), 5))
    table = quantize(
        np.concatenate([np.zeros((1, 8)), rng.normal(size=(20, 8))[place_I]]).astype(np.float32),
        kind,
    )
    h_UD = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    best_UK, score_UK = best_items(h_UD, table, k=100, chunk_items=16)
    for best_K, score_K in zip(np.asarray(best_UK), np.asarray(score_UK), strict=True):
        assert sorted(best_K.tolist()) == list(range(1, 101)) and (np.diff(score_K) <= 0).all()
        assert [best_K[i : i + 5].tolist() for i in range(0, 100, 5)] == [
            sorted(best_K[i : i + 5]) for i in range(0, 100, 5)
        ]


def test_the_place_of_a_target_is_its_rank_in_evaluation(folder, model):
    """Every test user's history as a request: one number, found by evaluation and by serving."""
    task = tasks.of_run(Workdir(folder))
    data, test = task.interactions, task.splits.test
    rank_U = task.evaluator("test").predict(load_params(Workdir(folder), task.recipe)[1])
    histories_U = [slice(*edges) for edges in zip(test.start, test.stop, strict=True)]
    queries = [
        model.query(data.items[own], data.timestamps[own], now=int(data.timestamps[stop]), k=120)
        for own, stop in zip(histories_U, test.stop, strict=True)
    ]
    raw_U = data.catalog.decode(data.items[test.stop]).tolist()
    for answer, raw, rank in zip(
        model.best(model.encode(queries), queries), raw_U, rank_U, strict=True
    ):
        items = [found.item for found in answer]
        assert rank == (items.index(raw) + 1 if raw in items else 2501)


def test_seen_and_blocked_items_are_hidden(folder, model):
    first = [item.item for item in model.recommend([3, 14], k=6)]
    dense = model.catalog.encode(first)
    assert [item.item for item in model.recommend([3, 14], k=4, block=dense[[0, 3]])] == [
        first[i] for i in (1, 2, 4, 5)
    ]
    blocking = copy.copy(model)
    blocking.block(dense[[1]])
    assert [item.item for item in blocking.recommend([3, 14], k=4, block=dense[[0]])] == first[2:6]
    assert [item.item for item in model.recommend([3, 14], k=6)] == first


def test_fewer_than_k_are_left(model):
    assert len(model.recommend(list(range(1, 119)), k=20)) == 2
    assert model.recommend([1], k=20, block=list(range(1, 121))) == []


def test_times_that_go_back_are_refused(model):
    with pytest.raises(
        ValueError, match="times go back from 9 to 5: give the history oldest first"
    ):
        model.query([1, 2], [9, 5])
    with pytest.raises(ValueError, match="times go back from 9 to 8"):
        model.query([1, 2], [5, 9], now=8)
    with pytest.raises(ValueError, match="Give seconds, not milliseconds"):
        model.query([1, 2], [0, 2**31])
    assert (
        model.query([1] * 11, [0] + [2**31] * 10).num_events == 10
    )  # what is not encoded does not count


def test_neighbours_times_do_not_matter(model):
    """Times far apart between users, beyond what 32 bits hold together."""
    ends = (-(2**31), 2**32 - 501)
    queries = [model.query([5, 6, 7], [start, start + 10, start + 500]) for start in ends]
    one, other = model.best(model.encode(queries), queries)
    assert [item.item for item in one] == [item.item for item in other]


def test_no_program_is_compiled_after_the_warm_up(folder):
    model = RecommendationModel(str(folder), max_users=4)
    assert model.programs == 0
    # Rows for 1, 2 and 4 histories of 10 fit one class of 128; k and hidden items: 16 and all 120,
    # all 120.
    assert model.warm_up(max_k=120, max_hidden=1000) == model.programs == 1 + 2
    for seed in range(4):
        queries = [
            model.query(*history, k=1 + 39 * seed, block=[1] * (50 * seed))
            for history in histories(seed + 1, seed, longest=200)
        ]
        model.best(model.encode(queries), queries)
    assert model.programs == 3


def test_rows_and_capacities(folder):
    model = RecommendationModel(str(folder), max_users=16)
    model.config = with_(model.config, data__max_history=100)
    assert [len(model._batch([model.query([1] * 100)] * n).item_T) for n in (1, 2, 3, 5, 16)] == [
        128,
        256,
        512,
        896,
        1664,
    ]
    assert model._sizes_of([model.query([1])]) == (SMALLEST_K, 120)
    assert SMALLEST_HIDDEN > 120


def test_a_vector_and_its_query_decide_every_bit(model):
    queries = [model.query(*history, k=30) for history in histories(4)]
    vectors = model.encode(queries)
    alone = [model.best(vectors[i : i + 1], queries[i : i + 1])[0] for i in range(4)]
    for order in ([3, 1, 0, 2], [2, 3], [0, 0, 1]):
        assert model.best(vectors[order], [queries[i] for i in order]) == [alone[i] for i in order]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_catalogue(kind):
    """Temporaries of the compiled program, at one size and at sixteen times that.

    They hold no dense table and no row of scores.
    """

    def temporaries(items):
        table = quantize(np.zeros((items, 16), np.float32), kind)
        arguments = (jnp.zeros((4, 16)), table, jnp.zeros((4, 32), jnp.int32))
        program = (
            jax.jit(lambda h, table, seen: best_items(h, table, seen, k=10, chunk_items=512))
            .lower(*arguments)
            .compile()
        )
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) == temporaries(65536) < 4096 * 16 * 4


@pytest.mark.parametrize("kind", ["int4"])
def test_encoding_unpacks_rows_of_the_batch_only(folder, kind):
    model = RecommendationModel(str(folder), tables=kind, max_users=4)
    big = 100_000
    code = jax.tree.map(
        lambda leaf: jnp.zeros((big, *leaf.shape[1:]), leaf.dtype),
        model.params["embedding"]["item_table"],
    )
    params = copy.copy(model.params)
    params["embedding"]["item_table"] = code
    batch = model._batch([model.query([3, 14, 15])])
    temporaries = model._encode.lower(params, batch).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < big * 16


def test_parameters_that_are_not_finite_are_refused(folder, monkeypatch):
    restore = Checkpoints.restore

    def broken(self, *arguments, **options):
        restored = restore(self, *arguments, **options)
        params = jax.tree.map(lambda leaf: leaf * jnp.nan, restored.state.params)
        return restored._replace(state=dataclasses.replace(restored.state, params=params))

    monkeypatch.setattr(Checkpoints, "restore", broken)
    with pytest.raises(ValueError, match="holds NaN or infinity in .*: train again"):
        RecommendationModel(str(folder))
