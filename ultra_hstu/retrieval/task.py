"""Retrieval: every event of a history predicts the next one, among all items."""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int

from ultra_hstu import flops
from ultra_hstu.config import Config
from ultra_hstu.criteria import RETRIEVAL, Criteria
from ultra_hstu.data import signals
from ultra_hstu.data.events import seconds_since_first
from ultra_hstu.data.feed import (
    WHOLE,
    EventStore,
    Loader,
    Planner,
    choose_rows,
    require_some,
)
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.sampled import SampledHistory, SampledPlanner, Sampling
from ultra_hstu.flops import Flops
from ultra_hstu.parallel.mesh import DATA
from ultra_hstu.retrieval.batch import Events, HistoryGather
from ultra_hstu.retrieval.evaluate import CorpusEvaluator, PopularityEvaluator
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.retrieval.split import PROTOCOLS, Examples, Split, split
from ultra_hstu.task import Task


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalTask(Task):
    PROTOCOLS: ClassVar[tuple[str, ...]] = PROTOCOLS

    splits: Split
    store: EventStore[Events]

    @classmethod
    def of(cls, config: Config, interactions: Interactions) -> "RetrievalTask":
        splits = split(
            interactions,
            config.train.protocol,
            config.data.max_history,
            config.data.temporal_test_fraction,
        )
        events = events_of(interactions.items, interactions.timestamps)
        if names := config.rank.signals:
            codes_ES = signals.signals(interactions.actions, names, interactions.num_events)
            events = dataclasses.replace(events, signal_ES=codes_ES)
        return cls(config, interactions, splits, EventStore(events))

    @property
    def events(self) -> Events:
        return self.store.host

    @functools.cached_property
    def recipe(self) -> Recipe:
        return Recipe(self.config, self.interactions.num_items)

    @property
    def criteria(self) -> Criteria:
        return RETRIEVAL

    def loader(self, part: str, *, batch_users: int, steps_per_call: int) -> Loader:
        config, training = self.config, part == "train"
        examples = getattr(self.splits, part)
        if examples is None:
            raise ValueError(
                f"protocol {config.train.protocol!r} has no {part} items: "
                "train under 'validated' or 'temporal' for them"
            )
        return history_loader(
            self.store,
            examples,
            batch_users=batch_users,
            steps_per_call=steps_per_call,
            rows=config.data.batch_tokens if training else None,
            padded_length=config.padded_length if config.data.layout == "padded" else None,
            placement=config.data.placement,
            planner=self._planner() if training else WHOLE,
            mesh=self.recipe.mesh,
            groups=config.parallel.batch_groups if training else None,
        )

    def _planner(self) -> Planner:
        """Training sees parts of histories under stochastic length; evaluation sees whole ones."""
        sampling = Sampling.of(self.config.data, self.gamma)
        if sampling is None:
            return WHOLE
        times_E = (
            np.asarray(self.events.time_E) if self.interactions.timestamps is not None else None
        )
        histories = (SampledHistory(self.config.data.max_history),)
        return SampledPlanner(sampling, histories, times_E)

    def evaluator(self, split: str) -> CorpusEvaluator:
        return CorpusEvaluator(self.recipe, self.evaluation_loader(split))

    def baselines(self, split: str) -> dict[str, dict[str, float]]:
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


def events_of(items: Int[np.ndarray, " E"], timestamps: Int[np.ndarray, " E"] | None) -> Events:
    """int32 arrays from ids and absolute seconds.

    Raises ValueError as `seconds_since_first`.
    """
    return Events(items.astype(np.int32), seconds_since_first(timestamps, len(items)))


def history_loader(
    store: EventStore[Events],
    examples: Examples,
    *,
    batch_users: int,
    steps_per_call: int,
    rows: int | None = None,
    padded_length: int | None = None,
    placement: str = "auto",
    planner: Planner = WHOLE,
    mesh: Mesh | None = None,
    groups: int | None = None,
) -> Loader:
    """Batches of histories.

    Args:
      rows: T of all groups together, or None to choose it from the lengths.
      padded_length: N of the padded layout (T becomes B * N), or None for the jagged one.
      placement, planner, mesh, groups: as in `Loader`.
    """
    shards = 1 if mesh is None else mesh.shape[DATA]
    groups = shards if groups is None else groups
    require_some(examples)
    longest = int(examples.lengths.max())
    if padded_length is not None:
        if longest > padded_length:
            raise ValueError(
                f"a history of {longest} events does not fit the padded length {padded_length}: "
                "lower data.max_history"
            )
        rows = batch_users * padded_length
    if rows is None:
        lengths_n = planner.taken(examples, 0, 0).lengths
        rows = groups * choose_rows(lengths_n, batch_users // groups, longest)
    return Loader(
        store,
        examples,
        HistoryGather(rows // shards, padded_length),
        batch_users=batch_users,
        steps_per_call=steps_per_call,
        placement=placement,
        planner=planner,
        mesh=mesh,
        groups=groups,
    )
