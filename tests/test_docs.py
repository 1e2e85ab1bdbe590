"""The Python of these pages runs as it stands, block after block."""

import re
from pathlib import Path

import numpy as np

DOCS = Path(__file__).parent.parent / "docs"


def names_of(page):
    """What the blocks of a page define."""
    names = {"__name__": page}
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    assert blocks, f"{page} has no Python"
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


def test_context_parallel():
    names = names_of("context_parallel.md")
    assert names["o_THV"].shape == (64, 4, 16) and np.isfinite(names["o_THV"]).all()
    assert len(names["o_THV"].devices()) == 8


def test_cached_scoring():
    names = names_of("cached_scoring.md")
    scores = names["serving"].score(names["model"], names["cache"], names["candidates"])
    assert scores.shape == (4, 1) and np.isfinite(scores).all()
