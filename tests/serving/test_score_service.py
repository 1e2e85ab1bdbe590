"""Requests for scores: answers are those of the model on the same events.

Also what is refused and why, what is ignored, and users who are kept encoded.
"""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings

from tests.serving import fuzzed
from tests.serving.http_unchecked import http
from tests.serving.served_checks import page_example, shape
from tests.serving.small_serving import built, full_pass, requests
from tests.small_run import with_
from ultra_hstu import serving
from ultra_hstu.data.codebook import Codebook
from ultra_hstu.serving import export
from ultra_hstu.serving.front import lines
from ultra_hstu.serving.schema import (
    MAX_CANDIDATES,
    MAX_EVENTS,
    ItemSearch,
    ScoreRequest,
    ScoreResponse,
    UserSearch,
    problem,
)
from ultra_hstu.serving.scoring import MICRO_BATCH, RunData, ScoringModel
from ultra_hstu.serving.service import EMPTY, ScoreService, ServingOptions, open_service
from ultra_hstu.serving.users import CachedUsers

# Two channels, contextual tokens, interleaved input, a feature, a probability and a value.
FORM = "mixture"


@pytest.fixture(scope="module")
def model():
    task, ranker, _ = built(FORM)
    model = ScoringModel(
        ranker,
        task.config,
        Codebook.of(task.config, task.interactions),
        task.recipe.tasks,
        max_users=8,
    )
    model.buckets = model.buckets[-1:]  # few programs
    return model


@pytest.fixture
def service(model):
    data = RunData.__new__(RunData)  # of data in memory
    data.interactions = built(FORM)[0].interactions
    return ScoreService(model, data, CachedUsers(model))


def answer(service, **request):
    return service.answer([service.prepare(ScoreRequest(**request))])[0]


def counts(service):
    metrics = service.users.metrics()
    return metrics["hits"], metrics["misses"]


def asked_of(number):
    """One of the requests of the full pass, as JSON would hold it."""
    task, _, _ = built(FORM)
    columns, _ = requests(task)
    data, contexts = task.interactions, task.interactions.context_values
    user, target = int(columns["user"][number]), int(columns["target"][number])
    past = slice(0, 0) if number == 1 else slice(int(data.offsets[user]), target)
    targets = slice(target, target + int(columns["count"][number]))
    words = {name: values[data.contexts[name][user]] for name, values in contexts.items()}
    return {
        "history": data.items[past].tolist(),
        "times": data.timestamps[past].tolist(),
        "actions": {name: values[past].tolist() for name, values in data.actions.items()},
        "context": {name: word for name, word in words.items() if word},
        "candidates": data.items[targets].tolist(),
        "features": {"skill": data.actions["skill"][targets].tolist()},
        "now": int(data.timestamps[target]),
    }


def scores_of(given):
    return np.array([list(candidate.scores.values()) for candidate in given.candidates])


def values_of(logit_CK):
    """Of a binary task and of a value."""
    return np.stack(
        [1 / (1 + np.exp(-np.asarray(logit_CK, np.float64)[:, 0])), logit_CK[:, 1]], axis=1
    )


def test_scores_are_those_of_the_model(service):
    """Users of different histories (one has none) and numbers of candidates in few calls.

    Scores are those of `serving.score` and, where times agree, of a full forward pass.
    """
    history, candidates, logit_CK = full_pass(FORM)
    counts = np.diff(candidates.offsets)
    at_once = serving.Candidates(
        candidates.item_C,
        candidates.feature_CF,
        np.repeat(history.now_B, counts),
        candidates.offsets,
        np.zeros_like(candidates.item_C),
    )
    ranker = service.model.ranker
    cache = serving.encode_history(ranker, history, bucket=service.model.buckets[0])
    want = values_of(
        serving.score(ranker, cache, at_once, micro_batch=MICRO_BATCH, bucket=8 * MAX_CANDIDATES)
    )
    given = [ScoreRequest.model_validate_json(json.dumps(asked_of(number))) for number in range(7)]
    prepared = [service.prepare(request) for request in given]
    got = service.answer(prepared[:4]) + service.answer(prepared[4:])
    np.testing.assert_allclose(np.concatenate([scores_of(one) for one in got]), want, atol=2e-5)
    for one, whole in zip(
        got, np.split(values_of(logit_CK), candidates.offsets[1:-1]), strict=True
    ):
        np.testing.assert_allclose(scores_of(one)[0], whole[0], atol=2e-5)
    assert [EMPTY in one.warnings for one in got] == [number == 1 for number in range(7)]
    assert [one.events == 0 for one in got] == [number == 1 for number in range(7)]
    assert [[scored.item for scored in one.candidates] for one in got] == [
        request.candidates for request in given
    ]


