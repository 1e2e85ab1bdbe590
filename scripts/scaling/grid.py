"""The runs of the curve: data sets, models, lengths, depths, and the order they are worth.

HSTU has two tokens an event and full causal attention. ULTRA-HSTU has one token an event,
semi-local attention, and, above half of its layers, the newest quarter of the history alone. In
between stands each piece by itself.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from experiments.configs.ranking import ASSISTMENTS
from experiments.configs.scaling import LONG
from ultra_hstu import flops
from ultra_hstu.config import Config
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.fields import Values, changed
from ultra_hstu.flops import Flops
from ultra_hstu.model_config import ChannelConfig
from ultra_hstu.ranking import split
from ultra_hstu.ranking.form import channels

# What each model has of ULTRA-HSTU.
MODELS: dict[str, tuple[str, ...]] = {
    "hstu": (),
    "ultra": ("merged", "semi_local", "truncation"),
    "semi_local": ("semi_local",),
    "semi_local_truncation": ("semi_local", "truncation"),
    "truncation": ("truncation",),
    "merged": ("merged",),
    "mixture": ("mixture",),
}
WHOLE, OVER_LENGTH = ("hstu", "ultra"), ("semi_local", "semi_local_truncation")
SEEDS = (42, 43, 44)  # the first of every run, all of the ends
REACH = 256  # events of a window, and newest ones that see everything, of long histories
SAMPLE = 128  # histories that operations are counted for


@dataclasses.dataclass(frozen=True)
class Set:
    """A data set of the curve.

    Attributes:
      base: HSTU on it, of any length and depth.
      events: that a run reads, histories and targets, whatever its length.
      rows_a_step: events of a step, of whole histories.
      tflops: a second, for predictions.
    """

    base: Config
    lengths: tuple[int, ...]
    layers: tuple[int, int, int]
    events: int
    rows_a_step: int
    tflops: float


# Operations a second: 27 TFLOP/s of `assistments_rank_hstu`, whose GPU others used as well; for
# heads of width 64 less than half of what `long_ultra_h200` reached at width 128.
SETS = {
    "synthetic_long": Set(LONG, (512, 1024, 3072, 7168, 16384), (2, 4, 8), 2**27, 36864, 80.0),
    "assistments": Set(ASSISTMENTS, (192, 384, 768, 1536, 3072), (2, 4, 8), 2**26, 2**17, 25.0),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A run: one model of one length and depth."""

    data: str
    model: str
    length: int
    layers: int
    seed: int = SEEDS[0]

    @property
    def name(self) -> str:
        return f"{self.data}_{self.model}_{self.length}_{self.layers}_seed_{self.seed}"


def points(data: str) -> list[Point]:
    """The runs of a data set, those first that a curve needs most.

    Both models over length at the middle depth; at the others; other seeds of the ends; the pieces.
    """
    lengths, layers = SETS[data].lengths, SETS[data].layers
    middle, ends = layers[1], (lengths[0], lengths[-1])
    from_ends = [lengths[-1], lengths[0], *lengths[-2:0:-1]]

    def found() -> Iterator[Point]:
        for depth, length, model in itertools.product(
            (middle, layers[0], layers[2]), from_ends, WHOLE
        ):
            yield Point(data, model, length, depth)
        for seed, length, model in itertools.product(SEEDS[1:], ends, WHOLE):
            yield Point(data, model, length, middle, seed)
        for model, length in itertools.product(OVER_LENGTH, from_ends):
            yield Point(data, model, length, middle)
        for model in MODELS:
            if model not in (*WHOLE, *OVER_LENGTH):
                yield Point(data, model, lengths[-1], middle)

    return list(found())


def config_of(point: Point) -> Config:
    """The configuration of a run, without its steps."""
    of, length, layers = SETS[point.data], point.length, point.layers
    pieces = MODELS[point.model]
    reach = min(REACH, length // 4) * (1 if "merged" in pieces else 2)  # in rows
    model: Values = {"layers": layers}
    if "semi_local" in pieces:
        model |= {"window": (reach,), "full_rows": (reach,)}
    if "truncation" in pieces:
        model |= {"truncate_after": layers // 2, "truncate_length": length // 4}
    if "mixture" in pieces:
        (signal,) = of.base.rank.signals
        model["channels"] = {
            "everything": ChannelConfig(max_history=length - length // 3, layers=layers),
            "part": ChannelConfig(signal, max_history=length // 3, layers=layers),
        }
    users = max(1, of.rows_a_step // (length + of.base.rank.targets))
    return changed(
        of.base,
        name=point.name,
        data={"max_history": length, "batch_users": users},
        model=model,
        rank={"input": "merged" if "merged" in pieces else "interleaved"},
        train={"seed": point.seed, "eval_users": max(1, users)},
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Histories:
    """How many events lie before what a part of the data asks about: some of them, evenly chosen.

    Attributes:
      before: events before a request, ascending, of the whole user.
      requests: of an epoch.
    """

    before: Int64[np.ndarray, " n"]
    requests: int

    @classmethod
    def of(cls, config: Config, interactions: Interactions, part: str) -> "Histories":
        rank, data = config.rank, config.data
        fractions = (rank.validation_fraction, rank.test_fraction)
        if config.train.protocol == "new_users":
            parts = split.new_users(interactions, data.new_users_fraction, *fractions)
        else:
            parts = split.chronological(interactions, *fractions)
        first_U, last_U = parts.bounds(part)
        asked = split.segments(
            first_U, last_U, rank.targets, rank.targets, parts.first, interactions.num_events
        )
        before = np.sort(asked.stop - asked.start)
        chosen = np.linspace(0, len(before) - 1, min(SAMPLE, len(before))).round().astype(np.int64)
        return cls(before[chosen], len(before))

    def cost(self, config: Config) -> Flops:
        """Operations of a request."""
        history = {
            name: np.minimum(self.before, one.max_history) for name, one in channels(config).items()
        }
        mixed = history if config.model.channels else None
        longest = next(iter(history.values()))
        return flops.count(config, longest, targets=config.rank.targets, channels=mixed)

    def events(self, config: Config) -> float:
        """Of a request, targets counted: the mean."""
        of_channels = channels(config).values()
        read = sum(np.minimum(self.before, one.max_history).mean() for one in of_channels)
        return float(read) + config.rank.targets


def with_steps(config: Config, histories: Histories, events: int) -> Config:
    """The run that reads so many events, its learning rate falling to 0 meanwhile."""
    users = config.data.batch_users
    steps = max(2, round(events / (users * histories.events(config))))
    epochs = steps * users // histories.requests + 2  # more than enough
    every = max(1, epochs // 8)
    return changed(
        config,
        optim={"warmup_steps": steps // 20, "decay_steps": steps},
        train={"steps": steps, "epochs": epochs, "patience": epochs, "eval_every": every}
        | {"checkpoint_every": every, "checkpoint_minutes": 2.0},
    )


def seconds(config: Config, training: Flops, tflops: float) -> float:
    """How long a run with steps is predicted to take; starts, compilers and evaluations counted."""
    assert config.train.steps is not None
    work = training.training * config.train.steps * config.data.batch_users
    return 20.0 + 2.0 * config.model.layers + 0.002 * config.train.steps + work / (1e12 * tflops)
