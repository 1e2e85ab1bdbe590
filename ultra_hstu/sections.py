"""Sections of a configuration that no other section refers to; `config` has the others."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from ultra_hstu.fields import BelowOne, Limit, NotNegative, Positive, Section
from ultra_hstu.paths import LocalPath

Count = Positive[int]
GENERATED = ("synthetic", "synthetic_long")  # sources whose settings are sections of these names


@dataclasses.dataclass(frozen=True)
class SyntheticConfig(Section):
    """Streaming data of HSTU appendix C: a Dirichlet process over categories that drift."""

    users: Count = 4000  # records of the stream; the paper has 1,000,000
    # Events a record; the paper has 128.
    length: Annotated[
        int, Limit(lambda value: value >= 3, "at least 3: history, validation, test")
    ] = 64
    items: Count = 2000  # ids released over the stream; the paper has 20,000
    categories: Count = 50  # of items; the paper has 100
    prior_categories: Count = 5  # at most this many in a record's own prior
    released_at_start: BelowOne[float] = 0.4  # share of the ids available to the first record
    # a ~ U(1, this)
    max_concentration: Annotated[float, Limit(lambda value: value >= 1, "at least 1")] = 500.0
    seed: NotNegative[int] = 0  # of the stream


@dataclasses.dataclass(frozen=True)
class SyntheticLongConfig(Section):
    """Long histories of likes, whose best possible prediction is known: docs/scaling.md.

    A user likes an item with a probability that is drawn once for the user and the category.
    """

    users: Count = 800  # all with histories of the same length
    length: Annotated[
        int, Limit(lambda value: value >= 3, "at least 3: history, validation, test")
    ] = 20480  # events of a user
    categories: Count = 512  # of items
    items_per_category: Count = 4  # equally likely
    # An event is of category k = 1, 2, ... in proportion to k^-skew.
    skew: NotNegative[float] = 1.0
    likes: Positive[float] = 0.5  # that probability is drawn from Beta(likes, others)
    others: Positive[float] = 0.5  # the second parameter of that law
    seed: NotNegative[int] = 0  # of everything that is drawn


@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    learning_rate: Positive[float] = 1e-3  # of AdamW, after the warmup
    beta1: BelowOne[float] = 0.9  # decay of the mean of gradients
    beta2: BelowOne[float] = 0.98  # decay of the mean of their squares
    # Of both means between steps, those of lazy Adam too; each step computes them in float32.
    # bfloat16 halves their memory and refuses means that move too slowly for its 8 bits.
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: NotNegative[float] = 0.0  # of all parameters that a step changes
    warmup_steps: NotNegative[int] = 0  # the learning rate rises from 0 during them
    # The learning rate falls to 0 at this step, on a cosine; None: it stays.
    decay_steps: Count | None = None
    clip_norm: Positive[float] | None = None  # gradients are scaled down to this norm
    # Of the tables of items, signals, features and contextual tokens. same: AdamW, over every entry
    # in every step. The others change the entries that a step reads, so that time and memory of a
    # step do not grow with the table: row-wise AdaGrad keeps one number an entry, lazy Adam the two
    # means of Adam.
    tables: Literal["same", "rowwise_adagrad", "lazy_adam"] = "same"
    # Of these two, with the same warmup and decay; None: learning_rate.
    tables_learning_rate: Positive[float] | None = None

    def check_state(self) -> None:
        """Raises ValueError for means that `state_dtype` would hold still.

        Of a gradient of 0, a mean falls by 1 - beta. Rounding to bfloat16 undoes a fall below half
        its spacing, 2^-8 of a value at most; twice that is asked for.
        """
        for name in ("beta1", "beta2"):
            if self.state_dtype == "bfloat16" and 1 - getattr(self, name) < 2**-7:
                raise ValueError(
                    f"optim.state_dtype='bfloat16' rounds away what optim.{name}="
                    f"{getattr(self, name)} moves a mean by in a step: use at most 0.99, or "
                    "state_dtype='float32'"
                )


@dataclasses.dataclass(frozen=True)
class EvalConfig(Section):
    """What an evaluation hides, and what time it tells the model: docs/evaluation.md.

    Steps of training do not read it; the choice of the best epoch does.
    """

    # Retrieval: whose items are left out of the ranking, those of the newest data.max_history
    # events (as in the public code) or those of all earlier events of the user (as in serving).
    hide: Literal["window", "all"] = "window"
    # Retrieval: whether such items are left out at all. hide: a target among them is not found.
    # rank: every item of the catalogue is ranked, and `hide` only says what counts as a repeat.
    repeats: Literal["hide", "rank"] = "hide"
    # When the model is asked. target: at the time of each target, which lies ahead of the request;
    # request (ranking): about all targets of a request at the time of its first; last: at the time
    # of the user's last event, as in serving without `now`.
    time: Literal["target", "request", "last"] = "target"


@dataclasses.dataclass(frozen=True)
class WindowsConfig(Section):
    """Data that goes on, under `train.protocol="windows"`: docs/windows.md.

    A model learns from a window, is evaluated on the next one, learns from that one, and so on.
    """

    by: Literal["month", "day", "event"] = "month"  # what a window is measured in, UTC
    size: Count = 1  # so many of them a window
    first: Count = 1  # so many windows are the first one, which the run starts with
    count: Count | None = None  # at most so many windows, the oldest; None: all
    # Training steps on each later window; None: train.epochs epochs.
    steps: Count | None = None
    # Later windows start from the parameters of the one before and learn its events alone; or anew,
    # from all events up to its end.
    start: Literal["continued", "anew"] = "continued"
    # Retrieval: which of a user's events in the next window are asked about, each with all events
    # before it as history. The first is the only one with nothing of that window in its history.
    targets: Literal["first", "last", "all"] = "first"
    # Set by a run in the folder of a window: which one its model has learned from last.
    number: NotNegative[int] | None = None


@dataclasses.dataclass(frozen=True)
class RankConfig(Section):
    """What the user will do with each target. Without tasks a run is retrieval."""

    tasks: tuple[str, ...] = ()  # names of ultra_hstu.data.signals
    input: Literal["merged", "interleaved"] = "merged"  # item + action in one token, or two tokens
    # What the user did with an event, embedded and summed; 0 on targets. Retrieval embeds them in
    # every history token.
    signals: tuple[str, ...] = ()
    features: tuple[str, ...] = ()  # known of an event before the user acts; kept on targets
    contextual: tuple[str, ...] = ()  # features of the user, one token each before the history
    targets: Count = 16  # events a request asks about, which do not see one another
    # Events that a training request asks about; None: `targets`. With 1 a history is encoded anew
    # for each of them, as in impression-level training.
    train_targets: Count | None = None
    # Training requests of a user in an epoch: all of n, or one drawn, as HSTU's sampling rate 1/n.
    requests: Literal["all", "one"] = "all"
    # The end that positions count from: the targets, or the oldest event. A cached history grows
    # without being encoded anew only under "forwards".
    positions: Literal["backwards", "forwards"] = "backwards"
    # all: every history item too (interleaved only; positions are forwards)
    supervise: Literal["targets", "all"] = "targets"
    head_width: Count = 128  # hidden width of the multi-task head
    validation_fraction: NotNegative[float] = 0.1  # of a user's events, before the test events
    test_fraction: NotNegative[float] = 0.1  # of a user's events, the newest

    def check(self) -> None:
        """Raises ValueError for a name that stands twice, or more targets than a request has."""
        for name in ("tasks", "signals", "features", "contextual"):
            if len(set(values := getattr(self, name))) < len(values):
                raise ValueError(f"rank.{name}={values} names one twice")
        if (asked := self.train_targets) is not None and asked > self.targets:
            raise ValueError(
                f"rank.train_targets={asked} must be at most rank.targets={self.targets}, the most "
                "that a request has: lower it, or raise rank.targets"
            )

    def check_every_item(self, of_model: Mapping[str, Any]) -> None:
        """Raises ValueError for what `supervise="all"` cannot be used with.

        Args:
          of_model: `model.channels` and `model.truncate_after`, by name.
        """
        merged = self.input == "merged"
        reasons: dict[str, tuple[object, str]] = {  # what is used, and why it cannot be
            "rank.input": (self.input if merged else None, "an event's one token holds its action"),
            # A contextual token sees the whole history, and all of it sees the token.
            "rank.contextual": (self.contextual, "a contextual token has seen every action"),
            "model.channels": (
                list(of_model["model.channels"]),
                "an action decides what a channel holds",
            ),
            "model.truncate_after": (
                of_model["model.truncate_after"],
                "the oldest items have no row above it",
            ),
        }
        for name, (value, why) in reasons.items():
            if value:
                remedy = "use rank.input='interleaved'" if name == "rank.input" else "leave it out"
                raise ValueError(
                    f"{name}={value!r} cannot be used with rank.supervise='all', which predicts "
                    f"every item of a history before its action: {why}; {remedy}, or use "
                    "rank.supervise='targets'"
                )


@dataclasses.dataclass(frozen=True)
class ParallelConfig(Section):
    """How the devices of a mesh share a step, see docs/context_parallel.md.

    What is computed depends on `groups` alone.
    """

    data: Count = 1  # groups of devices, each with users of its own
    context: Count = 1  # devices of a group, which share the rows of its users
    # A batch is packed in so many parts, a multiple of data. None: those of the run; of a new one,
    # `data`.
    groups: Count | None = None
    # Of attention over context.
    strategy: Literal["auto", "gather", "ring", "ulysses", "halo"] = "auto"
    # Slices, or blocks in turns, which balance full causal masks.
    layout: Literal["auto", "contiguous", "striped"] = "auto"
    fsdp: bool = False  # matrices of layers, with their optimizer state, are divided over data
    # How the devices of a group come by their batch. Each reads all of it, or users of its own,
    # whose rows they then exchange: by all-to-all, or by all-gather, which sends all to all.
    batches: Literal["replicated", "exchanged", "gathered"] = "replicated"
    # Rows that a device may send to one other in an exchange by all-to-all. None: what any batch
    # can need.
    exchange_rows: Count | None = None

    @property
    def batch_groups(self) -> int:
        return self.data if self.groups is None else self.groups

    def check_chunk_rows(self, chunk_rows: int | None, rows: int) -> None:
        """Raises ValueError for mini-sequences longer than a device's part of a batch of `rows`."""
        shard = -(-rows // (self.data * self.context))
        if chunk_rows is not None and chunk_rows > shard:
            raise ValueError(
                f"model.chunk_rows={chunk_rows} is longer than the shard of a device, which has "
                f"{shard} of a batch's {rows} rows under parallel.data={self.data} and "
                f"parallel.context={self.context}: use at most {shard}, or None for all at one time"
            )


@dataclasses.dataclass(frozen=True)
class MolConfig(Section):
    """Mixture of logits (arXiv 2407.15462), under `loss.similarity="mol"`.

    See docs/mixture_of_logits.md. A score is a weighted mean of all products of a component of the
    user and one of the item. The defaults are those published for MovieLens-1M, without users' ids.
    """

    user_components: Count = 8  # P_u
    item_components: Count = 4  # P_x
    component_width: Count = 64  # of a component of either
    hidden_width: Count = 512  # of the SwiGLU net that makes a user's components
    gate_width: Count = 128  # hidden width of the three nets of the gate
    item_dropout: BelowOne[float] = 0.1  # of an item's vector before its components are made
    gate_dropout: BelowOne[float] = 0.2  # of the weights, of which those left add up to 1 again
    # Factor of the negative mutual information of weights and (user, target) pairs, which training
    # lowers besides: all weights are then used, and few of them for one pair.
    balance: NotNegative[float] = 0.001
    # One component of a user comes from a table of so many entries, by the id: whole numbers by
    # their remainder, texts by a hash. Who is not known has zeros there. 0: no such component.
    user_ids: NotNegative[int] = 0
    user_dropout: BelowOne[float] = 0.5  # of that component
    user_penalty: NotNegative[float] = 0.1  # factor of its mean squared norm in the loss

    def check(self) -> None:
        """Raises ValueError where nothing of a user but the id would be left."""
        if self.user_ids and self.user_components < 2:
            raise ValueError(
                f"mol.user_components={self.user_components} leaves none beside that of "
                f"mol.user_ids={self.user_ids}: use at least 2"
            )


@dataclasses.dataclass(frozen=True)
class LossConfig(Section):
    # What a softmax is taken over: items drawn uniformly, targets of the batch, or all items.
    kind: Literal["sampled", "in_batch", "full"] = "sampled"
    negatives: Count = 128  # per position
    rows_per_draw: Count = 1  # so many successive rows of a batch share their negatives
    temperature: Positive[float] = 0.05  # scores are divided by it
    l2_normalize: bool = True  # scores are cosines
    # What a score is: the product of two vectors, or a mixture of products of their components
    # (section `mol`); temperature and l2_normalize then apply to each of these products.
    similarity: Literal["dot", "mol"] = "dot"
    log_q: bool = True  # in_batch: correct for the items' frequency in training
    # Rows whose logits exist at one time. None: what suits the device.
    chunk_rows: Count | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    epochs: Count = 101  # at most
    steps: Count | None = None  # at most: the last epoch ends early; None: those of the epochs
    seed: Annotated[
        NotNegative[int],
        Limit(lambda value: value < 2**32, "below 2^32: larger seeds would repeat smaller ones"),
    ] = 42  # of the first parameters, and of the order and dropout of every epoch
    # published, validated, temporal; of ranking, chronological; of both, new_users and windows
    protocol: str = "published"
    # Folder of a run whose parameters this one starts from; None: from those of the seed.
    init_from: LocalPath | None = None
    eval_every: Count = 1  # epochs between two evaluations
    eval_users: Count = 256  # users scored at one time
    # Epochs without a better NDCG@10 (ranking: NE) before stopping. None: 10; under `published`
    # all epochs are run.
    patience: Count | None = None
    checkpoint_every: Count = 1  # epochs between two checkpoints
    keep_checkpoints: Count = 2  # newest kept, beside the best
    checkpoint_minutes: Positive[float] | None = 10.0  # one is written after so long at the latest
    # Steps in one compiled scan; progress, signals and metrics are looked at between calls.
    steps_per_call: Count = 16
    matmul_precision: Literal["default", "tensorfloat32", "highest"] = "default"  # of JAX
