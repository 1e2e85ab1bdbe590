"""`short` on a GPU: the attention contract, widths and dtypes, the same bits on a second run."""

import numpy as np
import pytest

from tests.kernels.attention_contract import BATCHES, MASKS, AttentionContract, Case


class TestShort(AttentionContract):
    implementation = "short"
    dtypes = ("bfloat16", "float16")
    widths = ((2, 8, 8), (1, 50, 50), (2, 25, 25), (1, 64, 32))
    longest = 128  # without a bias
    repeatable_gradients = (
        False  # of the bias tables, added in memory; those of q, k, v are, see below
    )

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("width", [50, 64])
    @pytest.mark.parametrize("lengths", [(100, 0, 128, 3), (256, 97, 130), (30, 7, 64, 1, 50)])
    def test_16_bits(self, lengths, width, dtype):
        case = Case(lengths, 300, 2, width, width, dtype, "both")
        self.compare(case, MASKS["all"], dtype)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("widths", [(64, 64), (50, 50), (25, 32)])
    @pytest.mark.parametrize("rescale", [False, True])
    def test_halves(self, widths, rescale, dtype):
        case = Case((100, 3, 0, 128, 64, 65, 1), 300, 2, *widths, dtype)
        self.compare(case, MASKS["causal"], dtype, rescale, counts=False)

    @pytest.mark.parametrize("batch", ["mixed", "one sequence fills T"])
    def test_gradients_of_q_k_v_have_the_same_bits_on_a_second_run(self, batch):
        case = Case(*BATCHES[batch], 2, 64, 64, "bfloat16", "both")
        first, second = (
            case.out_and_gradients(case.inputs(), mask=MASKS["causal"], implementation="short")
            for _ in range(2)
        )
        for name in ("out", "d q", "d k", "d v"):
            np.testing.assert_array_equal(
                np.asarray(first[name], np.float32),
                np.asarray(second[name], np.float32),
                err_msg=name,
            )
