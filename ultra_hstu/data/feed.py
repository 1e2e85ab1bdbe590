"""Feeds: how batches reach a compiled loop over several steps.

A feed is a pytree with `batch(i)`, used inside the loop. `DeviceFeed` holds all data on the device
and gathers each batch there, so a call moves only the columns of its examples. `StreamedFeed` holds
ready batches that host threads packed while the device computed.

The loader does not know what a batch is: examples are a table of integer columns, and a
`BatchGather` makes a batch of the data and B lines of that table.

In a mesh, a step's batch is that of all data groups: the columns of its B examples are divided
among the groups, and each group makes its own batch of its part.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Protocol, runtime_checkable

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, PyTree

from kernels.typing import Leaf
from ultra_hstu.data.packing import (
    WHOLE,
    BufferRows,
    ExampleTable,
    HostColumns,
    Packing,
    Plan,
    Planner,
    choose_rows,
)
from ultra_hstu.data.shards import ShardStore
from ultra_hstu.parallel.mesh import DATA, groups_here, put, put_groups
from ultra_hstu.sequences import Columns

DEVICE_BYTES = 2**30  # placement "auto": data up to this size lives on the device
STREAM_THREADS = 4
STREAM_AHEAD = 4  # groups of batches packed before they are asked for

StepNumber = int | Int[Array, ""]


@runtime_checkable
class BatchGather(Protocol):
    """Makes a batch. Hashable and equal where its settings are: it is static in compiled steps."""

    @property
    def rows(self) -> int | BufferRows:
        """Capacity of a batch, or of each of its buffers."""

    def __call__(self, data: PyTree, columns_B: Columns, xp: ModuleType = jnp, /) -> PyTree:
        """The batch of B examples; a line of zeros in all columns is an empty place."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class EventStore[Events]:
    """The arrays that batches are gathered from, placed on a mesh when first asked for there.

    All loaders of a task share one store, so that training and evaluation read one copy.
    """

    host: Events
    _placed: dict[Mesh | None, Events] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.host))

    def of(self, parts: Sequence[HostColumns]) -> tuple[Events, list[HostColumns]]:
        """What some batches are gathered from on the host, and their columns as int32."""
        return self.host, [
            {name: column.astype(np.int32) for name, column in part.items()} for part in parts
        ]

    def on(self, mesh: Mesh | None) -> Events:
        if mesh not in self._placed:
            self._placed[mesh] = put(self.host, mesh)
        return self._placed[mesh]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceFeed:
    data: Leaf[PyTree]
    columns_SB: Leaf[PyTree]  # int32 [S, B], by name
    gather: BatchGather = dataclasses.field(metadata={"static": True})

    def batch(self, step: StepNumber) -> PyTree:
        columns_B = {name: column_SB[step] for name, column_SB in self.columns_SB.items()}
        return self.gather(self.data, columns_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamedFeed:
    batches_S: Leaf[PyTree]  # a batch, every leaf with a leading axis of steps

    def batch(self, step: StepNumber) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[step], self.batches_S)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """One batch, whatever the number."""

    value: Leaf[PyTree]

    def batch(self, step: StepNumber) -> PyTree:
        return self.value


Feed = DeviceFeed | StreamedFeed | Fixed

OF_GROUPS = PartitionSpec(None, DATA)  # [steps, ...] with the groups' parts side by side


def feed_specs(feed: Feed) -> Feed:
    """How a mesh divides the arrays of a feed, as PartitionSpecs in their places.

    Data is on every device; what makes up a batch is divided over the data groups.
    """
    if isinstance(feed, DeviceFeed):
        return DeviceFeed(PartitionSpec(), OF_GROUPS, feed.gather)
    return StreamedFeed(OF_GROUPS) if isinstance(feed, StreamedFeed) else Fixed(PartitionSpec(DATA))


@dataclasses.dataclass(frozen=True)
class Group:
    """The steps of one compiled call: the first `steps` batches of `feed`."""

    feed: Feed
    steps: int
    first: int  # number of the first of them in the epoch


