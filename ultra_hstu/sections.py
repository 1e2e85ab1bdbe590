"""Sections of a configuration that no other section refers to; `config` has the others."""

import dataclasses
from typing import Annotated

from ultra_hstu.fields import BelowOne, Limit, NotNegative, Positive, Section

Count = Positive[int]


@dataclasses.dataclass(frozen=True)
class SyntheticConfig(Section):
    """Streaming data of HSTU appendix C: a Dirichlet process over categories that drift."""

    users: Count = 4000  # records of the stream; the paper has 1,000,000
    # Events a record; the paper has 128.
    length: Annotated[
        int, Limit(lambda value: value >= 3, "at least 3: history, validation, test")
    ] = 64
    items: Count = 2000  # ids released over the stream; the paper has 20,000
    categories: Count = 50  # the paper has 100
    prior_categories: Count = 5  # at most this many in a record's own prior
    released_at_start: BelowOne[float] = 0.4  # share of the ids available to the first record
    # a ~ U(1, this)
    max_concentration: Annotated[float, Limit(lambda value: value >= 1, "at least 1")] = 500.0
    seed: NotNegative[int] = 0


@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    learning_rate: Positive[float] = 1e-3
    beta1: BelowOne[float] = 0.9
    beta2: BelowOne[float] = 0.98
    weight_decay: NotNegative[float] = 0.0
    warmup_steps: NotNegative[int] = 0
    # The learning rate falls to 0 at this step, on a cosine; None: it stays.
    decay_steps: Count | None = None
    clip_norm: Positive[float] | None = None
