"""Jagged batches: B sequences back to back in one buffer of static capacity T.

Values are `[T, ...]`; sequence b owns rows `offsets[b]:offsets[b + 1]`. Rows from `offsets[B]` on
are padding and may hold anything, NaN included. `Rows` says where every row stands in its sequence.
All functions work under `jit` with traced offsets; capacities are static.
"""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from kernels.typing import PerRow

Offsets = Int[Array | np.ndarray, " B1"]
PerSequence = Int[Array | np.ndarray, " B"]
Lengths = PerSequence | Sequence[int | np.integer]
Counts = Lengths | None  # None: 0 in all of them


class Rows(NamedTuple):
    """Where rows stand in sequences of contextual tokens, then history, then targets.

    Attributes:
      real: the row belongs to a sequence. The other fields of padding hold any values in range.
      segment: number of the row's sequence.
      start: the row of the buffer at which the sequence begins.
      position: of the row in the sequence, from 0.
      contextual, history, targets: how many of them the sequence has.
    """

    real: Bool[Array, " T"]
    segment: PerRow
    start: PerRow
    position: PerRow
    contextual: PerRow
    history: PerRow
    targets: PerRow

    @property
    def end(self) -> Int[Array | np.ndarray, " T"]:
        """The position behind the history: the first target's."""
        return self.contextual + self.history

    @staticmethod
    def of(
        offsets: Offsets,
        row_T: int | Int[Array | np.ndarray, " T"],
        num_targets: Counts = None,
        num_contextual: Counts = None,
        *,
        lengths: Counts = None,
        xp: ModuleType = jnp,
    ) -> "Rows":
        """Rows of a buffer of sequences.

        Args:
          offsets: int32[B+1], may be traced.
          row_T: numbers of the rows, or how many rows the buffer has: then all of them.
          num_targets, num_contextual: clamped where they exceed a sequence's length.
          lengths: rows of each sequence in use, where its slot is longer; None: all.
          xp: `jax.numpy` or `numpy`.
        """
        offsets = xp.asarray(offsets)
        every = isinstance(row_T, int)
        row = xp.arange(row_T, dtype=offsets.dtype) if every else xp.asarray(row_T)
        batch = offsets.shape[0] - 1
        if batch == 0:
            zero = xp.zeros_like(row)
            return Rows(zero > 0, *(zero,) * 6)
        # JAX's own choice of a method is a loop, which is slow on a GPU.
        scan = functools.partial(jnp.searchsorted, method="scan_unrolled")
        search = np.searchsorted if xp is np else scan
        found = search(offsets[1:], row, side="right")
        segment = xp.minimum(found, batch - 1).astype(offsets.dtype)
        position = row - offsets[:-1][segment]
        counts = (num_targets, num_contextual)
        return Rows.at(offsets, segment, position, *counts, lengths=lengths, xp=xp)

    @staticmethod
    def at(
        offsets: Offsets,
        segment_R: Int[Array | np.ndarray, " R"],
        position_R: Int[Array | np.ndarray, " R"],
        num_targets: Counts = None,
        num_contextual: Counts = None,
        *,
        lengths: Counts = None,
        xp: ModuleType = jnp,
    ) -> "Rows":
        """Rows by sequence and position; a position may lie behind its sequence."""
        offsets, segment, position = (xp.asarray(x) for x in (offsets, segment_R, position_R))
        length_B = xp.diff(offsets) if lengths is None else xp.asarray(lengths)
        parts = split_lengths(length_B, num_targets, num_contextual, xp=xp)
        real, start = position < length_B[segment], offsets[:-1][segment]
        return Rows(real, segment, start, position, *(part[segment] for part in parts))


def split_lengths(
    length_B: PerSequence,
    num_targets: Counts = None,
    num_contextual: Counts = None,
    *,
    xp: ModuleType = jnp,
) -> tuple[PerSequence, ...]:
    """How many contextual tokens, history rows and targets each sequence has, in this order."""
    zero_B = xp.zeros_like(length_B)

    def clamped(counts: Counts, most_B: PerSequence) -> PerSequence:
        if counts is None:
            return zero_B
        return xp.clip(xp.asarray(counts).astype(length_B.dtype), zero_B, most_B)

    targets_B = clamped(num_targets, length_B)
    contextual_B = clamped(num_contextual, length_B - targets_B)
    return contextual_B, length_B - targets_B - contextual_B, targets_B


def lengths_to_offsets(lengths: Lengths, *, xp: ModuleType = jnp) -> Offsets:
    """Lengths [B] to offsets int32[B+1], starting at 0."""
    return xp.pad(xp.cumsum(xp.asarray(lengths, xp.int32), dtype=xp.int32), (1, 0))


def offsets_to_lengths(offsets: Offsets) -> Int[Array, " B"]:
    """Offsets int32[B+1] to lengths int32[B]."""
    return jnp.diff(jnp.asarray(offsets))


def pad(
    values: Shaped[Array | np.ndarray, "T ..."],
    offsets: Offsets,
    max_length: int,
    fill: float | int = 0,
) -> Shaped[Array, "B N ..."]:
    """`[T, ...]` to `[B, max_length, ...]`, with `fill` behind each sequence.

    Rows beyond `max_length` of a sequence are left out.
    """
    offsets = jnp.asarray(offsets)
    position_1N = jnp.arange(max_length, dtype=jnp.int32)[None, :]
    here_BN = position_1N < offsets_to_lengths(offsets)[:, None]
    row_BN = jnp.where(here_BN, offsets[:-1, None] + position_1N, 0)
    here = here_BN.reshape(here_BN.shape + (1,) * (values.ndim - 1))
    return jnp.where(here, jnp.asarray(values)[row_BN], jnp.asarray(fill, values.dtype))


def unpad(
    values: Shaped[Array, "B N ..."], offsets: Offsets, num_rows: int
) -> Shaped[Array, "T ..."]:
    """`[B, N, ...]` to `[num_rows, ...]`, the inverse of `pad`.

    Padding rows come out 0, and so do rows that a sequence has beyond N.
    """
    max_length = values.shape[1]
    rows = Rows.of(offsets, num_rows)
    here_T = rows.real & (rows.position < max_length)
    found = values[rows.segment, jnp.minimum(rows.position, max_length - 1)]
    here = here_T.reshape(here_T.shape + (1,) * (found.ndim - 1))
    return jnp.where(here, found, jnp.zeros((), values.dtype))
