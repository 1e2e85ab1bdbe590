"""Every kernel of `triton`, in every size of its heuristic and of the measured table, with bias, compiles for each kind of GPU that takes it and fits its
shared memory. Needs Triton, but no GPU.
"""

import jax.numpy as jnp
import pytest
import triton as triton_compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.hstu_attention import triton, triton_kernels, tuning

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
MEASURED = [key for key in tuning.table() if key.implementation == "triton"]


def shared_memory(kernel, dtype, width, capability, tilings, *, row_scale=False, precision="tf32", bias=True):
    function, tiling = getattr(triton_kernels, kernel), getattr(tilings, KERNELS[kernel])
    constants = {
        "T": 17024, "H": 2, "K": width, "V": width, "WK": triton.padded(width), "WV": triton.padded(width), "BQ": tiling.block_q,
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
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton_compiler.compile(source, target=target, options=options).metadata.shared


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """jax-triton, once imported, leaves Triton without a place for what it compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(kernel, dtype, width, capability, sizes, **options):
    limit = triton.shared_kib(capability) * 1024
    assert shared_memory(kernel, dtype, width, capability, triton.with_bias(sizes, dtype), bias=True, **options) <= limit
    if dtype == "bfloat16":  # in float32 the bias only adds
        assert shared_memory(kernel, dtype, width, capability, sizes, bias=False, **options) <= limit


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "wide", "capability"), CASES)
def test_sizes_fit(kernel, dtype, wide, capability):
    check(kernel, dtype, wide, capability, triton.heuristic(capability, dtype, wide, wide))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("key", MEASURED, ids=lambda key: "-".join(str(x) for x in key[2:]))
def test_measured_sizes_fit(kernel, key):
    check(kernel, {2: "bfloat16", 4: "float32"}[key.bytes], key.width, (9, 0), triton.from_table(tuning.table()[key]))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
def test_other_precisions_fit(kernel, precision):
    for width in (25, 50):
        check(kernel, "float32", width, (9, 0), triton.heuristic((9, 0), "float32", width, width), row_scale=True, precision=precision)
