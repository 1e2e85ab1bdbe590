"""A mixture of logits as an option: train, resume, evaluate, meshes, serve, export and flops."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from tests.ranking import rank_data
from tests.retrieval.test_item_features import BASE, data, steps_of
from tests.small_run import small_config, with_
from ultra_hstu import serving, tasks
from ultra_hstu.checkpoint import load_params
from ultra_hstu.config import from_config_dict, to_config_dict
from ultra_hstu.data.item_features import user_code
from ultra_hstu.effects import require_effect, without_effect
from ultra_hstu.initial import parameters_of
from ultra_hstu.library import fit
from ultra_hstu.sections import MolConfig
from ultra_hstu.serving.schema import Request
from ultra_hstu.serving.scoring import RunData, load_ranker
from ultra_hstu.serving.service import RecommendService
from ultra_hstu.workdir import Workdir

QUIET = Console(quiet=True)
SMALL = MolConfig(
    user_components=3,
    item_components=2,
    component_width=4,
    hidden_width=8,
    gate_width=6,
    user_ids=7,
)
RUN = dataclasses.replace(
    with_(
        small_config("unused", epochs=2),
        model__layers=1,
        model__relative_bias=False,
        loss__similarity="mol",
        loss__negatives=4,
        train__protocol="validated",
        eval__hide="all",
        eval__time="last",
    ),
    mol=SMALL,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mol")
    return folder, fit(RUN, data(), folder, console=QUIET)


def test_a_run_goes_on_as_if_it_had_not_stopped(run, tmp_path):
    folder, result = run
    fit(with_(RUN, train__epochs=1), data(), tmp_path, console=QUIET)
    assert fit(RUN, data(), tmp_path, console=QUIET)["best"] == result["best"]
    params = [
        load_params(Workdir(one), tasks.of_run(Workdir(one)).recipe)[1]
        for one in (folder, tmp_path)
    ]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_answers_are_those_of_the_evaluation(run):
    """Rank by rank, from the run's folder alone: of users by their ids."""
    folder, _ = run
    task = tasks.of_run(Workdir(folder))
    rank_U = task.evaluator("test").predict(load_params(Workdir(folder), task.recipe)[1])
    model = serving.RecommendationModel(str(folder), max_users=2)

    def asked(number, **who):
        events = slice(data().offsets[number], data().offsets[number + 1] - 1)
        history = (data().items[events], data().timestamps[events])
        found = model.recommend(*history, k=data().num_items, **who)
        return [item.item for item in found]

    others = 0
    for user in range(0, data().num_users, 5):
        ids = asked(user, user=int(data().users[user]))
        raw = data().catalog.raw_ids[data().items[data().offsets[user + 1] - 1]]
        assert (ids.index(raw) + 1 if raw in ids else 2501) == rank_U[user]
        others += ids != asked(user)
    assert others
    assert user_code(" 12", 7) == user_code(12, 7) == 6 and user_code("anna", 7) in range(1, 8)


def test_a_service_knows_its_users_and_refuses_what_does_not_fit(run):
    folder, _ = run
    model = serving.RecommendationModel(str(folder), max_users=2, candidates=8)
    service = RecommendService(model, RunData(str(folder)))
    queries = [service.prepare(Request(history=[3, 4], k=k)) for k in (3, 8)]
    answers = service.answer(queries)
    assert [len(answer.items) for answer in answers] == [3, 8]
    assert queries[0].user == 0 and queries[0].key == queries[1].key
    known = model.query([1, 2], k=5, user=3)
    assert known.user == user_code(3, 7) and known.key != model.query([1, 2], k=5, user=4).key
    with pytest.raises(ValueError, match="k=9 is more than the 8 candidates"):
        model.query([1], k=9)
    with pytest.raises(ValueError, match="tables='int8' cannot be used with loss.similarity='mol'"):
        serving.RecommendationModel(str(folder), tables="int8")
    with pytest.raises(ValueError, match="candidates=0 must be at least 1"):
        serving.RecommendationModel(str(folder), candidates=0)
    with pytest.raises(ValueError, match="is a retrieval run: candidates are scored by ranking"):
        load_ranker(RunData(str(folder)))  # what export writes


