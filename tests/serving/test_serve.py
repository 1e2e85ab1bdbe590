"""The online deployment at small size, as users start it.

Answers, load, fuzzing, a killed replica, and that it ends.
"""

import asyncio
import json
import os
import re
import signal
import stat
import urllib.error
import urllib.request
from pathlib import Path

import portpicker
import psutil
import pytest
from rich.console import Console

from scripts.load import requests as load_requests
from scripts.load.loop import closed_loop, deployment
from scripts.load.requests import Sent, bad, checked, right
from scripts.load.serve import kill
from scripts.load.swap import swapped
from tests import commands
from tests.serving.served_checks import (
    stands_fuzzing,
    stands_good_and_bad_requests,
    stands_slow_clients,
)
from tests.small_run import small_config
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.serving.scoring import RunData
from ultra_hstu.serving.service import RecommendService
from ultra_hstu.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    train(small_config(root / "data", epochs=1), root / "run", console=Console(quiet=True))
    return str(root / "run")


@pytest.fixture(scope="module")
def newer(folder):
    """Another run on the same data."""
    config = small_config(Path(folder).parent / "data", epochs=1, seed=7)
    train(config, Path(folder).parent / "newer", console=Console(quiet=True))
    return Path(folder).parent / "newer"


@pytest.fixture(scope="module")
def known(folder):
    """Good requests and their answers by the model in this process."""
    return checked(
        RecommendService(RecommendationModel(folder), RunData(folder)), count=60, events=10, seed=1
    )


