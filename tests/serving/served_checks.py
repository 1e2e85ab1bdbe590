"""What any deployment must stand, whichever kind of run it serves."""

import asyncio
import contextlib
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

from scripts.load.loop import closed_loop
from scripts.load.requests import Sent
from scripts.load.serve import mixed

PAGE = Path(__file__).parents[2] / "docs" / "http_service.md"


def page_example(path):
    """A request of the page, and what it says is the response."""
    found = re.search(
        rf"curl -s localhost:8000{path} [^\n]*-d '([^\n]*)'\n```\n\n```json\n(.*?)\n```",
        PAGE.read_text(),
        re.S,
    )
    return json.loads(found[1]), json.loads(found[2])


def shape(value):
    """Names and types of a response, of lists the first entry."""
    if isinstance(value, dict):
        return {name: shape(part) for name, part in value.items()}
    return [shape(part) for part in value[:1]] if isinstance(value, list) else type(value)


def stands_good_and_bad_requests(served, requests, known, count):
    """requests: the module of a kind of run that makes them and knows right answers."""
    result = asyncio.run(mixed(served, requests, known, count))
    assert (result["wrong_status"], result["wrong_answers"], result["hung"]) == (0, 0, 0)
    assert (
        result["requests"] == count
        and result["bad"] == count // 5
        and set(result["statuses"]) >= {"200", "400", "422"}
    )


HALF_HEAD = b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type:"
HALF_BODY = HALF_HEAD + b" application/json\r\ncontent-length: 9999\r\n\r\n{"


def stands_slow_clients(served, good, bodies, heads):
    """Clients that never end a body, and others that never end the head of a request, keep nobody
    waiting: good requests and the health check are answered in between."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))
    port = int(served.url.rsplit(":")[-1])
    health = Sent(b"", path="/-/healthz", method="GET")

    async def run():
        async with contextlib.AsyncExitStack() as connections:
            for sent in [HALF_BODY] * bodies + [HALF_HEAD] * heads:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                connections.callback(writer.close)
                writer.write(sent)
            return await closed_loop(served.url, [good, health] * 10, 2)

    try:
        seen = asyncio.run(run())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    assert [one.status for one in seen] == [200] * 20
    assert max(one.ended - one.began for one in seen) < 4  # a half head lives for 5 s


def stands_fuzzing(served, folder, examples):
    """Schemathesis makes requests inside and outside the schema.

    It cannot know that users and ids exist, so valid ones may be refused.
    """
    done = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis",
            "run",
            f"{served.url}/openapi.json",
            f"--max-examples={examples}",
            "--seed=1",
            "--exclude-checks=positive_data_acceptance",
            "--generation-database=none",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("[1-9] passed", done.stdout), done.stdout
