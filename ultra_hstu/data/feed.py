"""Feeds: how batches reach a compiled loop over several steps.

A feed is a pytree with `batch(i)`, used inside the loop. `DeviceFeed` holds all data on the device
and gathers each batch there, so a call moves only the columns of its examples. `StreamedFeed` holds
ready batches that host threads packed while the device computed.

The loader does not know what a batch is: examples are a table of integer columns, and a
`BatchGather` makes a batch of the data and B lines of that table. Batches are packed by rows, not
by users: B and T are fixed when a run starts, so that one compiled step serves every batch.

In a mesh, a step's batch is that of all data groups: the columns of its B examples are divided
among the groups, and each group makes its own batch of its part. Packing depends on the number of
*groups* of a plan alone, which is a multiple of the mesh's: meshes that agree in it see the same
examples in every step.
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
from ultra_hstu.parallel.mesh import DATA, groups_here, put, put_groups
from ultra_hstu.sequences import Columns

ROW_MULTIPLE = 128  # capacities are rounded up to it; a common tile height of the kernels
DEVICE_BYTES = 2**30  # placement "auto": data up to this size lives on the device
STREAM_THREADS = 4
STREAM_AHEAD = 4  # groups of batches packed before they are asked for

BufferRows = tuple[int, ...]  # capacity of each buffer of a batch
HostColumns = dict[str, Int[np.ndarray, "..."]]
Places = Int[np.ndarray, "S B"]  # of a batch's examples in their table, -1 in empty places
Lengths = Int[np.ndarray, "n *buffers"]  # rows of each example
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


@runtime_checkable
class ExampleTable(Protocol):
    """Integer columns of equal length, and the rows of each example, [n] or [n, buffers]."""

    @property
    def columns(self) -> HostColumns: ...

    @property
    def lengths(self) -> Lengths: ...


@dataclasses.dataclass(frozen=True, eq=False)
class EventStore[Events]:
    """The arrays that batches are gathered from, placed on a mesh when first asked for there.

    All loaders of a task share one store, so that training and evaluation read one copy.
    """

    host: Events
    _placed: dict[Mesh | None, Events] = dataclasses.field(default_factory=dict, repr=False)

    def on(self, mesh: Mesh | None) -> Events:
        if mesh not in self._placed:
            self._placed[mesh] = put(self.host, mesh)
        return self._placed[mesh]


# --- packing ---


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the examples of a step are packed.

    Attributes:
      batch_users: B, the examples of a step, of all groups.
      rows: capacity of a group's part, for each buffer of a batch.
      groups: parts that are packed by themselves.
      buffers: groups that share one buffer of a device.
    """

    batch_users: int
    rows: BufferRows
    groups: int = 1
    buffers: int = 1

    @staticmethod
    def of(rows: int | BufferRows, batch_users: int, groups: int, shards: int) -> "Packing":
        """The packing of `groups` parts into the buffers, of `rows`, of the mesh's data groups.

        Raises:
          ValueError: examples or rows that cannot be divided, with what could.
        """
        if groups % shards or batch_users % groups:
            raise ValueError(
                f"batches of {batch_users} examples, packed in parallel.groups={groups}, for "
                f"parallel.data={shards}: data must divide groups, and groups the examples of a "
                "batch (data.batch_users, train.eval_users)"
            )
        buffers = groups // shards
        rows_R = np.atleast_1d(rows)
        if (rows_R % buffers).any():
            raise ValueError(
                f"{rows} rows cannot be divided among {buffers} of the parallel.groups={groups}: "
                "change data.batch_tokens"
            )
        return Packing(batch_users, tuple((rows_R // buffers).tolist()), groups, buffers)


def choose_rows(lengths: Int[np.ndarray, " n"], batch_users: int, longest: int = 0) -> int:
    """T such that `batch_users` random histories nearly always fit.

    It is the mean and 4 standard deviations of the sum of their lengths, at least the longest, and
    `longest`, which a history may reach in another epoch. `plan_epoch` closes batches early.
    """
    users, longest = min(batch_users, len(lengths)), max(longest, int(lengths.max()))
    expected = users * lengths.mean() + 4 * np.sqrt(users) * lengths.std()
    rows = max(longest, min(int(np.ceil(expected)), users * longest), 1)
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def plan_epoch(
    lengths: Lengths,
    *,
    batch_users: int,
    rows: int | BufferRows,
    seed: int,
    epoch: int,
    shuffle: bool = True,
) -> Places:
    """Which examples each batch holds: int32 [S, B] of example numbers, -1 in empty places.

    The order is a function of (seed, epoch) alone. A batch closes at `batch_users` examples, or
    when the next one would exceed `rows`, the capacity of each of R buffers.

    Raises:
      ValueError: if a history is longer than `rows`.
    """
    n = len(lengths)
    lengths_nR, rows_R = lengths.reshape(n, -1), np.atleast_1d(rows)
    for longest, capacity in zip(lengths_nR.max(axis=0), rows_R, strict=True):
        if longest > capacity:
            raise ValueError(
                f"a history has {longest} events but a batch only {capacity} rows: "
                f"raise data.batch_tokens to at least {longest}"
            )
    order = np.random.default_rng((seed, epoch)).permutation(n) if shuffle else np.arange(n)
    ends_nR = np.cumsum(lengths_nR[order], axis=0)
    batches, first = [], 0
    while first < n:
        full_R = (ends_nR[first - 1] if first else 0) + rows_R
        fits = min(
            int(np.searchsorted(ends, full, side="right"))
            for ends, full in zip(ends_nR.T, full_R, strict=True)
        )
        last = min(first + batch_users, fits)
        empty = batch_users - (last - first)
        batches.append(np.pad(order[first:last], (0, empty), constant_values=-1))
        first = last
    return np.stack(batches).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The batches of an epoch."""

    place_SB: Places  # lines of the table, -1 in empty places
    examples: ExampleTable

    def __len__(self) -> int:
        return len(self.place_SB)

    def columns(self, steps_S: Int[np.ndarray, " S"]) -> HostColumns:
        """The columns of some batches, int32 [S, B]; empty places hold zeros."""
        place_SB = self.place_SB[steps_S]
        return {
            name: np.where(place_SB >= 0, column[np.maximum(place_SB, 0)], 0).astype(np.int32)
            for name, column in self.examples.columns.items()
        }


class Planner:
    """Plans epochs of whole examples; `data.sampled` has a planner that cuts them."""

    def taken(self, examples: ExampleTable, seed: int, epoch: int) -> ExampleTable:
        """The examples as an epoch trains on them."""
        return examples

    def plan(
        self, examples: ExampleTable, packing: Packing, *, seed: int, epoch: int, shuffle: bool
    ) -> Plan:
        """Packs each group of a batch by itself; an epoch is filled up to whole batches."""
        taken = self.taken(examples, seed, epoch)
        place = plan_epoch(
            taken.lengths,
            batch_users=packing.batch_users // packing.groups,
            rows=packing.rows,
            seed=seed,
            epoch=epoch,
            shuffle=shuffle,
        )
        place = np.pad(place, ((0, -len(place) % packing.groups), (0, 0)), constant_values=-1)
        return Plan(place.reshape(-1, packing.batch_users), taken)


WHOLE = Planner()


# --- feeds ---


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
      placement: "device", "stream", or "auto" by the size of the data.
      planner: what makes the batches of an epoch.
      mesh: where batches go; None: one device.
      groups: parts of a batch that are packed by themselves; None: the mesh's data groups.

    Raises:
      ValueError: no examples, or examples or rows that cannot be divided among the groups.
    """

    def __init__(
        self,
        store: EventStore,
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
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(store.host))
        self.streamed = {"device": False, "stream": True, "auto": size > DEVICE_BYTES}[placement]

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

    def _columns(self, plan: Plan, first: int) -> tuple[HostColumns, int]:
        steps = min(self.steps_per_call, len(plan) - first)
        steps_S = np.minimum(np.arange(first, first + self.steps_per_call), first + steps - 1)
        return plan.columns(steps_S), steps

    def _on_device(self, plan: Plan, first: int) -> Group:
        columns_SB, steps = self._columns(plan, first)
        columns_SB = put(columns_SB, self.mesh, OF_GROUPS)
        return Group(DeviceFeed(self.store.on(self.mesh), columns_SB, self.gather), steps, first)

    def _pack(self, plan: Plan, first: int) -> tuple[PyTree, int]:
        columns_SB, steps = self._columns(plan, first)
        groups = range(1) if self.mesh is None else groups_here(self.mesh)
        batches = []
        for step in range(self.steps_per_call):
            parts_B = {
                name: np.split(column[step], self.shards) for name, column in columns_SB.items()
            }
            of_groups = [
                {name: parts[group] for name, parts in parts_B.items()} for group in groups
            ]
            made = [self.gather(self.store.host, columns_B, np) for columns_B in of_groups]
            batches.append(jax.tree.map(lambda *leaves: np.concatenate(leaves), *made))
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
