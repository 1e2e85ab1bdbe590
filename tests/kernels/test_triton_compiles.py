"""Every kernel of `triton` compiles for Hopper and fits its shared memory, with and without bias.

Sizes are all of its heuristic and of the measured table. Needs Triton, but no GPU; for other GPUs:
tests/gpu/test_triton_other_gpus.py.
"""

import functools

import jax.numpy as jnp
import pytest

from kernels.hstu_attention import AttentionSpec, tuning
from kernels.hstu_attention.triton import kernels as triton_kernels
from kernels.hstu_attention.triton import sizes as triton
from tests.kernels.triton_compiler import HOPPER, shared_memory, triton_cache  # noqa: F401

DTYPES = {"float32": "*fp32", "bfloat16": "*bf16"}
KERNELS = {"forward": "forward", "backward_queries": "queries", "backward_keys": "keys"}
MEASURED = {
    (key.bytes, key.width, triton.from_table(sizes))
    for key, sizes in tuning.table().items()
    if key.implementation == "triton"
}


def cases(capability):
    """(dtype, width) of every size of the heuristic."""
    widest = triton.widest(capability)
    return [
        (name, wide)
        for name in DTYPES
        for size, wide in triton.SIZES
        if size == jnp.dtype(name).itemsize and wide <= widest
    ]


def spec(dtype, width):
    return AttentionSpec(dtype, 2, width, width)


def check(kernel, dtype, width, capability, sizes, *, row_scale=False, precision="tf32", both=True):
    """both: 16-bit kernels with a bias, too, which has sizes of its own."""
    variants = [(sizes, False)] if dtype == "bfloat16" else []
    if both or not variants:
        variants.append((triton.with_bias(sizes, spec(dtype, width)), True))
    for chosen, bias in variants:
        launch = getattr(chosen, KERNELS[kernel])
        found = memory(kernel, dtype, width, capability, launch, bias, row_scale, precision)
        assert found <= triton.shared_kib(capability) * 1024


@functools.cache  # the table has sizes of the heuristic, too
def memory(kernel, dtype, width, capability, launch, bias, row_scale, precision):
    pointers = dict.fromkeys(("q", "k", "v", "g", "out", "dq", "dk", "dv"), DTYPES[dtype])
    pointers |= dict.fromkeys(("scale", "position_table", "time_table", "d_tables"), "*fp32")
    constants = {
        "T": 17024,
        "H": 2,
        "K": width,
        "V": width,
        "WK": triton.padded(width),
        "WV": triton.padded(width),
        "BQ": launch.block_q,
        "BK": launch.block_k,
        "ALPHA": 0.125,
        "ROW_SCALE": row_scale,
        "ORDERED": True,
        "POSITIONS": 421 * bias,
        "BUCKETS": 129 * bias,
        "PRECISION": precision,
        "APPROXIMATE": dtype == "bfloat16",
        "COPIES": 64,
    }
    return shared_memory(getattr(triton_kernels, kernel), constants, pointers, launch, capability)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "wide"), cases(HOPPER))
def test_sizes_fit(kernel, dtype, wide):
    check(kernel, dtype, wide, HOPPER, triton.heuristic(HOPPER, spec(dtype, wide)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("size", "width", "sizes"), sorted(MEASURED))
def test_measured_sizes_fit(kernel, size, width, sizes):
    check(kernel, {2: "bfloat16", 4: "float32"}[size], width, HOPPER, sizes, both=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
def test_other_precisions_fit(kernel, precision):
    check(
        kernel,
        "float32",
        50,
        HOPPER,
        triton.heuristic(HOPPER, spec("float32", 50)),
        row_scale=True,
        precision=precision,
    )
