"""The registry of sources: a data set is one builder file and a line here.

Own files need neither: they are the source `table`.
"""

from ultra_hstu.data.amazon import AmazonBeauty, AmazonBooks
from ultra_hstu.data.assistments import Assistments
from ultra_hstu.data.builder import InteractionsBuilder
from ultra_hstu.data.kuairand import KuaiRand
from ultra_hstu.data.movielens import MovieLens
from ultra_hstu.data.synthetic import Synthetic

BUILDERS: tuple[type[InteractionsBuilder], ...] = (
    Synthetic,
    MovieLens,
    AmazonBooks,
    AmazonBeauty,
    Assistments,
    KuaiRand,
)
# The builder of every value of `data.source` that is a publisher's.
SOURCES = {name: builder for builder in BUILDERS for name in builder.builder_configs}
TABLE = "table"  # anybody's own files, which ultra_hstu.data.table reads


def check(source: str) -> None:
    """Raises ValueError for an unknown source, naming those that there are."""
    if source != TABLE and source not in SOURCES:
        known = ", ".join(map(repr, (*SOURCES, TABLE)))
        raise ValueError(f"data.source={source!r} is not allowed: use {known}")


def builder_of(source: str) -> type[InteractionsBuilder]:
    """The builder of a publisher's source. Raises ValueError as `check`."""
    check(source)
    return SOURCES[source]
