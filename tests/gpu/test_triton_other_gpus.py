"""The Triton kernels compile for the kinds of GPU that CI does not compile for.

They fit the shared memory in every size of their heuristics.
"""

import pytest

from kernels.hstu_attention.triton import sizes as triton
from tests.kernels import test_cached_triton_compiles as cached
from tests.kernels import test_triton_compiles as whole
from tests.kernels.triton_compiler import OTHERS, triton_cache  # noqa: F401 - a fixture


@pytest.mark.parametrize("kernel", whole.KERNELS)
@pytest.mark.parametrize(
    ("capability", "dtype", "wide"), [(gpu, *case) for gpu in OTHERS for case in whole.cases(gpu)]
)
def test_sizes_fit(kernel, capability, dtype, wide):
    whole.check(
        kernel, dtype, wide, capability, triton.heuristic(capability, whole.spec(dtype, wide))
    )


@pytest.mark.parametrize("shares", [1, 4])
@pytest.mark.parametrize("dtype", cached.POINTERS)
@pytest.mark.parametrize(
    ("capability", "width"),
    [(gpu, n) for gpu in OTHERS for n in cached.WIDTHS if n <= triton.widest(gpu)],
)
def test_cached_sizes_fit(capability, width, dtype, shares):
    cached.check(dtype, capability, width, shares)
