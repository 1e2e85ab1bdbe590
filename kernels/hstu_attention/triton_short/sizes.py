"""Sizes of the kernels of short sequences, by the longest sequence."""

from typing import NamedTuple

from kernels.hstu_attention.plan import AttentionSpec
from kernels.hstu_attention.triton.sizes import LaunchSizes


class ShortSizes(NamedTuple):
    """Sizes of the forward and of the backward; rows of a tile; whether it is cut in halves."""

    forward: LaunchSizes
    backward: LaunchSizes
    tile: int
    halves: bool = False

    @property
    def whole(self) -> bool:
        """Whether a program of the backward walks over the keys of a whole tile."""
        return self.backward.block_q == self.tile


# By rows of a tile.
SIZES = {
    128: ((64, 32, 4, 1), (128, 32, 8, 1)),
    256: ((16, 64, 4, 1), (16, 32, 2, 1)),
}
HALVES = ShortSizes(LaunchSizes(64, 64, 4, 1), LaunchSizes(64, 64, 4, 1), 128, halves=True)


def find_sizes(spec: AttentionSpec) -> ShortSizes:
    """Sizes of calls whose sequences have at most `spec.longest` rows, whatever their mask."""
    assert spec.longest is not None
    tile = 128 if spec.longest <= 128 else 256
    forward, backward = SIZES[tile]
    return ShortSizes(LaunchSizes(*forward), LaunchSizes(*backward), tile)
