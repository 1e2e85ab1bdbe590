"""Feeds: how batches reach a compiled loop over several steps.

A feed is a pytree with `batch(i)`, used inside the loop. `DeviceFeed` holds all data on the device
and gathers each batch there, so a call moves only the columns of its examples. `StreamedFeed` holds
ready batches that host threads packed while the device computed.

The loader does not know what a batch is: examples are a table of integer columns, and a
`BatchGather` makes a batch of the data and B lines of that table.

In a mesh, a step's batch is that of all data groups: the columns of its B examples are divided
among the groups, and each group makes its own batch of its part. Each device of a group makes all
of that batch, or what it reads of it, which the step puts together (`SharedFeed`).
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
from ultra_hstu.parallel.exchange import Exchange
from ultra_hstu.parallel.mesh import CONTEXT, DATA, devices_here, groups_here, put, put_parts
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

    def shared(self, own: PyTree, exchange: Exchange, /) -> PyTree:
        """The batch of a group, of which this device has read the examples in `own`.

        Other examples are empty places there. Inside `shard_map`.
        """
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
        def taken(leaf: Array) -> Array:
            # Of no width, as signals are where there are none: XLA for CPUs dies of taking a part.
            return leaf[step] if leaf.size else jnp.zeros(leaf.shape[1:], leaf.dtype)

        return jax.tree.map(taken, self.batches_S)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """One batch, whatever the number."""

    value: Leaf[PyTree]

    def batch(self, step: StepNumber) -> PyTree:
        return self.value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedFeed:
    """Batches that each device of a group reads a part of.

    Attributes:
      own: what this device reads.
      gather: of the whole batch.
    """

    own: DeviceFeed | StreamedFeed
    gather: BatchGather = dataclasses.field(metadata={"static": True})
    exchange: Exchange = dataclasses.field(metadata={"static": True})

    def batch(self, step: StepNumber) -> PyTree:
        return self.gather.shared(self.own.batch(step), self.exchange)


Feed = DeviceFeed | StreamedFeed | SharedFeed | Fixed

OF_GROUPS = PartitionSpec(None, DATA)  # [steps, ...] with the groups' parts side by side
OF_DEVICES = PartitionSpec(None, (DATA, CONTEXT))  # the same of devices


def feed_specs(feed: Feed) -> Feed:
    """How a mesh divides the arrays of a feed, as PartitionSpecs in their places.

    Data is on every device; what makes up a batch is divided over the data groups, or devices.
    """
    if isinstance(feed, Fixed):
        return Fixed(PartitionSpec(DATA))
    if isinstance(feed, SharedFeed):
        return dataclasses.replace(feed, own=_specs(feed.own, OF_DEVICES))
    return _specs(feed, OF_GROUPS)


def _specs(feed: DeviceFeed | StreamedFeed, parts: PartitionSpec) -> DeviceFeed | StreamedFeed:
    if isinstance(feed, DeviceFeed):
        return DeviceFeed(PartitionSpec(), parts, feed.gather)
    return StreamedFeed(parts)


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
      exchange: of a group's batch, by its rows and the longest example in each buffer; None: every
        device of a group makes all of its batch.

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
        exchange: Callable[[BufferRows, BufferRows], Exchange] | None = None,
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
        longest_R = tuple(int(most) for most in longest or most_R)
        chosen = tuple(
            (rows or groups * choose_rows(lengths_n, batch_users // groups, most)) // self.shards
            for lengths_n, most in zip(kept_nR.T, longest_R, strict=True)
        )
        self.gather = gather(chosen, batch_users // self.shards)
        self.packing = Packing.of(self.gather.rows, batch_users, groups, self.shards)
        self.exchange: Exchange | None = None
        self.own_gather, self.parts, self.spec = self.gather, self.shards, OF_GROUPS
        self._here = groups_here
        if exchange is not None and mesh is not None:
            rows_R = tuple(np.atleast_1d(self.gather.rows).tolist())
            self.exchange = exchange(rows_R, longest_R)
            self.own_gather = gather(self.exchange.read, batch_users // self.shards)
            self.parts, self.spec, self._here = mesh.size, OF_DEVICES, devices_here
        large = store.nbytes > DEVICE_BYTES
        streamed = {"device": False, "stream": True, "shards": True, "auto": large}
        self.streamed = streamed[placement]

    def plan(self, *, seed: int = 0, epoch: int = 0, shuffle: bool = True) -> Plan:
        """The batches of an epoch.

        Raises:
          ValueError: an example that is too long, or batches whose exchange needs more rows.
        """
        examples = self.examples(seed, epoch)
        plan = self.planner.plan(examples, self.packing, seed=seed, epoch=epoch, shuffle=shuffle)
        if self.exchange is not None:
            self.exchange.check(self._lengths(plan, np.arange(len(plan))))
        return plan

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
        columns_SB = plan.columns(steps_S, dtype)
        if self.exchange is not None:
            columns_SB = self.exchange.divided(columns_SB, self._lengths(plan, steps_S))
        return columns_SB, steps

    def _lengths(self, plan: Plan, steps_S: Int[np.ndarray, " S"]) -> Int[np.ndarray, "S G B R"]:
        """Rows of the examples of some batches in each buffer, by group."""
        place_SB, lengths_n = plan.place_SB[steps_S], plan.examples.lengths
        length_SBR = lengths_n.reshape(len(lengths_n), -1)[place_SB] * (place_SB >= 0)[..., None]
        return length_SBR.reshape(len(steps_S), self.shards, -1, length_SBR.shape[-1])

    def _feed(self, own: DeviceFeed | StreamedFeed) -> Feed:
        return own if self.exchange is None else SharedFeed(own, self.gather, self.exchange)

    def _on_device(self, plan: Plan, first: int) -> Group:
        columns_SB, steps = self._columns(plan, first)
        columns_SB = put(columns_SB, self.mesh, self.spec)
        own = DeviceFeed(self.store.on(self.mesh), columns_SB, self.own_gather)
        return Group(self._feed(own), steps, first)

    def _pack(self, plan: Plan, first: int) -> tuple[PyTree, int]:
        columns_SB, steps = self._columns(plan, first, np.int64)
        here = [0] if self.mesh is None else self._here(self.mesh)
        parts = [
            {name: np.split(column[step], self.parts)[part] for name, column in columns_SB.items()}
            for step in range(self.steps_per_call)
            for part in here
        ]
        data, parts = self.store.of(parts)
        made = [self.own_gather(data, columns_B, np) for columns_B in parts]
        batches = [
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *made[first : first + len(here)])
            for first in range(0, len(made), len(here))
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches), steps

    def _stream(self, plan: Plan, starts: list[int]) -> Iterator[Group]:
        if not starts:
            return
        mesh, spec = self.mesh, self.spec
        put = jax.device_put
        if mesh is not None:
            put = functools.partial(put_parts, mesh=mesh, spec=spec)

        def group(first: int) -> Group:
            batches, steps = self._pack(plan, first)
            return Group(self._feed(StreamedFeed(put(batches))), steps, first)

        # Threads copy to the device what they packed, while the caller computes.
        options = grain.ReadOptions(num_threads=STREAM_THREADS, prefetch_buffer_size=STREAM_AHEAD)
        yield from grain.MapDataset.source(starts).map(group).to_iter_dataset(options)
