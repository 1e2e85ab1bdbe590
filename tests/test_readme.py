"""The README is true: tables come from records, records name their origin, commands exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests import commands

ROOT = Path(__file__).parent.parent
RECORDS = sorted((ROOT / "experiments" / "results").glob("*.json"))


def test_tables_are_current():
    done = commands.run("scripts.tables.make", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_say_where_they_come_from(path):
    record = json.loads(path.read_text())
    assert record.keys() >= {"device", "versions", "commit", "command", "date"}
    assert re.fullmatch(r"[0-9a-f]{7,40}\+?", record["commit"])


def test_commands_and_files_of_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", readme)) <= targets
    for module in re.findall(r"python -m ([a-z_.]+)", readme):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for file in re.findall(r"\]\(((?!http)[^)]+)\)", readme) + re.findall(
        r"--config=(\S+\.py)", readme
    ):
        assert (ROOT / file).exists(), file


def test_help_lists_every_target():
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout
    assert {"install", "install-cuda", "demo", "test", "lint"} <= set(
        re.findall(r"make ([a-z-]+)", shown)
    )
