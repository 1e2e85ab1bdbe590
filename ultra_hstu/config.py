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
from ultra_hstu.fields import BelowOne, Limit, NotNegative, Positive, Section
from ultra_hstu.paths import LocalPath
from ultra_hstu.sections import (
    Count,
    EvalConfig,
    LossConfig,
    OptimConfig,
    ParallelConfig,
    RankConfig,
    SyntheticConfig,
    TrainConfig,
    WindowsConfig,
)
from ultra_hstu.table_config import TableConfig

Kind = Literal["binary", "regression"]  # of a ranking task

Rows = tuple[NotNegative[int], ...]
Windows = tuple[Annotated[int, Limit(lambda value: value >= -1, "at least -1")], ...]


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
    table: TableConfig = TableConfig()


@dataclasses.dataclass(frozen=True)
class ChannelConfig(Section):
    """One transducer of a mixture, with a history, a length and a depth of its own.

    Its history is the newest events whose signal is at least a value.
    """

    signal: str = ""  # an action of the data; "": every event
    at_least: float = 1.0  # of the signal
    max_history: Count = 200  # newest such events kept in front of a target
    layers: Count = 2  # depth of its encoder


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    kind: Literal["hstu", "sasrec"] = "hstu"  # the encoder
    width: Count = 50  # D, of an event's embedding and of every layer
    layers: Count = 2  # depth of the encoder
    heads: Count = 1  # H
    qk_width: Count = 50  # K, per head
    v_width: Count = 50  # V, per head
    ffn_width: Count = 50  # of the feed-forward net of SASRec
    # The HSTU layer of the published research code, or the production layer.
    preset: Literal["research", "production"] = "research"
    attention: Literal["silu", "softmax"] = "silu"  # softmax: the paper's ablation
    relative_bias: bool = True  # position and time-bucket bias inside the SiLU
    # Of that bias, beside bucket 0; 0: it knows no times.
    time_buckets: NotNegative[int] = 128
    # The published padding behind the history: N = max_history + output_slots divides attention.
    output_slots: NotNegative[int] = 11
    # Standard deviation of the first vectors of items, which are cut at two of it.
    item_std: Positive[float] = 0.02
    # That of the first u, v, q and k projections of the research layer; Xavier's is
    # sqrt(2 / (width + their widths)), 0.09 for 50 and four times 50.
    uvqk_std: Positive[float] = 0.02
    input_dropout: BelowOne[float] = 0.2  # of the embedded events
    linear_dropout: BelowOne[float] = 0.2  # inside every layer
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    implementation: str | None = None  # of kernels.hstu_attention; None: the best for the device
    # Production layer: factor on the scores. None: 1 / sqrt(qk_width).
    alpha: Positive[float] | None = None
    # Semi-local attention, see kernels.mask: one value for all layers, or one a layer. An event
    # sees so many before it; -1: all.
    window: Windows = ()
    full_rows: Rows = ()  # so many newest events, and all targets, see everything before them
    # So many oldest positions are seen by everything behind them.
    prefix: Rows = ()
    # Attention truncation: so many layers work on the whole sequence, the others on its newest end.
    truncate_after: Count | None = None
    truncate_length: Count | None = None  # events of that end
    # Mixture of transducers, by name; empty: one transducer over all events, with `layers`.
    channels: dict[str, ChannelConfig] = dataclasses.field(default_factory=dict)
    # Precision of the uvqk and output projections in the forward; "same" follows dtype.
    projection: Literal["same", "fp8"] = "same"
    # Of the products that make the gradients of what those projections read: fp8 beside fp8.
    projection_gradient: Literal["same", "fp8"] = "same"
    # Of kernels.norm_linear and kernels.gated_linear; None: the best for the device.
    layer_implementation: str | None = None
    # What the backward computes again instead of keeping it.
    remat: Literal["none", "selective"] = "none"
    # Mini-sequences: rows that token-wise parts work on at one time; None: all.
    chunk_rows: Count | None = None


