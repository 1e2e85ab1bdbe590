"""Feeds: how batches reach a compiled loop over several steps.

A feed is a pytree with `batch(i)`, used inside the loop. `DeviceFeed` holds all data on the device and gathers each batch there, so a
call moves only the columns of its examples. `StreamedFeed` holds ready batches that host threads packed while the device computed.

What a batch is, the loader does not know: examples are a table of integer columns, and a `Gather` makes a batch of the data and B lines
of that table.

In a mesh a step's batch is that of all data groups: the columns of its B examples are divided among the groups, and each makes its own batch of its
part. How a batch is packed depends on the number of *groups* of a plan alone, which is a multiple of the mesh's: meshes that agree in it see the
same examples in every step.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int

from ultra_hstu.parallel.mesh import DATA, groups_here, put, put_groups
from ultra_hstu.retrieval.batch import Events, HistoryGather, choose_rows, plan_epoch
from ultra_hstu.retrieval.split import Examples

DEVICE_BYTES = 2**30  # placement "auto": data up to this size lives on the device
STREAM_THREADS = 4
STREAM_AHEAD = 4  # groups of batches packed before they are asked for


@runtime_checkable
class Gather(Protocol):
    """Makes a batch; hashable, equal where its settings are, since it is static in compiled steps."""

    @property
    def rows(self) -> int | tuple[int, ...]:
        """Capacity of a batch, or of each of its buffers."""
        ...

    def __call__(self, data: Any, columns_B: dict[str, Any], xp: Any = jnp, /) -> Any:
        """The batch of B examples; a line of zeros in all columns is an empty place."""
        ...


@runtime_checkable
class Table(Protocol):
    """Examples: integer columns of equal length, and the rows that each example takes ([n], or [n, R] for R buffers)."""

    @property
    def columns(self) -> dict[str, np.ndarray]: ...

    @property
    def lengths(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The batches of an epoch."""

    place_SB: Int[np.ndarray, "S B"]  # lines of the table, -1 in empty places
    examples: Any  # Table

    def __len__(self) -> int:
        return len(self.place_SB)

    def columns(self, steps_S: Int[np.ndarray, " S"]) -> dict[str, Int[np.ndarray, "S B"]]:
        """The columns of some batches, int32; empty places hold zeros."""
        place_SB = self.place_SB[steps_S]
        return {
            name: np.where(place_SB >= 0, column[np.maximum(place_SB, 0)], 0).astype(np.int32)
            for name, column in self.examples.columns.items()
        }


class Planner:
    """Which examples an epoch's batches hold, all of them whole; `data.sampled` has one that cuts them.

    `plan` packs each of the `groups` of a batch by itself, `batch_users / groups` examples in `rows` rows; `buffers` says how many groups share
    one buffer of a device.
    """

    def taken(self, examples: Table, seed: int, epoch: int) -> Table:
        """The examples as an epoch trains on them."""
        return examples

    def plan(
        self,
        examples: Table,
        *,
        batch_users: int,
        rows: int | tuple[int, ...],
        seed: int,
        epoch: int,
        shuffle: bool,
        groups: int = 1,
        buffers: int = 1,
    ) -> Plan:
        taken = self.taken(examples, seed, epoch)
        place = plan_epoch(
            taken.lengths,
            batch_users=batch_users // groups,
            rows=rows,
            seed=seed,
            epoch=epoch,
            shuffle=shuffle,
        )
        place = np.pad(place, ((0, -len(place) % groups), (0, 0)), constant_values=-1)
        return Plan(place.reshape(-1, batch_users), taken)


