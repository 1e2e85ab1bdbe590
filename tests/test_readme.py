"""README and docs are true: tables come from records, records name their origin, links lead on."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests import commands

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECORDS = sorted((ROOT / "experiments" / "results").glob("*.json"))


def test_tables_are_current():
    done = commands.run("scripts.tables.make", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_say_where_they_come_from(path):
    record = json.loads(path.read_text())
    assert record.keys() >= {"device", "versions", "commit", "command", "date"}
    assert re.fullmatch(r"[0-9a-f]{7,40}\+?", record["commit"])


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 130 and len(readme.split()) <= 1100


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_what_is_where_has_every_part_of_the_library():
    text = (ROOT / "docs" / "what_is_where.md").read_text()
    parts = [path for path in (ROOT / "ultra_hstu").iterdir() if not path.name.startswith("_")]
    names = [path.name + "/" * path.is_dir() for path in parts if path.suffix in ("", ".py")]
    assert not [name for name in names if name not in text]


def test_help_lists_every_target():
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout
    assert {"install", "install-cuda", "demo", "test", "lint"} <= set(
        re.findall(r"make ([a-z-]+)", shown)
    )
