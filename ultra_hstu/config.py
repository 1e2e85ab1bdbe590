"""The configuration of a run: frozen dataclasses, made from an `ml_collections.ConfigDict`, checked before any work.

A config file under `experiments/configs/` returns `Config(...)` as a `ConfigDict`, so that `--config.model.width=64` overrides any field;
`from_config_dict` turns it back into the dataclasses and validates it. Every error names the field, its value and what is allowed.
"""

import dataclasses
import math
import operator
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import ml_collections
from ml_collections import config_dict

POSITIVE = """data.max_history data.batch_users data.batch_tokens data.recalibrate_every data.synthetic.users data.synthetic.items data.synthetic.categories
    data.synthetic.prior_categories     model.width model.layers model.heads model.qk_width model.v_width model.ffn_width model.time_buckets
    model.alpha model.truncate_after model.truncate_length model.chunk_rows     rank.targets rank.head_width
    loss.negatives loss.temperature loss.chunk_rows optim.learning_rate optim.clip_norm optim.decay_steps train.epochs train.eval_every train.eval_users
    train.patience train.checkpoint_every train.keep_checkpoints train.steps_per_call parallel.data parallel.context parallel.groups""".split()
NOT_NEGATIVE = "rank.validation_fraction rank.test_fraction model.output_slots optim.weight_decay optim.warmup_steps train.seed data.ties_seed data.synthetic.seed".split()
BELOW_ONE = "model.input_dropout model.linear_dropout optim.beta1 optim.beta2 data.synthetic.released_at_start".split()


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Streaming data of HSTU appendix C: a Dirichlet process over categories with a drifting vocabulary."""

    users: int = 4000  # records of the stream; the paper has 1,000,000
    length: int = 64  # events a record; the paper has 128
    items: int = 2000  # ids released over the stream; the paper has 20,000
    categories: int = 50  # the paper has 100
    prior_categories: int = 5  # at most this many in a record's own prior
    released_at_start: float = 0.4  # share of the ids available to the first record
    max_concentration: float = 500.0  # a ~ U(1, this)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "synthetic"  # a name of ultra_hstu.data.sources
    raw_dir: str | None = None  # a local copy in the publisher's format, read instead of a download
    data_dir: str = "data"  # prepared array_record files go here
    ties: Literal["stable", "random"] = "stable"  # order of a user's events with equal timestamps
    ties_seed: int = 0
    max_history: int = 200  # newest events kept in front of a target
    batch_users: int = 128  # B, most users in a batch
    batch_tokens: int | None = (
        None  # T, rows of the flat buffer; None: chosen from the lengths so that a batch nearly always fits
    )
    layout: Literal["jagged", "padded"] = "jagged"
    placement: Literal["auto", "device", "stream"] = (
        "auto"  # auto: on the device below 1 GiB of events
    )
    temporal_test_fraction: float = (
        0.1  # share of events (newest) that protocol `temporal` tests on
    )
    stochastic_length: float | None = (
        None  # alpha of HSTU equation 4, in (1, 2]: training histories above max_history^(alpha/2) are cut
    )
    subsequence: Literal["recent", "random", "weighted"] = (
        "recent"  # which events of a cut history stay
    )
    load_balance: bool = (
        False  # choose which long histories stay whole so that every device has the same load
    )
    recalibrate_every: int = 100  # steps between two estimates of that load
    synthetic: SyntheticConfig = SyntheticConfig()


@dataclasses.dataclass(frozen=True)
class ChannelConfig:
    """One transducer of a mixture: its own history, the newest events whose signal is at least a value, at its own length and depth."""

    signal: str = ""  # an action of the data; "": every event
    at_least: float = 1.0
    max_history: int = 200
    layers: int = 2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    kind: Literal["hstu", "sasrec"] = "hstu"
    width: int = 50  # D
    layers: int = 2
    heads: int = 1
    qk_width: int = 50  # K, per head
    v_width: int = 50  # V, per head
    ffn_width: int = 50  # SASRec only
    preset: Literal["research", "production"] = (
        "research"  # HSTU layer: published research code, or the production layer
    )
    attention: Literal["silu", "softmax"] = "silu"  # softmax: the paper's ablation
    relative_bias: bool = True  # position and time-bucket bias inside the SiLU
    time_buckets: int = 128
    output_slots: int = 11  # the published padding behind the history: N = max_history + output_slots divides attention
    input_dropout: float = 0.2
    linear_dropout: float = 0.2
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    implementation: str | None = None  # of kernels.hstu_attention; None: the best for the device
    alpha: float | None = None  # production layer: factor on the scores; None: 1 / sqrt(qk_width)
    # Semi-local attention, see kernels.mask: one value for all layers, or one a layer. A window of -1 is none.
    window: tuple[int, ...] = ()
    full_rows: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    # Attention truncation: layers on the whole sequence; the others work on the newest `truncate_length` events.
    truncate_after: int | None = None
    truncate_length: int | None = None
    # Mixture of transducers, by name; empty: one transducer over all events, with `layers`.
    channels: dict[str, ChannelConfig] = dataclasses.field(default_factory=dict)
    projection: Literal["same", "fp8"] = (
        "same"  # precision of the uvqk and output projections, forward; "same": that of dtype
    )
    remat: Literal["none", "selective", "full"] = (
        "none"  # what the backward recomputes instead of keeping
    )
    chunk_rows: int | None = (
        None  # mini-sequences: rows that token-wise parts work on at one time; None: all
    )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    kind: Literal["sampled", "in_batch", "full"] = "sampled"
    negatives: int = 128  # per position
    temperature: float = 0.05
    l2_normalize: bool = True
    log_q: bool = True  # in_batch: correct for how often an item is drawn
    chunk_rows: int | None = (
        None  # rows whose logits exist at one time; None: 512 on a CPU (its cache), 4096 on an accelerator
    )


@dataclasses.dataclass(frozen=True)
class RankConfig:
    """Ranking as sequential transduction: what the user will do with each target. Without tasks a run is retrieval."""

    tasks: tuple[str, ...] = ()  # names of ultra_hstu.data.signals
    input: Literal["merged", "interleaved"] = "merged"  # item + action in one token, or two tokens
    signals: tuple[
        str, ...
    ] = ()  # what the user did with an event, embedded and summed; 0 on targets. Retrieval embeds them in every history token
    features: tuple[str, ...] = ()  # known of an event before the user acts; kept on targets
    contextual: tuple[str, ...] = ()  # features of the user, one token each in front of the history
    targets: int = 16  # events a request asks about, which do not see one another
    # Which end positions count from: the targets, or the oldest event. Only forwards can a cached history grow without being encoded anew.
    positions: Literal["backwards", "forwards"] = "backwards"
    supervise: Literal["targets", "all"] = (
        "targets"  # all: every history item too (interleaved only; positions are forwards)
    )
    head_width: int = 128  # hidden width of the multi-task head
    validation_fraction: float = 0.1  # of a user's events, before the test events
    test_fraction: float = 0.1  # of a user's events, the newest


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay_steps: int | None = (
        None  # the learning rate falls to 0 at this step, on a cosine; None: it stays
    )
    clip_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    epochs: int = 101
    seed: int = 42
    protocol: str = "published"  # one of the task's PROTOCOLS
    eval_every: int = 1  # epochs
    eval_users: int = 256  # users scored at one time
    patience: int | None = (
        None  # epochs without a better NDCG@10 (ranking: NE) before stopping; None: 10, under `published` all are run
    )
    checkpoint_every: int = 1  # epochs
    keep_checkpoints: int = 2  # newest kept, beside the best
    steps_per_call: int = (
        16  # steps in one compiled scan; progress, signals and metrics are looked at between calls
    )
    matmul_precision: Literal["default", "tensorfloat32", "highest"] = "default"


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices of a mesh share a step, see docs/context_parallel.md. What is computed depends on `groups` alone."""

    data: int = 1  # groups of devices, each with users of its own
    context: int = 1  # devices of a group, which share the rows of its users
    groups: int | None = (
        None  # a batch is packed in so many parts, a multiple of data; None: those of the run, of a new one `data`
    )
    strategy: Literal["auto", "gather", "ring", "ulysses", "halo"] = (
        "auto"  # of attention over context
    )
    layout: Literal["auto", "contiguous", "striped"] = (
        "auto"  # slices, or blocks in turns, which balance full causal masks
    )
    fsdp: bool = False  # matrices of layers, with their optimizer state, are divided over data

    @property
    def batch_groups(self) -> int:
        return self.data if self.groups is None else self.groups


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "synthetic"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    rank: RankConfig = RankConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()

    @property
    def padded_length(self) -> int:
        """N: the constant that attention is divided by, and the rows a user takes in the padded layout."""
        return self.data.max_history + self.model.output_slots

    def on_one_device(self) -> "Config":
        """The same run as one device computes it."""
        return dataclasses.replace(self, parallel=ParallelConfig(groups=self.parallel.batch_groups))

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        _require(self, POSITIVE, lambda value: value > 0, "greater than 0")
        _require(self, NOT_NEGATIVE, lambda value: value >= 0, "at least 0")
        _require(self, BELOW_ONE, lambda value: 0 <= value < 1, "in [0, 1)")
        if not 0 < self.data.temporal_test_fraction < 1:
            raise ValueError(
                f"data.temporal_test_fraction={self.data.temporal_test_fraction!r} must be in (0, 1)"
            )
        if self.model.kind == "sasrec" and self.model.width % self.model.heads:
            raise ValueError(
                f"model.width={self.model.width} must be a multiple of model.heads={self.model.heads} for SASRec"
            )
        if self.data.batch_tokens is not None and self.data.batch_tokens < self.data.max_history:
            raise ValueError(
                f"data.batch_tokens={self.data.batch_tokens} cannot hold one history of data.max_history={self.data.max_history} events"
            )
        if not 0 < self.rank.validation_fraction + self.rank.test_fraction < 1:
            raise ValueError(
                f"rank.validation_fraction={self.rank.validation_fraction!r} and rank.test_fraction={self.rank.test_fraction!r}: "
                "their sum must be in (0, 1)"
            )
        if self.rank.tasks:
            self._validate_ranking()
        elif self.model.channels or self.train.protocol == "chronological":
            raise ValueError(
                f"model.channels={sorted(self.model.channels)}, train.protocol={self.train.protocol!r}: a mixture and the chronological split "
                "are for ranking; name rank.tasks"
            )
        if self.optim.decay_steps is not None and self.optim.decay_steps <= self.optim.warmup_steps:
            raise ValueError(
                f"optim.decay_steps={self.optim.decay_steps} must be above optim.warmup_steps={self.optim.warmup_steps}"
            )
        for name in ("window", "full_rows", "prefix"):
            values = getattr(self.model, name)
            if len(values) not in (0, 1, self.model.layers):
                raise ValueError(
                    f"model.{name}={values} must hold one value, or one for each of model.layers={self.model.layers}"
                )
            if any(value < (-1 if name == "window" else 0) for value in values):
                raise ValueError(
                    f"model.{name}={values} must be at least {-1 if name == 'window' else 0}"
                )
        self._validate_encoder()
        self._validate_parallel()
        if (self.model.truncate_after is None) != (self.model.truncate_length is None):
            raise ValueError(
                f"model.truncate_after={self.model.truncate_after} and model.truncate_length={self.model.truncate_length}: give both, or neither"
            )
        if self.model.truncate_after is not None and self.model.truncate_after >= self.model.layers:
            raise ValueError(
                f"model.truncate_after={self.model.truncate_after} must be below model.layers={self.model.layers}"
            )
        if self.data.stochastic_length is not None and not 1 < self.data.stochastic_length <= 2:
            raise ValueError(
                f"data.stochastic_length={self.data.stochastic_length!r} must be in (1, 2], or None for whole histories"
            )
        if self.data.load_balance and self.data.stochastic_length is None:
            raise ValueError(
                "data.load_balance=True needs data.stochastic_length: it chooses which histories stay whole"
            )
        if self.train.seed >= 2**32:
            raise ValueError(
                f"train.seed={self.train.seed} must be below 2^32: larger seeds would repeat smaller ones"
            )
        if self.data.synthetic.max_concentration < 1:
            raise ValueError(
                f"data.synthetic.max_concentration={self.data.synthetic.max_concentration!r} must be at least 1"
            )
        if self.data.synthetic.length < 3:
            raise ValueError(
                f"data.synthetic.length={self.data.synthetic.length} must be at least 3: history, validation, test"
            )

    def _validate_encoder(self) -> None:
        """Options that only some encoders have."""
        model, default = self.model, ModelConfig()
        masks, cuts = ("window", "full_rows", "prefix"), ("truncate_after", "truncate_length")
        rules = [
            (
                model.kind == "sasrec",
                (*masks, *cuts, "alpha", "projection", "remat", "chunk_rows"),
                "model.kind='sasrec'",
                "use 'hstu'",
            ),
            (
                model.attention == "softmax",
                masks,
                "model.attention='softmax', which is plain causal",
                "use 'silu'",
            ),
            (
                model.preset == "research",
                ("alpha",),
                "model.preset='research', whose scores have no factor",
                "use 'production'",
            ),
            (
                self.data.layout == "padded",
                ("full_rows",),
                "data.layout='padded', whose newest rows are padding",
                "use 'jagged'",
            ),
        ]
        for applies, names, what, remedy in rules:
            for name in names:
                value = getattr(model, name)
                if (
                    applies
                    and value != getattr(default, name)
                    and not (isinstance(value, tuple) and set(value) <= {0})
                ):
                    raise ValueError(
                        f"model.{name}={value!r} does nothing under {what}: {remedy}, or leave it out"
                    )

    def _validate_parallel(self) -> None:
        """What the devices of a group can share."""
        parallel, model = self.parallel, self.model
        strategy, context, biased = parallel.strategy, parallel.context, model.relative_bias
        if parallel.batch_groups % parallel.data:
            raise ValueError(
                f"parallel.groups={parallel.groups} must be a multiple of parallel.data={parallel.data}"
            )
        windows = {width != -1 for width in model.window} or {False}
        halo = strategy == "halo" or (strategy == "auto" and True in windows)
        rules = [
            (model.kind != "hstu", f"model.kind={model.kind!r}", "use 'hstu'"),
            (model.attention != "silu", f"model.attention={model.attention!r}", "use 'silu'"),
            (self.data.layout != "jagged", f"data.layout={self.data.layout!r}", "use 'jagged'"),
            (
                biased and strategy not in ("auto", "ulysses"),
                f"a relative bias and parallel.strategy={strategy!r}",
                "use 'ulysses'",
            ),
            (
                (biased or strategy == "ulysses") and model.heads % context,
                f"'ulysses' with model.heads={model.heads}",
                "use a multiple",
            ),
            (
                strategy == "halo" and False in windows,
                f"'halo' with model.window={model.window}, a full mask,",
                "use 'ring' or 'auto'",
            ),
            (
                halo and parallel.layout == "striped",
                "'halo' with parallel.layout='striped'",
                "use 'contiguous', or strategy='ring'",
            ),
        ]
        for wrong, what, remedy in rules:
            if wrong and context > 1:
                raise ValueError(
                    f"{what} cannot be used with parallel.context={context}: {remedy}, or context=1"
                )

    def _validate_ranking(self) -> None:
        rank, model = self.rank, self.model
        for name in ("tasks", "signals", "features", "contextual"):
            if len(set(values := getattr(rank, name))) < len(values):
                raise ValueError(f"rank.{name}={values} names one twice")
        needed = {
            "train.protocol": (self.train.protocol, "chronological"),
            "data.layout": (self.data.layout, "jagged"),
            "model.kind": (model.kind, "hstu"),
            "model.attention": (
                model.attention,
                "silu",
            ),  # the softmax ablation lets targets see one another
        }
        for name, (value, only) in needed.items():
            if value != only:
                raise ValueError(f"{name}={value!r} cannot be used for ranking: use {only!r}")
        # A contextual token sees the whole history and is seen by all of it: an item would read its own action through it.
        unfit = (
            rank.input != "interleaved"
            or model.channels
            or model.truncate_after is not None
            or rank.contextual
        )
        if rank.supervise == "all" and unfit:
            raise ValueError(
                "rank.supervise='all' predicts every item of one whole history before its action: it needs rank.input='interleaved', "
                "no model.channels, no truncation and no rank.contextual; or use rank.supervise='targets'"
            )


