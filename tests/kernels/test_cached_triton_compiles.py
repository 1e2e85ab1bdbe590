"""The Triton kernel for cached keys compiles for Hopper and fits its shared memory, in every size.

Needs Triton, but no GPU.
"""

import pytest

from kernels.cached_attention.triton import attention as triton
from kernels.cached_attention.triton import kernels as triton_kernels
from kernels.hstu_attention import AttentionSpec
from kernels.hstu_attention.triton import sizes as triton_sizes
from tests.kernels.triton_compiler import HOPPER, shared_memory, triton_cache  # noqa: F401

WIDTHS = (25, 64, 128, 256)
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16"}


def check(dtype, capability, width, shares):
    sizes = triton_sizes.heuristic(capability, AttentionSpec(dtype, 4, width, width)).forward
    constants = {
        "R": 2048,
        "S": 4096,
        "H": 4,
        "K": width,
        "V": width,
        "WK": triton_sizes.padded(width),
        "WV": triton_sizes.padded(width),
        "BR": sizes.block_q,
        "BK": sizes.block_k,
        "SPLITS": shares,
        "OUTS": shares + (shares >= triton.SHORT_SHARES),
        "OWN": True,
        "ALPHA": 0.1,
        "SCALE": 0.1,
        "PRECISION": "tf32",
        "APPROXIMATE": dtype == "bfloat16",
    }
    pointers = dict.fromkeys(
        ("q", "k", "v", "own_k", "own_v", *(("out",) if shares == 1 else ())), POINTERS[dtype]
    )
    pointers = {"out": "*fp32"} | pointers
    assert (
        shared_memory(triton_kernels.forward, constants, pointers, sizes, capability)
        <= triton_sizes.shared_kib(capability) * 1024
    )


@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shares", [1, 8])
def test_sizes_fit(dtype, width, shares):
    check(dtype, HOPPER, width, shares)
