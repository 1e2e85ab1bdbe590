"""Attention truncation (ULTRA-HSTU, arXiv 2602.16986): upper layers work on the newest rows alone.

From some layer on, a sequence is its contextual tokens, its newest history rows and its targets.
What is left is a jagged batch of its own in a smaller buffer: the layers above cost what a batch of
that size costs.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from kernels.jagged import Rows, lengths_to_offsets, split_lengths
from kernels.typing import PerRow
from ultra_hstu.sequences import PerSequence, Sequences


class Cut(NamedTuple):
    """Which T' of the T rows are left.

    Attributes:
      sequences: of the rows that are left.
      source_S: the row that each came from; T and more, all different, on padding.
      row_T: the row of the smaller buffer that each went to; T' where it was dropped.
      fits: whether T' rows are enough.
    """

    sequences: Sequences
    source_S: Int[Array, " S"]
    row_T: PerRow
    fits: Bool[Array, ""]

    def take(self, x_TD: Shaped[Array, "T *D"]) -> Shaped[Array, "S *D"]:
        """The rows that are left, zeros on padding; NaN everywhere if they do not fit.

        The gradient of a dropped row is 0.
        """
        x_SD = x_TD.at[self.source_S].get(
            mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True
        )
        return self._checked(x_SD)

    def move(self, x_tD: Float[Array, "t D"]) -> Float[Array, "s D"]:
        """`take` of rows that a mesh divides; those that are left are divided anew."""
        shards = self.sequences.shards
        if shards.context == 1:
            return self.take(x_tD)
        layout = shards.layout(self.source_S.shape[0])
        return self._checked(shards.take(x_tD, self.source_S, self.row_T.shape[0], layout=layout))

    def restore(self, x_SD: Shaped[Array, "S *D"]) -> Shaped[Array, "T *D"]:
        """Rows back in the whole buffer, zeros where they were dropped."""
        zeros = jnp.zeros((self.row_T.shape[0], *x_SD.shape[1:]), x_SD.dtype)
        return zeros.at[self.source_S].set(
            x_SD, mode="drop", indices_are_sorted=True, unique_indices=True
        )

    def _checked(self, x_SD: Shaped[Array, "S *D"]) -> Shaped[Array, "S *D"]:
        if not jnp.issubdtype(x_SD.dtype, jnp.floating):
            return x_SD
        return jnp.where(self.fits, x_SD, jnp.nan)


# The rows that reach a stack's last layer, after it, and which they are (None: all).
Kept = tuple[Float[Array, "S D"], Cut | None]


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What is kept.

    Attributes:
      after: layers that work on whole sequences, N1.
      length: newest history rows that a sequence keeps, L'; a shorter history stays whole. An
        interleaved input has two rows an event.
    """

    after: int
    length: int

    def cut(self, sequences: Sequences, extra_rows: int | None = None) -> Cut:
        """The smaller batch, jagged even if the layout was padded.

        It has T' = min(T, B * (L' + extra_rows)) rows, which B sequences in T rows never exceed; in
        a mesh, the next number that its devices can divide. In a padded layout, padding is taken to
        stand behind the real rows of a sequence.

        Args:
          extra_rows: most contextual tokens and targets of a sequence, together; None: the bounds
            of `sequences`.

        Raises:
          ValueError: targets and contextual tokens that `extra_rows` leaves no room for. Where
            counts are traced, rows that do not fit make every row NaN: none is lost in silence.
        """
        if extra_rows is None:
            extra_rows = sequences.max_targets + sequences.max_contextual
        _check_room([count for count in sequences.counts if count is not None], extra_rows)
        offsets, num_rows = jnp.asarray(sequences.offsets, jnp.int32), sequences.num_rows
        lengths_B = sequences.lengths
        time_T, next_time_T = sequences.shards.whole((sequences.time_T, sequences.next_time_T))
        contextual_B, history_B, _ = split_lengths(lengths_B, *sequences.counts)
        dropped_B = jnp.maximum(history_B - self.length, 0)
        kept_offsets = lengths_to_offsets(lengths_B - dropped_B)

        wanted = sequences.num_sequences * (self.length + extra_rows)
        capacity = min(num_rows, sequences.shards.divisible(wanted))
        kept, row_S = Rows.of(kept_offsets, capacity), jnp.arange(capacity, dtype=jnp.int32)
        in_front = kept.position < contextual_B[kept.segment]
        moved_S = jnp.where(in_front, 0, dropped_B[kept.segment])
        source_S = offsets[kept.segment] + kept.position + moved_S
        source_S = jnp.where(kept.real, source_S, num_rows + row_S)
        row_T = jnp.full(num_rows, capacity, jnp.int32)
        row_T = row_T.at[source_S].set(row_S, mode="drop", unique_indices=True)
        cut = Cut(sequences, source_S, row_T, kept_offsets[-1] <= capacity)
        smaller = dataclasses.replace(
            sequences,
            offsets=kept_offsets,
            real_T=kept.real,
            time_T=cut.take(jnp.asarray(time_T)),
            next_time_T=cut.take(jnp.asarray(next_time_T)),
        )
        return cut._replace(sequences=smaller)


def _check_room(counts: list[PerSequence], extra_rows: int) -> None:
    if counts and extra_rows == 0:
        raise ValueError(
            "truncating sequences with targets or contextual tokens needs room to keep them: "
            "extra_rows=0 must be their number (max_targets + max_contextual of the sequences)"
        )
    if not any(isinstance(count, jax.core.Tracer) for count in counts):
        most = int(np.max(sum(np.asarray(count) for count in counts), initial=0))
        if most > extra_rows:
            raise ValueError(
                f"a sequence has {most} targets and contextual tokens, more than {extra_rows=}"
            )
