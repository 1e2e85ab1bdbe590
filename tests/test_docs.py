"""README and docs are followed as a reader would, block after block."""

import re

import numpy as np
import pytest

from tests.pages import FENCE, PAGES, ROOT, Page
from ultra_hstu.data import sources

# Pages on which commands must really run, so that none is only checked by mistake.
MUST_RUN = {
    "README.md": {f"experiments.{name}" for name in ("train", "evaluate", "recommend", "inspect")}
    | {"curl"},
    "docs/library.md": {"experiments.recommend"},
}


@pytest.mark.parametrize("name", PAGES)
def test_blocks_run_in_order(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PUBLIC", dict(sources.PUBLIC))
    monkeypatch.chdir(tmp_path)
    page = Page(name, tmp_path)
    page.follow()
    assert set(page.ran) >= MUST_RUN.get(name, set())
    HOLDS.get(name, lambda names: None)(page.names)


def attention_of_all_devices(names):
    assert names["o_THV"].shape == (64, 4, 16) and np.isfinite(names["o_THV"]).all()
    assert len(names["o_THV"].devices()) == 8


def scores_of_four_candidates(names):
    scores = names["serving"].score(names["model"], names["cache"], names["candidates"])
    assert scores.shape == (4, 1) and np.isfinite(scores).all()


HOLDS = {
    "docs/context_parallel.md": attention_of_all_devices,
    "docs/cached_scoring.md": scores_of_four_candidates,
}


@pytest.mark.parametrize("name", PAGES)
def test_commands_stand_in_fences(name):
    """Only what stands in a fence is followed."""
    outside = FENCE.sub("", PAGES[name].read_text())
    said = re.findall(
        r"^    (?:[A-Z_]+=\S+ )*(?:make|pip|python|ultra-hstu|curl)\b.*", outside, re.M
    )
    assert not said, f"{name}: put these into a fence `sh`: {said}"


def test_the_files_that_extending_names_exist():
    text = FENCE.sub("", PAGES["docs/extending.md"].read_text())
    for path in re.findall(r"`((?:kernels|ultra_hstu|tests)/[\w/]+(?:\.py|/))`", text):
        assert "NAME" in path or (ROOT / path).exists(), path
