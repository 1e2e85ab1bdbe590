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
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.codebook import Codebook
from ultra_hstu.data.feed import EventStore
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.item_features import item_codes, user_code
from ultra_hstu.data.packing import BufferRows
from ultra_hstu.data.room import room, with_room
from ultra_hstu.data.sampled import SampledHistory
from ultra_hstu.data.shards import Columns, ShardedInteractions, ShardStore
from ultra_hstu.flops import Flops
from ultra_hstu.nn.embeddings import NO_CODES, CodeSizes
from ultra_hstu.nn.item_features import ItemCodes
from ultra_hstu.retrieval.baselines import baselines
from ultra_hstu.retrieval.batch import Events, HistoryGather
from ultra_hstu.retrieval.evaluate import CorpusEvaluator
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.retrieval.series import Merged
from ultra_hstu.retrieval.split import PROTOCOLS, Examples, Split, new_users, split, window
from ultra_hstu.task import Task
from ultra_hstu.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalTask(Task[Events]):
    PROTOCOLS: ClassVar[tuple[str, ...]] = PROTOCOLS

    splits: Split
    code_sizes: CodeSizes = NO_CODES  # of what a token holds beside its item
    item_features: ItemCodes | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        interactions: Interactions,
        *,
        since: int | None = None,
        roomy: bool = False,
    ) -> "RetrievalTask":
        longest, windows = config.data.max_history, config.windows
        if config.train.protocol == "windows":
            anew = windows.start == "anew" or since is None
            splits = window(interactions, since, longest, targets=windows.targets, anew=anew)
        elif config.train.protocol == "new_users":
            splits = new_users(interactions, longest, config.data.new_users_fraction)
        else:
            fraction = config.data.temporal_test_fraction
            splits = split(interactions, config.train.protocol, longest, fraction)
        if isinstance(interactions, ShardedInteractions):
            store = ShardStore(interactions, functools.partial(_events, config, interactions))
            codes = _item_codes(config, interactions.catalog, roomy)
            sizes = CodeSizes(signals.sizes(config.rank.signals), (), ())
            return cls(config, interactions, store, splits, sizes, codes)
        items, code_ES = interactions.items, None
        known = Codebook.of(config, interactions)
        if (sizes := known.code_sizes(config)).columns:
            signal_ES = signals.signals(interactions.actions, config.rank.signals, len(items))
            of_users = {
                name: np.repeat(interactions.contexts[name], interactions.lengths)
                for name in known.contexts
            }
            code_ES = known.event_codes(signal_ES, interactions.actions, of_users)
        codes, merged = _item_codes(config, interactions.catalog, roomy), None
        if codes is not None and config.features.series:
            first_E = np.zeros(len(items), bool)
            first_E[interactions.offsets[:-1]] = True
            merged = Merged.of(items, first_E, codes)
        events = Events.from_arrays(items, interactions.timestamps, code_ES, merged)
        if roomy:
            events = dataclasses.replace(
                with_room(events), items_1=np.array([interactions.num_items], np.int32)
            )
        return cls(config, interactions, EventStore(events), splits, sizes, codes, roomy=roomy)

    def with_config(self, config: Config) -> Task:
        task = super().with_config(config)
        if config.features == self.config.features:
            return task
        if self.config.train.protocol == "windows":
            raise ValueError("features differ from those that the window was loaded for")
        return RetrievalTask.of(config, self.interactions)

    @functools.cached_property
    def recipe(self) -> Recipe:
        counts = self.target_counts() if self.config.loss.kind == "in_batch" else None
        items, trained_I = self.interactions.num_items, None
        if self.item_features is not None:  # to look at all events takes time
            trained_I = self.popularity() > 0
            if self.config.train.protocol == "windows":  # all that has been known is learned
                trained_I = np.bincount(self.interactions.items, minlength=items + 1) > 0
            trained_I = np.pad(trained_I, (0, self._room(items) - items))
        return Recipe(
            self.config,
            self._room(items),
            counts,
            self.code_sizes,
            self.item_features,
            trained_I,
        )

    @property
    def item_std(self) -> float:
        return self.config.model.item_std

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.config, self.interactions)

    def sized(self, vocabulary: Vocabulary) -> Recipe:
        items = vocabulary.catalog.num_items
        sizes = dataclasses.replace(
            self.code_sizes,
            features=tuple(1 + len(of) for of in vocabulary.features.values()),
            contextual=tuple(1 + len(of) for of in vocabulary.contextual.values()),
        )
        return dataclasses.replace(
            self.recipe,
            num_items=self._room(items),
            code_sizes=sizes,
            item_features=_item_codes(self.config, vocabulary.catalog, self.roomy),
            trained_I=None,
        )

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
        examples = dataclasses.replace(examples, rows=self._rows(examples.start, examples.stop))
        if self.codes_U is not None:
            examples = dataclasses.replace(examples, code=self.codes_U[examples.user])
        if part == "train" or self.config.eval.hide == "window":
            return examples
        first_U = self.interactions.offsets[:-1]
        return dataclasses.replace(examples, hide_from=first_U[examples.user])

    def has(self, part: str) -> bool:
        return len(self.examples(part)) > 0

    def count(self, part: str) -> int:
        return len(self.examples(part))

    def gather(self, training: bool, rows: BufferRows, examples: int) -> HistoryGather:
        config = self.config
        hides_all = not training and config.eval.hide == "all" and config.eval.repeats == "hide"
        return HistoryGather.of(
            rows,
            examples,
            padded_length=config.padded_length if config.data.layout == "padded" else None,
            hidden=self._room(int(self.interactions.lengths.max())) if hides_all else 0,
            target_time=training or config.eval.time == "target",
            series=config.features.series,
        )

    @property
    def histories(self) -> tuple[SampledHistory, ...]:
        return (SampledHistory(self.config.data.max_history),)

    def evaluator(self, split: str) -> CorpusEvaluator:
        loader = self.evaluation_loader(split)
        longest = int(loader.examples(0, 0).lengths.max())
        return CorpusEvaluator(self.recipe, loader, self._room(longest), self._learned())

    @functools.cached_property
    def codes_U(self) -> Int64[np.ndarray, " users"] | None:
        """Codes of the users' ids; None where the model reads none."""
        config = self.config
        if config.loss.similarity != "mol" or not config.mol.user_ids:
            return None
        users = self.interactions.users.tolist()
        return np.array([user_code(user, config.mol.user_ids) for user in users], np.int64)

    def _room(self, size: int) -> int:
        return room(size) if self.roomy else size

    def _learned(self) -> Int64[np.ndarray, " I1"]:
        """How many events each item has that a model has learned which is evaluated."""
        if self.splits.known is None:
            return self.popularity()
        known = self.splits.known
        return self._counts(known.start, known.stop)

    def baselines(self, split: str) -> dict[str, Metrics]:
        """Random, popularity, the last item's neighbours, item-item: from training events alone."""
        if isinstance(self.interactions, ShardedInteractions):
            return {}  # they read all events at one time
        train, test = self.splits.known or self.splits.train, self.examples(split)
        hides = self.config.eval.repeats == "hide"
        return baselines(self.interactions.items, self._learned(), train, test, hides=hides)

    def flops(self, part: str) -> Flops:
        columns = self.columns(part)
        history_n = columns["stop"] - columns["start"]
        rows_n = self._rows(columns["start"], columns["stop"])
        history_n = history_n if rows_n is None else rows_n
        return flops.count(
            self.config,
            history_n,
            items=self.interactions.num_items,
            item_features=self.item_features,
        )

    def _rows(
        self, start: Int64[np.ndarray, " n"], stop: Int64[np.ndarray, " n"]
    ) -> Int64[np.ndarray, " n"] | None:
        """Rows of histories with series of features merged in; None without them."""
        if not (series := self.config.features.series):
            return None
        merged = self.events.merged
        return None if merged is None else np.asarray(merged.rows(start, stop, series), np.int64)

    def popularity(self) -> Int64[np.ndarray, " I1"]:
        """How often each item occurs in the training events, rows and targets; 0 for padding."""
        train = self.splits.train
        return self._counts(train.start, train.stop)

    def target_counts(self) -> Int64[np.ndarray, " I1"]:
        """How often each item is a target in an epoch of training on whole histories."""
        train = self.splits.train
        first = train.start + 1
        if train.learn_from is not None:
            first = np.maximum(first, train.learn_from)
        return self._counts(first, train.stop)

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


def _item_codes(config: Config, catalog: Catalog, roomy: bool) -> ItemCodes | None:
    items = room(catalog.num_items) if roomy else None
    return item_codes(config.features, catalog.features, catalog.titles, items)
