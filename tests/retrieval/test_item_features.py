"""Features of items: their codes, in tokens and scores, over meshes, cold items."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import nnx

from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.item_features import ItemNumbers, ItemTexts, hashed, item_codes
from ultra_hstu.feature_config import FeatureConfig
from ultra_hstu.nn import item_features
from ultra_hstu.nn.item_features import ItemFeatures
from ultra_hstu.step import run_steps

ITEMS, STEPS = 30, 3
GENRES = [[], ["a"], ["b", "a"], ["c"], ["a", "b"], ["c", "c", "b"]]
BASE = with_(
    small_config("unused", steps_per_call=STEPS),
    data__batch_tokens=256,
    model__implementation="reference",
    model__relative_bias=False,
    model__layers=1,
    parallel__groups=8,
    features__items=("genre", "year[3,6]", "year[mlp]"),
)


@functools.cache
def data(users=40):
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 12, users)
    genres = ItemTexts.of([GENRES[i % len(GENRES)] for i in range(ITEMS)])
    years = ItemNumbers.of(np.where(np.arange(ITEMS) % 7, np.arange(ITEMS) % 10, np.nan))
    events = int(lengths.sum())
    return Interactions(
        users=np.arange(users),
        items=rng.integers(1, ITEMS - 3, events).astype(np.int32),  # the last ones never occur
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        timestamps=np.arange(events) * 10,
        actions={},
        catalog=Catalog.from_ids(np.arange(ITEMS), features={"genre": genres, "year": years}),
    )


def steps_of(config, mesh=(1, 1)):
    config = with_(config, parallel__data=mesh[0], parallel__context=mesh[1])
    config.validate()
    task = tasks.of(config, data())
    loader = task.loader("train", batch_users=config.data.batch_users, steps_per_call=STEPS)
    group = next(iter(loader.groups(loader.plan(seed=1))))
    run = jax.jit(
        functools.partial(run_steps, task.recipe),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    state, history = run(task.recipe.start(0), group.feed, np.int32(group.steps))
    return task, state, {name: np.asarray(x)[: group.steps] for name, x in history.items()}


def test_texts_are_kept_as_they_are_whatever_the_order():
    ids = np.array([5, 3, 9])
    texts = ItemTexts.of([["x", "y", "x"], [], ["", "y"]])
    catalog = Catalog.from_ids(ids, features={"tag": texts})
    assert [catalog.features["tag"].words(i) for i in range(4)] == [[], [], ["x", "y"], ["y"]]
    lists = pa.array([["x"], None, [None, "z"]])
    assert [ItemTexts.from_arrow(lists).words(i) for i in range(4)] == [[], ["x"], [], ["z"]]
    plain = ItemTexts.from_arrow(pa.array(["x", None, "x"]))
    assert [plain.words(i) for i in range(4)] == [[], ["x"], [], ["x"]]


def test_a_catalogue_keeps_its_features(tmp_path):
    catalog = data().catalog
    catalog.save(tmp_path / "catalog.npz")
    again = Catalog.load(tmp_path / "catalog.npz")
    for name, column in catalog.features.items():
        assert again.features[name].digest() == column.digest()
        assert [again.features[name].words(i) for i in (1, 4, 6)] == [
            column.words(i) for i in (1, 4, 6)
        ]


def test_codes():
    columns = data().catalog.features
    codes = item_codes(FeatureConfig(items=("genre", "year[3,6]", "year[mlp]")), columns)
    assert (codes.widths, codes.sizes) == ((2, 1, 0), (3, 3, 0))
    assert codes.code_IV[[0, 1, 3, 6]].tolist() == [[0, 0, 0], [0, 0, 0], [2, 1, 4], [3, 2, 5]]
    assert codes.number_IN[3].tolist() == [np.float32(np.log1p(2)), 1]
    assert codes.number_IN[1].tolist() == [0, 0]
    hash_codes = item_codes(FeatureConfig(items=("genre[hash 100]",)), columns)
    assert set(hash_codes.code_IV[3]) == {1 + hashed("a", 100), 1 + hashed("b", 100)}
    titles = ("", *(f"The Mug, {i % 2}" for i in range(ITEMS)))
    words = item_codes(FeatureConfig(items=("title[words 50]",)), columns, titles)
    assert words.code_IV[2].tolist() == [1 + hashed(word, 50) for word in ("the", "mug", "1")]
    few = item_codes(FeatureConfig(items=("genre",), max_values=1), columns)
    assert few.code_IV[[2, 3]].tolist() == [[1], [2]]


def test_a_hash_is_the_same_everywhere():
    assert [hashed(text, 1000) for text in ("", "Drama", "é")] == [756, 497, 963]


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        (("gender",), "unknown feature of items 'gender': this source has genre, year"),
        (("genre[1,2]",), "the column holds texts, such as .*'a'.*name 'genre' alone"),
        (("year[3,1]",), "the ends of buckets, which are numbers that ascend"),
        (("genre", "genre"), "names one twice"),
    ],
)
def test_what_cannot_be_read_is_refused(items, problem):
    config = with_(BASE, features__items=items)
    with pytest.raises(ValueError, match=problem):
        config.validate()
        tasks.of(config, data())
    with pytest.raises(ValueError, match="features.id_dropout=0.1 does nothing without"):
        with_(BASE, features__items=(), features__id_dropout=0.1).validate()


@pytest.mark.parametrize("size", [0, item_features.MATRIX_SIZE])
def test_vectors_are_means_of_values_and_sums_of_columns(size, monkeypatch):
    monkeypatch.setattr(item_features, "MATRIX_SIZE", size)
    codes = item_codes(BASE.features, data().catalog.features)
    features = ItemFeatures(codes, 4, hidden_width=5, rngs=nnx.Rngs(0))
    table = np.asarray(features.table[...])
    hidden, output = np.asarray(features.hidden[...]), np.asarray(features.output[...])
    x = np.array([np.log1p(2), 1.0]) @ hidden
    want = table[[0, 1]].mean(0) + table[3] + (x / (1 + np.exp(-x))) @ output
    np.testing.assert_allclose(features(jnp.array([3, 0]))[0], want, atol=1e-6)
    assert not features(jnp.array([0]))[0].any()
    np.testing.assert_allclose(features.all()[3], want, atol=1e-6)
    one = features.series(jnp.array([3, 3, 3]), jnp.array([0, 1, 2]))
    np.testing.assert_allclose(one, [0 * want, table[[0, 1]].mean(0), table[3]], atol=1e-6)


def test_cold_items_have_no_vector_but_their_features():
    task, state, history = steps_of(with_(BASE, features__id_dropout=0.5))
    assert np.isfinite(history["loss"]).all() and history["loss"][-1] > 0
    table = np.asarray(state.params["embedding"]["item_table"][...])
    cold = task.popularity()[1:] == 0
    assert cold.sum() >= 3 and not table[1:][cold].any() and table[1:][~cold].all()
    model = task.recipe.model(state.params)
    np.testing.assert_array_equal(
        np.asarray(model.all_items())[1:][cold],
        np.asarray(model.embedding.item_features.all())[1:][cold],
    )


def test_the_token_and_the_score_see_features():
    task = tasks.of(BASE, data())
    other = ItemTexts.of([["z"] if i == 4 else GENRES[i % len(GENRES)] for i in range(ITEMS)])
    catalog = dataclasses.replace(
        data().catalog, features=data().catalog.features | {"genre": other}
    )
    changed = tasks.of(BASE, dataclasses.replace(data(), catalog=catalog))
    assert changed.item_features.sizes == (4, 3, 0)
    vectors = [
        np.asarray(one.recipe.model(one.recipe.init(0).params).all_items())
        for one in (task, changed)
    ]
    assert (vectors[0] != vectors[1]).any()


MESHES = [
    (BASE, (8, 1)),
    (with_(BASE, features__merge="series", features__items=("genre", "year[3,6]")), (2, 4)),
    (with_(BASE, features__id_dropout=0.3, loss__kind="full"), (2, 4)),
]


@pytest.mark.parametrize(("config", "mesh"), MESHES)
def test_meshes_agree(config, mesh):
    want, got = steps_of(config)[2], steps_of(with_(config, parallel__batches="exchanged"), mesh)[2]
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, err_msg=name)