def test_evaluation_at_the_time_of_the_request_scores_as_serving_does(service):
    """At `now`, and without it at the time of the last event."""
    task, _, params = built(FORM)
    logits, seen = jax.jit(task.recipe.logits), []
    for time in ("target", "request", "last"):
        columns, batch = requests(task.with_config(with_(task.config, eval__time=time)))
        place_M = np.arange(task.config.rank.targets)
        real_P = (place_M < np.asarray(columns["count"])[:, None]).reshape(-1)
        seen.append(values_of(np.asarray(logits(params, batch))[real_P]))
    served = []
    for time in ("request", "last"):
        asked = [asked_of(number) for number in range(7)]
        given = [one if time == "request" else one | {"now": None} for one in asked]
        prepared = [service.prepare(ScoreRequest(**one)) for one in given]
        served.append(np.concatenate([scores_of(one) for one in service.answer(prepared)]))
    np.testing.assert_allclose(served, seen[1:], atol=2e-5)
    for one, other in itertools.combinations(seen, 2):
        assert np.abs(one - other).max() > 1e-3


def test_an_exported_model_scores_the_same_and_knows_no_users(service, tmp_path):
    task, ranker, _ = built(FORM)
    path, options = (
        str(tmp_path / "scorer.zip"),
        dict(config=task.config, catalog=task.interactions.catalog, candidates=8, events=8),
    )
    export.save(path, ranker, vocabulary=service.model.vocabulary, **options)
    served = open_service(path, options=ServingOptions(max_users=8))
    served.model.buckets = served.model.buckets[-1:]
    for number in (0, 1):
        assert answer(served, **asked_of(number)) == answer(service, **asked_of(number))
    with pytest.raises(ValueError, match="an exported model: give a history"):
        served.prepare(ScoreRequest(user=1, candidates=[1]))
    export.save(path, ranker, **options)
    with pytest.raises(ValueError, match="does not say what the values of its source mean"):
        open_service(path)
    (tmp_path / "scorer.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="no scorer that can be served"):
        open_service(path)


def test_users_are_kept_and_dropped(service):
    """A known user costs no encoding, `now` makes no new one, and memory is bounded.

    What was dropped is encoded again.
    """
    whole = [asked_of(number) for number in (0, 2, 4)]
    first = [answer(service, **request) for request in whole]
    assert counts(service) == (0, 3) and len(service.users) == 3
    again = service.answer([service.prepare(ScoreRequest(**request)) for request in whole])
    for one, other in zip(first, again, strict=True):
        np.testing.assert_allclose(scores_of(one), scores_of(other), atol=1e-5)
    later = answer(service, **whole[0] | {"now": whole[0]["now"] + 10**6})
    assert counts(service) == (4, 3) and not np.allclose(scores_of(later), scores_of(first[0]))
    other = answer(
        service,
        **whole[0] | {"actions": whole[0]["actions"] | {"rating": [1] * len(whole[0]["history"])}},
    )
    assert counts(service) == (4, 4) and not np.allclose(scores_of(other), scores_of(first[0]))
    held = service.users.host.bytes
    users = CachedUsers(service.model, host_bytes=held // 2)
    small = ScoreService(service.model, service.data, users)
    for request in (*whole, whole[0]):
        np.testing.assert_allclose(
            scores_of(answer(small, **request)), scores_of(answer(service, **request)), atol=1e-5
        )
    assert 0 < len(users) < 3 and users.host.bytes <= held // 2 and counts(small) == (0, 4)


def test_nothing_is_compiled_after_the_warm_up(service):
    service.warm_up()
    programs = service.model.programs
    for numbers, repeats in (([0], 1), ([2, 3], 40), ([0, 2, 4, 6], 3)):
        some = [asked_of(number) for number in numbers]
        for request in some:
            request["candidates"], request["features"] = (
                request["candidates"] * repeats,
                {"skill": request["features"]["skill"] * repeats},
            )
        service.answer([service.prepare(ScoreRequest(**request)) for request in some])
    assert service.model.programs == programs


def test_histories_get_the_smallest_bucket(model):
    task, ranker, _ = built(FORM)
    whole = ScoringModel(ranker, task.config, model.vocabulary, model.kinds, max_users=8)
    assert [bucket.events for bucket in whole.buckets] == [
        {"consumption": 6 * fill, "engagement": 4 * fill} for fill in (1, 2, 4, 8)
    ]
    for counts, bucket in (((0, 0), 0), ((6, 4), 0), ((6, 5), 1), ((25, 1), 3), ((48, 32), 3)):
        events = [serving.Events.of([[1] * count]) for count in counts]
        channels = dict(zip(("consumption", "engagement"), events, strict=True))
        history = serving.History(channels, np.zeros((1, 0), int), np.zeros(1, int))
        assert whole.bucket_of([history]) is whole.buckets[bucket]


def test_a_user_of_the_data_is_the_whole_history(service):
    data = service.data.interactions
    events = data.history(2)
    words = {name: data.context_values[name][codes[2]] for name, codes in data.contexts.items()}
    told = {
        "history": data.items[events].tolist(),
        "times": data.timestamps[events].tolist(),
        "context": words,
    }
    told["actions"] = {name: values[events].tolist() for name, values in data.actions.items()}
    asked = {"candidates": [3, "4", 5], "features": {"skill": [5, 6, 7]}}
    assert (
        answer(service, user=2, **asked)
        == answer(service, user="2", **asked)
        == answer(service, **told, **asked)
    )


def test_the_same_candidate_gets_the_same_scores_and_an_unknown_one_none(service):
    asked = {"user": 0, "candidates": [3, 777, 4, 3], "features": {"skill": [5, 5, 6, 5]}}
    got = answer(service, **asked)
    assert [one.item for one in got.candidates] == [3, 777, 4, 3] and got.candidates[
        0
    ] == got.candidates[3]
    assert got.candidates[1].scores is None
    assert got.warnings == [
        "candidates: 1 of 4 items are not in the catalogue and were ignored: 777"
    ]
    alone = answer(service, user=0, candidates=[4], features={"skill": [6]})
    assert list(alone.candidates[0].scores.values()) == pytest.approx(
        list(got.candidates[2].scores.values()), abs=1e-5
    )
    nothing = answer(service, user=0, candidates=[777], features={"skill": [5]})
    assert nothing.candidates[0].scores is None


def test_the_request_of_the_readme(service):
    """It is answered as it says: every candidate in its order, a score for each task."""
    request, said = page_example("/score")
    asked = request | {"user": 2, "candidates": [1 + item % 30 for item in request["candidates"]]}
    got = answer(service, **asked, features={"skill": [5, 6, 7]}).model_dump()
    assert [one["item"] for one in got["candidates"]] == asked["candidates"]
    assert [one["item"] for one in said["candidates"]] == request["candidates"]
    told = said | {"candidates": [one | {"title": None} for one in said["candidates"]]}
    assert shape(got) == shape(told)
    assert ScoreResponse.model_validate(said).model_dump() == said


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_item_table_in_host_memory(service, kind):
    """The scores of a table on the device, to rounding of the kind; also of users who are held."""
    task, ranker, _ = built(FORM)
    model = ScoringModel(
        ranker,
        task.config,
        service.model.vocabulary,
        task.recipe.tasks,
        max_users=8,
        host_table=kind,
    )
    model.buckets = model.buckets[-1:]
    served = ScoreService(model, service.data, CachedUsers(model))
    bound = {"float32": 2e-5, "bfloat16": 0.05, "int8": 0.05, "int4": 0.6}[kind]
    for _ in range(2):
        for number in (0, 2):
            request = asked_of(number)
            got, want = (scores_of(answer(one, **request)) for one in (served, service))
            np.testing.assert_allclose(got, want, atol=bound * max(1, np.abs(want).max()))
    assert counts(served) == (2, 2)


def test_what_is_ignored_or_missing_is_told(service):
    got = answer(
        service,
        history=[3, 999],
        actions={"rating": [5, 1], "mood": [1, 1]},
        context={"age": "1", "region": "moon"},
        candidates=[4],
        features={"skill": [1e9], "colour": [1]},
    )
    assert got.warnings == [
        "history: 1 of 2 items are not in the catalogue and were ignored: 999",
        "actions 'mood' are not read by this run and were ignored",
        "actions: this run reads 'is_click', 'skill', which was not given and counts as unknown",
        "context: 'region': 'moon' is not known to this run and was ignored",
        "features: 1 of 1 values of 'skill' are not in the data and were ignored",
        "features 'colour' are not read by this run and were ignored",
    ]
    assert got.events == 1
    assert answer(service, history=[], candidates=[4]).warnings[-1] == EMPTY


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"user": 1}', "candidates: Field required"),
        ('{"user": 1, "candidates": []}', "candidates: List should have at least 1 item"),
        ('{"candidates": [1]}', "give either user or history"),
        ('{"user": 1, "history": [1], "candidates": [1]}', "give either user or history"),
        ('{"user": 1, "candidates": [NaN]}', "candidates.0: Input should be a valid integer"),
        ('{"user": 1, "candidates": 1}', "candidates: Input should be a valid array"),
        (
            json.dumps({"user": 1, "candidates": [1] * (MAX_CANDIDATES + 1)}),
            "candidates: List should have at most 4096 items",
        ),
        (
            json.dumps({"history": [1] * (MAX_EVENTS + 1), "candidates": [1]}),
            "history: List should have at most 8192 items",
        ),
        (
            '{"user": 1, "candidates": [1, 2], "features": {"skill": [1]}}',
            "2 candidates but 1 values of 'skill'",
        ),
        (
            '{"user": 1, "candidates": [1], "features": {"skill": [Infinity]}}',
            "features.skill.0: Input should be",
        ),
        ('{"user": 1, "candidates": [1], "context": {"age": "1"}}', "context goes with a history"),
        (
            '{"history": [1], "candidates": [1], "context": {"age": 1}}',
            "context.age: Input should be a valid string",
        ),
        ('{"user": 1, "candidates": [1], "k": 3}', "k: there is no such field"),
    ],
)
def test_requests_outside_the_schema(body, message):
    with pytest.raises(pydantic.ValidationError) as refused:
        ScoreRequest.model_validate_json(body)
    assert problem(refused.value.errors()).startswith(message)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"user": 9999}, "unknown user 9999"),
        ({"history": ["nothing"]}, "item ids of this catalogue are whole numbers, not 'nothing'"),
        (
            {"history": [1], "candidates": ["nothing"]},
            "item ids of this catalogue are whole numbers, not 'nothing'",
        ),
        ({"history": [1, 2], "times": [2, 1]}, "times go back from 2 to 1"),
        ({"history": [1, 2], "times": [0, 2**31]}, "Give seconds, not milliseconds"),
        ({"history": [1], "actions": {"rating": [9]}}, "ratings must lie in 0.5..5"),
        (
            {"history": [1], "actions": {"is_click": [0.5]}},
            "is_click must be 0 or 1, but a value is 0.5",
        ),
    ],
)
def test_requests_that_cannot_be_answered(service, request_, message):
    with pytest.raises(ValueError, match=message.replace(".", "[.]")):
        service.prepare(ScoreRequest(**{"candidates": [1]} | request_))


