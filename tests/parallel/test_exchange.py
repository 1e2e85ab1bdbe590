"""Batches that each device of a group reads a part of are the batches of the whole group.

Bit by bit, for every kind of batch: what a step computes from them is the same program.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.parallel.test_parallel_step import (
    GROUPS,
    MIXTURE,
    QUICK,
    RANKING,
    RETRIEVAL,
    interactions,
)
from tests.small_run import with_
from ultra_hstu import tasks
from ultra_hstu.data.feed import feed_specs
from ultra_hstu.parallel.collectives import collectives
from ultra_hstu.parallel.exchange import Exchange
from ultra_hstu.parallel.shards import Shards

CASES = {
    "retrieval": (1, 8, with_(RETRIEVAL, model__window=(4,), rank__signals=("rating",))),
    "ids of users, streamed": (
        1,
        8,
        with_(
            RETRIEVAL,
            model__window=(4,),
            loss__similarity="mol",
            mol__user_ids=7,
            data__placement="stream",
        ),
    ),
    "blocks of rows, streamed": (2, 4, with_(RETRIEVAL, data__placement="stream")),
    "several features, a mixture": (
        2,
        4,
        with_(RANKING, model__channels=MIXTURE, rank__features=("skill", "skill[hash 7]")),
    ),
    "every item supervised, chosen events, streamed": (
        4,
        2,
        with_(
            RANKING,
            rank__input="interleaved",
            rank__supervise="all",
            rank__contextual=(),
            data__stochastic_length=1.5,
            data__subsequence="random",
            data__placement="stream",
        ),
    ),
}


def loaded(config, data, context, **fields):
    config = with_(config, parallel__data=data, parallel__context=context, **fields)
    config.validate()
    task = tasks.of(config, interactions(bool(config.rank.tasks)))
    return task, task.loader("train", batch_users=config.data.batch_users, steps_per_call=3)


def batches_of(task, loader):
    """The compiled program that makes a batch whole on every device, and the feed of an epoch."""
    feed = next(iter(loader.groups(loader.plan(seed=1)))).feed
    recipe, groups = task.recipe, PartitionSpec("data")

    def whole(feed, step):
        batch = recipe.shards.whole(feed.batch(step))
        if task.config.rank.tasks:  # labels of empty places may be anything
            label_PK = jnp.where(batch.weight_PK > 0, batch.label_PK, 0)
            batch = dataclasses.replace(batch, label_PK=label_PK)
        return batch

    program = jax.jit(recipe.over_devices(whole, (feed_specs(feed), PartitionSpec()), groups))
    return program.lower(feed, np.int32(0)).compile(QUICK), feed


def require_same_batches(config, data, context, **fields):
    """Batches by an exchange are those without one; returns the program of the exchange."""
    (replicated, feed), (exchanged, own) = (
        batches_of(*loaded(config, data, context, **more)) for more in ({}, fields)
    )
    for step in range(3):
        want, got = replicated(feed, np.int32(step)), exchanged(own, np.int32(step))
        paths = jax.tree_util.tree_leaves_with_path(want)
        for (path, leaf), found in zip(paths, jax.tree.leaves(got), strict=True):
            for here, there in zip(leaf.addressable_shards, found.addressable_shards, strict=True):
                np.testing.assert_array_equal(
                    there.data, here.data, jax.tree_util.keystr(path), strict=True
                )
    return exchanged


@pytest.mark.parametrize("name", CASES)
def test_batches_are_those_of_the_group(name):
    data, context, config = CASES[name]
    program = require_same_batches(config, data, context, parallel__batches="exchanged")
    kinds = {one.kind for one in collectives(program.as_text(), 8)}
    assert "all-to-all" in kinds


def test_a_bound_that_is_too_low_is_refused_with_the_number_that_would_do():
    config = with_(RETRIEVAL, model__window=(4,), parallel__batches="exchanged")
    _, loader = loaded(config, 1, 8, parallel__exchange_rows=1)
    with pytest.raises(
        ValueError, match=r"parallel.exchange_rows=1 rows .* need \d+: raise it"
    ) as e:
        loader.plan(seed=1)
    needed = int(str(e.value).partition(" need ")[2].partition(":")[0])
    _, loader = loaded(config, 1, 8, parallel__exchange_rows=needed - 1)
    with pytest.raises(ValueError, match=f"need {needed}: raise it"):
        loader.plan(seed=1)
    assert needed <= loaded(config, 1, 8)[1].exchange.capacity[0]
    fields = dict(parallel__batches="exchanged", parallel__exchange_rows=needed)
    require_same_batches(with_(config, parallel__batches="replicated"), 1, 8, **fields)
    with pytest.raises(ValueError, match="exchange_rows=3 bounds .*'gathered' does without"):
        with_(config, parallel__batches="gathered", parallel__exchange_rows=3).validate()


def test_rows_that_nobody_has_checked_are_not_lost_in_silence():
    """All weights are NaN, and so is the loss of the batch."""
    task, loader = loaded(RANKING, 1, 8, parallel__batches="exchanged")
    loader.exchange = dataclasses.replace(loader.exchange, capacity=(1,))
    program, feed = batches_of(task, loader)
    assert np.isnan(program(feed, np.int32(0)).weight_PK).all()


@pytest.mark.parametrize("striped", [False, True])
@pytest.mark.parametrize("context", [2, 4])
def test_sizes_are_what_any_batch_can_need(striped, context):
    """Drawn batches, the worst among them: one of the longest users at every edge."""
    rng = np.random.default_rng(0)
    shards = Shards(context=context, striped=striped)
    for longest in (1, 7, 32, 128):
        exchange = Exchange.of(shards, (128,), (longest,))
        # What all can need is enough: `check` has nothing to refuse.
        exchange = dataclasses.replace(exchange, limit=exchange.capacity[0])
        length_SB = np.stack([_fill(rng, 128, longest) for _ in range(100)])
        exchange.check(length_SB[:, None, :, None])
        reader_SB = exchange.readers(length_SB[..., None])
        for device in range(context):
            assert ((reader_SB == device) * length_SB).sum(1).max() <= exchange.read[0]
        assert (np.diff(reader_SB) >= 0).all()
    assert Exchange.of(shards, (128,), (8,)).capacity[0] <= (4 if not striped else 128 // context)


def test_what_is_computed_and_what_answers_know_nothing_of_it():
    config = with_(RETRIEVAL, parallel__context=8, parallel__batches="exchanged")
    assert config.on_one_device() == with_(RETRIEVAL, parallel__groups=GROUPS)
    plain, exchanged = (
        tasks.of(with_(config, parallel__batches=one), interactions(False)).flops("train")
        for one in ("replicated", "exchanged")
    )
    assert plain == exchanged


def _fill(rng, rows, longest):
    length_B = rng.integers(0, longest + 1, 128)
    return np.where(np.cumsum(length_B) <= rows, length_B, 0)
