"""A deployment of a ranking run at small size, and its requests from a file.

These tests show what `test_serve` does not show of the parts that both share.
"""

import asyncio
import io
import json
import socket
import urllib.request

import portpicker
import psutil
import pytest
from rich.console import Console

from scripts.load import scores as load_scores
from scripts.load.loop import closed_loop, deployment
from scripts.load.requests import Sent
from tests.ranking.small_rank import rank_config, write_answers
from tests.serving.served_checks import stands_fuzzing, stands_good_and_bad_requests
from ultra_hstu.serving.front.lines import answer_lines
from ultra_hstu.serving.service import ServingOptions, open_service
from ultra_hstu.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve_scores")
    write_answers(root / "raw")
    train(rank_config(root, epochs=1), root / "run", console=Console(quiet=True))
    return str(root / "run")


@pytest.fixture(scope="module")
def service(folder):
    return open_service(folder, options=ServingOptions(max_users=2))  # few programs


@pytest.fixture(scope="module")
def known(service):
    """Good requests and their answers by the model in this process."""
    return load_scores.checked(service, count=60, events=10, seed=1)


def answers_of(served, *sent):
    return asyncio.run(closed_loop(served.url, sent, 1))


def an_answer_and_its_description(served, known, folder):
    [seen] = answers_of(served, known[0])
    assert seen.status == 200 and load_scores.right(known[0], seen.body)
    with urllib.request.urlopen(f"{served.url}/openapi.json", timeout=60) as response:
        described = json.loads(response.read())
    assert (
        set(described["paths"]) == {"/score", "/items", "/user", "/health"}
        and "Request" not in described["components"]["schemas"]
    )
    assert set(described["components"]["schemas"]["ScoreRequest"]["properties"]) >= {
        "user",
        "history",
        "candidates",
        "features",
    }


REFUSED = [
    (b'{"user": 1, "candidates": [NaN]}', 422, "candidates.0: Input should be a valid integer"),
    (b'{"user": 9999, "candidates": [1]}', 422, "unknown user 9999"),
    (
        json.dumps({"user": 1, "candidates": [1] * 4097}).encode(),
        422,
        "candidates: List should have at most 4096 items",
    ),
    (b" " * (2**20 + 1), 413, "Content Too Large"),
]


def what_is_refused_is_told_why(served, known, folder):
    seen = answers_of(
        served,
        *(Sent(body, path="/score") for body, _, _ in REFUSED),
        Sent(b'{"user": 1}', path="/recommend"),
        *(Sent(b"", path=path, method="GET") for path in ("/", "/items", "/user?user=1")),
    )
    assert [one.status for one in seen] == [*(status for _, status, _ in REFUSED), *[404] * 4]
    for one, (_, _, message) in zip(seen, REFUSED, strict=False):
        assert message in one.body.decode()
    for one in seen[len(REFUSED) :]:  # another run's path, and the page, which is off
        assert "this run answers POST /score; /docs describes it" in one.body.decode()


def nobody_answers_without_replicas(served, known, folder):
    """The proxy says so, in answers and in the health check, as while the service starts."""
    for replica in served.replicas():
        replica.kill()
    health = Sent(b"", path="/-/healthz", method="GET")
    seen = answers_of(served, *[known[0], health] * 200)
    nobody = [one for one in seen if one.sent is known[0] and one.status == 503]
    assert b"the service is starting, or replaces one" in nobody[-1].body
    assert 503 in [one.status for one in seen if one.sent is health]


def a_killed_server_leaves_nothing_behind(served, known, folder):
    """So the next one can start at once: last, since this one is gone."""
    started = psutil.Process(served.process.pid).children(recursive=True)
    served.process.kill()
    _, alive = psutil.wait_procs(started, timeout=5)
    # Agents of Ray, which hold no port of ours, take longer.
    assert not [process.name() for process in alive if not process.name().endswith("Agent")]
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", int(served.url.rsplit(":")[-1])))


def good_and_bad_requests_mixed(served, known, folder):
    stands_good_and_bad_requests(served, load_scores, known, 300)


def fuzzing_from_its_own_description(served, known, folder):
    stands_fuzzing(served, folder, 30)


CHECKS = [
    an_answer_and_its_description,
    what_is_refused_is_told_why,
    good_and_bad_requests_mixed,
    fuzzing_from_its_own_description,
    nobody_answers_without_replicas,
    a_killed_server_leaves_nothing_behind,
]


@pytest.mark.usefixtures("one_deployment")
def test_the_deployment(folder, known, subtests):
    """One deployment for all checks, in one test so that parallel test processes start it once. Its
    item table is in host memory, its users are in both tiers, and nobody is shown them."""
    with deployment(
        folder,
        "--cache_mib=1",
        "--device_cache_mib=1",
        "--host_table=float32",
        "--batch=2",
        "--nopage",
        port=portpicker.pick_unused_port(),
    ) as served:
        for check in CHECKS:
            with subtests.test(check.__name__):
                check(served, known, folder)


def test_the_checks_of_answers_can_fail(known):
    other = next(
        sent for sent in known[1:] if sent.expected.candidates != known[0].expected.candidates
    )
    assert not load_scores.right(known[0], other.expected.model_dump_json().encode())


def test_a_file_of_requests(service, known, capsys):
    lines = [*(sent.body.decode() for sent in known[:20]), '{"user": 1}', "nonsense"]
    answer_lines(service, io.BytesIO("\n".join(lines).encode()))
    said = capsys.readouterr()
    *answers, missing, nonsense = said.out.splitlines()
    assert (
        all(
            load_scores.right(sent, line.encode())
            for sent, line in zip(known, answers, strict=False)
        )
        and len(answers) == 20
    )
    assert json.loads(missing)["error"].startswith("candidates: Field required") and json.loads(
        nonsense
    )["error"].startswith("Invalid JSON")
    assert "22 requests, 2 refused" in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tables": "int4"}, "tables=int4 is for retrieval runs"),
        ({"block": [1]}, "block hides items from recommendations"),
    ],
)
def test_options_of_retrieval_runs_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        open_service(folder, options=ServingOptions(**options))