def test_no_logit_is_too_large_for_a_probability(model):
    with jax.debug_nans(True):
        value_CK = model._values(np.array([[-1e9, -1e9], [0, 3], [1e9, 1e9]], np.float32))
    np.testing.assert_allclose(value_CK, [[0, -1e9], [0.5, 3], [1, 1e9]])


FIELDS = "user history times actions now candidates features context".split()
SKILLS = {5: 1, 6: 2, 7: 3, 8: 4}  # codes of the values that the data has
WORDS = {"age": ["", "1", "2", "3"], "region": ["", "north", "south"]}


def wanted(service, body):
    """The definition: the arguments of `ScoringModel.query` for every known candidate alone, None
    for unknown ones, and the number of events. Raises NotAnswered for a request that is refused."""
    request, require = fuzzed.read(body), fuzzed.require
    found = fuzzed.history_of(request, 30, FIELDS)
    candidates = fuzzed.dense_ids(request.get("candidates"), 30, 4096)
    require(candidates)
    features, context = request.get("features", {}), request.get("context")
    fuzzed.require_columns(features, len(candidates), 1e9)
    if context is not None:
        require(isinstance(context, dict) and found is not None)
        require(all(isinstance(word, str) and len(word) <= 256 for word in context.values()))
    if found is None:
        user = fuzzed.user_of(request["user"], list(range(5)))
        history, seconds, actions, codes = service.data.user(user)
    else:
        history, seconds, places = found
        given = request.get("actions") or {}
        actions = {name: np.array([given[name][i] for i in places]) for name in given}
        if len(places):
            require(all(1 <= round(2 * one) <= 10 for one in actions.get("rating", ())))
            require(all(one in (0, 1) for one in actions.get("is_click", ())))
        codes = {
            name: WORDS[name].index(word)
            for name, word in (context or {}).items()
            if word in WORDS.get(name, ())
        }
    now = request.get("now")
    fuzzed.require_order(list(seconds), now, 10**9)
    skills = [SKILLS.get(value, 0) for value in features.get("skill", [0] * len(candidates))]
    known = {name: actions[name] for name in ("rating", "is_click", "skill") if name in actions}
    times = None if found and request.get("times") is None else np.array(seconds, np.int64)
    alone = [
        dict(
            items=np.array(history, np.int32),
            times=times,
            actions=known,
            context=codes,
            candidates=np.array([item], np.int32),
            feature_CF=np.array([[skill]], np.int32),
            now=now,
        )
        if item
        else None
        for item, skill in zip(candidates, skills, strict=True)
    ]
    clicked = sum(value >= 1 for value in actions.get("is_click", ()))
    return alone, max(min(6, len(history)), min(4, clicked))


