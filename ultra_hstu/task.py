"""The protocol of a task: what training, evaluation and the commands ask of retrieval and ranking.

A task is one folder and its line in `ultra_hstu.tasks`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

from ultra_hstu import flops
from ultra_hstu.config import Config
from ultra_hstu.criteria import Criteria, Metrics
from ultra_hstu.data.feed import BatchGather, EventStore, Loader
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.packing import WHOLE, BufferRows, ExampleTable, HostColumns, Planner
from ultra_hstu.data.room import room
from ultra_hstu.data.sampled import SampledHistory, SampledPlanner, Sampling
from ultra_hstu.data.shards import ShardStore
from ultra_hstu.evaluate import STEPS_PER_CALL, Evaluator
from ultra_hstu.flops import Flops
from ultra_hstu.parallel.exchange import Exchange
from ultra_hstu.step import Params, Steps
from ultra_hstu.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class Task[Events](abc.ABC):
    """What a run works on: data, split, model and measures, all from the configuration."""

    PROTOCOLS: ClassVar[tuple[str, ...]]  # the values of `train.protocol` that it has

    config: Config
    interactions: Interactions
    store: EventStore[Events] | ShardStore[Events]
    # Of a run over windows, whose programs serve several of them: sizes that grow with the data are
    # rounded up to powers of two.
    roomy: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.config.eval.time != "target" and not self.interactions.timed:
            raise ValueError(
                f"eval.time={self.config.eval.time!r} needs times, and the source "
                f"{self.config.data.source!r} has none: leave it out"
            )

    @property
    def events(self) -> Events:
        return self.store.host

    @classmethod
    @abc.abstractmethod
    def of(
        cls,
        config: Config,
        interactions: Interactions,
        *,
        since: int | None = None,
        roomy: bool = False,
    ) -> "Task":
        """The task on data that is in memory. Raises ValueError where the two do not suit.

        Args:
          since: under protocol `windows`, when the window begins that ends with the data; None: all
            of the data is one window.
        """

    @property
    @abc.abstractmethod
    def recipe(self) -> Steps:
        """The model, what is minimised, and the mesh."""

    @property
    @abc.abstractmethod
    def criteria(self) -> Criteria:
        """What a run is judged by."""

    @property
    @abc.abstractmethod
    def vocabulary(self) -> Vocabulary:
        """What the entries of the tables stand for that grow with the data."""

    @property
    def item_std(self) -> float | None:
        """Of the first vectors of items that a run meets later, as of `vocabulary.carried`."""
        return None

    @abc.abstractmethod
    def sized(self, vocabulary: Vocabulary) -> Steps:
        """The recipe of the same model on another vocabulary."""

    @abc.abstractmethod
    def examples(self, part: str) -> ExampleTable | Callable[[int, int], ExampleTable]:
        """The examples of one part of the split: "train", "validation" or "test".

        Raises:
          ValueError: if the split has no such part.
        """

    @abc.abstractmethod
    def has(self, part: str) -> bool:
        """Whether a part of the split has examples."""

    @abc.abstractmethod
    def count(self, part: str) -> int:
        """How many targets a part of an evaluation has."""

    @abc.abstractmethod
    def gather(self, training: bool, rows: BufferRows, examples: int) -> BatchGather:
        """What makes batches of so many examples in buffers of so many rows."""

    @property
    @abc.abstractmethod
    def histories(self) -> tuple[SampledHistory, ...]:
        """The histories of an example that stochastic length may cut, one a buffer."""

    @property
    def longest(self) -> tuple[int, ...] | None:
        """As of a `Loader`."""
        return None

    def loader(self, part: str, *, batch_users: int, steps_per_call: int) -> Loader:
        """Batches of `batch_users` examples of one part of the split.

        Raises:
          ValueError: if the split has no such part, or nothing in it.
        """
        config, training, parallel = self.config, part == "train", self.config.parallel
        exchange = None
        if parallel.context > 1 and parallel.batches != "replicated":
            exchange = functools.partial(
                Exchange.of,
                self.recipe.shards,
                by="all_to_all" if parallel.batches == "exchanged" else "all_gather",
                limit=parallel.exchange_rows,
            )
        loader = Loader(
            self.store,
            self.examples(part),
            functools.partial(self._gather, training),
            batch_users=batch_users,
            steps_per_call=steps_per_call,
            rows=config.data.batch_tokens if training else None,
            longest=self.longest,
            placement=config.data.placement,
            planner=self.planner() if training else WHOLE,
            mesh=self.recipe.mesh,
            groups=parallel.batch_groups if training else None,
            exchange=exchange,
        )
        if training:
            rows = max(loader.packing.rows) * loader.packing.groups
            config.parallel.check_chunk_rows(config.model.chunk_rows, rows)
        return loader

    def _gather(self, training: bool, rows: BufferRows, examples: int) -> BatchGather:
        if self.roomy:
            parallel = self.config.parallel
            buffers = parallel.batch_groups // parallel.data if training else 1
            rows = tuple(buffers * room(-(-one // buffers)) for one in rows)
        return self.gather(training, rows, examples)

    def planner(self) -> Planner:
        """Training sees parts of histories under stochastic length; evaluation sees whole ones."""
        data, gamma = self.config.data, None
        if data.stochastic_length is None:
            return WHOLE
        if data.load_balance:  # a history's cost, from the model's own operations
            items = self.interactions.num_items
            gamma, _ = flops.cost_exponent(self.config, data.max_history, items=items)
        sampling = Sampling(data.stochastic_length, data.subsequence, gamma, data.recalibrate_every)
        # Only one kind of subsequence asks for times, which may lie on a disk.
        timestamps = self.interactions.timestamps if data.subsequence == "weighted" else None
        mesh = self.recipe.mesh
        return SampledPlanner(sampling, self.histories, timestamps, mesh)

    def folded(self, params: Params) -> tuple["Task", Params]:
        """The task and parameters of the model that answers: features are part of embeddings."""
        recipe, params = self.recipe.folded(params)
        task = self.with_config(recipe.config) if recipe is not self.recipe else self
        return task, params

    @abc.abstractmethod
    def evaluator(self, split: str) -> Evaluator:
        """What measures a run on a split; it places nothing on a device before it is called.

        Raises:
          ValueError: if the split has nothing to measure.
        """

    @abc.abstractmethod
    def baselines(self, split: str) -> dict[str, Metrics]:
        """The metrics of what needs no model, by name."""

    @abc.abstractmethod
    def flops(self, part: str) -> Flops:
        """Operations of a sample, the mean over a part of the split (training: its first epoch)."""

    def with_config(self, config: Config) -> "Task":
        """The same data under another model, loss or seed.

        Raises:
          ValueError: if the configurations differ in data, `rank` or protocol.
        """
        asked, loaded = ((one.data, one.rank, one.train.protocol) for one in (config, self.config))
        if asked != loaded:
            raise ValueError(f"the data was loaded for {loaded}: load it for {asked}")
        return dataclasses.replace(self, config=config)

    def evaluation_loader(self, split: str) -> Loader:
        """The batches of an evaluation: `train.eval_users`, rounded up for the data groups."""
        data = self.config.parallel.data
        users = -(-self.config.train.eval_users // data) * data
        return self.loader(split, batch_users=users, steps_per_call=STEPS_PER_CALL)

    def columns(self, part: str) -> HostColumns:
        """The examples of a part as columns (training: the first epoch, by plain draws)."""
        config, training = self.config, part == "train"
        users = config.data.batch_users if training else config.train.eval_users
        loader = self.loader(part, batch_users=users, steps_per_call=1)
        seed = config.train.seed
        return loader.planner.taken(loader.examples(seed, 0), seed, 0).columns
