"""Jagged batches: B sequences back to back in one buffer of static capacity T.

Values are `[T, ...]`; sequence b owns rows `offsets[b]:offsets[b + 1]`; rows from `offsets[B]` on are padding and may hold
anything, NaN included.
All functions work under `jit` with traced offsets; capacities are static.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def lengths_to_offsets(lengths: Int[Any, " B"]) -> Int[Array, " B1"]:
    """Lengths int32[B] to offsets int32[B+1], starting at 0."""
    lengths = jnp.asarray(lengths, jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lengths, dtype=jnp.int32)])


def offsets_to_lengths(offsets: Int[Any, " B1"]) -> Int[Array, " B"]:
    """Offsets int32[B+1] to lengths int32[B]."""
    offsets = jnp.asarray(offsets)
    return offsets[1:] - offsets[:-1]


def segment_ids(offsets: Int[Any, " B1"], num_rows: int) -> Int[Array, " T"]:
    """The sequence of each row; B on padding rows."""
    offsets = jnp.asarray(offsets)
    rows = jnp.arange(num_rows, dtype=offsets.dtype)
    return jnp.searchsorted(offsets[1:], rows, side="right", method="scan_unrolled").astype(
        jnp.int32
    )


def positions(offsets: Int[Any, " B1"], num_rows: int) -> Int[Array, " T"]:
    """Position of each row in its sequence, from 0; 0 on padding rows."""
    offsets = jnp.asarray(offsets)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.where(
        rows < offsets[-1], rows - offsets[segment_ids(offsets, num_rows)].astype(jnp.int32), 0
    )


def is_real(offsets: Int[Any, " B1"], num_rows: int) -> Shaped[Array, " T"]:
    """True on rows that belong to a sequence, bool[T]."""
    return jnp.arange(num_rows) < jnp.asarray(offsets)[-1]


def pad(
    values: Shaped[Array, "T ..."], offsets: Int[Any, " B1"], max_length: int, fill: Any = 0
) -> Shaped[Array, "B N ..."]:
    """`[T, ...]` to `[B, max_length, ...]`, `fill` behind each sequence. Rows beyond `max_length` of a sequence are left out."""
    offsets = jnp.asarray(offsets)
    place_1N = jnp.arange(max_length, dtype=jnp.int32)[None, :]
    here_BN = place_1N < offsets_to_lengths(offsets)[:, None]
    row_BN = jnp.where(here_BN, offsets[:-1, None] + place_1N, 0)
    here = here_BN.reshape(here_BN.shape + (1,) * (values.ndim - 1))
    return jnp.where(here, values[row_BN], jnp.asarray(fill, values.dtype))


def unpad(
    values: Shaped[Array, "B N ..."], offsets: Int[Any, " B1"], num_rows: int
) -> Shaped[Array, "T ..."]:
    """`[B, N, ...]` to `[num_rows, ...]`: the inverse of `pad`; zeros on padding rows and where a sequence is longer than N."""
    batch, max_length = values.shape[:2]
    place_T = positions(offsets, num_rows)
    here_T = is_real(offsets, num_rows) & (place_T < max_length)
    segment_T = jnp.minimum(segment_ids(offsets, num_rows), batch - 1)
    rows = values[segment_T, jnp.minimum(place_T, max_length - 1)]
    return jnp.where(
        here_T.reshape(here_T.shape + (1,) * (rows.ndim - 1)), rows, jnp.zeros((), values.dtype)
    )


def concat(
    left: Shaped[Array, "L ..."],
    left_offsets: Int[Any, " B1"],
    right: Shaped[Array, "R ..."],
    right_offsets: Int[Any, " B1"],
    num_rows: int,
) -> tuple[Shaped[Array, "T ..."], Int[Array, " B1"]]:
    """Joins two jagged arrays sequence by sequence, left first, in a buffer of `num_rows` rows.

    Returns values, zeros on padding, and offsets.
    """
    left_offsets, right_offsets = jnp.asarray(left_offsets), jnp.asarray(right_offsets)
    offsets = left_offsets + right_offsets
    batch = offsets.shape[0] - 1
    segment_T = jnp.minimum(segment_ids(offsets, num_rows), batch - 1)
    place_T = positions(offsets, num_rows)
    left_length_T = offsets_to_lengths(left_offsets)[segment_T]
    from_left_T = place_T < left_length_T
    left_row_T = jnp.where(from_left_T, left_offsets[segment_T] + place_T, 0)
    right_row_T = jnp.where(from_left_T, 0, right_offsets[segment_T] + place_T - left_length_T)
    bools = (slice(None),) + (None,) * (left.ndim - 1)
    rows = jnp.where(
        from_left_T[bools],
        jnp.take(left, left_row_T, axis=0, mode="clip"),
        jnp.take(right, right_row_T, axis=0, mode="clip"),
    )
    return jnp.where(is_real(offsets, num_rows)[bools], rows, jnp.zeros((), rows.dtype)), offsets


def split(
    values: Shaped[Array, "T ..."],
    offsets: Int[Any, " B1"],
    right_lengths: Int[Any, " B"],
    left_rows: int,
    right_rows: int,
) -> tuple[Shaped[Array, "L ..."], Int[Array, " B1"], Shaped[Array, "R ..."], Int[Array, " B1"]]:
    """The inverse of `concat`: takes the last `right_lengths[b]` rows of each sequence off. Returns (left, offsets, right, offsets)."""
    offsets = jnp.asarray(offsets)
    right_offsets = lengths_to_offsets(right_lengths)
    left_offsets = offsets - right_offsets
    left_B, batch = offsets_to_lengths(left_offsets), offsets.shape[0] - 1

    def part(part_offsets: Array, skip_B: Array, rows: int) -> Array:
        segment = jnp.minimum(segment_ids(part_offsets, rows), batch - 1)
        source = offsets[segment] + skip_B[segment] + positions(part_offsets, rows)
        real = is_real(part_offsets, rows).reshape((rows,) + (1,) * (values.ndim - 1))
        return jnp.where(
            real, jnp.take(values, source, axis=0, mode="clip"), jnp.zeros((), values.dtype)
        )

    left = part(left_offsets, jnp.zeros_like(left_B), left_rows)
    return left, left_offsets, part(right_offsets, left_B, right_rows), right_offsets
