"""Compiles Triton kernels for a kind of GPU that need not be here."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

OTHERS = ((8, 0), (8, 6))  # of `make test-gpu`; CI compiles for Hopper
HOPPER = (9, 0)


@pytest.fixture(autouse=True)
def triton_cache(monkeypatch, tmp_path):
    """jax-triton, once imported, leaves Triton without a place for what it compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def shared_memory(function, constants, pointers, tiling, capability):
    """Bytes of shared memory that a kernel takes, compiled for a compute capability.

    Args:
      constants: of these, those that the kernel has.
      pointers: types of its pointers; other arguments are pointers to int32.
    """
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "*i32")
        for name in function.arg_names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name not in constants
    }
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(
        source, target=target, options={"num_warps": tiling.warps, "num_stages": tiling.stages}
    ).metadata.shared
