"""How the raw values of a source become the codes of a ranking model: items, features of events, what is known of users."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Shaped

from ultra_hstu.config import Config
from ultra_hstu.data import signals
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import Interactions


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
        """That of a ranking run on its data."""
        features = {name: np.unique(interactions.actions[name]) for name in config.rank.features}
        contexts = {name: interactions.context_values[name] for name in config.rank.contextual}
        return Vocabulary(interactions.catalog, features, contexts)

    def feature(self, name: str, values: Sequence[Any] | np.ndarray) -> Int32[np.ndarray, " n"]:
        """Codes of the values of a feature, 0 for those that the source did not have."""
        known, given = self.features[name], np.asarray(values)
        index = np.minimum(np.searchsorted(known, given), len(known) - 1)
        return np.where(known[index] == given, index + 1, 0).astype(np.int32)

    def context(self, codes: dict[str, int]) -> Int32[np.ndarray, " C"]:
        """A user's codes by name, 0 where nothing is given, as one code over all contextual features together."""
        first, found = 0, []
        for name, values in self.contexts.items():
            code = codes.get(name, 0)
            found.append(code + first if code else 0)
            first += len(values) - 1
        return np.array(found, np.int32)


def signal_codes(
    names: Sequence[str], actions: dict[str, np.ndarray], count: int
) -> Int32[np.ndarray, "E S"]:
    """The codes of signals of `count` events, 0 for signals whose actions were not given. Raises ValueError for values that a signal cannot be made from."""
    codes = [
        signals.signal(actions, name).code
        if set(signals.needs((name,))) <= set(actions)
        else np.zeros(count, np.int32)
        for name in names
    ]
    return np.stack(codes, axis=1) if codes else np.zeros((count, 0), np.int32)
