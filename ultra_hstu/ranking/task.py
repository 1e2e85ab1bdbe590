"""Ranking: what a user will do with each target of a request."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int32, Int64

from ultra_hstu import criteria, flops
from ultra_hstu.config import Config
from ultra_hstu.criteria import Criteria, Metrics
from ultra_hstu.data import signals
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.feed import EventStore
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.item_features import item_codes
from ultra_hstu.data.packing import BufferRows
from ultra_hstu.data.room import room, with_room
from ultra_hstu.data.sampled import SampledHistory
from ultra_hstu.flops import Flops
from ultra_hstu.nn.item_features import ItemCodes
from ultra_hstu.ranking import evaluate
from ultra_hstu.ranking import split as requests
from ultra_hstu.ranking.batch import RankEvents, RankGather
from ultra_hstu.ranking.evaluate import RequestEvaluator
from ultra_hstu.ranking.form import Sizes, channels, form, num_rows
from ultra_hstu.ranking.recipe import RankRecipe
from ultra_hstu.ranking.split import Parts, Requests, RequestTable
from ultra_hstu.sequences import seconds_since_first
from ultra_hstu.task import Task
from ultra_hstu.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class RankingTask(Task[RankEvents]):
    """Requests about the events of a data set.

    Attributes:
      sizes: what the model must know of the data.
      parts: where each user's training, validation and test events are.
    """

    PROTOCOLS: ClassVar[tuple[str, ...]] = ("chronological", "new_users", "windows")

    sizes: Sizes
    parts: Parts
    item_features: ItemCodes | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        interactions: Interactions,
        *,
        since: int | None = None,
        roomy: bool = False,
    ) -> "RankingTask":
        """Raises ValueError for names in `rank` or `model.channels` that the source lacks."""
        rank = config.rank
        if not rank.tasks:
            raise ValueError(f"{config.name} has no rank.tasks: it is a retrieval run")
        signals.check_channels(config, interactions.actions)
        labels = [signals.task(interactions, name) for name in rank.tasks]
        features = [signals.feature(interactions, name) for name in rank.features]
        contexts = [signals.context(interactions, name) for name in rank.contextual]
        first_code = np.cumsum([0, *(context.size - 1 for context in contexts)])
        context_codes = [
            np.where(codes.code > 0, codes.code + before, 0)
            for codes, before in zip(contexts, first_code[:-1], strict=True)
        ]
        events, users = interactions.num_events, interactions.num_users
        store = RankEvents(
            item_E=interactions.items.astype(np.int32),
            time_E=seconds_since_first(interactions.timestamps, events),
            signal_ES=signals.signals(interactions.actions, rank.signals, events),
            feature_EF=signals.side_by_side([codes.code for codes in features], events, np.int32),
            label_EK=signals.side_by_side([label.label_E for label in labels], events, np.float32),
            weight_EK=signals.side_by_side(
                [label.weight_E for label in labels], events, np.float32
            ),
            context_UC=signals.side_by_side(context_codes, users, np.int32),
            index=_kept_events(config, interactions),
        )
        if roomy:
            store = dataclasses.replace(with_room(store), index=store.index)
        sizes = Sizes(
            items=room(interactions.num_items) if roomy else interactions.num_items,
            signals=signals.sizes(rank.signals),
            features=tuple(codes.size for codes in features),
            contextual=tuple(codes.size for codes in contexts),
            kinds=tuple(label.kind for label in labels),
            timestamps=interactions.timestamps is not None,
        )
        if config.train.protocol == "windows":
            anew = config.windows.start == "anew"
            parts = requests.window(interactions, since, anew=anew)
        else:
            fractions = (rank.validation_fraction, rank.test_fraction)
            if config.train.protocol == "new_users":
                fraction = config.data.new_users_fraction
                parts = requests.new_users(interactions, fraction, *fractions)
            else:
                parts = requests.chronological(interactions, *fractions)
        codes = _item_codes(config, interactions.catalog, roomy)
        return cls(config, interactions, EventStore(store), sizes, parts, codes, roomy=roomy)

    @functools.cached_property
    def recipe(self) -> RankRecipe:
        trained_I = self.training_counts() > 0
        if self.config.train.protocol == "windows":  # all that has been known is learned
            trained_I = np.bincount(self.interactions.items, minlength=len(trained_I)) > 0
        more = self.sizes.items + 1 - len(trained_I)
        return RankRecipe(self.config, self.sizes, self.item_features, np.pad(trained_I, (0, more)))

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.config, self.interactions)

    def sized(self, vocabulary: Vocabulary) -> RankRecipe:
        items = vocabulary.catalog.num_items
        sizes = dataclasses.replace(
            self.sizes,
            items=room(items) if self.roomy else items,
            features=tuple(1 + len(of) for of in vocabulary.features.values()),
            contextual=tuple(1 + len(of) for of in vocabulary.contextual.values()),
        )
        codes = _item_codes(self.config, vocabulary.catalog, self.roomy)
        return dataclasses.replace(self.recipe, sizes=sizes, item_features=codes, trained_I=None)

    @property
    def criteria(self) -> Criteria:
        return criteria.ranking(self.recipe.tasks)

    def with_config(self, config: Config) -> Task:
        task = super().with_config(config)
        read = [(one.model.channels, one.features) for one in (config, self.config)]
        if read[0] == read[1]:
            return task
        if self.parts.learned is not None:
            raise ValueError(
                "model.channels or features differ from those that the window was loaded for"
            )
        return RankingTask.of(config, self.interactions)

    def examples(self, part: str) -> RequestTable | Callable[[int, int], RequestTable]:
        """Every epoch of training has its own requests."""
        first_U, last_U = self.parts.bounds(part)
        if not (first_U < last_U).any():
            remedy = (
                "lower the other fractions" if part == "train" else f"raise rank.{part}_fraction"
            )
            raise ValueError(f"no user has {part} events: {remedy}")
        if part != "train":
            asked = requests.evaluation(self.parts, part, self.config)
            return self.table(asked, self.config.eval.time)
        return lambda seed, epoch: self.table(
            requests.training(self.parts, self.config, seed, epoch)
        )

    def has(self, part: str) -> bool:
        return self.count(part) > 0

    def count(self, part: str) -> int:
        first_U, last_U = self.parts.bounds(part)
        return int((last_U - first_U).sum())

    def gather(self, training: bool, rows: BufferRows, examples: int) -> RankGather:
        config, layout = self.config, form(self.config)
        most = config.rank.targets
        if training and config.rank.train_targets is not None:
            most = config.rank.train_targets
        return RankGather(
            rows=rows,
            channels=tuple(channels(config)),
            targets=most,
            contextual=layout.contextual,
            interleaved=layout.interleaved,
            backwards=layout.backwards,
            supervise_history=training and config.rank.supervise == "all",
        )

    @property
    def histories(self) -> tuple[SampledHistory, ...]:
        index = {name: np.asarray(kept_n) for name, kept_n in self.events.index.items()}
        per_event = form(self.config).per_event
        return tuple(
            SampledHistory(channel.max_history, f"/{name}", per_event, index.get(name))
            for name, channel in channels(self.config).items()
        )

    @property
    def longest(self) -> tuple[int, ...]:
        events, config = int((self.parts.last - self.parts.first).max()), self.config
        return tuple(
            num_rows(config, min(channel.max_history, events), config.rank.targets)
            for channel in channels(config).values()
        )

    def table(self, of: Requests, time: str = "target") -> RequestTable:
        """Requests with the history of every channel, asked at a time that `eval.time` names.

        Of a mixture, a channel's history is the newest `max_history` of all earlier events that it
        keeps.
        """
        config = self.config
        columns: dict[str, np.ndarray] = {"user": of.user, "target": of.stop, "count": of.count}
        if time == "request":
            columns["now"] = of.stop
        elif time == "last":  # the first target's, where there is no event before it
            columns["now"] = np.maximum(of.stop - 1, self.parts.first[of.user])
        lengths = []
        for name, channel in channels(config).items():
            start, stop = self.parts.first[of.user] if config.model.channels else of.start, of.stop
            if name in self.events.index:
                start, stop = np.searchsorted(self.events.index[name], (start, stop))
            start = np.maximum(start, stop - channel.max_history)
            columns |= {f"start/{name}": start, f"stop/{name}": stop}
            lengths.append(num_rows(config, stop - start, of.count))
        return RequestTable(columns, np.stack(lengths, axis=1))

    def evaluator(self, split: str) -> RequestEvaluator:
        loader, count_I = self.evaluation_loader(split), self.training_counts()
        return RequestEvaluator(self.recipe, loader, self.criteria, split, count_I)

    def baselines(self, split: str) -> dict[str, Metrics]:
        """Predicts the base rates of everything, of the item, of the user, and of both."""
        return evaluate.base_rates(self.evaluator(split), self._user_E, self._known_E)

    @property
    def _user_E(self) -> Int64[np.ndarray, " E"]:
        return np.repeat(np.arange(self.interactions.num_users), self.interactions.lengths)

    @property
    def _known_E(self) -> Bool[np.ndarray, " E"]:
        """Which events have been learned, or are to be: of a window, those of earlier ones, too."""
        first_U, last_U = self.parts.known
        row_E, user_E = np.arange(self.interactions.num_events), self._user_E
        return (row_E >= first_U[user_E]) & (row_E < last_U[user_E])

    def training_counts(self) -> Int64[np.ndarray, " I1"]:
        """How many such events each item has; 0 for padding."""
        items = self.interactions.num_items + 1
        return np.bincount(self.interactions.items[self._known_E], minlength=items)

    def flops(self, part: str) -> Flops:
        """Operations of a request."""
        columns, config = self.columns(part), self.config
        history = {
            name: columns[f"stop/{name}"] - columns[f"start/{name}"] for name in channels(config)
        }
        return flops.count(
            config,
            next(iter(history.values())),
            targets=columns["count"],
            contextual=len(config.rank.contextual),
            channels=history if config.model.channels else None,
            item_features=self.item_features,
        )


def _kept_events(config: Config, interactions: Interactions) -> dict[str, Int32[np.ndarray, " n"]]:
    """The events of each channel that leaves some out; a warning names one that keeps none."""
    index = {}
    for name, channel in channels(config).items():
        if not channel.signal:
            continue
        keep_E = interactions.actions[channel.signal] >= channel.at_least
        if not keep_E.any():
            log.warning(
                "model.channels.%s keeps none of the %d events: %s is never %g or more. Lower its "
                "at_least, or leave the channel out",
                name,
                interactions.num_events,
                channel.signal,
                channel.at_least,
            )
        index[name] = np.flatnonzero(keep_E).astype(np.int32)
    return index


def _item_codes(config: Config, catalog: Catalog, roomy: bool) -> ItemCodes | None:
    items = room(catalog.num_items) if roomy else None
    return item_codes(config.features, catalog.features, catalog.titles, items)
