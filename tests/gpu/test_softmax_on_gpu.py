"""`triton` of the softmax losses on a GPU: the contract, wide rows, TF32, what it refuses."""

import jax
import numpy as np
import pytest

from kernels.full_softmax import full_softmax
from kernels.sampled_softmax import Negatives, sampled_softmax
from tests.kernels.softmax_contract import FullContract, Rows, SampledContract


class TestFull(FullContract):
    implementation = "triton"

    @pytest.mark.parametrize("width", [64, 65, 256])
    def test_widths(self, width, dtype):
        self.check(Rows(300, 400, width, 1, dtype), dtype)

    def test_float32_products_follow_the_matmul_precision(self):
        rows = Rows(200, 300, 50, 1, "float32")
        want = rows.values(self.loss(rows, implementation="reference"))

        def loss(*args):
            with jax.default_matmul_precision("tensorfloat32"):
                return self.loss(rows, implementation="triton")(*args)

        got = rows.values(loss)
        error = np.abs(got["loss_T"] - want["loss_T"]).max()
        assert 1e-6 < error < 1e-2

    def test_too_wide(self):
        rows = Rows(8, 5, 2000, 1, "float32")
        with pytest.raises(NotImplementedError, match="D = 2000.*implementation='xla'"):
            full_softmax(rows.q, rows.e, rows.positive, rows.weight, implementation="triton")


class TestSampled(SampledContract):
    implementation = "triton"

    @pytest.mark.parametrize("width", [1, 64, 512, 1000])
    def test_widths(self, width, dtype):
        self.check(Rows(100, 70000 if width == 1 else 90, width, 40, dtype), dtype)

    def test_what_it_refuses(self):
        rows = Rows(8, 5, 2000, 3, "float32")
        inputs = (rows.q, rows.e, rows.positive, rows.weight)
        with pytest.raises(NotImplementedError, match="D = 2000.*implementation='xla'"):
            sampled_softmax(*inputs, rows.negative, implementation="triton")
        shared = Negatives(rows.negative, 3, lambda negative_CR, _: negative_CR, rows_per_draw=4)
        with pytest.raises(NotImplementedError, match="4 rows share"):
            sampled_softmax(*inputs, shared, implementation="triton")