@given(
    fuzzed.bodies(
        fuzzed.requests(
            users=[0, 2, "4", 5],
            actions=["rating", "is_click", "skill", "mood"],
            candidates=["skill", "tab"],
            contexts=["age", "region", "mood"],
        )
    )
)
@settings(fuzzed.BOUNDED, max_examples=120)
def test_any_request_gets_the_defined_scores_or_a_reason(service, body):
    query = lines._query(service, body)
    try:
        alone, events = wanted(service, body)
    except fuzzed.NotAnswered:
        assert isinstance(query, str) and query
        return
    assert not isinstance(query, str), query
    [got] = service.answer([query])
    assert got.events == events and len(got.candidates) == len(alone)
    assert [one.scores is None for one in got.candidates] == [one is None for one in alone]
    for one, arguments in [pair for pair in zip(got.candidates, alone, strict=True) if pair[1]][:3]:
        query = service.model.query(**arguments)
        [score] = service.model.score(service.model.encode([query]), [query])
        np.testing.assert_allclose(list(one.scores.values()), score[0], atol=2e-5)


def test_the_page_shows_what_a_request_takes(service):
    """The columns of a user, sent back as a history, get the scores of the user."""
    page, data = http.Page(service), service.data.interactions
    user = int(data.users[3])
    known = page.user(UserSearch(user=str(user)))
    columns = {"times": known.times, "actions": known.actions, "context": known.context}
    features = {"skill": known.actions["skill"][:5]}
    candidates = {"candidates": known.history[:5], "features": features}
    sent = answer(service, history=known.history, **columns, **candidates)
    assert sent.warnings == []
    of_user = answer(service, user=user, **candidates)
    np.testing.assert_allclose(scores_of(sent), scores_of(of_user), atol=1e-5)


