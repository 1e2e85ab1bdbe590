"""`triton` of `layer_norm` and `gate` on a GPU: the contract, more widths, long buffers."""

import numpy as np
import pytest

from tests.kernels.attention_contract import largest_error
from tests.kernels.row_contract import FORMS, RowContract, Rows


class TestTriton(RowContract):
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")
    widths = (50, 128)

    @pytest.mark.parametrize("width", [1, 16, 100, 512, 1024, 8192])
    def test_more_widths(self, width):
        case = Rows(70, width, "float32", FORMS[2])
        want = case.results("reference")
        for name, value in case.results("triton").items():
            assert largest_error(value, want[name]) <= 2e-5, name

    def test_many_rows(self):
        """More blocks than programs of a backward: each sums over several."""
        case = Rows(70_000, 64, "float32", FORMS[0])
        want = case.results("xla")
        for name, value in case.results("triton").items():
            assert np.isfinite(value).all()
            assert largest_error(value, want[name]) <= 1e-4, name
