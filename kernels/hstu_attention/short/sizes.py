"""Sizes of the kernels of short sequences, by head width and the longest sequence."""

from typing import NamedTuple

from kernels.hstu_attention.plan import AttentionSpec
from kernels.hstu_attention.triton.sizes import LaunchSizes
from kernels.triton_call import padded


class ShortSizes(NamedTuple):
    """Sizes of the forward and of the backward; rows of a tile."""

    forward: LaunchSizes
    backward: LaunchSizes
    tile: int

    @property
    def whole(self) -> bool:
        """Whether a program of the backward holds a whole tile."""
        return self.backward.block_q == self.tile


# By padded width of the widest head and rows of a tile.
SIZES = {
    (64, 128): ((64, 32, 4, 1), (128, 32, 8, 1)),
    (64, 256): ((16, 64, 4, 1), (16, 32, 2, 1)),
    (128, 128): ((64, 32, 4, 1), (128, 32, 8, 1)),
    (128, 256): ((32, 32, 4, 1), (32, 32, 4, 1)),
}


def find_sizes(spec: AttentionSpec) -> ShortSizes:
    """Sizes of calls whose sequences have at most `spec.longest` rows."""
    assert spec.longest is not None
    width = max(64, padded(spec.k_width), padded(spec.v_width))
    tile = 128 if spec.longest <= 128 else 256
    forward, backward = SIZES[width, tile]
    return ShortSizes(LaunchSizes(*forward), LaunchSizes(*backward), tile)
