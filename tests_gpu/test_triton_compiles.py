"""Every kernel of `triton`, in every size of its table, compiles for each kind of GPU and fits its shared memory. Needs Triton, but no GPU."""

import jax.numpy as jnp
import pytest
import triton as triton_compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.hstu_attention import triton, triton_kernels

SHARED_KIB = {80: 163, 86: 99, 90: 227}
DTYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
KERNELS = {"forward": "forward", "backward_queries": "queries", "backward_keys": "keys"}
CASES = [
    (dtype, wide, capability)
    for dtype in DTYPES
    for size, wide in triton.TILINGS
    for capability in SHARED_KIB
    if size == jnp.dtype(dtype).itemsize and (wide <= triton.WIDEST_SMALL or capability != 86)
]


def compile_kernel(kernel, dtype, width, capability, *, bias, row_scale=False, precision="tf32"):
    function, tiling = getattr(triton_kernels, kernel), getattr(triton.tilings(dtype, width, width), KERNELS[kernel])
    constants = {
        "T": 17024, "H": 2, "K": width, "V": width, "WK": triton._padded(width), "WV": triton._padded(width), "BQ": tiling.block_q,
        "BK": tiling.block_k, "ALPHA": 0.125, "ROW_SCALE": row_scale, "ORDERED": True, "POSITIONS": 421 * bias, "BUCKETS": 129 * bias,
        "PRECISION": precision, "APPROXIMATE": dtype == "bfloat16", "COPIES": 64,
    }  # fmt: skip
    types = dict.fromkeys(("q", "k", "v", "g", "out", "dq", "dk", "dv"), DTYPES[dtype])
    types |= dict.fromkeys(("scale", "position_table", "time_table", "d_tables"), "*fp32")
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in function.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name not in constants}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    return triton_compiler.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "wide", "capability"), CASES)
def test_sizes_fit(kernel, dtype, wide, capability):
    for bias in (False, True):
        compiled = compile_kernel(kernel, dtype, wide, capability, bias=bias)
        assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
def test_other_precisions_compile(kernel, precision):
    for width in (25, 50):
        compiled = compile_kernel(kernel, "float32", width, 90, bias=True, row_scale=True, precision=precision)
        assert compiled.metadata.shared <= SHARED_KIB[90] * 1024
