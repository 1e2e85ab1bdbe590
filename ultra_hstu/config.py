"""The configuration of a run: frozen dataclasses, checked before any work.

`experiments/configs` holds configurations by name; a file of a user may return one, too. Commands
take an `ml_collections.ConfigDict`, so that `--config.model.width=64` overrides any field;
`from_config_dict` makes the dataclasses and validates them. Errors name field, value and remedy.
"""

import dataclasses
from typing import Annotated, Literal

import ml_collections

from ultra_hstu import fields
from ultra_hstu.feature_config import FeatureConfig
from ultra_hstu.fields import Limit, NotNegative, Section
from ultra_hstu.model_config import ChannelConfig as ChannelConfig
from ultra_hstu.model_config import ModelConfig
from ultra_hstu.paths import LocalPath
from ultra_hstu.sections import (
    Count,
    EvalConfig,
    LossConfig,
    MolConfig,
    OptimConfig,
    ParallelConfig,
    RankConfig,
    SyntheticConfig,
    SyntheticLongConfig,
    TrainConfig,
    WindowsConfig,
)
from ultra_hstu.table_config import TableConfig

Kind = Literal["binary", "regression"]  # of a ranking task


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    source: str = "synthetic"  # a name of ultra_hstu.data.sources, or table: own files
    raw_dir: LocalPath | None = None  # a copy in the publisher's format, read instead of a download
    # Prepared data goes here. None: to ULTRA_HSTU_DATA, else to ~/.local/share/ultra-hstu/data.
    data_dir: LocalPath | None = None
    # Order of a user's events with equal timestamps: that of the file, or drawn.
    ties: Literal["stable", "random"] = "stable"
    ties_seed: NotNegative[int] = 0  # of that random order
    max_history: Count = 200  # newest events kept in front of a target
    batch_users: Count = 128  # B, most users in a batch
    # T, rows of the flat buffer. None: chosen from the lengths so that a batch nearly always fits.
    batch_tokens: Count | None = None
    # padded: every user has max_history rows of the buffer, as in the public code
    layout: Literal["jagged", "padded"] = "jagged"
    # Where events lie (docs/large_data.md). auto: device below 1 GiB of events, else stream
    placement: Literal["auto", "device", "stream", "shards"] = "auto"
    # Share of events (the newest) that protocol `temporal` tests on.
    temporal_test_fraction: Annotated[float, Limit(lambda value: 0 < value < 1, "in (0, 1)")] = 0.1
    # Share of users (the newest) that protocol `new_users` tests on.
    new_users_fraction: Annotated[float, Limit(lambda value: 0 < value < 1, "in (0, 1)")] = 0.1
    # alpha of HSTU equation 4: training histories above max_history^(alpha/2) are cut.
    stochastic_length: (
        Annotated[
            float, Limit(lambda value: 1 < value <= 2, "in (1, 2], or None for whole histories")
        ]
        | None
    ) = None
    # Which events of a cut history stay.
    subsequence: Literal["recent", "random", "weighted"] = "recent"
    # Choose which long histories stay whole so that every device has the same load.
    load_balance: bool = False
    recalibrate_every: Count = 100  # steps between two estimates of that load
    synthetic: SyntheticConfig = SyntheticConfig()
    synthetic_long: SyntheticLongConfig = SyntheticLongConfig()
    table: TableConfig = TableConfig()


