"""The options of features: train, resume, evaluate, meshes, serve, export and flops know them.

Meshes are in tests/retrieval/test_item_features.py; what is refused by name, here and there.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from rich.console import Console

from tests import test_windows
from tests.ranking import rank_data
from tests.retrieval.test_item_features import GENRES
from tests.small_run import small_config, with_
from ultra_hstu import serving, tasks
from ultra_hstu.checkpoint import load_params
from ultra_hstu.criteria import by_warmth
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.item_features import ItemNumbers, ItemTexts
from ultra_hstu.library import fit
from ultra_hstu.serving import export
from ultra_hstu.serving.schema import Request
from ultra_hstu.serving.scoring import RunData, load_ranker
from ultra_hstu.serving.service import RecommendService
from ultra_hstu.vocabulary import Vocabulary
from ultra_hstu.workdir import Workdir

QUIET = Console(quiet=True)
RETRIEVAL = with_(
    small_config("unused", epochs=2),
    model__layers=1,
    model__relative_bias=False,
    rank__signals=("rating",),
    rank__features=("skill", "skill[hash 7]"),
    rank__contextual=("gender",),
    train__protocol="validated",
    eval__hide="all",
    eval__time="last",
)
OPTIONS = {
    "sum": dict(features__items=("genre", "year[3,6]", "year[mlp]"), features__id_dropout=0.2),
    "series": dict(features__items=("genre", "year[3,6]"), features__merge="series"),
}
RANKING = dataclasses.replace(
    rank_data.config(train=dict(epochs=1), rank=dict(features=("skill", "skill[hash 7]"))),
    features=with_(RETRIEVAL, **OPTIONS["sum"]).features,
)


@functools.cache
def data():
    made = rank_data.interactions(tuple(range(5, 17)))
    raw_ids = made.catalog.raw_ids[1:]
    features = {
        "genre": ItemTexts.of([GENRES[i % len(GENRES)] for i in range(len(raw_ids))]),
        "year": ItemNumbers.of(raw_ids % 9),
    }
    return dataclasses.replace(
        made,
        catalog=Catalog.from_ids(raw_ids, features=features),
        contexts={"gender": (np.arange(made.num_users) % 3).astype(np.int32)},
        context_values={"gender": ("", "F", "M")},
        features=("skill",),
    )


@pytest.fixture(scope="module", params=OPTIONS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = with_(RETRIEVAL, **OPTIONS[request.param])
    return config, folder, fit(config, data(), folder, console=QUIET)


def test_a_run_goes_on_as_if_it_had_not_stopped(run, tmp_path):
    config, folder, result = run
    if config.features.series:
        return  # the state is of the same kind
    fit(with_(config, train__epochs=1), data(), tmp_path, console=QUIET)
    again = fit(config, data(), tmp_path, console=QUIET)
    assert again["best"] == result["best"]
    params = [
        load_params(Workdir(one), tasks.of_run(Workdir(one)).recipe)[1]
        for one in (folder, tmp_path)
    ]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_cold_items_are_told_apart(run):
    _, _, result = run
    parts = by_warmth(tasks.of(run[0], data()).criteria)
    assert parts.tasks == ("warm", "cold", "new")
    best = result["best"]
    assert best["users/warm"] == 0 and best["users/cold"] == data().num_users
    assert best["hr@10/cold"] == best["hr@10"] and "hr@10/warm" not in best


def test_answers_are_those_of_the_evaluation(run):
    """Rank by rank, from the run's folder alone: no data is read."""
    config, folder, _ = run
    task = tasks.of_run(Workdir(folder))
    task, params = task.folded(load_params(Workdir(folder), task.recipe)[1])
    rank_U = task.evaluator("test").predict(params)
    model = serving.RecommendationModel(str(folder), max_users=2)
    for user in range(0, data().num_users, 3):
        events = slice(data().offsets[user], data().offsets[user + 1] - 1)
        target = data().items[data().offsets[user + 1] - 1]
        found = model.recommend(
            data().items[events],
            data().timestamps[events],
            actions={name: values[events] for name, values in data().actions.items()},
            context={"gender": int(data().contexts["gender"][user])},
            k=data().num_items,
        )
        ids = [item.item for item in found]
        raw = data().catalog.raw_ids[target]
        assert (ids.index(raw) + 1 if raw in ids else 2501) == rank_U[user]


