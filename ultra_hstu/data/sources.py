"""The registry of sources: a data set is one builder file and a line here."""

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
# The builder of every value of `data.source`.
SOURCES = {name: builder for builder in BUILDERS for name in builder.builder_configs}


def builder_of(source: str) -> type[InteractionsBuilder]:
    """The builder of a source.

    Raises ValueError for an unknown one, naming those that there are.
    """
    if source not in SOURCES:
        known = ", ".join(map(repr, SOURCES))
        raise ValueError(f"data.source={source!r} is not allowed: use {known}")
    return SOURCES[source]
