"""Attention truncation (ULTRA-HSTU, arXiv 2602.16986): from some layer on, a sequence is its contextual tokens, its newest history rows and its targets.

What is left is a jagged batch of its own, in a smaller buffer: the layers above cost what a batch of that size costs.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from kernels.jagged import is_real, lengths_to_offsets, positions, segment_ids
from ultra_hstu.parallel.shards import ONE, Shards
from ultra_hstu.sequences import Sequences


class Cut(NamedTuple):
    """Which T' of the T rows are left."""

    sequences: Sequences  # of the rows that are left
    source_S: Int[Array, " S"]  # the row that each came from; T and more, all different, on padding
    place_T: Int[
        Array, " T"
    ]  # the row of the smaller buffer that each went to; T' where it was dropped
    fits: Bool[Array, ""]  # whether T' rows are enough

    def take(self, x_TD: Shaped[Array, "T *D"]) -> Shaped[Array, "S *D"]:
        """The rows that are left, zeros on padding; NaN everywhere if they do not fit. The gradient of a dropped row is 0."""
        x_SD = x_TD.at[self.source_S].get(
            mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True
        )
        return (
            jnp.where(self.fits, x_SD, jnp.nan)
            if jnp.issubdtype(x_SD.dtype, jnp.floating)
            else x_SD
        )

    def move(self, x_tD: Float[Array, "t D"], shards: Shards) -> Float[Array, "s D"]:
        """`take` of rows that are sharded over a mesh; those that are left are divided anew among its devices."""
        if shards.context == 1:
            return self.take(x_tD)
        x_sD = shards.take(
            x_tD, self.source_S, self.place_T.shape[0], layout=shards.layout(self.source_S.shape[0])
        )
        return jnp.where(self.fits, x_sD, jnp.nan)

    def restore(self, x_SD: Shaped[Array, "S *D"]) -> Shaped[Array, "T *D"]:
        """Rows back in their places in the whole buffer, zeros where they were dropped."""
        zeros = jnp.zeros((self.place_T.shape[0], *x_SD.shape[1:]), x_SD.dtype)
        return zeros.at[self.source_S].set(
            x_SD, mode="drop", indices_are_sorted=True, unique_indices=True
        )


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What is kept, and the room for it.

    Attributes:
      after: layers that work on whole sequences, N1.
      length: newest history rows that a sequence keeps, L'; a shorter history stays whole. (An interleaved input has two rows an event.)
      extra_rows: most contextual tokens and targets of a sequence, together.
      shards: devices that divide the rows.
    """

    after: int
    length: int
    extra_rows: int = 0
    shards: Shards = ONE

    def capacity(self, num_rows: int, batch: int) -> int:
        """T' = min(T, B * (L' + extra_rows)): B sequences in T rows never keep more. In a mesh, the next number that its devices can divide."""
        return min(num_rows, self.shards.room(batch * (self.length + self.extra_rows)))

    def kept(self, sequences: Sequences) -> Bool[Array, " T"]:
        """The rows that are left. In a padded layout, padding is taken to stand behind the real rows of a sequence."""
        return _frame(sequences, self.length).kept_T

    def cut(self, sequences: Sequences) -> Cut:
        """The smaller batch, jagged even if the layout was padded.

        Raises:
          ValueError: for targets and contextual tokens that `extra_rows` leaves no room for. Where counts are
            traced, rows that do not fit make every row NaN: none is lost in silence.
        """
        self._check_room(sequences)
        frame, rows = _frame(sequences, self.length), sequences.num_rows
        room = self.capacity(rows, frame.lengths_B.shape[0])
        offsets = lengths_to_offsets(frame.lengths_B - frame.dropped_B)

        def dropped_before(segment: Array, position: Array) -> Array:
            return jnp.where(position < frame.contextual_B[segment], 0, frame.dropped_B[segment])

        segment_S, position_S = _segments(offsets, room), positions(offsets, room)
        source_S = (
            jnp.asarray(sequences.offsets)[segment_S]
            + position_S
            + dropped_before(segment_S, position_S)
        )
        source_S = jnp.where(
            is_real(offsets, room), source_S, rows + jnp.arange(room, dtype=jnp.int32)
        )
        place_T = (
            offsets[frame.segment_T]
            + frame.position_T
            - dropped_before(frame.segment_T, frame.position_T)
        )
        cut = Cut(sequences, source_S, jnp.where(frame.kept_T, place_T, room), offsets[-1] <= room)
        smaller = dataclasses.replace(
            sequences,
            offsets=offsets,
            real_T=is_real(offsets, room),
            time_T=cut.take(jnp.asarray(sequences.time_T)),
            next_time_T=cut.take(jnp.asarray(sequences.next_time_T)),
        )
        return cut._replace(sequences=smaller)

    def _check_room(self, sequences: Sequences) -> None:
        counts = [
            count
            for count in (sequences.num_targets, sequences.num_contextual)
            if count is not None
        ]
        if counts and self.extra_rows == 0:
            raise ValueError(
                "truncating sequences with targets or contextual tokens needs room to keep them: extra_rows=0 must be their number"
            )
        if not any(isinstance(count, jax.core.Tracer) for count in counts):
            most = int(np.max(sum(np.asarray(count) for count in counts), initial=0))
            if most > self.extra_rows:
                raise ValueError(
                    f"a sequence has {most} targets and contextual tokens, more than extra_rows={self.extra_rows}"
                )


class _Frame(NamedTuple):
    """Where the rows of a batch stand, and what a truncation takes away: `dropped_B` rows behind the contextual ones."""

    segment_T: Int[Array, " T"]
    position_T: Int[Array, " T"]
    kept_T: Bool[Array, " T"]
    lengths_B: Int[Array, " B"]  # real rows
    contextual_B: Int[Array, " B"]
    dropped_B: Int[Array, " B"]


def _frame(sequences: Sequences, length: int) -> _Frame:
    offsets, rows = jnp.asarray(sequences.offsets, jnp.int32), sequences.num_rows
    segment_T, position_T = _segments(offsets, rows), positions(offsets, rows)
    real_T = jnp.asarray(sequences.real_T) & is_real(offsets, rows)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(real_T, dtype=jnp.int32)])
    lengths_B = before[offsets[1:]] - before[offsets[:-1]]
    zero_B = jnp.zeros_like(lengths_B)
    targets_B = (
        zero_B
        if sequences.num_targets is None
        else jnp.clip(jnp.asarray(sequences.num_targets), zero_B, lengths_B)
    )
    contextual_B = zero_B
    if sequences.num_contextual is not None:
        contextual_B = jnp.clip(
            jnp.asarray(sequences.num_contextual), zero_B, lengths_B - targets_B
        )
    dropped_B = jnp.maximum(lengths_B - targets_B - contextual_B - length, 0)
    contextual_T = contextual_B[segment_T]
    kept_T = real_T & (
        (position_T < contextual_T) | (position_T >= contextual_T + dropped_B[segment_T])
    )
    return _Frame(segment_T, position_T, kept_T, lengths_B, contextual_B, dropped_B)


def _segments(offsets: Any, rows: int) -> Int[Array, " T"]:
    """The sequence of each row; on padding some sequence, too."""
    return jnp.minimum(segment_ids(offsets, rows), offsets.shape[0] - 2)
