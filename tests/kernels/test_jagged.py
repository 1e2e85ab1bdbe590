"""Jagged helpers against plain loops; padding rows hold NaN throughout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import jagged
from kernels.jagged import Rows

LENGTHS = np.array([3, 0, 1, 5, 0], np.int32)
OFFSETS = np.array([0, 3, 3, 4, 9, 9], np.int32)
ROWS = 12


def values(lengths, rows, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, 2)).astype(np.float32)
    x[lengths.sum() :] = np.nan
    return x


def sequences(x, offsets):
    return [np.asarray(x)[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def test_offsets_and_lengths():
    np.testing.assert_array_equal(jagged.lengths_to_offsets(LENGTHS), OFFSETS)
    np.testing.assert_array_equal(jagged.offsets_to_lengths(OFFSETS), LENGTHS)


TARGETS, CONTEXTUAL = np.array([1, 0, 0, 2, 0], np.int32), np.array([1, 3, 4, 1, 0], np.int32)


@pytest.mark.parametrize("xp", [np, jnp])
def test_rows(xp):
    """Positions of rows, by hand; contextual tokens beyond a sequence's length are clamped."""
    rows = Rows.of(OFFSETS, ROWS, TARGETS, CONTEXTUAL, xp=xp)
    assert all(isinstance(x, jax.Array if xp is jnp else np.ndarray) for x in rows)
    assert all(x.dtype == np.int32 for x in rows[1:])
    np.testing.assert_array_equal(rows.real, np.arange(ROWS) < 9)
    wanted = {
        "segment": [0, 0, 0, 2, 3, 3, 3, 3, 3],
        "start": [0, 0, 0, 3, 4, 4, 4, 4, 4],
        "position": [0, 1, 2, 0, 0, 1, 2, 3, 4],
        "contextual": [1, 1, 1, 1, 1, 1, 1, 1, 1],
        "history": [1, 1, 1, 0, 2, 2, 2, 2, 2],
        "targets": [1, 1, 1, 0, 2, 2, 2, 2, 2],
        "end": [2, 2, 2, 1, 3, 3, 3, 3, 3],
    }
    for name, values in wanted.items():
        np.testing.assert_array_equal(getattr(rows, name)[:9], values, err_msg=name)
    assert set(np.asarray(rows.segment[9:])) <= set(range(5)), "padding is in range"


def test_rows_traced_chosen_and_padded():
    every = Rows.of(OFFSETS, ROWS, TARGETS, CONTEXTUAL)
    traced = jax.jit(Rows.of, static_argnums=1)(OFFSETS, ROWS, TARGETS, CONTEXTUAL)
    jax.tree.map(np.testing.assert_array_equal, traced, every)
    some = np.array([8, 2, 11], np.int32)
    chosen = Rows.of(OFFSETS, jnp.asarray(some), TARGETS, CONTEXTUAL)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[some]), chosen, every)
    padded = Rows.of(np.array([0, 4, 8], np.int32), 10, lengths=np.array([3, 1], np.int32))
    np.testing.assert_array_equal(padded.real, [1, 1, 1, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(padded.history, [3] * 4 + [1] * 6)
    assert not Rows.of(np.zeros(1, np.int32), 3).real.any(), "no sequences at all"


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
