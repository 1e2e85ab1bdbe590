"""`triton` of the softmax losses on a GPU: the contract, wide rows, TF32, what it refuses."""

import jax
import numpy as np
import pytest

from kernels.full_softmax import full_softmax
from kernels.sampled_softmax import Negatives, sampled_softmax
from tests.kernels.softmax_contract import FullContract, Rows, SampledContract, extreme


class Accurate:
    """Beyond the contract: `triton` never takes the difference of a share and 1."""

    def test_small_slopes_are_accurate(self, dtype):
        rows = extreme(1, dtype)
        rows.q /= 2  # scores of 40
        got = rows.values(self.loss(rows, implementation="triton"))
        slope = 3 * np.exp(-40.0)  # of each other item; the positive's is -4 of them
        e = np.asarray(rows.e, np.float64)
        number = np.asarray(rows.positive)
        want = slope * (e[1:].sum(0)[None] - 5 * e[number])
        size = np.abs(want).max()
        np.testing.assert_allclose(np.asarray(got["d q"], np.float64), want, atol=0.01 * size)
        own = np.asarray(got["d e"], np.float64)[1:] @ np.eye(16)[:, 1:6]
        q = 5.0
        per_item = np.bincount(number, minlength=6)[1:]
        expected = slope * q * (per_item[None, :] - 5 * np.diag(per_item))
        np.testing.assert_allclose(own, expected, atol=0.01 * np.abs(expected).max())


class TestFull(Accurate, FullContract):
    implementation = "triton"

    @pytest.mark.parametrize("width", [1, 64, 128])
    def test_widths(self, width, dtype):
        if (width, dtype) == (128, "float32"):
            width = 33
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
        rows = Rows(8, 5, 65, 1, "float32")
        inputs = (rows.q, rows.e, rows.positive, rows.weight)
        with pytest.raises(NotImplementedError, match="D = 65.*implementation='xla'"):
            full_softmax(*inputs, implementation="triton")


class TestSampled(Accurate, SampledContract):
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
