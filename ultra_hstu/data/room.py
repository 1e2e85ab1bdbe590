"""Sizes that grow with the data, rounded up, so that few sizes are compiled for."""

import jax
import numpy as np


def room(size: int) -> int:
    """The power of two that holds `size`."""
    return 1 << max(size - 1, 0).bit_length()


def with_room[Events](events: Events) -> Events:
    """The arrays of events with zeros behind them, up to a power of two."""

    def fill(leaf: np.ndarray) -> np.ndarray:
        return np.pad(leaf, [(0, room(len(leaf)) - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)])

    return jax.tree.map(fill, events)