class Loader:
    """Batches of examples, in groups of `steps_per_call`; every group has the same shapes.

    Args:
      store: the arrays that batches are gathered from.
      examples: a table, or a function (seed, epoch) -> table where every epoch has its own.
      gather: what makes the batches of a data group of so many rows (of each buffer) and examples.
      batch_users: B, examples of a step, those of all groups.
      rows: of all groups together; None: chosen for each buffer from the lengths.
      longest: rows in each buffer that no example exceeds in any epoch; None: as in the first.
      placement: "device", or "stream" or "shards", whose batches are made on the host; "auto": by
        the size of the data.
      planner: what makes the batches of an epoch.
      mesh: where batches go; None: one device.
      groups: parts of a batch that are packed by themselves; None: the mesh's data groups.

    Raises:
      ValueError: no examples, or examples or rows that cannot be divided among the groups.
    """

    def __init__(
        self,
        store: EventStore | ShardStore,
        examples: ExampleTable | Callable[[int, int], ExampleTable],
        gather: Callable[[BufferRows, int], BatchGather],
        *,
        batch_users: int,
        steps_per_call: int,
        rows: int | None = None,
        longest: Sequence[int] | None = None,
        placement: str = "auto",
        planner: Planner = WHOLE,
        mesh: Mesh | None = None,
        groups: int | None = None,
    ):
        self.batch_users, self.steps_per_call = batch_users, steps_per_call
        self.store, self.planner, self.mesh = store, planner, mesh
        self.shards = 1 if mesh is None else mesh.shape[DATA]
        groups = self.shards if groups is None else groups
        self.examples = examples if callable(examples) else lambda seed, epoch: examples
        whole = self.examples(0, 0)
        if len(whole.lengths) == 0:
            too_few = "every user of this split has too few events for a history and a target"
            raise ValueError(f"no examples: {too_few}")
        most_R = whole.lengths.reshape(len(whole.lengths), -1).max(axis=0)
        kept_nR = planner.taken(whole, 0, 0).lengths.reshape(len(whole.lengths), -1)
        chosen = tuple(
            (rows or groups * choose_rows(lengths_n, batch_users // groups, int(most)))
            // self.shards
            for lengths_n, most in zip(kept_nR.T, longest or most_R, strict=True)
        )
        self.gather = gather(chosen, batch_users // self.shards)
        self.packing = Packing.of(self.gather.rows, batch_users, groups, self.shards)
        large = store.nbytes > DEVICE_BYTES
        streamed = {"device": False, "stream": True, "shards": True, "auto": large}
        self.streamed = streamed[placement]

    def plan(self, *, seed: int = 0, epoch: int = 0, shuffle: bool = True) -> Plan:
        """The batches of an epoch. Raises ValueError for an example that is too long."""
        examples = self.examples(seed, epoch)
        return self.planner.plan(examples, self.packing, seed=seed, epoch=epoch, shuffle=shuffle)

    def groups(self, plan: Plan, first: int = 0) -> Iterator[Group]:
        """The batches of a plan from number `first` on.

        The last group repeats its last batch to keep the shape; `steps` says how many count.
        """
        starts = list(range(first, len(plan), self.steps_per_call))
        if self.streamed:
            return self._stream(plan, starts)
        return (self._on_device(plan, start) for start in starts)

    def _columns(
        self, plan: Plan, first: int, dtype: type[np.signedinteger] = np.int32
    ) -> tuple[HostColumns, int]:
        steps = min(self.steps_per_call, len(plan) - first)
        steps_S = np.minimum(np.arange(first, first + self.steps_per_call), first + steps - 1)
        return plan.columns(steps_S, dtype), steps

    def _on_device(self, plan: Plan, first: int) -> Group:
        columns_SB, steps = self._columns(plan, first)
        columns_SB = put(columns_SB, self.mesh, OF_GROUPS)
        return Group(DeviceFeed(self.store.on(self.mesh), columns_SB, self.gather), steps, first)

    def _pack(self, plan: Plan, first: int) -> tuple[PyTree, int]:
        columns_SB, steps = self._columns(plan, first, np.int64)
        groups = range(1) if self.mesh is None else groups_here(self.mesh)
        parts = [
            {
                name: np.split(column[step], self.shards)[group]
                for name, column in columns_SB.items()
            }
            for step in range(self.steps_per_call)
            for group in groups
        ]
        data, parts = self.store.of(parts)
        made = [self.gather(data, columns_B, np) for columns_B in parts]
        batches = [
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *made[first : first + len(groups)])
            for first in range(0, len(made), len(groups))
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches), steps

    def _stream(self, plan: Plan, starts: list[int]) -> Iterator[Group]:
        if not starts:
            return
        options = grain.ReadOptions(num_threads=STREAM_THREADS, prefetch_buffer_size=STREAM_AHEAD)
        packed = (
            grain.MapDataset.source(starts)
            .map(lambda first: (first, *self._pack(plan, first)))
            .to_iter_dataset(options)
        )
        mesh = self.mesh
        put = jax.device_put if mesh is None else functools.partial(put_groups, mesh=mesh)
        moving = (
            Group(StreamedFeed(put(batches)), int(steps), int(at)) for at, batches, steps in packed
        )
        ready = next(moving, None)
        while ready is not None:
            # One group ahead: its copy to the device runs while the caller computes on the last.
            ahead = next(moving, None)
            yield ready
            ready = ahead
