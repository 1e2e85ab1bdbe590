"""Retrieval: every event of a history predicts the next one, among all items."""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from ultra_hstu import flops
from ultra_hstu.config import Config
from ultra_hstu.criteria import RETRIEVAL, Criteria, Metrics
from ultra_hstu.data import signals
from ultra_hstu.data.feed import BufferRows, EventStore
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.sampled import SampledHistory
from ultra_hstu.flops import Flops
from ultra_hstu.retrieval.batch import Events, HistoryGather
from ultra_hstu.retrieval.evaluate import CorpusEvaluator, PopularityEvaluator
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.retrieval.split import PROTOCOLS, Examples, Split, split
from ultra_hstu.task import Task


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalTask(Task[Events]):
    PROTOCOLS: ClassVar[tuple[str, ...]] = PROTOCOLS

    splits: Split

    @classmethod
    def of(cls, config: Config, interactions: Interactions) -> "RetrievalTask":
        splits = split(
            interactions,
            config.train.protocol,
            config.data.max_history,
            config.data.temporal_test_fraction,
        )
        items, signal_ES = interactions.items, None
        if names := config.rank.signals:
            signal_ES = signals.signals(interactions.actions, names, len(items))
        events = Events.from_arrays(items, interactions.timestamps, signal_ES)
        return cls(config, interactions, EventStore(events), splits)

    @functools.cached_property
    def recipe(self) -> Recipe:
        return Recipe(self.config, self.interactions.num_items)

    @property
    def criteria(self) -> Criteria:
        return RETRIEVAL

    def examples(self, part: str) -> Examples:
        examples = getattr(self.splits, part)
        if examples is None:
            raise ValueError(
                f"protocol {self.config.train.protocol!r} has no {part} items: "
                "train under 'validated' or 'temporal' for them"
            )
        if part == "train" or self.config.eval.hide == "window":
            return examples
        first_U = self.interactions.offsets[:-1]
        return dataclasses.replace(examples, hide_from=first_U[examples.user])

    def gather(self, training: bool, rows: BufferRows, examples: int) -> HistoryGather:
        config = self.config
        hides_all = not training and config.eval.hide == "all" and config.eval.repeats == "hide"
        return HistoryGather.of(
            rows,
            examples,
            padded_length=config.padded_length if config.data.layout == "padded" else None,
            hidden=int(self.interactions.lengths.max()) if hides_all else 0,
            target_time=training or config.eval.time == "target",
        )

    @property
    def histories(self) -> tuple[SampledHistory, ...]:
        return (SampledHistory(self.config.data.max_history),)

    def evaluator(self, split: str) -> CorpusEvaluator:
        return CorpusEvaluator(self.recipe, self.evaluation_loader(split))

    def baselines(self, split: str) -> dict[str, Metrics]:
        """Recommends what is popular in the training data."""
        popular = PopularityEvaluator(self.recipe, self.evaluation_loader(split))
        return {"popularity": popular(jnp.asarray(self.popularity()[:, None]))}

    def flops(self, part: str) -> Flops:
        columns = self.columns(part)
        history_n = columns["stop"] - columns["start"]
        return flops.count(self.config, history_n, items=self.interactions.num_items)

    def popularity(self) -> Float32[np.ndarray, " I1"]:
        """How often each item occurs in the training events, rows and targets.

        Ties go to the lower id; row 0 is padding.
        """
        train, items = self.splits.train, self.interactions.items
        edges = np.zeros(len(items) + 2, np.int64)
        np.add.at(edges, train.start, 1)
        np.add.at(edges, train.stop + 1, -1)
        used_E = np.cumsum(edges)[: len(items)] > 0
        num_items = self.interactions.num_items
        counts_I1 = np.bincount(items[used_E], minlength=num_items + 1).astype(np.float32)
        return counts_I1 - np.arange(num_items + 1, dtype=np.float32) / (num_items + 2)
