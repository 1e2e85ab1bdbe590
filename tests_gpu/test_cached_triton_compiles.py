"""The Triton kernel for cached keys, in every size of its table, compiles for each kind of GPU that takes it and fits its shared memory. Needs Triton, but no
GPU.
"""

import pytest
import triton as triton_compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.cached_attention import triton, triton_kernels
from kernels.hstu_attention import triton as whole

CASES = [
    (width, capability) for width in (25, 64, 128, 256) for capability in ((8, 0), (8, 6), (9, 0)) if width <= whole.widest(capability)
]
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """jax-triton, once imported, leaves Triton without a place for what it compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize(("width", "capability"), CASES)
@pytest.mark.parametrize("shares", [1, 4])
def test_sizes_fit(dtype, capability, width, shares):
    sizes = triton.tiling(capability, dtype, width, width)
    constants = dict(R=2048, S=4096, H=4, K=width, V=width, WK=whole.padded(width), WV=whole.padded(width), BR=sizes.block_q,
                     BK=sizes.block_k, SPLITS=shares, ALPHA=0.1, PRECISION="tf32", APPROXIMATE=dtype == "bfloat16")  # fmt: skip
    function = triton_kernels.forward
    types = dict.fromkeys(("q", "k", "v"), POINTERS[dtype]) | {"out": "*fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in function.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name not in constants}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    compiled = triton_compiler.compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=options)
    assert compiled.metadata.shared <= whole.shared_kib(capability) * 1024
