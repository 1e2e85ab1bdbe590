"""Packing: which examples each batch of an epoch holds.

Batches are packed by rows, not by users: B and T are fixed when a run starts, so that one compiled
step serves every batch. Packing depends on the number of *groups* of a plan alone, which is a
multiple of the mesh's: meshes that agree in it see the same examples in every step.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

ROW_MULTIPLE = 128  # capacities are rounded up to it; a common tile height of the kernels

BufferRows = tuple[int, ...]  # capacity of each buffer of a batch
HostColumns = dict[str, Int[np.ndarray, "..."]]
Places = Int[np.ndarray, "S B"]  # of a batch's examples in their table, -1 in empty places
Lengths = Int[np.ndarray, "n *buffers"]  # rows of each example


@runtime_checkable
class ExampleTable(Protocol):
    """Integer columns of equal length, and the rows of each example, [n] or [n, buffers]."""

    @property
    def columns(self) -> HostColumns: ...

    @property
    def lengths(self) -> Lengths: ...


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

    def cut(self, steps: int) -> "Plan":
        """The first batches, at most so many."""
        return dataclasses.replace(self, place_SB=self.place_SB[:steps])

    def columns(
        self, steps_S: Int[np.ndarray, " S"], dtype: type[np.signedinteger] = np.int32
    ) -> HostColumns:
        """The columns of some batches, [S, B]; empty places hold zeros."""
        place_SB = self.place_SB[steps_S]
        return {
            name: np.where(place_SB >= 0, column[np.maximum(place_SB, 0)], 0).astype(dtype)
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
