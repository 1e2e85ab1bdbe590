"""A case of the benchmark of context parallelism: long_mst without mini-sequences, full batches."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax

from experiments import configs
from experiments.record import Json
from scripts.bench.program import Program
from ultra_hstu.config import Config
from ultra_hstu.fields import changed

ITEMS = 20000
SEMI_LOCAL = 256  # window, and full rows
QUICK = {"xla_backend_optimization_level": 0}  # of small programs, half the time to compile
SMALL: Json = {  # what a CPU can do
    "width": 32,
    "layers": 1,
    "heads": 2,
    "qk_width": 16,
    "v_width": 16,
    "dtype": "float32",
    "implementation": "reference",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step on `users` histories of `length` events."""

    mask: str  # "causal", "semi_local"
    users: int
    length: int
    data: int = 1
    context: int = 1
    strategy: Literal["auto", "gather", "ring", "ulysses", "halo"] = "auto"
    remat: Literal["none", "selective", "full"] = "none"
    small: bool = False

    @property
    def devices(self) -> int:
        return self.data * self.context

    @functools.cached_property
    def config(self) -> Config:
        width = 16 if self.small else SEMI_LOCAL
        model: Json = {"chunk_rows": None, "remat": self.remat} | (SMALL if self.small else {})
        masks: Json = {"causal": {}, "semi_local": {"window": (width,), "full_rows": (width,)}}
        model |= masks[self.mask]
        rows = self.users * self.length
        config = changed(
            configs.named("long_mst"),
            data={"max_history": self.length, "batch_users": self.users, "batch_tokens": rows},
            model=model,
            loss={"chunk_rows": 64 if self.small else 4096},
            parallel={
                "data": self.data,
                "context": self.context,
                "strategy": self.strategy if self.context > 1 else "auto",
            },
        )
        config.validate()
        return config

    def compiled(
        self, devices: Sequence[jax.Device], options: dict[str, int] | None = None
    ) -> Program:
        """The step, compiled for these devices, which need not be here."""
        return Program(self.config, ITEMS, devices).compile(QUICK if self.small else options)
