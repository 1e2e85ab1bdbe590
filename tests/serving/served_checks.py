"""What any deployment must stand, whichever kind of run it serves."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

from scripts.load.serve import mixed

README = Path(__file__).parents[2] / "README.md"


def readme_example(path):
    """A request of the README, and what it says is the response."""
    found = re.search(
        rf"curl -s localhost:8000{path} [^\n]*-d '([^\n]*)'\n\n```json\n(.*?)\n```",
        README.read_text(),
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
    assert "1 passed" in done.stdout