@dataclasses.dataclass(frozen=True)
class Config(Section):
    name: str = "synthetic"  # what records and tables call the run
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    mol: MolConfig = MolConfig()
    rank: RankConfig = RankConfig()
    features: FeatureConfig = FeatureConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    windows: WindowsConfig = WindowsConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def evaluation(self) -> dict[str, str]:
        """How a run is evaluated, as records name it: the fields of `eval` that its task reads."""
        names = ("time",) if self.rank.tasks else ("hide", "repeats", "time")
        return {name: getattr(self.eval, name) for name in names}

    @property
    def padded_length(self) -> int:
        """N: the constant that attention is divided by, and a user's rows in the padded layout."""
        return self.data.max_history + self.model.output_slots

    def in_groups(self, groups: int) -> "Config":
        """The same with `parallel.groups`."""
        return dataclasses.replace(self, parallel=dataclasses.replace(self.parallel, groups=groups))

    def on_one_device(self) -> "Config":
        """The same run as one device computes it."""
        return dataclasses.replace(self, parallel=ParallelConfig(groups=self.parallel.batch_groups))

    def of_table(self) -> "Config":
        """The same with the tasks of own data, reading what signals and features are made from."""
        rank, table, train = self.rank, self.data.table, self.train
        if table.tasks and not rank.tasks:
            rank = dataclasses.replace(rank, tasks=tuple(table.tasks))
            if train.protocol not in ("windows", "new_users"):  # ranking has one other
                train = dataclasses.replace(train, protocol="chronological")
        if self.data.source != "table":  # whose columns are known
            return dataclasses.replace(self, rank=rank, train=train)
        names = [*rank.tasks, *rank.signals, *(one.signal for one in self.model.channels.values())]
        columns = table.with_columns(rank.features, names, self.features.columns)
        data = dataclasses.replace(self.data, table=columns)
        return dataclasses.replace(self, data=data, rank=rank, train=train)

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        fields.check_limits(self)
        self._validate_data()
        self.model.check(self.data.layout)
        self._validate_parallel()
        self.mol.check()
        if self.rank.tasks:
            self._validate_ranking()
        optim = self.optim
        if optim.tables != "same" and not self.rank.tasks and self.loss.kind == "full":
            raise ValueError(
                f"optim.tables={optim.tables!r} updates the items that a step reads, and "
                "loss.kind='full' reads all: use optim.tables='same', or loss.kind='sampled'"
            )
        if self.train.protocol == "windows" and self.data.ties == "random":
            raise ValueError(
                "data.ties='random' draws an order over all events, later ones too: use 'stable' "
                "with train.protocol='windows'"
            )
        optim.check_state()
        if self.train.protocol == "windows" and self.train.steps is not None:
            raise ValueError(
                f"train.steps={self.train.steps} does nothing under train.protocol='windows': set "
                "windows.steps"
            )
        decay, warmup = optim.decay_steps, optim.warmup_steps
        if decay is not None and decay <= warmup:
            raise ValueError(f"optim.decay_steps={decay} must be above optim.warmup_steps={warmup}")

    def _validate_data(self) -> None:
        """Histories, their split and their batches."""
        data, rank = self.data, self.rank
        if data.batch_tokens is not None and data.batch_tokens < data.max_history:
            raise ValueError(
                f"data.batch_tokens={data.batch_tokens} cannot hold one history of "
                f"data.max_history={data.max_history} events"
            )
        if data.batch_tokens is not None and data.layout == "jagged":  # else the data says how many
            self.parallel.check_chunk_rows(self.model.chunk_rows, data.batch_tokens)
        if data.load_balance and data.stochastic_length is None:
            needs = "needs data.stochastic_length: it chooses which histories stay whole"
            raise ValueError(f"data.load_balance=True {needs}")
        if not 0 < rank.validation_fraction + rank.test_fraction < 1:
            raise ValueError(
                f"rank.validation_fraction={rank.validation_fraction!r} and "
                f"rank.test_fraction={rank.test_fraction!r}: their sum must be in (0, 1)"
            )
        data.table.check(data.source, [*rank.signals, *rank.tasks])
        of_series = (data.stochastic_length, data.layout)
        self.features.check(*of_series, self.optim.tables, ranking=bool(rank.tasks))
        if self.eval.time == "request" and not rank.tasks:
            raise ValueError(
                "eval.time='request' is for ranking, whose requests have several targets: "
                "use 'target', or 'last'"
            )
        protocol, channels = self.train.protocol, self.model.channels
        if self.model.kind == "din" and not rank.tasks:
            raise ValueError(
                "model.kind='din' weighs a history for each given target, and retrieval gives "
                "none: use 'hstu' or 'sasrec', or name rank.tasks"
            )
        if not rank.tasks and (channels or protocol == "chronological"):
            raise ValueError(
                f"model.channels={sorted(channels)}, train.protocol={protocol!r}: a mixture and "
                "the chronological split are for ranking; name rank.tasks"
            )

    def _validate_parallel(self) -> None:
        """What the devices of a group can share."""
        parallel, model = self.parallel, self.model
        strategy, context, biased = parallel.strategy, parallel.context, model.relative_bias
        if parallel.exchange_rows is not None and parallel.batches != "exchanged":
            raise ValueError(
                f"parallel.exchange_rows={parallel.exchange_rows} bounds an all-to-all, which "
                f"parallel.batches={parallel.batches!r} does without: use 'exchanged', or leave it "
                "out"
            )
        if parallel.batch_groups % parallel.data:
            raise ValueError(
                f"parallel.groups={parallel.groups} must be a multiple of "
                f"parallel.data={parallel.data}"
            )
        if context == 1:
            return
        given = [encoder.window for encoder in model.encoders.values()]
        windows = {width != -1 for window in given for width in window or (-1,)}
        halo = strategy == "halo" or (strategy == "auto" and True in windows)
        refused: dict[str, str] = {}  # what cannot be used, and the remedy
        if model.kind != "hstu":
            refused[f"model.kind={model.kind!r}"] = "use 'hstu'"
        if model.attention != "silu":
            refused[f"model.attention={model.attention!r}"] = "use 'silu'"
        if self.data.layout != "jagged":
            refused[f"data.layout={self.data.layout!r}"] = "use 'jagged'"
        if biased and strategy not in ("auto", "ulysses"):
            refused[f"a relative bias and parallel.strategy={strategy!r}"] = "use 'ulysses'"
        if (biased or strategy == "ulysses") and model.heads % context:
            refused[f"'ulysses' with model.heads={model.heads}"] = "use a multiple"
        if strategy == "halo" and False in windows:
            full = next(window for window in given if -1 in window or not window)
            refused[f"'halo' with model.window={full}, a full mask,"] = "use 'ring' or 'auto'"
        if halo and parallel.layout == "striped":
            remedy = "use 'contiguous', or strategy='ring'"
            refused["'halo' with parallel.layout='striped'"] = remedy
        for why, remedy in refused.items():
            raise ValueError(
                f"{why} cannot be used with parallel.context={context}: {remedy}, or context=1"
            )

    def _validate_ranking(self) -> None:
        rank, model = self.rank, self.model
        if self.train.protocol not in ("chronological", "new_users", "windows"):
            raise ValueError(
                f"train.protocol={self.train.protocol!r} cannot be used for ranking: use "
                "'chronological', 'new_users' or 'windows'"
            )
        needed: dict[str, tuple[str, str]] = {
            "data.layout": (self.data.layout, "jagged"),
            # Nothing of a history is hidden: the targets of a request are given.
            "eval.hide": (self.eval.hide, "window"),
            "eval.repeats": (self.eval.repeats, "hide"),
            # Nothing is scored by a product that a mixture could stand for.
            "loss.similarity": (self.loss.similarity, "dot"),
        }
        if model.kind == "sasrec":
            needed["model.kind"] = (model.kind, "hstu")
        if model.kind == "din":
            needed["rank.input"] = (rank.input, "merged")
        if model.attention == "softmax":  # it lets targets see one another
            needed["model.attention"] = (model.attention, "masked_softmax")
        for name, (value, only) in needed.items():
            if value != only:
                raise ValueError(f"{name}={value!r} cannot be used for ranking: use {only!r}")
        rank.check()
        if rank.supervise == "all":
            names = ("channels", "truncate_after")
            rank.check_every_item({f"model.{name}": getattr(model, name) for name in names})


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The configuration as flags override it: every field, those that are None too."""
    return fields.overridable(config)


def from_config_dict(values: ml_collections.ConfigDict | fields.Values) -> Config:
    """The validated `Config` of a ConfigDict or nested dict.

    Raises:
      ValueError: naming an unknown field, a value of the wrong type or a value that cannot work.
    """
    plain = values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values
    config = fields.build(Config, plain).of_table()
    config.validate()
    return config
