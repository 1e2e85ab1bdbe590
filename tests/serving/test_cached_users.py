"""Users who are kept encoded, in two tiers, and extended by their new events.

Their scores are always those of encoding them anew.
"""

import functools
import logging

import numpy as np
import pytest

from tests.serving.small_serving import MAX_HISTORY, built
from tests.small_run import with_
from ultra_hstu import tasks
from ultra_hstu.data.codebook import Codebook
from ultra_hstu.serving.schema import ScoreRequest
from ultra_hstu.serving.scoring import ScoringModel
from ultra_hstu.serving.service import ScoreService
from ultra_hstu.serving.tokens import kept_in_blocks
from ultra_hstu.serving.users import CachedUsers

USERS = 3  # of a call
# Forms whose rows stay, in their ways, and one whose rows do not.
GROWING = ["a mask a layer", "ULTRA", "biased, truncated"]
FORMS = [*GROWING, "contextual"]


@functools.cache
def model_of(form, **options):
    task, ranker, _ = built(form)
    vocabulary = Codebook.of(task.config, task.interactions)
    return ScoringModel(
        ranker, task.config, vocabulary, task.recipe.tasks, max_users=USERS, **options
    )


def service_of(model, **budgets):
    return ScoreService(model, None, CachedUsers(model, **budgets))


def anew(model):
    """A service that remembers nobody."""
    return service_of(model, host_bytes=0)


def scores(service, *requests):
    answers = service.answer([service.prepare(ScoreRequest(**request)) for request in requests])
    return np.array([[list(c.scores.values()) for c in one.candidates] for one in answers])


def history(seed, count=3 * MAX_HISTORY):
    """Columns of a user's life."""
    rng = np.random.default_rng(seed)
    return {
        "history": rng.integers(1, 31, count).tolist(),
        "times": np.cumsum(rng.integers(0, 5000, count)).tolist(),
        "rating": rng.integers(1, 6, count).astype(float).tolist(),
        "is_click": rng.integers(0, 2, count).astype(float).tolist(),
        "skill": rng.integers(5, 9, count).astype(float).tolist(),
    }


def asked(life, count, later=10, **changes):
    """A request after `count` events."""
    life = life | changes
    times = life["times"][:count]
    return {
        "history": life["history"][:count],
        "times": times,
        "actions": {name: life[name][:count] for name in ("rating", "is_click", "skill")},
        "candidates": [3, 1, 4, 15],
        "features": {"skill": [5, 6, 7, 8]},
        "now": (times[-1] if times else 0) + later,
    }


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-5 * max(1, np.abs(want).max()))


def budget(model, users):
    """Bytes of so many of the longest histories, of the host and of the device."""
    example = model.encode([model.short_query()], model.buckets[0])
    return int(users * example.nbytes * 1.01)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tiers", ["host", "small host", "device", "device alone"])
def test_random_streams_of_events(form, tiers):
    """Users come back with none, some or many new events, in any mixture.

    Evictions and restarts lie between them.
    """
    model = model_of(form)
    fits = budget(model, USERS)
    options = {
        "host": {},
        "small host": dict(host_bytes=budget(model, 2)),
        "device": dict(device_bytes=fits, host_bytes=budget(model, 3)),
        "device alone": dict(device_bytes=fits, host_bytes=0),
    }[tiers]
    rng = np.random.default_rng(5)
    lives, seen = [history(seed) for seed in range(6)], np.zeros(6, int)
    kept, reference = service_of(model, **options), anew(model)
    assert (kept.users.pool is not None) == tiers.startswith("device")
    extended = hits = 0
    for call in range(14):
        some = rng.choice(6, rng.integers(1, USERS + 1), replace=False)
        seen[some] = np.minimum(seen[some] + rng.choice([0, 1, 1, 2, 5], len(some)), 36)
        requests = [asked(lives[user], seen[user], int(rng.integers(100))) for user in some]
        close(scores(kept, *requests), scores(reference, *requests))
        if call == 8:
            before = kept.users.metrics()
            extended, hits = before["extended"], before["hits"]
            kept = service_of(model, **options)  # a restart
    metrics = kept.users.metrics()
    extended += metrics["extended"]
    assert (extended > 3) == (form in GROWING)
    assert metrics["bytes"] <= kept.users.host.max_bytes
    assert set(metrics) == set(kept.users.METRICS)
    if tiers == "device":
        # Where the model reads when a request is made, no history is met twice as it was.
        assert hits + metrics["hits"] > 0 or "biased" in form
        assert 0 < metrics["device_bytes"] <= fits
    reference = reference.users.metrics()
    assert reference["hits"] == reference["extended"] == reference["bytes"] == 0


