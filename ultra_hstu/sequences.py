"""What encoders read of a batch: its sequences, their times, and how the rows lie on the mesh."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Int64
from numpy.typing import ArrayLike

from kernels.jagged import Offsets, Rows, lengths_to_offsets
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

    @staticmethod
    def of(
        lengths: ArrayLike,
        times: ArrayLike | None = None,
        *,
        num_rows: int | None = None,
        num_targets: ArrayLike | None = None,
        num_contextual: ArrayLike | None = None,
    ) -> "Sequences":
        """Sequences of these lengths, one behind the other, made on the host.

        Args:
          lengths: rows of each sequence, [B]; 0 is a legal one.
          times: whole seconds of all these rows, oldest first within a sequence; None: all the
            same.
          num_rows: T, the capacity of the buffer. A compiled program serves all batches of one T
            and one B; None: the sum of the lengths.
          num_targets, num_contextual: how many rows of each sequence are such, [B]. Most of them
            become `max_targets` and `max_contextual`, which are static.

        Raises:
          ValueError: lengths or counts that are not whole numbers from 0 on, more rows than
            `num_rows`, more targets and contextual tokens than rows, or times of another number,
            that go back within a sequence or span more than 2^31 - 1 seconds.
        """
        length_B = _counts("lengths", lengths)
        offsets = lengths_to_offsets(length_B, xp=np)
        used, batch = int(offsets[-1]), len(length_B)
        rows = used if num_rows is None else num_rows
        if used > rows:
            raise ValueError(
                f"the lengths add up to {used} rows, more than num_rows={rows}: raise it"
            )
        targets_B, contextual_B = (
            None if counts is None else _counts(name, counts, batch)
            for name, counts in (("num_targets", num_targets), ("num_contextual", num_contextual))
        )
        special_B = sum(x for x in (targets_B, contextual_B) if x is not None)
        if (over := np.flatnonzero(special_B > length_B)).size:
            raise ValueError(
                f"sequence {over[0]} has {length_B[over[0]]} rows, fewer than its targets and "
                "contextual tokens: they are among the rows"
            )
        time_T = np.zeros(rows, np.int32)
        if times is not None:
            given = np.asarray(times)
            if given.shape != (used,) or (used and given.dtype.kind not in "iu"):
                raise ValueError(
                    f"times must be whole seconds, one a row of the sequences, [{used}]; got "
                    f"{given.dtype}{list(given.shape)}"
                )
            time_T[:used] = seconds_since_first(given.astype(np.int64), used)
        last_b = offsets[1:][length_B > 0] - 1
        next_time_T = np.append(time_T[1:], time_T[-1:])
        next_time_T[last_b] = time_T[last_b]
        if (back := np.flatnonzero(next_time_T[:used] < time_T[:used])).size:
            raise ValueError(f"times go back behind row {back[0]}: give each sequence oldest first")
        return Sequences(
            offsets,
            np.arange(rows) < used,
            time_T,
            next_time_T,
            targets_B,
            contextual_B,
            max_targets=_most(targets_B),
            max_contextual=_most(contextual_B),
        )

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
    def lengths(self) -> Int32[Array, " B"]:
        """Rows of each sequence that hold something."""
        offsets = jnp.asarray(self.offsets, jnp.int32)
        used_T = jnp.arange(self.num_rows, dtype=jnp.int32) < offsets[-1]
        real_T = jnp.asarray(self.shards.whole(self.real_T))
        before = lengths_to_offsets((real_T & used_T).astype(jnp.int32))
        return before[offsets[1:]] - before[offsets[:-1]]

    @property
    def rows(self) -> Rows:
        """Where this device's rows stand."""
        return Rows.of(self.offsets, self.shards.rows(self.num_rows), *self.counts)

    def on(self, shards: Shards) -> "Sequences":
        """The same sequences on a mesh."""
        return dataclasses.replace(self, shards=shards)


def _counts(name: str, values: ArrayLike, batch: int | None = None) -> Int32[np.ndarray, " B"]:
    """Numbers of rows as int32 [B]. Raises ValueError for what is none."""
    count_B = np.asarray(values)
    wrong = count_B.ndim != 1 or batch not in (None, len(count_B))
    if wrong or (count_B.size and (count_B.dtype.kind not in "iu" or count_B.min() < 0)):
        raise ValueError(f"{name} must be whole numbers from 0 on, one a sequence, got {values!r}")
    return count_B.astype(np.int32)


def _most(count_B: Int32[np.ndarray, " B"] | None) -> int:
    return 0 if count_B is None else int(count_B.max(initial=0))


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
