"""The section `features`: what a model knows of items beside their ids; how columns are spelled."""

import dataclasses
import math
import re
from typing import Literal

from ultra_hstu.fields import BelowOne, Positive, Section
from ultra_hstu.table_config import BUCKETS

Count = Positive[int]
TITLE = "title"  # a column of every catalogue with titles
HASHED = re.compile(r"(hash|words) +([1-9][0-9]{0,8})")


@dataclasses.dataclass(frozen=True)
class FeatureConfig(Section):
    """Columns of items that are embedded beside their ids: docs/features.md."""

    # Columns of the source's items: genres; year[1950,1980], in buckets between these values;
    # brand[hash 4096], in so many buckets by a hash of its text; title[words 4096], each word so;
    # price[mlp], by a small net.
    items: tuple[str, ...] = ()
    # How a history reads them. sum: added to the token of each item; series (retrieval): each
    # column is a series of tokens, one where its value changes, merged into the history (HSTU 2.1).
    # The vector of an item that is scored is its id's and its features' in both.
    merge: Literal["sum", "series"] = "sum"
    max_values: Count = 16  # of an item in a column; the first ones count
    # Share of the items whose id is left out in a training step, so that features must do.
    id_dropout: BelowOne[float] = 0.0
    hidden_width: Count = 16  # of the net of column[mlp]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a table of items that are read beside titles, each once."""
        columns = dict.fromkeys(Spelled.of(name).column for name in self.items)
        return tuple(name for name in columns if name != TITLE)

    @property
    def series(self) -> int:
        """How many series are merged into a history."""
        return len(self.items) if self.merge == "series" else 0

    def check(
        self, stochastic_length: float | None, layout: str, tables: str, *, ranking: bool
    ) -> None:
        """Raises ValueError for names that cannot be read, and for fields that do nothing.

        The arguments are what features do not go with, or series: fields of `data` and `optim`,
        and a task.
        """
        read = [Spelled.of(name) for name in self.items]
        if len(set(self.items)) < len(self.items):
            raise ValueError(f"features.items={self.items} names one twice")
        default = FeatureConfig()
        for name in ("merge", "max_values", "id_dropout", "hidden_width"):
            if not read and (value := getattr(self, name)) != getattr(default, name):
                raise ValueError(
                    f"features.{name}={value!r} does nothing without features.items: name columns"
                )
        if read and tables != "same":
            raise ValueError(
                f"optim.tables={tables!r} updates the items that a step reads, and features.items "
                "make the vectors of all: use optim.tables='same'"
            )
        refused = {
            f"data.stochastic_length={stochastic_length}, which cuts histories of events": (
                stochastic_length is not None
            ),
            f"data.layout={layout!r}, in which every row is an event": layout != "jagged",
            f"a net, which {self.items} ask for: a token stands where a value changes": any(
                one.mlp for one in read
            ),
            "ranking, whose users have tokens of their own (rank.contextual)": ranking,
        }
        for why, here in refused.items():
            if here and self.series:
                raise ValueError(
                    f"features.merge='series' cannot be used with {why}: use merge='sum'"
                )


@dataclasses.dataclass(frozen=True)
class Spelled:
    """A column, and how its values become codes.

    Attributes:
      edges: where buckets of numbers end; empty: no buckets.
      hashed: buckets of a hash of the text; 0: each distinct value has a code.
      words: each word of a text is a value.
      mlp: a number that a small net reads.
    """

    column: str
    edges: tuple[float, ...] = ()
    hashed: int = 0
    words: bool = False
    mlp: bool = False

    @property
    def size(self) -> int:
        """How many codes there are, whatever the values; 0 where that depends on them."""
        return self.hashed or (len(self.edges) + 1 if self.edges else 0)

    @classmethod
    def of(cls, name: str) -> "Spelled":
        """Raises ValueError for brackets that say nothing known."""
        if (found := BUCKETS.fullmatch(name)) is None:
            return cls(name)
        column, how = found[1], found[2].strip()
        if how == "mlp":
            return cls(column, mlp=True)
        if hashed := HASHED.fullmatch(how):
            return cls(column, hashed=int(hashed[2]), words=hashed[1] == "words")
        try:
            edges = tuple(float(edge) for edge in how.split(","))
        except ValueError:
            edges = ()
        ascend = all(low < high for low, high in zip(edges, edges[1:], strict=False))
        if not edges or not all(map(math.isfinite, edges)) or not ascend:
            raise ValueError(
                f"{name!r}: brackets hold the ends of buckets, which are numbers that ascend, or "
                "'hash N', 'words N' or 'mlp'"
            )
        return cls(column, edges=edges)