def post(url, body, kind="application/json"):
    request = urllib.request.Request(f"{url}/recommend", body, {"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def an_answer_and_its_description(served, known, folder):
    status, answer = post(served.url, known[0].body)
    assert status == 200 and right(known[0], json.dumps(answer).encode())
    with urllib.request.urlopen(f"{served.url}/openapi.json", timeout=60) as response:
        described = json.loads(response.read())
    assert set(described["paths"]) == {"/recommend", "/items", "/user", "/health"}
    assert set(described["components"]["schemas"]["Request"]["properties"]) >= {
        "user",
        "history",
        "times",
        "k",
        "block",
    }


REFUSED = [
    (b'{"history": [NaN]}', 422, "history.0: Input should be a valid integer"),
    (b'{"history": [1], "times": [2, 1]}', 422, "1 items but 2 values of 'times'"),
    (b'{"user": 9999}', 422, "unknown user 9999"),
    (b'{"\\ud800": 1, "history": [1]}', 422, "valid string"),
    (b"{", 422, "JSON decode error"),
    (b"\xff", 400, "There was an error parsing the body"),
    (b" " * (2**20 + 1), 413, "Content Too Large"),
    (b'{"history": [1], "times": [1112486027000]}', 422, "give whole seconds since 1970"),
]


def what_is_refused_is_told_why(served, known, folder):
    for body, status, message in REFUSED:
        got = post(served.url, body)
        assert got[0] == status and message in got[1]
    status, message = post(served.url, b'{"history": [1]}', "text/plain")
    assert status == 415 and "send JSON, with 'content-type: application/json'" in message


def get(url):
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.headers, response.read().decode()


def a_page_to_try_the_run(served, known, folder):
    """It is there, with all that it reads, and may load nothing from elsewhere."""
    headers, page = get(f"{served.url}/")
    assert headers["content-type"].startswith("text/html") and "Add an item" in page
    assert "default-src 'none'" in headers["content-security-policy"]
    paths = set(re.findall(r"ask\([`\"](/\w+)", page))
    assert paths == {"/items", "/user"}
    item = json.loads(get(f"{served.url}/items?search=item+40&limit=1")[1])["items"][0]
    assert item["item"] == 40
    user = json.loads(get(f"{served.url}/user?user=21")[1])
    status, answer = post(served.url, json.dumps({"history": user["history"]}).encode())
    assert status == 200 and answer["source"] == "model"


def slow_clients_keep_nobody_waiting(served, known, folder):
    stands_slow_clients(served, known[0], bodies=330, heads=4200)


def only_its_user_may_stop_the_proxy(served, known, folder):
    """Its admin socket is in a folder of nobody else."""
    proxy, *_ = [
        process
        for process in psutil.Process(served.process.pid).children(recursive=True)
        if process.name() == "haproxy"
    ]
    path = Path(proxy.cmdline()[proxy.cmdline().index("-f") + 1])
    assert (path.parent / "admin.sock").is_socket()
    assert stat.S_IMODE(path.parents[1].stat().st_mode) == 0o700


def only_loopback_answers(served, known, folder):
    listening = {
        c.laddr.ip
        for c in psutil.net_connections("tcp")
        if c.status == "LISTEN" and c.laddr.port == int(served.url.rsplit(":")[-1])
    }
    assert listening == {"127.0.0.1"}


def good_and_bad_requests_mixed(served, known, folder):
    stands_good_and_bad_requests(served, load_requests, known, 500)


def fuzzing_from_its_own_description(served, known, folder):
    stands_fuzzing(served, folder, 60)


def random_bytes(served, known, folder):
    sent = [Sent(os.urandom(1 + 13 * i), good=False) for i in range(60)]
    seen = asyncio.run(closed_loop(served.url, [*sent, *bad(60, seed=5)], 4))
    assert all(400 <= one.status < 500 for one in seen)


def a_killed_replica_loses_what_it_held_at_most(served, known, folder):
    """Last, since it takes a while until the other replica is there again."""
    result = asyncio.run(kill(served, load_requests, known * 5))
    assert result["replicas"] == 2 and result["requests"] == 300
    assert result["lost"] <= result["connections"] and result["lost_before_or_after"] == 0
    assert (result["hung"], result["wrong_answers"], result["replicas_at_the_end"]) == (0, 0, 2)


def a_newer_model_takes_over(served, known, link, newer):
    service = RecommendService(RecommendationModel(str(newer)), RunData(str(newer)))
    answered = checked(service, count=60, events=10, seed=1)
    assert [one.body for one in answered] == [one.body for one in known]
    expected = {"run": known, "newer": answered}
    found = asyncio.run(swapped(served.url, link, newer, expected, 4, 0.5))
    assert (found["lost"], found["wrong"]) == (0, 0), found
    assert all(found["by_version"].values())
    health = json.loads(get(f"{served.url}/health")[1])
    assert health["version"].startswith("newer:") and health["problem"] is None


CHECKS = [
    an_answer_and_its_description,
    what_is_refused_is_told_why,
    a_page_to_try_the_run,
    slow_clients_keep_nobody_waiting,
    only_its_user_may_stop_the_proxy,
    only_loopback_answers,
    good_and_bad_requests_mixed,
    fuzzing_from_its_own_description,
    random_bytes,
    a_killed_replica_loses_what_it_held_at_most,
]


@pytest.mark.usefixtures("one_deployment")
def test_the_deployment(folder, newer, known, subtests, tmp_path):
    """One deployment of two replicas for all checks. All it started must end.

    It is one test so that parallel test processes start the deployment once.
    """
    options, port = ("--replicas=2", "--cache_mib=1"), portpicker.pick_unused_port()
    link = tmp_path / "current"
    link.symlink_to(folder)
    with (
        open(tmp_path / "errors", "w+") as errors,
        deployment(str(link), "--follow_s=0.5", *options, port=port, errors=errors) as served,
    ):
        started = psutil.Process(served.process.pid).children(recursive=True)
        for check in CHECKS:
            with subtests.test(check.__name__):
                check(served, known, folder)
        with subtests.test("a newer model takes over, and no request is lost"):
            a_newer_model_takes_over(served, known, link, newer)
        started += psutil.Process(served.process.pid).children(recursive=True)
        served.process.send_signal(signal.SIGTERM)  # as a supervisor does; Ctrl-C ends the others
        assert served.process.stdout.read().splitlines()[-1].startswith("stopping: ")
        errors.seek(0)
        wrong = r"Traceback|SIGTERM|\.py\", line|will not be applied"
        assert not re.search(wrong, errors.read())
    assert served.process.returncode == 0
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not [process.name() for process in alive]


def test_the_checks_of_answers_can_fail(known):
    other = next(sent for sent in known[1:] if sent.expected.items != known[0].expected.items)
    assert not right(known[0], other.expected.model_dump_json().encode())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=nowhere"], "holds no run"),
        (["--host=203.0.113.1"], "--host=203.0.113.1 --port=8000 cannot be listened on"),
    ],
)
def test_what_cannot_start_is_named_at_once(folder, arguments, message):
    done = commands.run("experiments.serve", f"--workdir={folder}", *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
