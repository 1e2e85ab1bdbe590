"""Requests: what is refused and why, what is ignored, users kept encoded, and files of requests."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydantic
import pytest
from hypothesis import given
from rich.console import Console

from tests import commands
from tests.serving import fuzzed
from tests.serving.http_unchecked import http
from tests.serving.served_checks import page_example, shape
from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.quantization import served_table
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.serving.front import lines
from ultra_hstu.serving.schema import (
    MAX_BODY_BYTES,
    MAX_EVENTS,
    MAX_K,
    ItemSearch,
    Request,
    Response,
    UserSearch,
    problem,
)
from ultra_hstu.serving.scoring import RunData
from ultra_hstu.serving.service import RecommendService, ServingOptions, open_service
from ultra_hstu.serving.users import ENTRY_BYTES, EncodedUsers
from ultra_hstu.train import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("service")
    train(small_config(root / "data", epochs=1), root / "run", console=Console(quiet=True))
    return str(root / "run")


@pytest.fixture(scope="module")
def model(folder):
    return RecommendationModel(folder, max_users=4)


@pytest.fixture
def service(folder, model):
    return RecommendService(model, RunData(folder))


def answer(service, **request):
    return service.answer([service.prepare(Request(**request))])[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{}", "give either user or history"),
        ('{"user": 1, "history": [1]}', "give either user or history"),
        ('{"user": null}', "give either user or history"),
        ('{"history": [1.5]}', "history.0: Input should be a valid integer (and 1 more)"),
        ('{"history": [true]}', "history.0: Input should be a valid integer (and 1 more)"),
        ('{"history": [NaN]}', "history.0: Input should be a valid integer (and 1 more)"),
        ('{"history": 5}', "history: Input should be a valid array"),
        ('{"history": [1], "k": 0}', "k: Input should be greater than or equal to 1"),
        ('{"history": [1], "k": "3"}', "k: Input should be a valid integer"),
        (f'{{"history": [1], "k": {MAX_K + 1}}}', "k: Input should be less than or equal to 1000"),
        ('{"history": [1], "times": [1, 2]}', "1 items but 2 values of 'times': give one an item"),
        (
            '{"history": [1], "actions": {"rating": []}}',
            "1 items but 0 values of 'rating': give one an item",
        ),
        (
            '{"history": [1], "actions": {"rating": [NaN]}}',
            "actions.rating.0: Input should be a finite number",
        ),
        ('{"user": 1, "times": [1]}', "times and actions go with a history"),
        ('{"history": [1], "colour": 1}', "colour: there is no such field"),
        (
            '{"history": [9223372036854775808]}',
            "history.0: Input should be less than or equal to 9223372036854775807 (and 1 more)",
        ),
        (
            json.dumps({"history": [1] * (MAX_EVENTS + 1)}),
            "history: List should have at most 8192 items after validation, not 8193",
        ),
        ("[1]", "Input should be an object"),
        ("{", "Invalid JSON: EOF while parsing an object at line 1 column 1"),
    ],
)
def test_requests_outside_the_schema(body, message):
    with pytest.raises(pydantic.ValidationError) as refused:
        Request.model_validate_json(body)
    assert problem(refused.value.errors()).startswith(message)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"user": 9999}, "unknown user 9999"),
        ({"user": "nobody"}, "unknown user 'nobody'"),
        ({"history": ["nothing"]}, "item ids of this catalogue are whole numbers, not 'nothing'"),
        ({"history": [1], "k": 121}, "k=121 must be in 1..120"),
        ({"history": [1, 2], "times": [2, 1]}, "times go back from 2 to 1"),
        ({"history": [1], "times": [5], "now": 4}, "times go back from 5 to 4"),
        ({"history": [1, 2], "times": [0, 2**31]}, "Give seconds, not milliseconds"),
    ],
)
def test_requests_that_cannot_be_answered(service, request_, message):
    with pytest.raises(ValueError, match=message.replace(".", "[.]")):
        service.prepare(Request(**request_))


def test_unknown_items_are_ignored_with_their_times_and_a_warning(service):
    got = answer(service, history=[5, 777, 6, 888], times=[1, 2, 3, 4], block=[999], k=5)
    assert got.warnings == [
        "history: 2 of 4 items are not in the catalogue and were ignored: 777, 888",
        "block: 1 of 1 items are not in the catalogue and were ignored: 999",
    ]
    assert got.items == answer(service, history=["5", 6], times=[1, 3], k=5).items


def test_repeated_items_are_events_of_their_own(service):
    assert answer(service, history=[5, 5, 5]).items != answer(service, history=[5]).items


def test_without_a_history_the_most_popular_items(folder, service):
    task = tasks.load(service.model.config)
    count_I = np.bincount(
        task.interactions.items[
            np.concatenate([np.arange(a, b + 1) for a, b in zip(*train_rows(task), strict=True)])
        ]
    )
    got = answer(
        service, history=[777], k=7, block=[service.model.catalog.raw_ids[count_I.argmax()].item()]
    )
    assert (
        got.source == "popularity"
        and got.warnings[1] == "the history is empty: these are the most popular items"
    )
    assert [item.score for item in got.items] == np.sort(count_I)[::-1][1:8].tolist()
    assert answer(service, history=[5]).source == "model"


def train_rows(task):
    return task.splits.train.start, task.splits.train.stop


def test_a_user_is_the_history_of_the_data(service):
    interactions = service.data.interactions
    events = interactions.history(7)
    raw = interactions.catalog.decode(interactions.items[events]).tolist()
    assert (
        answer(service, user=7)
        == answer(service, user="7")
        == answer(service, history=raw, times=interactions.timestamps[events].tolist())
    )


def test_answers_keep_the_order_of_requests(service):
    requests = [{"history": [3]}, {"history": []}, {"user": 7}, {"history": [3]}]
    together = service.answer([service.prepare(Request(**request)) for request in requests])
    assert [one.source for one in together] == ["model", "popularity", "model", "model"]
    assert together[0] == together[3] and together[0].items == answer(service, history=[3]).items


def test_a_known_user_gets_the_same_bits(service):
    """Encoded once beside others, then looked up, alone and beside others."""
    requests = [service.prepare(Request(history=list(range(1, 3 + i)))) for i in range(4)]
    first = service.answer(requests)
    assert (service.users.hits, service.users.misses, len(service.users)) == (0, 4, 4)
    assert [service.answer([one])[0] for one in requests] == first
    assert service.answer(requests[::-1]) == first[::-1]
    assert (service.users.hits, service.users.misses) == (8, 4)
    assert RecommendService(service.model, service.data, cache_bytes=0).answer(requests) == first


def test_all_that_is_encoded_is_in_the_key(folder, model):
    base = dict(items=[3, 4], times=[10, 20])
    key = model.query(**base).key
    assert (
        key == model.query([3, 4], [1010, 1020], k=3, block=[9]).key
    )  # times count from the first
    for other in (
        dict(items=[4, 3]),
        dict(times=[10, 21]),
        dict(items=[3, 4, 4], times=[10, 20, 20]),
        dict(now=21),
    ):
        assert model.query(**base | other).key != key
    signalled = RecommendationModel(folder)
    signalled.config = with_(model.config, rank__signals=("rating",))
    keys = {signalled.query(**base, actions={"rating": [5, last]}).key for last in (3, 4)}
    assert len(keys) == 2 and key not in keys


def test_users_are_dropped_least_recently_used_first():
    vector = np.ones(16, np.float32)
    users = EncodedUsers(3 * (vector.nbytes + ENTRY_BYTES) + 10)
    for name in (b"a", b"b", b"c"):
        users.put(name, vector)
    users.get(b"a")
    users.put(b"c", vector)
    users.put(b"d", vector)
    assert [name in users for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert users.bytes == 3 * (vector.nbytes + ENTRY_BYTES) <= users.max_bytes
    with pytest.raises(KeyError):
        users.get(b"b")


def test_kept_vectors_hold_no_batch_alive():
    users = EncodedUsers(10**6)
    batch = np.ones((16, 16), np.float32)
    users.put(b"a", batch[3])
    assert users.get(b"a").base is None


def test_actions_that_a_run_does_not_read(service):
    got = answer(service, history=[3], actions={"rating": [5], "mood": [1]})
    assert got.warnings == ["actions 'mood', 'rating' are not read by this run and were ignored"]
    assert got.items == answer(service, history=[3]).items


def test_the_request_of_the_readme(service):
    """It is answered as it says: three items, in this form."""
    request, said = page_example("/recommend")
    got = answer(service, **request | {"user": 7}).model_dump()
    assert shape(got) == shape(said) and len(got["items"]) == len(said["items"]) == request["k"]
    assert Response.model_validate(said).model_dump() == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(host_table="int4"), "host_table=int4 is for ranking runs.*use tables=int8"),
        (dict(kind="int8"), "cache_kind=int8 is for ranking runs"),
        (dict(host_kind="fp8"), "host_cache_kind=fp8 is for ranking runs"),
        (dict(device_bytes=2**21), "device_cache_mib=2 is for ranking runs"),
        (dict(drop_blocks=True), "drop_blocks=True is for ranking runs"),
    ],
)
def test_options_of_ranking_runs_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        open_service(folder, options=ServingOptions(**options))


LINES = [
    '{"user": 7, "k": 2}',
    "nonsense",
    '{"history": [3, 999], "k": 3}',
    "",
    '{"user": 9999}',
    '{"history": []}',
]


def test_a_file_of_requests(folder, tmp_path, service):
    path = tmp_path / "requests.jsonl"
    many = [json.dumps({"history": [1 + i % 100], "k": 1}) for i in range(70)]
    long = '{"history": [' + " " * MAX_BODY_BYTES + "3]}"
    path.write_text("\n".join([*LINES, long, *many]))
    done = commands.run("experiments.recommend", f"--workdir={folder}", f"--requests={path}")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 76 and "76 requests, 3 refused" in done.stderr
    assert answers[1]["error"].startswith("Invalid JSON")
    assert (
        answers[3]["error"].startswith("unknown user 9999")
        and answers[5]["error"] == f"a request has at most {MAX_BODY_BYTES} bytes"
    )
    assert answers[4]["source"] == "popularity" and len(answers[2]["warnings"]) == 1
    for one, line in zip(answers[6:], many, strict=True):
        expected = answer(service, **json.loads(line))
        assert one["items"][0]["item"] == expected.items[0].item
        assert one["items"][0]["score"] == pytest.approx(expected.items[0].score, abs=1e-5)


def test_a_program_may_wait_for_each_answer(folder):
    command = [sys.executable, "-m", "experiments.recommend", f"--workdir={folder}", "--requests=-"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for k in (1, 2):
            process.stdin.write(json.dumps({"history": [3], "k": k}) + "\n")
            process.stdin.flush()
            assert len(json.loads(process.stdout.readline())["items"]) == k
        process.stdin.close()
        assert process.wait(timeout=60) == 0


FIELDS = ("user", "history", "times", "actions", "now", "k", "block")


def wanted(service, body):
    """The definition: (known items of the history, their times, now, k, hidden items). Raises
    NotAnswered for a request that is refused."""
    data, items = service.data.interactions, service.catalog.num_items
    request = fuzzed.read(body)
    found = fuzzed.history_of(request, items, FIELDS)
    k, block = request.get("k", 10), request.get("block", [])
    fuzzed.require(fuzzed.is_integer(k) and 1 <= k <= items)
    blocked = fuzzed.dense_ids(block, items)
    if found is None:
        events = data.history(fuzzed.user_of(request["user"], data.users.tolist()))
        history, seconds = data.items[events].tolist(), data.timestamps[events].tolist()
    else:
        history, seconds, _ = found
    now = request.get("now")
    fuzzed.require_order(seconds, now, service.model.config.data.max_history)
    return history, seconds, now, k, {*history, *blocked} - {0}


@given(fuzzed.bodies(fuzzed.requests(users=[1, 7, "7", "60"], actions=["rating", "mood"])))
@fuzzed.BOUNDED
def test_any_request_gets_the_defined_answer_or_a_reason(service, body):
    query = lines._query(service, body)
    try:
        history, seconds, now, k, hidden = wanted(service, body)
    except fuzzed.NotAnswered:
        assert isinstance(query, str) and query
        return
    assert not isinstance(query, str), query
    [got] = service.answer([query])
    if history:
        known = service.model.query(history, seconds, now=now)
        [vector] = service.model.encode([known]).astype(np.float64)
        table = np.asarray(served_table(service.model.params), np.float64)
        scores = table @ vector / np.maximum(np.linalg.norm(table, axis=1), 1e-6)
    else:
        scores = service.data.count_I
    left = sorted({*range(1, len(scores))} - hidden, key=lambda item: -scores[item])[:k]
    assert got.source == ("model" if history else "popularity") and len(got.items) == len(left)
    for item, best in zip(got.items, left, strict=True):
        assert item.item not in hidden
        assert item.score == pytest.approx(scores[item.item], abs=1e-5)
        assert item.score == pytest.approx(scores[best], abs=1e-5)


TIMES = [1112486027, 1112489627, 1112572427]


@pytest.mark.parametrize(
    ("times", "now", "message"),
    [
        (TIMES, TIMES[-1] + 60, None),
        ([-5, 0, 10], None, None),
        ([-(2**31), 2 - 2**31, -5], -1, None),
        ([2**32 - 3, 2**32 - 2, 2**32 - 1], 2**32 - 1, None),
        (TIMES[:1] * 3, 1893456000, None),
        ([1000 * time for time in TIMES], None, "times.0: .* not 1112486027000: give whole sec"),
        ([10**9 * time for time in TIMES], None, "times.0: .*: give whole seconds since 1970"),
        (TIMES, 1000 * TIMES[-1], "now: .* not 1112572427000: give whole seconds since 1970"),
        (None, 1000 * TIMES[-1], "now: .* not 1112572427000: give whole seconds since 1970"),
        ([time + 0.5 for time in TIMES], None, "times.0: .* not 1112486027.5: give whole seconds"),
        (["2005-04-02T23:53:47Z"] * 3, None, "times.0: .*'2005-04-02T23:53:47Z': give whole sec"),
        ([2**32 - 2, 2**32 - 1, 2**32], None, "times.2: .* not 4294967296"),
        ([-(2**31) - 1, 0, 2], None, "times.0: .* not -2147483649"),
    ],
)
def test_times_are_seconds_by_their_range(service, times, now, message):
    request = {"history": [3, 5, 7], "times": times, "now": now, "k": 4}
    query = lines._query(service, json.dumps(request).encode())
    if message is None:
        assert len(service.answer([query])[0].items) == 4
    else:
        assert isinstance(query, str) and re.match(message, query)
    if message and now is None and all(isinstance(time, int) for time in times):
        with pytest.raises(ValueError, match="times must be seconds since 1970"):
            service.model.query([3, 5, 7], times)


def test_now_alone_is_seconds_too(service):
    with pytest.raises(ValueError, match="now must be seconds since 1970: 1112572427000 would"):
        service.model.query([3], now=1112572427000)


def test_a_block_list_counts_what_it_does_not_block(folder, caplog):
    best = open_service(folder)
    first = answer(best, history=[3], k=1).items[0].item
    blocked = open_service(folder, options=ServingOptions(block=[str(first), "999", "888"]))
    assert blocked.unknown_blocked == 2
    assert "--block: 2 of 3 items are not in the catalogue and were ignored: '999'" in caplog.text
    assert first not in [item.item for item in answer(blocked, history=[3], k=9).items]


@pytest.mark.parametrize(
    ("content", "said", "error"),
    [
        (b"\xef\xbb\xbf3\r\n5\r\n\r\n999\r\n", "3 items\n--block: 1 of 3 items are not in", ""),
        (b"3\n 5 ", ": 2 items\n", ""),
        (b"\n", ": 0 items\n", ""),
        (b"3,5\n", "", "item ids of this catalogue are whole numbers, not '3,5'"),
        ("3\n".encode("utf-16"), "", "is in UTF-16: save it as UTF-8"),
    ],
)
def test_a_file_of_blocked_items(folder, tmp_path, content, said, error):
    path = tmp_path / "block.txt"
    path.write_bytes(content)
    nowhere = "--host=203.0.113.1"  # it ends before anything is started
    done = commands.run("experiments.serve", f"--workdir={folder}", f"--block={path}", nowhere)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert said in done.stdout
    assert str(path) in done.stdout + done.stderr
    assert (error or "203.0.113.1 --port=8000 cannot be listened on") in done.stderr


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_file_of_requests_from_any_editor(service, capsys, end):
    texts = [b'\xef\xbb\xbf{"history": [3], "k": 1}', b"", b" \t", b'{"history": [3], "k": 2}', b""]
    lines.answer_lines(service, io.BytesIO(end.join(texts)))
    said = capsys.readouterr()
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [len(one["items"]) for one in answers] == [1, 2]
    assert "2 requests, 0 refused" in said.err


def run_of(page):
    """What a page was told of its run."""
    found = re.search(r'<script id="run" type="application/json">(.*)</script>', page.html)
    return json.loads(found[1])


def test_the_page_shows_what_a_request_takes(service, monkeypatch):
    """The columns of a user, sent back as a history, get the answer of the user."""
    page = http.Page(service)
    known = page.user(UserSearch(user="21"))
    assert (known.user, known.events, len(known.titles)) == (21, 12, 12)
    sent = answer(service, history=known.history, times=known.times, actions=known.actions or None)
    np.testing.assert_allclose(
        [item.score for item in sent.items],
        [item.score for item in answer(service, user=21).items],
        rtol=1e-5,
    )
    monkeypatch.setattr(http.schema, "MAX_EVENTS", 5)
    newest = page.user(UserSearch(user="21"))
    assert (newest.events, newest.history) == (12, known.history[-5:])
    assert newest.times == known.times[-5:] and newest.titles == known.titles[-5:]


@pytest.mark.parametrize("user", ["61", "9" * 256, "nobody", " "])
def test_the_page_names_unknown_users(service, user):
    with pytest.raises(ValueError, match="unknown user"):
        http.Page(service).user(UserSearch(user=user))


def test_the_page_finds_items(service):
    page, data = http.Page(service), service.data.interactions
    found = page.items(ItemSearch(search="ITEM 40", limit=5))
    assert found.items[0].item == 40 and found.items[0].title.startswith("item 40 of")
    assert found.items[0].events == (data.items == data.catalog.encode([40])[0]).sum()
    popular = page.items(ItemSearch())
    assert (len(popular.items), popular.found, popular.complete) == (20, 120, True)
    counts = [item.events for item in popular.items]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_the_page_needs_nothing_from_elsewhere(service, monkeypatch):
    page = http.Page(service)
    run = run_of(page)
    assert (run["path"], run["items"], run["users"], run["events"]) == ("/recommend", 120, 60, 720)
    assert run["examples"] == [1, 21, 41] and run["actions"] == {}
    assert "://" not in page.html and "@import" not in page.html
    assert re.findall(r'\b(?:src|href)="([^"]*)"', page.html) == ["data:,", "/docs"]
    assert "innerHTML" not in page.html  # titles are text, whatever they hold
    named = dataclasses.replace(service.model.config, name="</script><script>alert(1)</script>")
    monkeypatch.setattr(service.model, "config", named)
    assert run_of(http.Page(service))["name"] == named.name
    assert "alert(1)</script>" not in http.Page(service).html