def test_an_event_costs_one_row():
    """A known user with one new event: all rows but those that change are reused.

    Ten such users at once come in one call.
    """
    model, life = model_of("ULTRA"), history(0)
    service = service_of(model)
    scores(service, asked(life, 8))
    close(scores(service, asked(life, 9)), scores(anew(model), asked(life, 9)))
    metrics = service.users.metrics()
    assert (metrics["extended"], metrics["misses"], metrics["reused_rows"]) == (1, 1, 8 - 2)
    assert metrics["extended_share"] == 0.5
    # The one before is still there, and the first to go.
    scores(service, asked(life, 8))
    assert service.users.metrics()["hits"] == 1
    # Another name, the same events: what counts is the history.
    scores(service, asked(history(0), 10))
    assert service.users.metrics()["extended"] == 2


def test_a_history_that_shares_a_prefix_and_then_differs():
    """In its items, times, actions or features: encoded anew, and exact."""
    model, life = model_of("a mask a layer"), history(1)
    service, reference = service_of(model), anew(model)
    scores(service, asked(life, 9))
    for name, value in (("history", 30), ("rating", 1.0), ("is_click", 7.0), ("skill", 5.0)):
        if name == "is_click":
            value = 1.0 - life[name][5]
        elif life[name][5] == value:
            value = life[name][5] + 1 if name != "history" else 29
        other = life | {name: [*life[name][:5], value, *life[name][6:]]}
        close(scores(service, asked(other, 10)), scores(reference, asked(other, 10)))
    later = life | {"times": [*life["times"][:5], *(time + 9000 for time in life["times"][5:])]}
    close(scores(service, asked(later, 10)), scores(reference, asked(later, 10)))
    shorter = asked(life, 4)
    close(scores(service, shorter), scores(reference, shorter))
    assert service.users.metrics()["extended"] == 0


@pytest.mark.parametrize("form", ["ULTRA", "biased, truncated"])
def test_clocks_that_run_backwards(form):
    """A request at an earlier time than the one before, with more events, fewer, or the same."""
    model, life = model_of(form), history(2)
    service, reference = service_of(model), anew(model)
    for count, later in ((6, 500), (6, 100), (7, 3), (7, 900), (7, 0), (6, 50), (8, 1)):
        request = asked(life, count, later)
        close(scores(service, request), scores(reference, request))
    with pytest.raises(ValueError, match="times go back from .*: give the history oldest first"):
        scores(service, asked(life, 6, -1))
    back = asked(life, 6) | {"times": life["times"][:6][::-1]}
    with pytest.raises(ValueError, match="times go back from"):
        scores(service, back)


@pytest.mark.parametrize("device", [False, True])
def test_a_prefix_that_was_evicted_between_two_calls(device):
    model = model_of("ULTRA")
    options = (
        dict(device_bytes=budget(model, USERS), host_bytes=0)
        if device
        else dict(host_bytes=budget(model, 1))
    )
    service, reference = service_of(model, **options), anew(model)
    life = history(3)
    scores(service, asked(life, 12))
    for seed in range(10, 16):
        scores(service, asked(history(seed), 12))
    close(scores(service, asked(life, 12 + 0)), scores(reference, asked(life, 12)))
    assert service.users.metrics()["hits"] == 0
    assert len(service.users._start_of) == len(service.users)


