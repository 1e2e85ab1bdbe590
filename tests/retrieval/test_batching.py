"""Batches: no event lost or repeated, an order by (seed, epoch), the same on device and host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultra_hstu.data.feed import EventStore, Loader
from ultra_hstu.data.packing import choose_rows, plan_epoch
from ultra_hstu.retrieval.batch import Events, HistoryGather
from ultra_hstu.retrieval.split import Examples


@pytest.fixture
def events():
    rng = np.random.default_rng(0)
    return Events.from_arrays(
        rng.integers(1, 50, 400), np.sort(rng.integers(10**9, 10**9 + 10**6, 400))
    )


def random_examples(n=37, seed=1):
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 300, n)
    return Examples(user=np.arange(n), start=start, stop=start + rng.integers(0, 40, n))


@pytest.mark.parametrize("rows", [40, 64, 200, 1000])
def test_plan_holds_every_example_once_within_capacity(rows):
    examples = random_examples()
    plan = plan_epoch(examples.lengths, batch_users=8, rows=rows, seed=3, epoch=5)
    used = plan[plan >= 0]
    assert sorted(used) == list(range(len(examples)))
    for batch in plan:
        assert examples.lengths[batch[batch >= 0]].sum() <= rows


def test_plan_is_a_function_of_seed_and_epoch():
    lengths = random_examples().lengths
    plan = lambda seed, epoch: plan_epoch(lengths, batch_users=8, rows=100, seed=seed, epoch=epoch)  # noqa: E731
    np.testing.assert_array_equal(plan(1, 2), plan(1, 2))
    assert plan(1, 2).shape != plan(1, 3).shape or (plan(1, 2) != plan(1, 3)).any()
    assert plan(1, 2).shape != plan(2, 2).shape or (plan(1, 2) != plan(2, 2)).any()


def test_plan_refuses_a_history_longer_than_the_batch():
    with pytest.raises(
        ValueError,
        match="90 events but a batch only 64 rows: raise data.batch_tokens to at least 90",
    ):
        plan_epoch(np.array([3, 90]), batch_users=2, rows=64, seed=0, epoch=0)


def by_hand(events, start, stop, rows, padded_length=None):
    """The batch by plain loops."""
    columns = {
        name: np.zeros(rows, np.int64)
        for name in ("item_T", "time_T", "next_time_T", "target_T", "weight_T")
    }
    offsets, last_rows, row = [0], [], 0
    for b, (first, end) in enumerate(zip(start, stop, strict=True)):
        if padded_length is not None:
            row = b * padded_length
        for event in range(first, end):
            columns["item_T"][row], columns["target_T"][row] = (
                events.item_E[event],
                events.item_E[event + 1],
            )
            columns["time_T"][row], columns["next_time_T"][row] = (
                events.time_E[event],
                events.time_E[event + 1],
            )
            columns["weight_T"][row] = 1
            row += 1
        last_rows.append(row - 1 if end > first else 0)
        offsets.append(row if padded_length is None else (b + 1) * padded_length)
    return columns | {"offsets": offsets, "last_row_B": last_rows}


@pytest.mark.parametrize("padded_length", [None, 45])
@pytest.mark.parametrize("xp", [np, jnp])
def test_batches_against_loops(events, padded_length, xp):
    start, stop = np.array([5, 100, 7, 60, 0]), np.array([9, 140, 7, 61, 0])
    rows = 5 * 45 if padded_length else 64
    data = events if xp is np else jax.device_put(events)
    columns = {"start": xp.asarray(start), "stop": xp.asarray(stop)}
    batch = HistoryGather(rows, padded_length)(data, columns, xp)
    for name, value in by_hand(events, start, stop, rows, padded_length).items():
        np.testing.assert_array_equal(getattr(batch, name), value, err_msg=name)


def test_all_empty_batch(events):
    columns = {name: np.zeros(4, np.int32) for name in ("start", "stop")}
    batch = HistoryGather(16)(events, columns, np)
    assert not batch.item_T.any() and not batch.weight_T.any() and not batch.offsets.any()


def collect(loader, plan, first=0):
    batches = []
    for group in loader.groups(plan, first=first):
        assert group.first == first + len(batches)
        batches += [jax.tree.map(np.asarray, group.feed.batch(i)) for i in range(group.steps)]
    return batches


@pytest.mark.parametrize("padded_length", [None, 40])
def test_streamed_and_device_feeds_give_the_same_batches(events, padded_length):
    examples = random_examples()
    loaders = [
        Loader(
            EventStore(events),
            examples,
            functools.partial(HistoryGather.of, padded_length=padded_length),
            batch_users=4,
            steps_per_call=3,
            placement=placement,
        )
        for placement in ("device", "stream")
    ]
    plan = loaders[0].plan(seed=1, epoch=2)
    device, streamed = (collect(loader, plan) for loader in loaders)
    assert len(device) == len(streamed) == len(plan)
    for one, other in zip(device, streamed, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    for one, other in zip(device[5:], collect(loaders[1], plan, first=5), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_groups_have_one_shape(events):
    loader = Loader(
        EventStore(events), random_examples(), HistoryGather.of, batch_users=4, steps_per_call=3
    )
    shapes = {
        str([leaf.shape for leaf in jax.tree.leaves(group.feed)])
        for group in loader.groups(loader.plan(seed=0))
    }
    assert len(shapes) == 1


def test_choose_rows_nearly_always_fits():
    lengths = np.minimum(np.random.default_rng(0).lognormal(4.5, 1, 5000).astype(int) + 1, 200)
    rows = choose_rows(lengths, 128)
    plan = plan_epoch(lengths, batch_users=128, rows=rows, seed=0, epoch=0)
    assert len(plan) == -(-5000 // 128)
    assert rows < 0.85 * 128 * 200  # what the padded layout would take


def test_times_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Give seconds, not milliseconds"):
        Events.from_arrays(np.ones(2, int), np.array([0, 2**31]))


def test_no_examples_is_refused(events):
    empty = Examples(*(np.zeros(0, int) for _ in range(3)))
    with pytest.raises(ValueError, match="no examples"):
        Loader(EventStore(events), empty, HistoryGather.of, batch_users=4, steps_per_call=3)
