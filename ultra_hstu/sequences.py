"""What encoders read of a batch: its sequences, their times, and how the rows lie on the mesh."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Int64

from kernels.jagged import Offsets, Rows
from kernels.typing import STATIC, Leaf
from ultra_hstu.parallel.shards import ONE, Shards

SECONDS_RANGE = 2**31 - 1  # batches hold times as int32

Activations = Float[Array, "T D"]  # a vector for each row
PerSequence = Int[Array | np.ndarray, " B"]  # a number for each sequence
Times = Int[Array | np.ndarray, " T"]  # of each row, seconds
Columns = Mapping[str, Int[Array | np.ndarray, "..."]]  # of the examples of a batch, by name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
    """B sequences in T rows; each is contextual tokens, history, targets.

    Arrays have all T rows. Of anything with a width a device of a mesh has its own rows alone.

    Attributes:
      offsets: rows from `offsets[B]` on are padding.
      real_T: rows that hold something; a padded layout has others inside its sequences.
      time_T: seconds.
      next_time_T: time of the event after the row.
      num_targets, num_contextual: None for none of them.
      shards: how the rows lie on the mesh.
      max_targets, max_contextual: most of them in a sequence, where something keeps room for them:
        a truncation, or a strategy of context parallelism.
    """

    offsets: Leaf[Offsets]
    real_T: Leaf[Bool[Array | np.ndarray, " T"]]
    time_T: Leaf[Times]
    next_time_T: Leaf[Times]
    num_targets: Leaf[PerSequence] | None = None
    num_contextual: Leaf[PerSequence] | None = None
    shards: Shards = dataclasses.field(default=ONE, metadata=STATIC)
    max_targets: int = dataclasses.field(default=0, metadata=STATIC)
    max_contextual: int = dataclasses.field(default=0, metadata=STATIC)

    @property
    def counts(self) -> tuple[PerSequence | None, PerSequence | None]:
        """Targets and contextual tokens of each sequence."""
        return self.num_targets, self.num_contextual

    @property
    def num_rows(self) -> int:
        return self.time_T.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def rows(self) -> Rows:
        """Where this device's rows stand."""
        return Rows.of(self.offsets, self.shards.rows(self.num_rows), *self.counts)

    def on(self, shards: Shards) -> "Sequences":
        """The same sequences on a mesh."""
        return dataclasses.replace(self, shards=shards)


def seconds_since_first(
    timestamps: Int64[np.ndarray, " E"] | None, count: int
) -> Int32[np.ndarray, " E"]:
    """The times of `count` events as a batch holds them; without timestamps every time is 0.

    Raises:
        ValueError: timestamps that span more than 2^31 - 1 seconds (68 years), which usually means
            milliseconds.
    """
    if timestamps is None or not len(timestamps):
        return np.zeros(count, np.int32)
    first, last = int(timestamps.min()), int(timestamps.max())
    if last - first > SECONDS_RANGE:
        raise ValueError(
            f"timestamps run from {first} to {last}: more than 2^31 - 1 seconds. "
            "Give seconds, not milliseconds."
        )
    return (timestamps - first).astype(np.int32)
