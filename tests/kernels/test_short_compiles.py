"""The kernels of `short` compile for Hopper at all their sizes, and fit its shared memory."""

import pytest

from kernels.hstu_attention.triton.sizes import LaunchSizes, shared_kib
from kernels.hstu_attention.triton_short import halves, kernels
from kernels.hstu_attention.triton_short.sizes import HALVES, SIZES, ShortSizes
from tests.kernels.triton_compiler import HOPPER, shared_memory, triton_cache  # noqa: F401


@pytest.mark.parametrize("kernel", ["forward_halves", "backward_halves"])
def test_halves_fit(kernel):
    launch = HALVES.forward if kernel == "forward_halves" else HALVES.backward
    assert launch.block_q == HALVES.tile // 2
    check(getattr(halves, kernel), launch, HALVES.tile)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("tile", SIZES)
def test_sizes_fit(kernel, tile):
    forward, backward = (LaunchSizes(*sizes) for sizes in SIZES[tile])
    launch, function = forward, kernels.forward
    if kernel == "backward":
        whole = ShortSizes(forward, backward, tile).whole
        launch = backward
        function = kernels.backward if whole else kernels.backward_in_parts
    check(function, launch, tile)


def check(function, launch, tile):
    pointers = dict.fromkeys(("q", "k", "v", "g", "out", "dq", "dk", "dv"), "*bf16")
    pointers |= dict.fromkeys(("scale", "position_table", "time_table", "d_tables"), "*fp32")
    constants = {
        "T": 17024,
        "H": 2,
        "K": 50,
        "V": 50,
        "WK": 64,
        "WV": 64,
        "BQ": launch.block_q,
        "BK": launch.block_k,
        "TILES": 128,
        "PIECES": -(-tile // launch.block_q),
        "ALPHA": 0.125,
        "ROW_SCALE": True,
        "POSITIONS": 421,
        "BUCKETS": 129,
        "PRECISION": "tf32",
        "APPROXIMATE": True,
        "COPIES": 64,
    }
    found = shared_memory(function, constants, pointers, launch, HOPPER)
    assert found <= shared_kib(HOPPER) * 1024