def test_the_page_knows_what_a_run_reads(service, model):
    html = http.Page(service).html
    assert '"path": "/score"' in html and '"features": ["skill"]' in html
    run = http.Page(service)._run()
    assert run["tasks"] == model.kinds and list(run["actions"]) == service.reads
    skill = service.data.interactions.actions["skill"]
    assert run["actions"]["skill"] == [skill.min(), skill.max()]
    assert run["context"] == {
        name: list(words[1:]) for name, words in model.vocabulary.contexts.items()
    }


def test_the_page_of_an_exported_model_knows_no_users(model):
    page = http.Page(ScoreService(model, None, CachedUsers(model)))
    run = page._run()
    assert (run["users"], run["events"], run["examples"]) == (None, None, [])
    assert set(run["actions"].values()) == {None}
    assert [item.events for item in page.items(ItemSearch(limit=2)).items] == [None, None]
    with pytest.raises(ValueError, match="this is an exported model: give a history"):
        page.user(UserSearch(user="1"))


def test_the_page_shows_actions_without_a_value(service, monkeypatch):
    data = service.data.interactions
    wide = {name: values.astype(np.float32) for name, values in data.actions.items()}
    wide["skill"][data.history(int(data.users[0])).start] = np.nan
    changed = dataclasses.replace(data, actions=wide)
    monkeypatch.setattr(service.data, "interactions", changed)
    known = http.Page(service).user(UserSearch(user=str(changed.users[0])))
    assert known.actions["skill"][0] is None and known.actions["skill"][1] is not None
