"""Series of features merged into histories, and histories as they were: nothing later is seen."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranking import rank_data
from tests.retrieval.test_item_features import BASE, GENRES, ITEMS, data
from tests.small_run import with_
from ultra_hstu import tasks
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.item_features import ItemTexts, item_codes
from ultra_hstu.ranking.task import RankingTask

SERIES = with_(BASE, features__merge="series", features__items=("genre", "year[3,6]"))


def plain_rows(items, start, stop, codes):
    """(series, item, event) of the rows of a history, as the rule says it."""
    sets = [[tuple(row) for row in part] for part in codes.parts(codes.code_IV)]
    rows = [(number, items[start], start) for number in range(1, len(sets) + 1)]
    for event in range(start, stop):
        for number, of_items in enumerate(sets, 1):
            here = of_items[items[event]]
            if event > start and any(here) and here != of_items[items[event - 1]]:
                rows.append((number, items[event], event))
        rows.append((0, items[event], event))
    return rows


def test_rows_are_those_of_the_rule():
    task = tasks.of(SERIES, data())
    codes = item_codes(SERIES.features, data().catalog.features)
    loader = task.loader("train", batch_users=8, steps_per_call=1)
    plan = loader.plan(seed=3)
    batch = next(iter(loader.groups(plan))).feed.batch(0)
    items, places = data().items, plan.place_SB[0]
    column, of_item, position, item, target, weight = (
        np.asarray(x)
        for x in (
            batch.series.column_T,
            batch.series.of_item_T,
            batch.series.position_T,
            batch.item_T,
            batch.target_T,
            batch.weight_T,
        )
    )
    examples = task.examples("train")
    for b, place in enumerate(places[places >= 0].tolist()):
        start, stop = int(examples.start[place]), int(examples.stop[place])
        want = plain_rows(items, start, stop, codes)
        rows = slice(*np.asarray(batch.offsets)[b : b + 2])
        assert examples.lengths[place] == len(want) == rows.stop - rows.start
        assert column[rows].tolist() == [number for number, _, _ in want]
        assert of_item[rows].tolist() == [item for _, item, _ in want]
        assert position[rows].tolist() == [event - start for _, _, event in want]
        own = [number == 0 for number, _, _ in want]
        assert weight[rows].tolist() == own and (item[rows] > 0).tolist() == own
        assert target[rows][own].tolist() == items[start + 1 : stop + 1].tolist()
        assert np.asarray(batch.last_row_B)[b] == rows.stop - 1


def test_streamed_batches_are_the_same():
    found = []
    for placement in ("device", "stream"):
        task = tasks.of(with_(SERIES, data__placement=placement), data())
        loader = task.loader("test", batch_users=8, steps_per_call=1)
        found.append(next(iter(loader.groups(loader.plan(shuffle=False)))).feed.batch(0))
    for one, other in zip(*(vars(batch).values() for batch in found), strict=True):
        if hasattr(one, "column_T"):
            one, other = one.column_T, other.column_T
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(data__stochastic_length=1.5), "data.stochastic_length=1.5, which cuts histories"),
        (dict(data__layout="padded"), "data.layout='padded', in which every row is an event"),
        (dict(features__items=("year[mlp]",)), "a net, which .*: a token stands where a value"),
    ],
)
def test_what_series_do_not_go_with_is_refused(change, problem):
    with pytest.raises(ValueError, match=f"features.merge='series' cannot be used with {problem}"):
        with_(SERIES, **change).validate()
    with pytest.raises(ValueError, match="optim.tables='lazy_adam' updates the items that a step"):
        with_(BASE, optim__tables="lazy_adam").validate()
    config = rank_data.config()
    ranking = dataclasses.replace(
        config, features=dataclasses.replace(config.features, items=("x",), merge="series")
    )
    with pytest.raises(ValueError, match="cannot be used with ranking"):
        ranking.validate()


def later(interactions, rng, count=4):
    """The same with later events of every user, of a new item and a new value, too."""
    items = interactions.num_items
    genres = [interactions.catalog.features["genre"].words(i + 1) for i in range(items)]
    ids = np.concatenate([interactions.catalog.raw_ids[1:], [10**6]])
    column = ItemTexts.of([*genres, ["a", "of later"]])
    catalog = Catalog.from_ids(ids, features={"genre": column})
    ends, users = interactions.offsets[1:], interactions.num_users
    at = np.repeat(ends, count)
    time = int(interactions.timestamps.max())

    def grown(column_E, new_E):
        return np.insert(column_E, at, new_E.astype(column_E.dtype))

    new = users * count
    return dataclasses.replace(
        interactions,
        items=grown(interactions.items, rng.integers(1, items + 2, new)),
        offsets=interactions.offsets + count * np.arange(users + 1),
        timestamps=grown(interactions.timestamps, time + np.arange(new) + 1),
        actions={
            name: grown(values, rng.choice(np.unique(values), new))
            for name, values in interactions.actions.items()
        },
        catalog=catalog,
    )


def with_genres(interactions):
    genres = ItemTexts.of([GENRES[i % len(GENRES)] for i in range(ITEMS)])
    raw_ids = interactions.catalog.raw_ids[1:]
    return dataclasses.replace(
        interactions, catalog=Catalog.from_ids(raw_ids, features={"genre": genres})
    )


def batch_of(task, columns):
    """With a capacity that does not follow the data: the longest history may grow."""
    users = len(columns["start" if "start" in columns else "user"])
    rows = (users * 150,) * len(task.longest or (0,))
    gather = task.gather(True, rows, 0)
    return gather(task.events, columns, np)


@settings(max_examples=8)
@given(seed=st.integers(0, 99), merge=st.sampled_from(["sum", "series"]))
def test_the_future_changes_no_history(seed, merge):
    """Later events, features and values leave every batch of earlier ones as it is, bit for bit."""
    rng = np.random.default_rng(seed)
    before = with_genres(rank_data.interactions(rng.integers(3, 12, 6), seed=seed))
    after = later(before, rng)
    config = with_(
        BASE,
        features__items=("genre",),
        features__merge=merge,
        rank__signals=("rating", "is_click"),
        rank__features=("skill",),
    )
    shift = 4 * np.arange(before.num_users)  # later events of the users in front
    found = []
    for interactions, moved in ((before, 0 * shift), (after, shift)):
        task = tasks.of(config, interactions)
        columns = {"start": before.offsets[:-1] + moved, "stop": before.offsets[1:] - 1 + moved}
        batch = batch_of(task, columns)
        codes = task.item_features.code_IV[batch.item_T]
        found.append((jax.tree.leaves(batch), codes))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found[0][1], found[1][1])


@settings(max_examples=8)
@given(seed=st.integers(0, 99), interleaved=st.booleans())
def test_the_future_changes_no_request(seed, interleaved):
    """Of ranking: an event's features, signals and gaps are those of its time."""
    rng = np.random.default_rng(seed)
    before = with_genres(rank_data.interactions(rng.integers(3, 12, 6), seed=seed))
    after = later(before, rng)
    config = rank_data.config(
        rank=dict(
            input="interleaved" if interleaved else "merged",
            features=("skill", "skill[hash 50]", "skill[6,8]"),
        )
    )
    shift = 4 * np.arange(before.num_users)
    found = []
    for interactions, moved in ((before, 0 * shift), (after, shift)):
        task = RankingTask.of(config, interactions)
        first, last = before.offsets[:-1] + moved, before.offsets[1:] + moved
        columns = {
            "user": np.arange(before.num_users),
            "target": last - 1,
            "count": np.ones(before.num_users, np.int64),
            "start/events": np.maximum(first, last - 1 - config.data.max_history),
            "stop/events": last - 1,
        }
        found.append(jax.tree.leaves(batch_of(task, columns)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
