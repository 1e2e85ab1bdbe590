"""Stochastic length in loaders: what is cut, what stays; a plan is a function of (seed, epoch)."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from rich.console import Console

from tests.ranking import rank_data
from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.data import sampled
from ultra_hstu.data.feed import EventStore, Loader
from ultra_hstu.data.packing import Packing
from ultra_hstu.data.sampled import SampledHistory, SampledPlanner, Sampling
from ultra_hstu.parallel import make_mesh, processes
from ultra_hstu.retrieval.batch import Events, HistoryGather
from ultra_hstu.retrieval.split import Examples
from ultra_hstu.sampling import threshold
from ultra_hstu.train import train

# --- retrieval ---

LONG = SampledHistory(60)


@pytest.fixture(scope="module")
def events():
    rng = np.random.default_rng(0)
    return Events.from_arrays(
        rng.integers(1, 50, 3000), np.sort(rng.integers(10**9, 10**9 + 10**6, 3000))
    )


def loader(events, sampling, placement="device", padded_length=None, timed=True):
    start = np.arange(0, 2900, 70)
    examples = Examples(
        user=np.arange(len(start)),
        start=start,
        stop=start + np.random.default_rng(1).integers(1, 61, len(start)),
    )
    planner = SampledPlanner(sampling, (LONG,), events.time_E if timed else None)
    options = dict(
        batch_users=6,
        steps_per_call=3,
        placement=placement,
        planner=planner,
    )
    gather = functools.partial(HistoryGather.of, padded_length=padded_length)
    return Loader(EventStore(events), examples, gather, **options), examples


def batches(loader, plan):
    return [
        jax.tree.map(np.asarray, group.feed.batch(i))
        for group in loader.groups(plan)
        for i in range(group.steps)
    ]


@pytest.mark.parametrize("padded_length", [None, 64])
@pytest.mark.parametrize("balance", [None, 1.5])
@pytest.mark.parametrize("kind", ["recent", "random", "weighted"])
def test_retrieval_batches_hold_parts_of_the_histories(events, kind, balance, padded_length):
    made, examples = loader(events, Sampling(1.5, kind, balance), padded_length=padded_length)
    plan = made.plan(seed=1, epoch=2)
    cut = threshold(60, 1.5)
    lengths = []
    for places, batch in zip(plan.place_SB, batches(made, plan), strict=True):
        for b, place in enumerate(places[places >= 0]):
            start, stop = examples.start[place], examples.stop[place]
            first = batch.offsets[b]
            rows = slice(first, batch.last_row_B[b] + 1 if stop > start else first)
            used = [
                int(np.flatnonzero(events.time_E[start:stop] == time)[0]) + start
                for time in batch.time_T[rows]
            ]  # times are distinct
            lengths.append(len(used))
            assert len(used) == stop - start or len(used) == cut < stop - start
            assert used == sorted(set(used))
            if kind == "recent":
                assert used == list(range(stop - len(used), stop))
            np.testing.assert_array_equal(batch.item_T[rows], events.item_E[used])
            # What a row predicts is what the user did next, kept or not.
            np.testing.assert_array_equal(batch.target_T[rows], events.item_E[np.add(used, 1)])
            np.testing.assert_array_equal(batch.next_time_T[rows], events.time_E[np.add(used, 1)])
        assert batch.weight_T.sum() == sum(lengths[-len(places[places >= 0]) :])
        assert made.gather.rows < examples.lengths.max() * 6 or padded_length
    assert len(lengths) == len(examples) and cut in lengths and max(lengths) > cut


@pytest.mark.parametrize(
    "sampling", [Sampling(1.5), Sampling(1.5, "weighted"), Sampling(1.5, "random", 1.4, 3)], ids=str
)
def test_plans_are_functions_of_seed_and_epoch(events, sampling):
    (device, _), (stream, _) = (
        loader(events, sampling, placement) for placement in ("device", "stream")
    )
    one, other = (
        batches(device, device.plan(seed=1, epoch=2)),
        batches(stream, stream.plan(seed=1, epoch=2)),
    )
    assert len(one) == len(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    later = batches(device, device.plan(seed=1, epoch=3))
    assert any(a.item_T.tolist() != b.item_T.tolist() for a, b in zip(one, later, strict=False))
    assert (
        len(
            {
                str([leaf.shape for leaf in jax.tree.leaves(group.feed)])
                for group in device.groups(device.plan(seed=4))
            }
        )
        == 1
    )


def test_without_times_places_count(events):
    timed, untimed = (
        loader(events, Sampling(1.2, "weighted"), timed=timed)[0] for timed in (True, False)
    )
    one, other = (batches(made, made.plan(seed=1, epoch=2)) for made in (timed, untimed))
    assert [batch.weight_T.sum() for batch in one] == [batch.weight_T.sum() for batch in other]
    assert any((a.item_T != b.item_T).any() for a, b in zip(one, other, strict=True))


def test_balanced_batches_have_nearly_one_load(events):
    def spread(sampling):
        made, examples = loader(events, sampling)
        load = []
        for epoch in range(10):
            plan = made.plan(seed=0, epoch=epoch)
            length_SB = np.where(
                plan.place_SB >= 0, plan.examples.lengths[plan.place_SB], 0
            ).astype(float)
            load += (
                (length_SB**1.5).sum(1)[:-1].tolist()
            )  # the last batch of an epoch holds what is left
        return np.std(load) / np.mean(load)

    # Six histories, of which one whole one is more than the target: it comes as often as before.
    assert spread(Sampling(1.2, "recent", 1.5)) < 0.85 * spread(Sampling(1.2, "recent"))


def test_processes_choose_for_their_groups_and_agree_on_the_load(events, monkeypatch):
    """Together they choose what one process does, and exchange loads alone."""
    _, examples = loader(events, Sampling(1.5))
    packing = Packing(8, (400,), groups=4)
    planner = SampledPlanner(Sampling(1.5, "recent", 1.5, 2), (LONG,), None)

    def plan(groups, all_gather):
        monkeypatch.setattr(processes, "all_gather", all_gather)
        monkeypatch.setattr(sampled, "groups_here", lambda mesh: groups)
        made = dataclasses.replace(planner, mesh=make_mesh(context=8))
        return made.plan(examples, packing, seed=1, epoch=2, shuffle=True)

    loads = {}
    whole = plan([0, 1, 2, 3], lambda given: [loads.update(given) or given])
    given = [{name: loads[name] for name in names} for names in ("01", "23", "2")]
    place_SGb = whole.place_SB.reshape(len(whole), 4, -1)
    kept = whole.examples.kept_nR
    assert (kept != planner.taken(examples, 1, 2).kept_nR).any() and len(loads["0"]) > 1
    for own, process in (([0, 1], 0), ([2, 3], 1), ([2], 2)):
        seen = []
        part = plan(own, lambda mine, seen=seen: seen.append(mine) or given)
        assert seen == [given[process]]
        place = place_SGb[:, own]
        place = place[place >= 0]
        np.testing.assert_array_equal(part.examples.kept_nR[place], kept[place])


def test_training_is_cut_and_evaluation_whole(tmp_path):
    """A run with everything on, of balanced random parts; whole histories on test users."""
    config = with_(
        small_config(tmp_path, epochs=2),
        model__layers=1,
        model__implementation="reference",
        data__stochastic_length=1.2,
        data__subsequence="weighted",
        data__load_balance=True,
        data__recalibrate_every=2,
    )
    task = tasks.load(config)
    options = dict(batch_users=8, steps_per_call=3)
    training = task.loader("train", **options).plan(seed=0, epoch=0)
    assert set(training.examples.lengths.ravel()) == {threshold(10, 1.2), 10}
    whole = tasks.of(
        with_(config, data__stochastic_length=None, data__load_balance=False), task.interactions
    )
    one, other = (t.loader("test", **options) for t in (task, whole))
    jax.tree.map(
        np.testing.assert_array_equal,
        batches(one, one.plan(shuffle=False)),
        batches(other, other.plan(shuffle=False)),
    )
    result = train(config, tmp_path / "run", console=Console(quiet=True), task=task)
    assert result["epochs"] == 2 and np.isfinite(result["best"]["ndcg@10"])


# --- ranking ---


def rank_loader(sampled, **sections):
    interactions = rank_data.interactions(lengths=(40, 3, 20, 31, 12, 7))
    config = rank_data.config(**sections)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **sampled))
    task = tasks.of(config, interactions)
    return task, task.loader("train", batch_users=4, steps_per_call=2)


FORMS = {
    "merged": {},
    "interleaved": dict(rank=dict(input="interleaved")),
    "all": dict(rank=dict(input="interleaved", supervise="all")),
    "mixture": dict(model=dict(channels=rank_data.MIXTURE)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["recent", "random", "weighted"])
def test_ranking_histories_are_cut_and_targets_are_not(kind, form):
    sampled = dict(stochastic_length=1.3, subsequence=kind, load_balance=kind != "random")
    task, made = rank_loader(sampled, **FORMS[form])
    _, whole = rank_loader({}, **FORMS[form])
    plan, data = made.plan(seed=1, epoch=2), task.events
    table, full = plan.examples, whole.plan(seed=1, epoch=2).examples
    per_event = 2 if form in ("interleaved", "all") else 1
    cuts = 0
    for places, batch in zip(plan.place_SB, batches(made, plan), strict=True):
        for r, name in enumerate(batch.channels):
            tokens, limit = batch.channels[name], made.planner.histories[r].max_length
            for b, place in enumerate(places[places >= 0]):
                start, stop = (
                    full.columns[f"start/{name}"][place],
                    full.columns[f"stop/{name}"][place],
                )
                ids = data.index[name][start:stop] if name in data.index else np.arange(start, stop)
                keep, count = table.kept_nR[place, r], full.columns["count"][place]
                rows = slice(tokens.offsets[b], tokens.offsets[b + 1])
                assert tokens.offsets[b + 1] - tokens.offsets[b] == per_event * keep + count
                assert keep in (len(ids), threshold(limit, 1.3)) and tokens.num_targets[b] == count
                cuts += keep < len(ids)
                items, times = tokens.item_T[rows], tokens.time_T[rows]
                history = [
                    i for i in ids if data.time_E[i] in times[: per_event * keep : per_event]
                ]
                assert len(history) == keep
                np.testing.assert_array_equal(
                    items[: per_event * keep : per_event], data.item_E[history]
                )
                if kind == "recent":
                    assert history == list(ids[len(ids) - keep :])
                target = full.columns["target"][place]
                np.testing.assert_array_equal(
                    items[per_event * keep :], data.item_E[target : target + count]
                )
        used_P = batch.weight_PK[:, 0] > 0
        tokens = batch.channels[list(batch.channels)[0]]
        asked = tokens.row_P[used_P]
        event = [int(np.flatnonzero(data.time_E == time)[0]) for time in tokens.time_T[asked]]
        np.testing.assert_array_equal(batch.label_PK[used_P], data.label_EK[event])
    assert cuts > 0


def test_ranking_evaluation_is_whole():
    (one, made), (other, plain) = (
        rank_loader(sampled) for sampled in (dict(stochastic_length=1.3, subsequence="random"), {})
    )
    assert made.gather.rows <= plain.gather.rows
    loaders = [task.loader("test", batch_users=4, steps_per_call=2) for task in (one, other)]
    jax.tree.map(
        np.testing.assert_array_equal,
        *(batches(each, each.plan(shuffle=False)) for each in loaders),
    )