@pytest.mark.parametrize("device", [False, True])
def test_a_call_of_a_history_and_of_those_that_continue_it(device):
    """The budget just holds them: nobody who is in the call is evicted by it, from either tier."""
    model = model_of("ULTRA")
    options = dict(device_bytes=budget(model, USERS), host_bytes=budget(model, 2))
    service = service_of(model, **options if device else dict(host_bytes=budget(model, 6)))
    reference, life, other = anew(model), history(30), history(31)
    for first in (life, other, history(32), history(33), history(34)):
        scores(service, asked(first, 9))
    for requests in (
        [asked(life, 9), asked(life, 10), asked(life, 11)],
        [asked(other, 10), asked(other, 9), asked(life, 11)],
        [asked(life, 12), asked(life, 12), asked(other, 11)],
    ):
        close(scores(service, *requests), scores(reference, *requests))
    assert service.users.metrics()["extended"] >= 3


def test_a_budget_smaller_than_one_user(caplog):
    """Answers are exact.

    A device budget that a call may not fit into is named, and host memory is used.
    """
    model, life = model_of("ULTRA"), history(4)
    with caplog.at_level(logging.WARNING):
        service = service_of(model, device_bytes=budget(model, 1), host_bytes=300)
    assert service.users.pool is None and "Raise the budget, or lower max_users" in caplog.text
    reference = anew(model)
    for count in (5, 6, 7):
        request = asked(life, count)
        close(scores(service, request), scores(reference, request))
    assert len(service.users) == 0 and service.users.metrics()["misses"] == 3


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "fp8"])
def test_host_memory_in_fewer_bits(kind):
    """Users who left the device come back near their exact scores, in fewer bytes."""
    model, life = model_of("ULTRA"), history(5)
    exact = scores(anew(model), asked(life, 12))
    sizes = []
    for host_kind in ("same", kind):
        service = service_of(model, device_bytes=budget(model, USERS), host_kind=host_kind)
        scores(service, asked(life, 12))
        for seed in range(20, 28):
            scores(service, asked(history(seed), 12))
        sizes.append(service.users.host.bytes)
        got = scores(service, asked(life, 12))
        assert service.users.metrics()["host_hits"] == 1
        error = np.abs(got - exact).max()
        assert error < (2e-5 if host_kind == "same" else 0.05 * np.abs(exact).max())
    assert sizes[1] < sizes[0] and error > 0


@pytest.mark.parametrize(
    ("tiers", "host_table"), [({}, None), (dict(device_bytes=10**6), None), ({}, "int4")]
)
def test_nothing_is_compiled_after_the_warm_up(tiers, host_table):
    task, ranker, _ = built("a mask a layer")
    vocabulary = Codebook.of(task.config, task.interactions)
    model = ScoringModel(
        ranker, task.config, vocabulary, task.recipe.tasks, max_users=2, host_table=host_table
    )
    service = service_of(model, **tiers)
    programs = service.warm_up()
    assert len(service.users) == 0 and not service.users._starts
    for count in (0, 1, 2, 4, 9, 12):
        scores(service, asked(history(6), count), asked(history(7), count))
        scores(service, asked(history(6), count + 1))
    assert service.users.metrics()["extended"] > 0
    assert model.programs == programs


def test_full_histories_drop_their_oldest_events_in_blocks():
    """A full history is extended until the next block is dropped.

    Without blocks it is encoded anew.
    """
    assert [kept_in_blocks(count, 80) for count in (0, 79, 80, 81, 90, 91)] == [
        0,
        79,
        80,
        71,
        80,
        71,
    ]
    assert [kept_in_blocks(count, 5) for count in (5, 6, 7)] == [5, 5, 5]
    task, _, _ = built("ULTRA")
    config = with_(task.config, data__max_history=24, model__truncate_length=9)
    task = tasks.of(config, task.interactions)
    ranker, life = task.recipe.model(task.recipe.init(0).params), history(8)
    extended = []
    for blocks in (False, True):
        vocabulary = Codebook.of(config, task.interactions)
        model = ScoringModel(
            ranker, config, vocabulary, task.recipe.tasks, max_users=2, drop_blocks=blocks
        )
        service, reference = service_of(model), anew(model)
        for count in range(22, 32):
            request = asked(life, count)
            close(scores(service, request), scores(reference, request))
        extended.append(service.users.metrics()["extended"])
    # Of 22 to 31 events, 23 and 24 continue; with blocks of three only 25, 28 and 31 do not.
    assert extended == [2, 6]
