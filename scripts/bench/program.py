"""The training step of a configuration on full batches, compiled and timed."""

import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from kernels.device import compiling_for
from ultra_hstu.config import Config
from ultra_hstu.profiling import Profile, profiled
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.step import TrainState


def full_batch(config: Config, items: int) -> Batch:
    """Every history at its full length, items uniform; the same however many groups share it."""
    length, groups = config.data.max_history, config.parallel.data
    rows, users = config.data.batch_users * length, config.data.batch_users // groups
    item_T1 = jax.random.randint(jax.random.key(0), (rows + 1,), 1, items + 1, jnp.int32)
    time_T = jnp.arange(rows, dtype=jnp.int32)
    offsets = jnp.arange(users + 1, dtype=jnp.int32) * length
    return Batch(
        item_T1[:-1],
        time_T,
        time_T + 1,
        item_T1[1:],
        jnp.ones(rows, jnp.float32),
        jnp.tile(offsets, groups),
        jnp.tile(offsets[1:] - 1, groups),
    )


def temporaries(program: jax.stages.Compiled) -> float:
    """Bytes that the program needs beside its arguments and results; NaN where nobody knows."""
    memory = program.memory_analysis()
    return math.nan if memory is None else memory.temp_size_in_bytes


class TrainingCase(Protocol):
    """A dataclass of what a training step depends on."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def devices(self) -> int: ...

    def compiled(
        self, devices: Sequence[jax.Device], options: dict[str, int] | None = None
    ) -> "Program": ...


class Program:
    """A step for some devices, which need not be here.

    Raises:
      ValueError: if there are fewer devices than the configuration's mesh has.
    """

    def __init__(self, config: Config, items: int, devices: Sequence[jax.Device]):
        count = config.parallel.data * config.parallel.context
        self.config, self.items, self.devices = config, items, list(devices)[:count]
        if len(self.devices) < count:
            raise ValueError(
                f"{config.parallel} needs {count} devices, but there are {len(self.devices)}"
            )
        self.recipe = Recipe(config, items, devices=self.devices)
        # Shardings of the state and the batch; either may stand for a whole subtree.
        self.shardings: tuple[Any, Any] = (SingleDeviceSharding(self.devices[0]),) * 2
        results: Any = None
        if (mesh := self.recipe.mesh) is not None:
            self.shardings = (
                self.recipe.shardings,
                NamedSharding(mesh, PartitionSpec("data")),
            )
            results = (self.recipe.shardings, NamedSharding(mesh, PartitionSpec()))
        self._step = jax.jit(self.recipe.step, donate_argnums=0, out_shardings=results)

    def compile(self, options: dict[str, int] | None = None) -> "Program":
        shapes = jax.eval_shape(lambda: (self.recipe.init(0), full_batch(self.config, self.items)))

        def placed(sharding: Any, tree: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
            )

        arguments = [
            jax.tree.map(placed, where, shape)
            for where, shape in zip(self.shardings, shapes, strict=True)
        ]
        with compiling_for(self.devices[0]):
            self.run = self._step.lower(*arguments).compile(options)
        self.memory: Any = self.run.memory_analysis()
        self.text = self.run.as_text() or ""
        return self

    def bytes(self) -> int:
        """The most that a device holds at one time, by the compiler."""
        memory = self.memory
        arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return arguments - memory.alias_size_in_bytes + memory.temp_size_in_bytes

    def start(self) -> tuple[Any, Any]:
        """An initial state and the batch, on the devices."""
        where, batch_where = self.shardings
        state = jax.jit(self.recipe.init, static_argnums=0, out_shardings=where)(0)
        batch = jax.jit(lambda: full_batch(self.config, self.items))()
        host = jax.tree.map(np.asarray, batch)
        return state, jax.tree.map(functools.partial(jax.device_put, device=batch_where), host)

    def sample(self, rounds: int, seconds: float) -> tuple[list[float], float]:
        """(seconds of a step, loss of the first step).

        Each sample is the mean over steps that are enqueued together and last `seconds`.
        """
        state, batch = self.start()
        state, metrics = self.run(state, batch)

        def of(calls: int) -> float:
            nonlocal state
            jax.block_until_ready(state)
            started = time.perf_counter()
            for _ in range(calls):
                state, _ = self.run(state, batch)
            jax.block_until_ready(state)
            return (time.perf_counter() - started) / calls

        of(1)
        calls = max(1, round(seconds / of(1)))
        return [of(calls) for _ in range(rounds)], float(metrics["loss"])

    def profile(self, steps: int = 4, folder: Path | None = None) -> Profile:
        """Where the time of a step goes, the mean of a few.

        Args:
          folder: of the trace; None: it is not kept.
        """
        state, batch = self.start()
        state = jax.block_until_ready(self.run(state, batch)[0])

        def run() -> TrainState:
            nonlocal state
            for _ in range(steps):
                state, _ = self.run(state, batch)
            return state

        return profiled(run, [self.run], steps=steps, folder=folder)[0]
