"""What the values of a source mean to a model: codes of features of events and of users."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32, Shaped

from ultra_hstu.config import Config
from ultra_hstu.data import signals
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import Interactions

Values = Shaped[np.ndarray, " n"] | Sequence[int] | Sequence[float]


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Features and contexts in the order of the model's columns.

    Attributes:
      features: by name, the values of the source, ascending: the first has code 1.
      contexts: by name, the source's text for every code; slot 0 is "".
    """

    catalog: Catalog
    features: dict[str, Shaped[np.ndarray, " n"]]
    contexts: dict[str, tuple[str, ...]]

    @staticmethod
    def of(config: Config, interactions: Interactions) -> "Vocabulary":
        """The vocabulary of a ranking run on its data."""
        features = {name: signals.values(interactions, name) for name in config.rank.features}
        contexts = {name: interactions.context_values[name] for name in config.rank.contextual}
        return Vocabulary(interactions.catalog, features, contexts)

    def feature(self, name: str, values: Values) -> Int32[np.ndarray, " n"]:
        """Codes of the values of a feature, 0 for those that the source did not have."""
        known, given = self.features[name], np.asarray(values)
        index = np.minimum(np.searchsorted(known, given), len(known) - 1)
        return np.where(known[index] == given, index + 1, 0).astype(np.int32)

    def features_of(self, columns: Mapping[str, Values], count: int) -> Int32[np.ndarray, "n F"]:
        """Codes of all features of `count` events or candidates, 0 where a column is not given."""
        codes = [
            self.feature(name, columns[name]) if name in columns else np.zeros(count, np.int32)
            for name in self.features
        ]
        return np.stack(codes, axis=1) if codes else np.zeros((count, 0), np.int32)

    def context(self, codes: Mapping[str, int]) -> Int32[np.ndarray, " C"]:
        """A user's codes by name, 0 where nothing is given, as one code over all contextual
        features together."""
        first, found = 0, []
        for name, values in self.contexts.items():
            code = codes.get(name, 0)
            found.append(code + first if code else 0)
            first += len(values) - 1
        return np.array(found, np.int32)
