"""Retrieval: every event of a history predicts the next one, among all items."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np
from jaxtyping import Int64

from ultra_hstu import flops
from ultra_hstu.config import Config
from ultra_hstu.criteria import RETRIEVAL, Criteria, Metrics
from ultra_hstu.data import signals
from ultra_hstu.data.feed import EventStore
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.packing import BufferRows
from ultra_hstu.data.sampled import SampledHistory
from ultra_hstu.data.shards import Columns, ShardedInteractions, ShardStore
from ultra_hstu.flops import Flops
from ultra_hstu.retrieval.baselines import baselines
from ultra_hstu.retrieval.batch import Events, HistoryGather
from ultra_hstu.retrieval.evaluate import CorpusEvaluator
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
        if isinstance(interactions, ShardedInteractions):
            store = ShardStore(interactions, functools.partial(_events, config, interactions))
            return cls(config, interactions, store, splits)
        items, signal_ES = interactions.items, None
        if names := config.rank.signals:
            signal_ES = signals.signals(interactions.actions, names, len(items))
        events = Events.from_arrays(items, interactions.timestamps, signal_ES)
        return cls(config, interactions, EventStore(events), splits)

    @functools.cached_property
    def recipe(self) -> Recipe:
        counts = self.target_counts() if self.config.loss.kind == "in_batch" else None
        return Recipe(self.config, self.interactions.num_items, counts)

    @property
    def criteria(self) -> Criteria:
        return RETRIEVAL

    def examples(self, part: str) -> Examples:
        if part not in (parts := ("train", "validation", "test")):
            raise ValueError(f"unknown part {part!r}: use {', '.join(parts)}")
        if (examples := getattr(self.splits, part)) is None:
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
        """Random, popularity, the last item's neighbours, item-item: from training events alone."""
        if isinstance(self.interactions, ShardedInteractions):
            return {}  # they read all events at one time
        train, test = self.splits.train, self.examples(split)
        hides = self.config.eval.repeats == "hide"
        return baselines(self.interactions.items, self.popularity(), train, test, hides=hides)

    def flops(self, part: str) -> Flops:
        columns = self.columns(part)
        history_n = columns["stop"] - columns["start"]
        return flops.count(self.config, history_n, items=self.interactions.num_items)

    def popularity(self) -> Int64[np.ndarray, " I1"]:
        """How often each item occurs in the training events, rows and targets; 0 for padding."""
        train = self.splits.train
        return self._counts(train.start, train.stop)

    def target_counts(self) -> Int64[np.ndarray, " I1"]:
        """How often each item is a target in an epoch of training on whole histories."""
        train = self.splits.train
        return self._counts(train.start + 1, train.stop)

    def _counts(
        self, first: Int64[np.ndarray, " n"], last: Int64[np.ndarray, " n"]
    ) -> Int64[np.ndarray, " I1"]:
        """How often each item occurs in the stretches first..last, which lie apart."""
        edge_X = np.concatenate([first, last + 1])
        step_X = np.repeat([1, -1], [len(first), len(last)])
        counts_I1 = np.zeros(self.interactions.num_items + 1, np.int64)
        begin, reaching = 0, 0  # of a piece: its first event, the stretches that reach into it
        for item_E in self.interactions.column("items"):
            here_X = (edge_X >= begin) & (edge_X < begin + len(item_E))
            steps_E = np.zeros(len(item_E), np.int64)
            np.add.at(steps_E, edge_X[here_X] - begin, step_X[here_X])
            inside_E = reaching + np.cumsum(steps_E)
            counts_I1 += np.bincount(item_E[inside_E > 0], minlength=len(counts_I1))
            begin, reaching = begin + len(item_E), int(inside_E[-1])
        return counts_I1


def _events(config: Config, interactions: ShardedInteractions, columns: Columns) -> Events:
    """The events of some users, from their columns."""
    items = np.ascontiguousarray(columns["items"])
    seconds = np.zeros(len(items), np.int32)
    if interactions.timed:
        seconds = (columns["timestamps"] - interactions.first_time).astype(np.int32)
    signal_ES = None
    if names := config.rank.signals:
        signal_ES = signals.signals(dict(columns), names, len(items))
    return Events(items, seconds, signal_ES)
