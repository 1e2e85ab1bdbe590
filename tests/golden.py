"""Reads the golden files of tests/testdata: numbers of the public PyTorch implementation."""

import pathlib

import numpy as np


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(__file__).parent / "testdata" / f"{name}.npz") as file:
        return dict(file)


def flatten(padded_BNX: np.ndarray, lengths: np.ndarray, rows: int) -> np.ndarray:
    """The valid rows of [B, N, ...] one after another in a buffer of `rows` rows, zeros behind."""
    flat = np.concatenate([padded_BNX[b, :n] for b, n in enumerate(lengths)])
    return np.concatenate([flat, np.zeros((rows - len(flat), *flat.shape[1:]), flat.dtype)])


def assert_close(actual: object, expected: np.ndarray, tolerance: float, name: str) -> None:
    """max|a - b| <= tolerance * max|b| over the whole array."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape, (
        f"{name}: shape {actual.shape}, expected {expected.shape}"
    )
    error, size = np.max(np.abs(actual - expected)), np.max(np.abs(expected))
    assert error <= tolerance * size, (
        f"{name}: error {error:.3g} against a largest value of {size:.3g}, tolerance {tolerance:g}"
    )