@dataclasses.dataclass(frozen=True)
class Config(Section):
    name: str = "synthetic"  # what records and tables call the run
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
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
            if train.protocol != "windows":  # ranking has one other
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
        self._validate_encoder()
        self._validate_parallel()
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
        if not rank.tasks and (channels or protocol == "chronological"):
            raise ValueError(
                f"model.channels={sorted(channels)}, train.protocol={protocol!r}: a mixture and "
                "the chronological split are for ranking; name rank.tasks"
            )

    def _validate_encoder(self) -> None:
        """Options of layers that do not fit together, or that only some encoders have."""
        model, default = self.model, ModelConfig()
        width, heads = model.width, model.heads
        after, length = model.truncate_after, model.truncate_length
        if model.kind == "sasrec" and width % heads:
            raise ValueError(
                f"model.width={width} must be a multiple of model.heads={heads} for SASRec"
            )
        masks, cuts = ("window", "full_rows", "prefix"), ("truncate_after", "truncate_length")
        if (after is None) != (length is None):
            cut = f"model.truncate_after={after} and model.truncate_length={length}"
            raise ValueError(f"{cut}: give both, or neither")
        channels = {f"channels.{name}.layers": one.layers for name, one in model.channels.items()}
        for depth, layers in (channels or {"layers": model.layers}).items():
            for name in masks:
                if len(values := getattr(model, name)) not in (0, 1, layers):
                    each = f"one value, or one for each of model.{depth}={layers}"
                    raise ValueError(f"model.{name}={values} must hold {each}")
            if after is not None and after >= layers:
                below = f"must be below model.{depth}={layers}"
                raise ValueError(f"model.truncate_after={after} {below}")
        without: dict[tuple[str, str], tuple[str, ...]] = {}  # (why, remedy): what does nothing
        if model.kind == "sasrec":
            of_layer = ("alpha", "projection", "projection_gradient", "layer_implementation")
            lacks = (*masks, *cuts, *of_layer, "remat", "chunk_rows", "uvqk_std")
            without["model.kind='sasrec'", "use 'hstu'"] = lacks
        if model.projection == "same":
            why = "model.projection='same', whose gradients follow dtype"
            without[why, "use projection='fp8'"] = ("projection_gradient",)
        if model.attention == "softmax":
            without["model.attention='softmax', which is plain causal", "use 'silu'"] = masks
        if model.preset == "production":
            why = "model.preset='production', whose projections start from Xavier's values"
            without[why, "use 'research'"] = ("uvqk_std",)
        if model.preset == "research":
            why = "model.preset='research', whose scores have no factor"
            without[why, "use 'production'"] = ("alpha",)
        if self.data.layout == "padded":
            why = "data.layout='padded', whose newest rows are padding"
            without[why, "use 'jagged'"] = ("full_rows",)
        for (why, remedy), names in without.items():
            for name in names:
                value = getattr(model, name)
                nothing = isinstance(value, tuple) and set(value) <= {0}
                if value != getattr(default, name) and not nothing:
                    raise ValueError(
                        f"model.{name}={value!r} does nothing under {why}: {remedy}, "
                        "or leave it out"
                    )

    def _validate_parallel(self) -> None:
        """What the devices of a group can share."""
        parallel, model = self.parallel, self.model
        strategy, context, biased = parallel.strategy, parallel.context, model.relative_bias
        if parallel.batch_groups % parallel.data:
            raise ValueError(
                f"parallel.groups={parallel.groups} must be a multiple of "
                f"parallel.data={parallel.data}"
            )
        if context == 1:
            return
        windows = {width != -1 for width in model.window} or {False}
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
            refused[f"'halo' with model.window={model.window}, a full mask,"] = (
                "use 'ring' or 'auto'"
            )
        if halo and parallel.layout == "striped":
            remedy = "use 'contiguous', or strategy='ring'"
            refused["'halo' with parallel.layout='striped'"] = remedy
        for why, remedy in refused.items():
            raise ValueError(
                f"{why} cannot be used with parallel.context={context}: {remedy}, or context=1"
            )

    def _validate_ranking(self) -> None:
        rank, model = self.rank, self.model
        for name in ("tasks", "signals", "features", "contextual"):
            if len(set(values := getattr(rank, name))) < len(values):
                raise ValueError(f"rank.{name}={values} names one twice")
        if self.train.protocol not in ("chronological", "windows"):
            raise ValueError(
                f"train.protocol={self.train.protocol!r} cannot be used for ranking: use "
                "'chronological' or 'windows'"
            )
        needed = {
            "data.layout": (self.data.layout, "jagged"),
            "model.kind": (model.kind, "hstu"),
            # The softmax ablation lets targets see one another.
            "model.attention": (model.attention, "silu"),
            # Nothing of a history is hidden: the targets of a request are given.
            "eval.hide": (self.eval.hide, "window"),
            "eval.repeats": (self.eval.repeats, "hide"),
        }
        for name, (value, only) in needed.items():
            if value != only:
                raise ValueError(f"{name}={value!r} cannot be used for ranking: use {only!r}")
        # A contextual token sees the whole history and all of it sees the token: through it an
        # item would read its own action.
        unfit = (
            rank.input != "interleaved"
            or model.channels
            or model.truncate_after is not None
            or rank.contextual
        )
        if rank.supervise == "all" and unfit:
            raise ValueError(
                "rank.supervise='all' predicts every item of one whole history before its action: "
                "it needs rank.input='interleaved', no model.channels, no truncation and no "
                "rank.contextual; or use rank.supervise='targets'"
            )


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
