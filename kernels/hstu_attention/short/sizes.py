"""Sizes of the kernels of short sequences, by dtype, head width and the longest sequence."""

from typing import NamedTuple

import jax.numpy as jnp

from kernels.hstu_attention.plan import AttentionSpec
from kernels.hstu_attention.triton.sizes import LaunchSizes, padded


class ShortSizes(NamedTuple):
    """Sizes of the forward and of the backward, whose programs hold a whole tile."""

    forward: LaunchSizes
    backward: LaunchSizes

    @property
    def tile(self) -> int:
        return self.backward.block_q


# By bytes of an element, padded width of the widest head and rows of a tile.
SIZES = {
    (2, 64, 128): ((64, 128, 4, 1), (128, 32, 4, 2)),
    (2, 64, 256): ((64, 64, 4, 2), (256, 32, 8, 2)),
    (2, 128, 128): ((64, 64, 4, 2), (128, 32, 8, 2)),
    (2, 128, 256): ((64, 64, 4, 2), (256, 32, 8, 1)),
    (4, 64, 128): ((32, 32, 4, 2), (128, 32, 8, 1)),
    (4, 64, 256): ((32, 32, 4, 2), (256, 32, 8, 1)),
    (4, 128, 128): ((32, 32, 4, 1), (128, 32, 8, 1)),
    (4, 128, 256): ((32, 32, 4, 1), (256, 16, 8, 1)),
}


def find_sizes(spec: AttentionSpec) -> ShortSizes:
    """Sizes of calls whose sequences have at most `spec.longest` rows."""
    assert spec.longest is not None
    width = max(64, padded(spec.k_width), padded(spec.v_width))
    tile = 128 if spec.longest <= 128 else 256
    return ShortSizes(
        *(LaunchSizes(*sizes) for sizes in SIZES[jnp.dtype(spec.dtype).itemsize, width, tile])
    )
