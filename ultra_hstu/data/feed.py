"""Feeds: how batches reach a compiled loop over several steps.

A feed is a pytree with `batch(i)`, used inside the loop. `DeviceFeed` holds all events on the device and gathers each batch there, so a
call moves only the slice bounds of its examples. `StreamedFeed` holds ready batches that host threads packed while the device computed.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int

from ultra_hstu.data.batching import Batch, Events, choose_rows, gather_batch, plan_epoch, slices
from ultra_hstu.data.split import Examples

DEVICE_BYTES = 2**30  # placement "auto": events up to this size live on the device
STREAM_THREADS = 4
STREAM_AHEAD = 4  # groups of batches packed before they are asked for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceFeed:
    events: Events
    start_SB: Any  # int32 [S, B]
    stop_SB: Any
    rows: int = dataclasses.field(metadata={"static": True})
    padded_length: int | None = dataclasses.field(metadata={"static": True})

    def batch(self, step: Any) -> Batch:
        return gather_batch(self.events, self.start_SB[step], self.stop_SB[step], rows=self.rows, padded_length=self.padded_length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamedFeed:
    batches_S: Batch  # every leaf with a leading axis of steps

    def batch(self, step: Any) -> Batch:
        return jax.tree.map(lambda leaf: leaf[step], self.batches_S)


Feed = DeviceFeed | StreamedFeed


@dataclasses.dataclass(frozen=True)
class Group:
    """The steps of one compiled call: the first `steps` batches of `feed`."""

    feed: Feed
    steps: int
    first: int  # number of the first of them in the epoch


class Loader:
    """Batches of `examples`, in groups of `steps_per_call`; every group has the same shapes.

    Args:
      rows: T, or None to choose it from the lengths.
      padded_length: N of the padded layout (T becomes B * N), or None for the jagged one.
      placement: "device", "stream", or "auto" by the size of the events.
    """

    def __init__(
        self,
        events: Events,
        examples: Examples,
        *,
        batch_users: int,
        steps_per_call: int,
        rows: int | None = None,
        padded_length: int | None = None,
        placement: str = "auto",
    ):
        self.examples, self.batch_users, self.steps_per_call, self.padded_length = examples, batch_users, steps_per_call, padded_length
        if len(examples) == 0:
            raise ValueError("no examples: every user of this split has too few events for a history and a target")
        if padded_length is not None:
            longest = int(examples.lengths.max())
            if longest > padded_length:
                raise ValueError(f"a history of {longest} events does not fit the padded length {padded_length}: lower data.max_history")
            self.rows = batch_users * padded_length
        else:
            self.rows = rows or choose_rows(examples.lengths, batch_users)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(events))
        self.streamed = placement == "stream" or (placement == "auto" and size > DEVICE_BYTES)
        self.events = events if self.streamed else jax.device_put(events)

    def plan(self, *, seed: int = 0, epoch: int = 0, shuffle: bool = True) -> Int[np.ndarray, "S B"]:
        rows = self.rows if self.padded_length is None else self.batch_users * int(self.examples.lengths.max())
        return plan_epoch(self.examples.lengths, batch_users=self.batch_users, rows=rows, seed=seed, epoch=epoch, shuffle=shuffle)

    def groups(self, plan_SB: Int[np.ndarray, "S B"], first: int = 0) -> Iterator[Group]:
        """The batches of a plan from number `first` on. The last group repeats its last batch to keep the shape; `steps` tells."""
        starts = list(range(first, len(plan_SB), self.steps_per_call))
        return self._stream(plan_SB, starts) if self.streamed else self._on_device(plan_SB, starts)

    def _bounds(self, plan_SB: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray, int]:
        steps = min(self.steps_per_call, len(plan_SB) - first)
        taken_SB = plan_SB[np.minimum(np.arange(first, first + self.steps_per_call), first + steps - 1)]
        return *slices(self.examples, taken_SB), steps

    def _on_device(self, plan_SB: np.ndarray, starts: list[int]) -> Iterator[Group]:
        for first in starts:
            start_SB, stop_SB, steps = self._bounds(plan_SB, first)
            start_SB, stop_SB = jax.device_put((start_SB, stop_SB))
            yield Group(DeviceFeed(self.events, start_SB, stop_SB, self.rows, self.padded_length), steps, first)

    def _pack(self, plan_SB: np.ndarray, first: int) -> tuple[Batch, int]:
        start_SB, stop_SB, steps = self._bounds(plan_SB, first)
        batches = [
            gather_batch(self.events, start_B, stop_B, rows=self.rows, padded_length=self.padded_length, xp=np)
            for start_B, stop_B in zip(start_SB, stop_SB, strict=True)
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches), steps

    def _stream(self, plan_SB: np.ndarray, starts: list[int]) -> Iterator[Group]:
        if not starts:
            return
        options = grain.ReadOptions(num_threads=STREAM_THREADS, prefetch_buffer_size=STREAM_AHEAD)
        packed = grain.MapDataset.source(starts).map(lambda first: (first, *self._pack(plan_SB, first))).to_iter_dataset(options)
        ready: Group | None = None
        for first, batches_S, steps in packed:
            # One group ahead: its copy to the device runs while the caller computes on the one before.
            moving = Group(StreamedFeed(jax.device_put(batches_S)), int(steps), int(first))
            if ready is not None:
                yield ready
            ready = moving
        if ready is not None:
            yield ready
