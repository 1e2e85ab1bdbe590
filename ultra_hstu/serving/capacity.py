"""Capacity classes: sizes are rounded up to a short ladder, and one compiled program serves every request of a class."""

import dataclasses
from typing import Any

import numpy as np

LEAST_ROWS = 64
MAX_USERS = 16  # requests of an online call, if nothing else is asked for


@dataclasses.dataclass(frozen=True)
class Room:
    """Sizes of a call that the caller has chosen, so that few programs serve all of its calls: users, and events of each channel."""

    users: int
    events: dict[str, int]


def capacity(count: int, least: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... (2^k and 3 * 2^(k - 1)) that is at least `count` and `least`: two classes an octave, at most
    half as much again as is needed.
    """
    need = max(count, least)
    power = 1 << (need - 1).bit_length()
    return 3 * power // 4 if 4 <= power and need <= 3 * power // 4 else power


def padded(x: Any, rows: int, fill: int = 0) -> np.ndarray:
    """The array with rows of `fill` behind it."""
    x = np.asarray(x)
    return (
        x
        if len(x) == rows
        else np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (np.ndim(x) - 1), constant_values=fill)
    )


def padded_offsets(offsets: Any, users: int) -> np.ndarray:
    """Offsets of `users` users, of whom the last have nothing."""
    return np.pad(np.asarray(offsets), (0, users + 1 - len(offsets)), mode="edge").astype(np.int32)
