"""The training step that the benchmark of context parallelism compiles and times: the model of long_mst.py without mini-sequences, on full batches."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from experiments import configs
from kernels.device import compiling_for
from ultra_hstu.config import Config, ParallelConfig
from ultra_hstu.parallel.collectives import bytes_sent
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.recipe import Recipe

ITEMS = 20000
SEMI_LOCAL = 256  # window, and full rows
QUICK = {"xla_backend_optimization_level": 0}  # of small programs, half the time to compile
SMALL = dict(
    width=32,
    layers=1,
    heads=2,
    qk_width=16,
    v_width=16,
    dtype="float32",
    implementation="reference",
)  # what a CPU can do


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step on `users` histories of `length` events."""

    mask: str  # "causal", "semi_local"
    users: int
    length: int
    data: int = 1
    context: int = 1
    strategy: Any = "auto"  # of config.ParallelConfig
    remat: Any = "none"  # of config.ModelConfig
    small: bool = False

    @property
    def devices(self) -> int:
        return self.data * self.context

    @functools.cached_property
    def config(self) -> Config:
        config = configs.named("long_mst")
        width = 16 if self.small else SEMI_LOCAL
        model: dict[str, Any] = dict(chunk_rows=None, remat=self.remat)
        model |= dict(window=(width,), full_rows=(width,)) if self.mask == "semi_local" else {}
        model |= SMALL if self.small else {}
        changed = dataclasses.replace(
            config,
            data=dataclasses.replace(
                config.data,
                max_history=self.length,
                batch_users=self.users,
                batch_tokens=self.users * self.length,
            ),
            model=dataclasses.replace(config.model, **model),
            loss=dataclasses.replace(config.loss, chunk_rows=64 if self.small else 4096),
            parallel=ParallelConfig(
                data=self.data,
                context=self.context,
                strategy=self.strategy if self.context > 1 else "auto",
            ),
        )
        changed.validate()
        return changed

    def batch(self) -> Batch:
        """The same events however many groups share them, items uniform."""
        rows, users = self.users * self.length, self.users // self.data
        item_T1 = jax.random.randint(jax.random.key(0), (rows + 1,), 1, ITEMS + 1, jnp.int32)
        time_T = jnp.arange(rows, dtype=jnp.int32)
        offsets = jnp.arange(users + 1, dtype=jnp.int32) * self.length
        of_groups = functools.partial(jnp.tile, reps=self.data)
        return Batch(
            item_T1[:-1],
            time_T,
            time_T + 1,
            item_T1[1:],
            jnp.ones(rows, jnp.float32),
            of_groups(offsets),
            of_groups(offsets[1:] - 1),
        )


class Program:
    """A case's step for some devices, which need not be here."""

    def __init__(self, case: Case, devices: Sequence[Any]):
        self.case, self.devices = case, list(devices)[: case.devices]
        if len(self.devices) < case.devices:
            raise ValueError(
                f"{case} needs {case.devices} devices, but there are {len(self.devices)}"
            )
        self.recipe = Recipe(case.config, ITEMS, devices=self.devices)

    @functools.cached_property
    def shardings(self) -> tuple[Any, Any]:
        """Of the state and the batch; either may stand for a whole subtree."""
        if self.recipe.mesh is None:
            return (SingleDeviceSharding(self.devices[0]),) * 2
        return self.recipe.shardings, NamedSharding(self.recipe.mesh, PartitionSpec("data"))

    def compile(self, options: dict[str, Any] | None = None) -> "Program":
        shapes = jax.eval_shape(lambda: (self.recipe.init(0), self.case.batch()))

        def placed(sharding: Any, tree: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
            )

        arguments = [
            jax.tree.map(placed, where, shape)
            for where, shape in zip(self.shardings, shapes, strict=True)
        ]
        with compiling_for(self.devices[0]):
            lowered = jax.jit(
                self.recipe.step, donate_argnums=0, out_shardings=self._results()
            ).lower(*arguments)
            self.run = lowered.compile(QUICK if self.case.small else options)
        return self

    def _results(self) -> Any:
        mesh = self.recipe.mesh
        return (
            None if mesh is None else (self.recipe.shardings, NamedSharding(mesh, PartitionSpec()))
        )

    def bytes(self) -> int:
        """The most that a device holds at one time, by the compiler."""
        memory: Any = self.run.memory_analysis()
        return (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )

    def bytes_sent(self) -> int:
        return bytes_sent(self.run.as_text() or "", self.case.devices)

    def start(self) -> tuple[Any, Any]:
        """An initial state and the batch, on the devices."""
        state = jax.jit(self.recipe.init, static_argnums=0, out_shardings=self.shardings[0])(0)
        host = jax.tree.map(np.asarray, jax.jit(self.case.batch)())
        return state, jax.tree.map(
            functools.partial(jax.device_put, device=self.shardings[1]), host
        )
