"""The registry of sources: a public set is a declaration and its place in a tuple of sets here.

Own files need neither: they are the source `table`.
"""

import difflib
import re

from ultra_hstu.data import amazon, kuaishou, movielens, neighbours
from ultra_hstu.data.assistments import ASSISTMENTS
from ultra_hstu.data.public import PublicSet
from ultra_hstu.sections import GENERATED

SETS: tuple[PublicSet, ...] = (
    *movielens.RELEASES,
    *amazon.SETS,
    ASSISTMENTS,
    *kuaishou.SETS,
    *neighbours.SETS,
)
# By their values of `data.source`.
PUBLIC = {one.name: one for one in SETS}
# The stream of HSTU's appendix C, and long histories whose best prediction is known.
SYNTHETIC, SYNTHETIC_LONG = GENERATED
SYNTHETIC_ACTIONS = ("is_like",)
TABLE = "table"  # anybody's own files, which ultra_hstu.data.table reads


def check(source: str) -> None:
    """Raises ValueError for an unknown source, naming those that are near, or families of all."""
    if source in (known := [*GENERATED, *PUBLIC, TABLE]):
        return
    folded = {name.lower(): name for name in known}
    near = [folded[name] for name in difflib.get_close_matches(source.lower(), folded, 5, 0.7)]
    release, _, category = source.partition("/")
    if category and not any(name.startswith(f"{release}/") for name in known):
        releases = sorted({name.partition("/")[0] for name in known if "/" in name})
        near = [f"{one}/{category}" for one in releases if f"{one}/{category}" in known] or near
    families = dict.fromkeys(re.sub("/.*", "/<Category>[/5core]", name) for name in known)
    raise ValueError(
        f"data.source={source!r} is not allowed: use {', '.join(map(repr, families))}"
        + (f". Did you mean {', '.join(map(repr, near))}?" if near else "")
    )