def test_another_run_starts_from_it(run):
    folder, _ = run
    config = with_(RUN, mol__gate_dropout=0.5)
    params, _ = parameters_of(folder, tasks.of(config, data()), QUIET)
    want = load_params(Workdir(folder), tasks.of_run(Workdir(folder)).recipe)[1]
    jax.tree.map(np.testing.assert_array_equal, params, want)
    for changes, field in (
        ({"loss__similarity": "dot"}, "loss.similarity"),
        ({"mol__gate_width": 9}, "mol.gate_width"),
    ):
        with pytest.raises(ValueError, match=f"another model(.|\n)*{field}"):
            parameters_of(folder, tasks.of(with_(config, **changes), data()), QUIET)


MIXED = dataclasses.replace(with_(BASE, loss__similarity="mol", loss__negatives=4), mol=SMALL)
MESHES = [
    (with_(MIXED, loss__kind="full"), (2, 4)),
    (with_(MIXED, features__items=(), optim__tables="lazy_adam"), (8, 1)),
]


@pytest.mark.parametrize(("config", "mesh"), MESHES)
def test_meshes_agree(config, mesh):
    """With features of items, over sharded tables, with tables that a step reads in part."""
    want, got = steps_of(config)[2], steps_of(config, mesh)[2]
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=5e-5, err_msg=name)


def test_meshes_rank_alike(run):
    folder, _ = run
    task = tasks.of_run(Workdir(folder))
    params = load_params(Workdir(folder), task.recipe)[1]
    want = task.evaluator("test").predict(params)
    config = with_(RUN, parallel__data=2, parallel__context=4, model__implementation="reference")
    sharded = tasks.of(config, data())
    state = sharded.recipe.start(0)
    like = jax.tree.map(lambda x: x.sharding, state.params)
    padded = jax.tree.map(
        lambda x, to: np.pad(x, [(0, to.shape[0] - x.shape[0])] + [(0, 0)] * (x.ndim - 1)),
        params,
        state.params,
    )
    got = sharded.evaluator("test").predict(jax.device_put(padded, like))
    assert np.mean(got == want) > 0.9


def test_operations_are_counted():
    """As the products of a user and an item, by hand."""
    plain = dataclasses.replace(with_(RUN, loss__similarity="dot"), mol=MolConfig())
    dot, mol = (tasks.of(config, data()).flops("test") for config in (plain, RUN))
    width, items = RUN.model.width, data().num_items
    pair = 2 * (6 * 4 + 6 * 6 + 6 * 6 + 6)
    row = 2 * (width * 16 + 8 * 2 * 4 + width * 6 + 6 * 6)
    assert mol.corpus == items * pair + row and dot.corpus == 2 * items * width
    rows = dot.loss / (2 * 5 * width)
    assert mol.loss == pytest.approx(rows * (5 * pair + row))
    item = 2 * (width * 8 + width * 6 + 6 * 6)
    assert mol.features == pytest.approx(item * (items + 1) / RUN.data.batch_users)
    assert mol.projections == dot.projections


def test_fields_are_refused_by_name():
    rank = with_(rank_data.config(), loss__similarity="mol")
    with pytest.raises(ValueError, match="loss.similarity='mol' cannot be used for ranking"):
        rank.validate()
    with pytest.raises(ValueError, match="mol.user_components=1 leaves none beside that of"):
        with_(RUN, mol__user_components=1).validate()
    with pytest.raises(ValueError, match="mol.gate_dropout=1.0 must be in"):
        with_(RUN, mol__gate_dropout=1.0).validate()
    with pytest.raises(ValueError, match="mol.balance has no effect under loss.similarity=dot"):
        require_effect(small_config("unused"), "mol.balance")
    assert "mol" not in without_effect(RUN)
    assert "mol.user_dropout" in without_effect(with_(RUN, mol__user_ids=0))
    assert from_config_dict(to_config_dict(RUN)) == RUN


def test_scores_that_are_products_are_what_they_were():
    """The same parameters from the same seed, whatever `mol` says."""
    config = with_(RUN, loss__similarity="dot")
    other = dataclasses.replace(config, mol=MolConfig())
    one, same = (tasks.of(each, data()).recipe.init(0).params for each in (config, other))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    mixed = tasks.of(RUN, data()).recipe.init(0).params
    jax.tree.map(np.testing.assert_array_equal, one["embedding"], mixed["embedding"])
    assert "mixture" not in one and "mixture" in mixed