WHOLE = Planner()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceFeed:
    data: Any
    columns_SB: Any  # a dict of columns, int32 [S, B] each
    gather: Any = dataclasses.field(metadata={"static": True})

    def batch(self, step: Any) -> Any:
        return self.gather(
            self.data, {name: column_SB[step] for name, column_SB in self.columns_SB.items()}
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamedFeed:
    batches_S: Any  # a batch, every leaf with a leading axis of steps

    def batch(self, step: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[step], self.batches_S)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """One batch, whatever the number."""

    value: Any

    def batch(self, step: Any) -> Any:
        return self.value


Feed = DeviceFeed | StreamedFeed | Fixed

OF_GROUPS = PartitionSpec(None, DATA)  # [steps, ...] with the groups' parts side by side


def feed_specs(feed: Feed) -> Any:
    """How a mesh divides the arrays of a feed, as PartitionSpecs: data on every device, what makes up a batch over the data groups."""
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
      data: arrays that batches are gathered from.
      examples: a table, or a function (seed, epoch) -> table where every epoch has its own.
      gather: what makes a batch of a data group; its `rows` bound that batch.
      batch_users: B, examples of a step, those of all groups.
      placement: "device", "stream", or "auto" by the size of the data.
      planner: what makes the batches of an epoch.
      mesh: where batches go; None: one device.
      groups: parts of a batch that are packed by themselves, a multiple of the mesh's data groups; None: as many.

    Raises:
      ValueError: examples or rows that cannot be divided among the groups.
    """

    def __init__(
        self,
        data: Any,
        examples: Table | Callable[[int, int], Table],
        gather: Gather,
        *,
        batch_users: int,
        steps_per_call: int,
        placement: str = "auto",
        planner: Planner = WHOLE,
        mesh: Mesh | None = None,
        groups: int | None = None,
    ):
        self.batch_users, self.steps_per_call, self.gather, self.planner = (
            batch_users,
            steps_per_call,
            gather,
            planner,
        )
        self.mesh, self.shards = mesh, 1 if mesh is None else mesh.shape[DATA]
        self.batch_groups = self.shards if groups is None else groups
        self.group_rows = divided(gather.rows, batch_users, self.batch_groups, self.shards)
        self.examples: Callable[[int, int], Table] = (
            examples if callable(examples) else lambda seed, epoch: examples
        )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(data))
        self.streamed = placement == "stream" or (placement == "auto" and size > DEVICE_BYTES)
        self.data = data if self.streamed else put(data, mesh)

    def plan(self, *, seed: int = 0, epoch: int = 0, shuffle: bool = True) -> Plan:
        """The batches of an epoch, a function of (seed, epoch). Raises ValueError if there are no examples, or one too long for a batch."""
        examples = self.examples(seed, epoch)
        _require_some(examples)
        packing: dict[str, Any] = dict(
            batch_users=self.batch_users,
            rows=self.group_rows,
            groups=self.batch_groups,
            buffers=self.batch_groups // self.shards,
        )
        return self.planner.plan(examples, seed=seed, epoch=epoch, shuffle=shuffle, **packing)

    def groups(self, plan: Plan, first: int = 0) -> Iterator[Group]:
        """The batches of a plan from number `first` on. The last group repeats its last batch to keep the shape; `steps` tells."""
        starts = list(range(first, len(plan), self.steps_per_call))
        return self._stream(plan, starts) if self.streamed else self._on_device(plan, starts)

    def _columns(self, plan: Plan, first: int) -> tuple[dict[str, np.ndarray], int]:
        steps = min(self.steps_per_call, len(plan) - first)
        return plan.columns(
            np.minimum(np.arange(first, first + self.steps_per_call), first + steps - 1)
        ), steps

    def _on_device(self, plan: Plan, starts: list[int]) -> Iterator[Group]:
        for first in starts:
            columns_SB, steps = self._columns(plan, first)
            yield Group(
                DeviceFeed(self.data, put(columns_SB, self.mesh, OF_GROUPS), self.gather),
                steps,
                first,
            )

    def _pack(self, plan: Plan, first: int) -> tuple[Any, int]:
        columns_SB, steps = self._columns(plan, first)
        batches = []
        for group in range(1) if self.mesh is None else groups_here(self.mesh):
            of_group = {
                name: np.split(column_SB, self.shards, axis=1)[group]
                for name, column_SB in columns_SB.items()
            }
            steps_of_group = [
                self.gather(
                    self.data, {name: column_SB[step] for name, column_SB in of_group.items()}, np
                )
                for step in range(self.steps_per_call)
            ]
            batches.append(jax.tree.map(lambda *leaves: np.stack(leaves), *steps_of_group))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *batches), steps

    def _stream(self, plan: Plan, starts: list[int]) -> Iterator[Group]:
        if not starts:
            return
        options = grain.ReadOptions(num_threads=STREAM_THREADS, prefetch_buffer_size=STREAM_AHEAD)
        packed = (
            grain.MapDataset.source(starts)
            .map(lambda first: (first, *self._pack(plan, first)))
            .to_iter_dataset(options)
        )
        ready: Group | None = None
        for first, batches_S, steps in packed:
            # One group ahead: its copy to the device runs while the caller computes on the one before.
            ahead = (
                jax.device_put(batches_S) if self.mesh is None else put_groups(batches_S, self.mesh)
            )
            moving = Group(StreamedFeed(ahead), int(steps), int(first))
            if ready is not None:
                yield ready
            ready = moving
        if ready is not None:
            yield ready


def history_loader(
    events: Events,
    examples: Examples,
    *,
    batch_users: int,
    steps_per_call: int,
    rows: int | None = None,
    padded_length: int | None = None,
    placement: str = "auto",
    planner: Planner = WHOLE,
    mesh: Mesh | None = None,
    groups: int | None = None,
) -> Loader:
    """Batches of histories for retrieval.

    Args:
      rows: T of all groups together, or None to choose it from the lengths.
      padded_length: N of the padded layout (T becomes B * N), or None for the jagged one.
      mesh, groups: as in `Loader`.
    """
    shards = 1 if mesh is None else mesh.shape[DATA]
    groups = shards if groups is None else groups
    _require_some(examples)
    longest = int(examples.lengths.max())
    if padded_length is not None:
        if longest > padded_length:
            raise ValueError(
                f"a history of {longest} events does not fit the padded length {padded_length}: lower data.max_history"
            )
        rows = batch_users * padded_length
    if rows is None:
        rows = groups * choose_rows(
            planner.taken(examples, 0, 0).lengths, batch_users // groups, longest
        )
    gather = HistoryGather(rows // shards, padded_length)
    options: dict[str, Any] = dict(
        batch_users=batch_users, steps_per_call=steps_per_call, placement=placement, planner=planner
    )
    return Loader(events, examples, gather, mesh=mesh, groups=groups, **options)


def divided(rows: int | tuple[int, ...], batch_users: int, groups: int, shards: int) -> Any:
    """Rows of each of a batch's `groups`, from those of the buffer of each of `shards` data groups of the mesh.

    Raises:
      ValueError: what cannot be divided, with what could.
    """
    if groups % shards or batch_users % groups:
        raise ValueError(
            f"batches of {batch_users} examples, packed in parallel.groups={groups}, for parallel.data={shards}: data must divide groups, and groups "
            "the examples of a batch (data.batch_users, train.eval_users)"
        )
    buffers = groups // shards
    for room in np.atleast_1d(rows):
        if room % buffers:
            raise ValueError(
                f"{room} rows cannot be divided among {buffers} of the parallel.groups={groups}: change data.batch_tokens"
            )
    return tuple(room // buffers for room in rows) if isinstance(rows, tuple) else rows // buffers


def _require_some(examples: Table) -> None:
    if len(examples.lengths) == 0:
        raise ValueError(
            "no examples: every user of this split has too few events for a history and a target"
        )
