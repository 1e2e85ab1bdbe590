"""Every kernel of `triton`, in every size of its tables, with bias, compiles for each kind of GPU and fits its shared memory. Needs Triton, but no GPU."""

import jax.numpy as jnp
import pytest
import triton as triton_compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.hstu_attention import triton, triton_kernels

CAPABILITIES = ((8, 0), (8, 6), (9, 0))
DTYPES = {"float32": "*fp32", "bfloat16": "*bf16"}
KERNELS = {"forward": "forward", "backward_queries": "queries", "backward_keys": "keys"}
CASES = [
    (dtype, wide, capability)
    for dtype in DTYPES
    for size, wide in triton.TILINGS
    for capability in CAPABILITIES
    if size == jnp.dtype(dtype).itemsize and wide <= triton.widest(capability)
]


def shared_memory(kernel, dtype, width, capability, *, row_scale=False, precision="tf32"):
    function, tiling = getattr(triton_kernels, kernel), getattr(triton.tilings(capability, dtype, width, width), KERNELS[kernel])
    constants = {
        "T": 17024, "H": 2, "K": width, "V": width, "WK": triton._padded(width), "WV": triton._padded(width), "BQ": tiling.block_q,
        "BK": tiling.block_k, "ALPHA": 0.125, "ROW_SCALE": row_scale, "ORDERED": True, "POSITIONS": 421, "BUCKETS": 129,
        "PRECISION": precision, "APPROXIMATE": dtype == "bfloat16", "COPIES": 64,
    }  # fmt: skip
    types = dict.fromkeys(("q", "k", "v", "g", "out", "dq", "dk", "dv"), DTYPES[dtype])
    types |= dict.fromkeys(("scale", "position_table", "time_table", "d_tables"), "*fp32")
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in function.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name not in constants}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton_compiler.compile(source, target=target, options=options).metadata.shared


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "wide", "capability"), CASES)
def test_sizes_fit(kernel, dtype, wide, capability):
    assert shared_memory(kernel, dtype, wide, capability) <= triton.shared_kib(capability) * 1024


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
def test_other_precisions_fit(kernel, precision):
    for width in (25, 50):
        used = shared_memory(kernel, "float32", width, (9, 0), row_scale=True, precision=precision)
        assert used <= triton.shared_kib((9, 0)) * 1024
