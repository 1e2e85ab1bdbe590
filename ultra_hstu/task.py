"""What a run works on: its data, split and model, all from the configuration."""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float

from ultra_hstu import flops
from ultra_hstu.config import Config
from ultra_hstu.data import signals
from ultra_hstu.data.feed import WHOLE, Loader, Planner, history_loader
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.data.sampled import History, SampledPlanner, Sampling
from ultra_hstu.flops import Flops
from ultra_hstu.ranking.form import channels
from ultra_hstu.ranking.recipe import RankRecipe
from ultra_hstu.ranking.source import RankSource
from ultra_hstu.retrieval.batch import Events
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.retrieval.split import Split, split
from ultra_hstu.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Task:
    config: Config
    interactions: Interactions
    splits: Split
    events: Events
    recipe: Recipe

    @staticmethod
    def load(config: Config) -> "Task | RankTask":
        """Reads (and prepares, the first time) the data. Raises ValueError for bad data or a configuration that does not suit it."""
        return Task.of(config, load_interactions(config.data))

    @staticmethod
    def of_run(folder: Workdir, raw_dir: str | None = None) -> "Task | RankTask":
        """The task of a run, as one device computes it.

        Args:
          raw_dir: where the raw data is now, if not where the run found it.

        Raises:
          ValueError: no run, or data that is not what it was trained on.
        """
        task = Task.load(folder.read_for_one_device(raw_dir))
        folder.check_data(task.interactions)
        return task

    @staticmethod
    def of(config: Config, interactions: Interactions) -> "Task | RankTask":
        """The task of a configuration on data that is already in memory: ranking where `rank.tasks` names some, else retrieval."""
        if config.rank.tasks:
            return RankTask(config, interactions, RankSource.of(config, interactions))
        splits = split(
            interactions,
            config.train.protocol,
            config.data.max_history,
            config.data.temporal_test_fraction,
        )
        events = Events.from_arrays(interactions.items, interactions.timestamps)
        if names := config.rank.signals:
            events = dataclasses.replace(
                events,
                signal_ES=signals.signals(interactions.actions, names, interactions.num_events),
            )
        return Task(config, interactions, splits, events, Recipe(config, interactions.num_items))

    def with_config(self, config: Config) -> "Task":
        """The same data under another model, loss or seed. Raises ValueError if the configurations differ in data or protocol."""
        same = (config.data, config.rank, config.train.protocol) == (
            self.config.data,
            self.config.rank,
            self.config.train.protocol,
        )
        if not same:
            raise ValueError(
                f"the data was loaded for {self.config.data}, protocol {self.config.train.protocol}: load it for {config.data}"
            )
        return dataclasses.replace(
            self, config=config, recipe=Recipe(config, self.interactions.num_items)
        )

    def loader(self, part: str, *, batch_users: int, steps_per_call: int) -> Loader:
        """Batches of one part of the split: "train", "validation" or "test". Raises ValueError if the protocol has no such part."""
        config = self.config
        examples = getattr(self.splits, part)
        if examples is None:
            raise ValueError(
                f"protocol {config.train.protocol!r} has no {part} items: train under 'validated' or 'temporal' for them"
            )
        return history_loader(
            self.events,
            examples,
            batch_users=batch_users,
            steps_per_call=steps_per_call,
            rows=config.data.batch_tokens if part == "train" else None,
            padded_length=config.padded_length if config.data.layout == "padded" else None,
            placement=config.data.placement,
            planner=self._planner() if part == "train" else WHOLE,
            mesh=self.recipe.mesh,
            groups=config.parallel.batch_groups if part == "train" else None,
        )

    def _planner(self) -> Planner:
        """Evaluation always sees whole histories; training sees parts of them under stochastic length."""
        data = self.config.data
        sampling = Sampling.of(data, _gamma(self.config, self.interactions))
        if sampling is None:
            return WHOLE
        return SampledPlanner(
            sampling,
            (History(data.max_history),),
            None if self.interactions.timestamps is None else self.events.time_E,
        )

    def flops(self, part: str) -> Flops:
        """Operations of a sample, the mean over the histories of a part of the split (of training: those of the first epoch)."""
        columns = _columns(self, part)
        return flops.count(
            self.config, columns["stop"] - columns["start"], items=self.interactions.num_items
        )

    def popularity(self) -> Float[np.ndarray, " I1"]:
        """How often each item occurs in the training events (rows and targets); ties go to the lower id, row 0 is padding."""
        train = self.splits.train
        edges = np.zeros(len(self.interactions.items) + 2, np.int64)
        np.add.at(edges, train.start, 1)
        np.add.at(edges, train.stop + 1, -1)
        used_E = np.cumsum(edges)[: len(self.interactions.items)] > 0
        num_items = self.interactions.num_items
        counts_I1 = np.bincount(self.interactions.items[used_E], minlength=num_items + 1).astype(
            np.float32
        )
        return counts_I1 - np.arange(num_items + 1, dtype=np.float32) / (num_items + 2)


@dataclasses.dataclass(frozen=True)
class RankTask:
    config: Config
    interactions: Interactions
    source: RankSource

    @functools.cached_property
    def recipe(self) -> RankRecipe:
        return RankRecipe(self.config, self.source.sizes)

    def with_config(self, config: Config) -> "RankTask":
        """The same data under another model or seed. Raises ValueError if the configurations differ in data, tasks or protocol."""
        if (config.data, config.rank, config.train.protocol) != (
            self.config.data,
            self.config.rank,
            self.config.train.protocol,
        ):
            raise ValueError(
                f"the data was loaded for {self.config.data}, {self.config.rank}: load it for {config.data}, {config.rank}"
            )
        same = config.model.channels == self.config.model.channels
        return RankTask(
            config,
            self.interactions,
            self.source if same else RankSource.of(config, self.interactions),
        )

    def loader(self, part: str, *, batch_users: int, steps_per_call: int) -> Loader:
        """Batches of requests of one part of the split: "train", "validation" or "test"; `batch_users` counts requests."""
        gamma = _gamma(self.config, self.interactions)
        options: dict[str, Any] = dict(
            batch_users=batch_users,
            steps_per_call=steps_per_call,
            gamma=gamma,
            mesh=self.recipe.mesh,
        )
        return self.source.loader(self.config, part, **options)

    def flops(self, part: str) -> Flops:
        """Operations of a request, the mean over those of a part of the split (of training: those of the first epoch)."""
        columns, config = _columns(self, part), self.config
        history = {
            name: columns[f"stop/{name}"] - columns[f"start/{name}"] for name in channels(config)
        }
        return flops.count(
            config,
            next(iter(history.values())),
            targets=columns["count"],
            contextual=len(config.rank.contextual),
            channels=history if config.model.channels else None,
        )


def _columns(task: Task | RankTask, part: str) -> dict[str, np.ndarray]:
    users = task.config.data.batch_users if part == "train" else task.config.train.eval_users
    plan = task.loader(part, batch_users=users, steps_per_call=1).plan(
        seed=task.config.train.seed, shuffle=part == "train"
    )
    return plan.examples.columns


def _gamma(config: Config, interactions: Interactions) -> float:
    """The exponent of a history's cost that load balance works with, from the model's own operations."""
    if not config.data.load_balance:
        return 1.0
    return flops.cost_exponent(config, config.data.max_history, items=interactions.num_items)[0]