def test_a_request_that_lacks_a_feature_is_told(run):
    _, folder, _ = run
    model = serving.RecommendationModel(str(folder), max_users=2)
    service = RecommendService(model, RunData(str(folder)))

    def warnings(**request):
        return service.answer([service.prepare(Request(**request))])[0].warnings

    unknown = "this run reads 'skill', which was not given and counts as unknown"
    of_user = "context: this run reads 'gender', which was not given and counts as unknown"
    given = {"rating": [1.0, 2.0]}
    assert warnings(history=[3, 4], actions=given) == [f"actions: {unknown}", of_user]
    full = given | {"skill": [5.0, 6.0]}
    assert warnings(history=[3, 4], actions=full, context={"gender": "F"}) == []
    assert (
        "is not known to this run"
        in warnings(history=[3, 4], actions=full, context={"gender": "X"})[0]
    )


def test_packed_tables_hold_what_is_scored(run):
    config, folder, _ = run
    if config.features.series:
        with pytest.raises(ValueError, match="tables='int8' cannot be used with features.merge"):
            serving.RecommendationModel(str(folder), tables="int8")
        return
    packed, plain = (
        serving.RecommendationModel(str(folder), tables=kind) for kind in ("int8", "float32")
    )
    assert "item_features" not in plain.params["embedding"]
    one, other = (model.recommend([3, 4, 5], k=5) for model in (packed, plain))
    np.testing.assert_allclose([x.score for x in one], [x.score for x in other], atol=0.02)


def test_operations_are_counted():
    without = tasks.of(RETRIEVAL, data()).flops("test")
    summed, series = (
        tasks.of(with_(RETRIEVAL, **option), data()).flops("test") for option in OPTIONS.values()
    )
    assert summed.features > 0 and summed.inference == without.inference
    assert summed.training > without.training
    assert series.inference > without.inference and series.attention > without.attention


def test_ranking_reads_features_of_items(tmp_path):
    config = with_(RANKING, features__id_dropout=0.0)
    result = fit(config, data(), tmp_path / "run", console=QUIET)
    assert "ne/rating_at_least_4/cold" in result["best"]
    folder = Workdir(tmp_path / "run")
    task = tasks.of_run(folder)
    _, params = load_params(folder, task.recipe)
    want = task.evaluator("test").predict(params)
    plain, folded = task.folded(params)
    np.testing.assert_allclose(plain.evaluator("test").predict(folded), want, atol=1e-5)

    ranker, served, vocabulary, kinds = load_ranker(RunData(str(folder.path)))
    assert served.features.items == () and ranker.embedding.item_features is None
    path = tmp_path / "scorer.zip"
    export.save(
        path,
        ranker,
        config=served,
        catalog=data().catalog,
        vocabulary=vocabulary,
        candidates=8,
    )
    _, again, known, same = export.load(path)
    assert again == served and same == kinds
    assert known.features_of({"skill": [5.0, 99.0]}, 2)[:, 0].tolist() == [1, 0]
    with pytest.raises(ValueError, match="give what `RankRecipe.folded` makes of its parameters"):
        serving.CompiledRanker(task.recipe.model(params), host_table="int8")


def test_windows_carry_features_by_their_names(tmp_path):
    """Values get other codes where items come in front; new items start from their features."""
    config = test_windows.config_of(
        tmp_path, windows__size=96, features__items=("genre", "genre[hash 9]")
    )
    events = test_windows.stream(2)
    genres = {raw: f"g{raw % 7}" for raw in events.catalog.raw_ids[1:].tolist()}
    events = dataclasses.replace(events, catalog=events.catalog.with_features({"genre": genres}))
    test_windows.trained(config, events, tmp_path / "run")
    folder = Workdir(tmp_path / "run").newest()
    known, first = (
        Vocabulary.load(folder),
        Vocabulary.load(Workdir(folder.path.parent / "window_000")),
    )
    assert set(first.item_features["genre"]) <= set(known.item_features["genre"])
    moved = known.tables(first)["embedding.item_features.table"]
    texts = [f"{name}={text}" for name, all_of in known.item_features.items() for text in all_of]
    before = [f"{name}={text}" for name, all_of in first.item_features.items() for text in all_of]
    assert all(texts[i] == before[old] for i, old in enumerate(moved) if old >= 0)
    assert (moved >= 0).sum() == len(before)
    model = serving.RecommendationModel(str(folder.path))
    raw = known.catalog.raw_ids[1:4]
    assert len(model.recommend(known.catalog.encode(raw), k=5)) == 5


def test_unknown_names_are_refused():
    for name, problem in (
        ("skills", "rank.features: unknown feature 'skills'"),
        ("skill[mlp]", "a net reads numbers of items"),
        ("skill[2,1]", "the ends of buckets, which are numbers that ascend"),
    ):
        with pytest.raises(ValueError, match=problem):
            tasks.of(with_(RETRIEVAL, rank__features=(name,)), data())
    with pytest.raises(ValueError, match="rank.contextual: unknown contextual feature 'age'"):
        tasks.of(with_(RETRIEVAL, rank__contextual=("age",)), data())
