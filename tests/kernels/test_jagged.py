"""Jagged helpers against plain loops; padding rows hold NaN throughout."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels import jagged

LENGTHS = np.array([3, 0, 1, 5, 0], np.int32)
OFFSETS = np.array([0, 3, 3, 4, 9, 9], np.int32)
ROWS = 12


def values(lengths, rows, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, 2)).astype(np.float32)
    x[lengths.sum() :] = np.nan
    return x


def sequences(x, offsets):
    return [np.asarray(x)[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def test_offsets_segments_positions():
    np.testing.assert_array_equal(jagged.lengths_to_offsets(LENGTHS), OFFSETS)
    np.testing.assert_array_equal(jagged.offsets_to_lengths(OFFSETS), LENGTHS)
    np.testing.assert_array_equal(
        jagged.segment_ids(OFFSETS, ROWS), [0, 0, 0, 2, 3, 3, 3, 3, 3, 5, 5, 5]
    )
    np.testing.assert_array_equal(
        jagged.positions(OFFSETS, ROWS), [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 0, 0]
    )
    np.testing.assert_array_equal(jagged.is_real(OFFSETS, ROWS), np.arange(ROWS) < 9)
    jitted = jax.jit(jagged.positions, static_argnums=1)(OFFSETS, ROWS)
    np.testing.assert_array_equal(jitted, jagged.positions(OFFSETS, ROWS))


def test_pad_and_unpad():
    x = values(LENGTHS, ROWS)
    padded = np.asarray(jagged.pad(jnp.asarray(x), OFFSETS, 6, fill=-1))
    for row, part in zip(padded, sequences(x, OFFSETS), strict=True):
        np.testing.assert_array_equal(row[: len(part)], part)
        assert (row[len(part) :] == -1).all()
    back = np.asarray(jagged.unpad(jnp.asarray(padded), OFFSETS, ROWS))
    np.testing.assert_array_equal(back, np.where(np.isnan(x), 0, x))


def test_pad_leaves_out_what_is_too_long():
    x = values(LENGTHS, ROWS)
    padded = jagged.pad(jnp.asarray(x), OFFSETS, 2)
    np.testing.assert_array_equal(padded[3], x[4:6])
    back = np.asarray(jagged.unpad(padded, OFFSETS, ROWS))
    np.testing.assert_array_equal(back[4:6], x[4:6])
    assert (back[6:9] == 0).all()


def test_gradients_of_padding_are_zero():
    def loss(x):
        return jnp.sum(jagged.unpad(jagged.pad(x, OFFSETS, 6), OFFSETS, ROWS) * 2)

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(values(LENGTHS, ROWS))))
    np.testing.assert_array_equal(
        gradient, np.where(np.arange(ROWS)[:, None] < 9, 2.0, 0.0) * np.ones((1, 2))
    )


def test_concat_and_split():
    right_lengths = np.array([1, 2, 0, 3, 0], np.int32)
    right_offsets = np.array([0, 1, 3, 3, 6, 6], np.int32)
    left, right = values(LENGTHS, ROWS), values(right_lengths, 7, seed=1)
    joined, offsets = jagged.concat(
        jnp.asarray(left), OFFSETS, jnp.asarray(right), right_offsets, 16
    )
    for got, a, b in zip(
        sequences(joined, offsets),
        sequences(left, OFFSETS),
        sequences(right, right_offsets),
        strict=True,
    ):
        np.testing.assert_array_equal(got, np.concatenate([a, b]))
    assert not np.asarray(joined)[15:].any()
    got_left, got_offsets, got_right, got_right_offsets = jagged.split(
        joined, offsets, right_lengths, ROWS, 7
    )
    np.testing.assert_array_equal(got_offsets, OFFSETS)
    np.testing.assert_array_equal(got_right_offsets, right_offsets)
    np.testing.assert_array_equal(got_left, np.nan_to_num(left))
    np.testing.assert_array_equal(got_right, np.nan_to_num(right))