def _require(config: Config, names: list[str], allowed: Callable[[Any], bool], words: str) -> None:
    for name in names:
        value = operator.attrgetter(name)(config)
        if value is not None and not allowed(value):
            raise ValueError(f"{name}={value!r} must be {words}")


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The ConfigDict that a config file returns; its fields can be overridden by flags, those that are None too."""

    def convert(section: Any) -> dict[str, Any]:
        hints = get_type_hints(type(section))
        values = {name: getattr(section, name) for name in hints}
        return {
            name: convert(value)
            if dataclasses.is_dataclass(value)
            else {key: convert(part) for key, part in value.items()}
            if isinstance(value, dict)
            else config_dict.placeholder(get_args(hints[name])[0])
            if value is None
            else value
            for name, value in values.items()
        }

    return ml_collections.ConfigDict(convert(config))


def from_config_dict(values: Any) -> Config:
    """The validated `Config` of a ConfigDict or nested dict.

    Raises:
      ValueError: naming an unknown field, a value of the wrong type or a value that cannot work.
    """
    plain = values.to_dict() if isinstance(values, ml_collections.ConfigDict) else dict(values)
    config = _build(Config, plain, prefix="")
    config.validate()
    return config


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for every field in which two nested config dicts differ: `data.ties: 'stable' -> 'random'`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(
            f"config section {prefix.rstrip('.') or '(root)'} is {values!r}, not a mapping of fields"
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise ValueError(
            f"unknown config field {prefix}{unknown[0]!s}; {prefix or 'the config '}has {', '.join(fields)}"
        )
    hints = get_type_hints(cls)
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            built[name] = _build(hints[name], value, f"{prefix}{name}.")
        elif get_origin(hints[name]) is dict and isinstance(value, dict):
            built[name] = {
                key: _build(get_args(hints[name])[1], part, f"{prefix}{name}.{key}.")
                for key, part in value.items()
            }
        elif isinstance(value, list) and _fits(tuple(value), hints[name]):
            built[name] = tuple(value)  # JSON has no tuples
        elif _fits(value, hint := hints[name]):
            # Flags may give 1 where 1.0 is meant; nothing else is converted.
            built[name] = float(value) if hint is float and type(value) is int else value
        else:
            allowed = (
                ", ".join(map(repr, get_args(hint)))
                if get_origin(hint) is Literal
                else getattr(hint, "__name__", str(hint))
            )
            raise ValueError(f"{prefix}{name}={value!r} is not allowed: use {allowed}")
    return cls(**built)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(part, get_args(hint)[0]) for part in value)
    if hint is float:
        return (
            isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
