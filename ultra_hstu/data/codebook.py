"""Codes of what a request says of events and of users, as a model reads them."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32, Shaped

from ultra_hstu.config import Config
from ultra_hstu.data import signals
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.nn.embeddings import CodeSizes
from ultra_hstu.table_config import made_from

Values = Shaped[np.ndarray, " n"] | Sequence[int] | Sequence[float]


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """The codes of features and contexts, in the order of the model's columns.

    Attributes:
      features: by name, the values of the source, ascending: the first has code 1. None of names
        with buckets or a hash.
      contexts: by name, the source's text for every code; slot 0 is "".
    """

    catalog: Catalog
    features: dict[str, Shaped[np.ndarray, " n"]]
    contexts: dict[str, tuple[str, ...]]

    @staticmethod
    def of(config: Config, interactions: Interactions) -> "Codebook":
        """The codes of a run on its data. Raises ValueError for what the data lacks."""
        for name in config.rank.features:
            signals.require_feature(interactions, name)
        for name in config.rank.contextual:
            signals.context(interactions, name)
        features = {name: signals.values(interactions, name) for name in config.rank.features}
        contexts = {name: interactions.context_values[name] for name in config.rank.contextual}
        return Codebook(interactions.catalog, features, contexts)

    def feature(self, name: str, values: Values) -> Int32[np.ndarray, " n"]:
        """Codes of the values of a feature, 0 for those that the source did not have."""
        return signals.feature_codes(name, self.features[name], np.asarray(values))

    def features_of(self, columns: Mapping[str, Values], count: int) -> Int32[np.ndarray, "n F"]:
        """Codes of all features of `count` events or candidates, 0 where a column is not given."""
        codes = [
            self.feature(name, columns[column])
            if (column := made_from(name)[0]) in columns
            else np.zeros(count, np.int32)
            for name in self.features
        ]
        return np.stack(codes, axis=1) if codes else np.zeros((count, 0), np.int32)

    def code_sizes(self, config: Config) -> CodeSizes:
        """How many codes each column of `event_codes` has."""
        return CodeSizes(
            signals.sizes(config.rank.signals),
            tuple(signals.feature_size(*one) for one in self.features.items()),
            tuple(len(words) for words in self.contexts.values()),
        )

    def event_codes(
        self,
        signal_ES: Int32[np.ndarray, "E S"],
        columns: Mapping[str, Values],
        contexts: Mapping[str, int | Int32[np.ndarray, " E"]],
    ) -> Int32[np.ndarray, "E X"]:
        """What a history token of retrieval holds beside its item: signals, features, the user's.

        Args:
          columns: of the events, by name; features whose column is missing are 0, none.
          contexts: codes of the user by name, one for all events or one each; 0 where missing.
        """
        count = len(signal_ES)
        of_user = [np.broadcast_to(contexts.get(name, 0), count) for name in self.contexts]
        context_EC = signals.side_by_side(of_user, count, np.int32)
        return np.concatenate([signal_ES, self.features_of(columns, count), context_EC], axis=1)

    def context(self, codes: Mapping[str, int]) -> Int32[np.ndarray, " C"]:
        """A user's codes by name, 0 where nothing is given, as one code over all contextual
        features together."""
        first, found = 0, []
        for name, values in self.contexts.items():
            code = codes.get(name, 0)
            found.append(code + first if code else 0)
            first += len(values) - 1
        return np.array(found, np.int32)
