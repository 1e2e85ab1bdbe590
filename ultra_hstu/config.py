"""The configuration of a run: frozen dataclasses, made from an `ml_collections.ConfigDict`, checked before any work.

A config file under `experiments/configs/` returns `Config(...)` as a `ConfigDict`, so that `--config.model.width=64` overrides any field;
`from_config_dict` turns it back into the dataclasses and validates it. Every error names the field, its value and what is allowed.
"""

import dataclasses
import math
from typing import Any, Literal, get_args, get_type_hints

import ml_collections

Source = Literal[
    "synthetic", "ml-100k", "ml-1m", "ml-20m", "amazon-books", "amazon-beauty", "assistments-2017",
    "kuairand-pure", "kuairand-1k", "kuairand-27k",
]  # fmt: skip
Protocol = Literal["published", "validated", "temporal"]


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
    source: Source = "synthetic"
    raw_dir: str | None = None  # a local copy in the publisher's format, read instead of a download
    data_dir: str = "data"  # prepared array_record files go here
    ties: Literal["stable", "random"] = "stable"  # order of a user's events with equal timestamps
    ties_seed: int = 0
    max_history: int = 200  # newest events kept in front of a target
    batch_users: int = 128  # B, most users in a batch
    batch_tokens: int | None = None  # T, rows of the flat buffer; None: chosen from the lengths so that a batch nearly always fits
    layout: Literal["jagged", "padded"] = "jagged"
    placement: Literal["auto", "device", "stream"] = "auto"  # auto: on the device below 1 GiB of events
    temporal_test_fraction: float = 0.1  # share of events (newest) that protocol `temporal` tests on
    synthetic: SyntheticConfig = SyntheticConfig()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    kind: Literal["hstu", "sasrec"] = "hstu"
    width: int = 50  # D
    layers: int = 2
    heads: int = 1
    qk_width: int = 50  # K, per head
    v_width: int = 50  # V, per head
    ffn_width: int = 50  # SASRec only
    preset: Literal["research", "production"] = "research"  # HSTU layer: published research code, or the production layer
    attention: Literal["silu", "softmax"] = "silu"  # softmax: the paper's ablation
    relative_bias: bool = True  # position and time-bucket bias inside the SiLU
    time_buckets: int = 128
    output_slots: int = 11  # the published padding behind the history: N = max_history + output_slots divides attention
    input_dropout: float = 0.2
    linear_dropout: float = 0.2
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    implementation: str | None = None  # of kernels.hstu_attention; None: the best for the device


@dataclasses.dataclass(frozen=True)
class LossConfig:
    kind: Literal["sampled", "in_batch", "full"] = "sampled"
    negatives: int = 128  # per position
    temperature: float = 0.05
    l2_normalize: bool = True
    log_q: bool = True  # in_batch: correct for how often an item is drawn
    chunk_rows: int = 2048  # rows whose logits exist at one time


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.0
    warmup_steps: int = 0
    clip_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    epochs: int = 101
    seed: int = 42
    protocol: Protocol = "published"
    eval_every: int = 1  # epochs
    eval_users: int = 256  # users scored at one time
    patience: int | None = None  # epochs without a better NDCG@10 before stopping; None: run all (`validated` always stops by it)
    checkpoint_every: int = 1  # epochs
    keep_checkpoints: int = 2  # newest kept, beside the best
    steps_per_call: int = 16  # steps in one compiled scan; progress, signals and metrics are looked at between calls
    matmul_precision: Literal["default", "tensorfloat32", "highest"] = "default"


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "synthetic"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @property
    def padded_length(self) -> int:
        """N: the constant that attention is divided by, and the rows a user takes in the padded layout."""
        return self.data.max_history + self.model.output_slots
