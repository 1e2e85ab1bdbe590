"""`triton` on a GPU: the contract, golden numbers, TF32, long buffers, wide and odd heads."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hstu_attention import hstu_attention
from kernels.mask import AttentionMask
from tests.kernels.attention_contract import (
    BATCHES,
    GRADIENTS,
    MASKS,
    AttentionContract,
    Case,
    expected,
    largest_error,
)

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "testdata" / "attention.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN if name.endswith("/options")})


class TestTriton(AttentionContract):
    implementation = "triton"
    widths = ((2, 8, 8), (1, 50, 50), (2, 25, 25), (1, 25, 50))
    repeatable_gradients = (
        False  # of the bias tables, added in memory; those of q, k, v are, see below
    )

    @pytest.mark.parametrize(
        "widths", [(2, 64, 64), (1, 128, 64), (1, 128, 128), (1, 1, 200), (1, 256, 256)]
    )
    def test_more_widths(self, widths):
        self.compare(self.case(widths=widths), MASKS["all"], self.dtype)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("width", [50, 64, 128, 256])
    def test_widths_in_16_bits(self, width, dtype):
        self.compare(Case(*BATCHES["mixed"], 2, width, width, dtype, None), MASKS["all"], dtype)

    def test_gradients_of_q_k_v_have_the_same_bits_on_a_second_run(self):
        case = self.case("one long", bias="both")
        first, second = (
            case.out_and_gradients(case.inputs(), mask=MASKS["full rows"], implementation="triton")
            for _ in range(2)
        )
        for name in ("d q", "d k", "d v"):
            np.testing.assert_array_equal(
                np.asarray(first[name]), np.asarray(second[name]), err_msg=name
            )

    @pytest.mark.parametrize(("precision", "allowed"), [("default", 4e-3), ("high", 2e-5)])
    def test_float32_products_follow_the_matmul_precision(self, precision, allowed):
        case = Case(*BATCHES["mixed"], 1, 50, 50, "float32", "both")
        want, _ = expected(case.key, MASKS["causal"], "float32", False)
        with jax.default_matmul_precision(precision):
            got = case.out_and_gradients(
                case.inputs(), mask=MASKS["causal"], implementation="triton"
            )
        for name, x in got.items():
            assert largest_error(x, want[name]) < allowed, name
        assert largest_error(got["out"], want["out"]) > 1e-7  # else the precision was not heeded


@pytest.mark.parametrize("name", CASES)
def test_golden_outputs_and_gradients(name):
    targets, contextual, window, full_rows = (int(x) for x in GOLDEN[f"{name}/options"])
    group = "context" if contextual else "plain"
    q, k, v, g = (jnp.asarray(GOLDEN[f"{group}/{x}"]) for x in "qkvg")
    counts = {
        "num_targets": jnp.asarray(GOLDEN[f"{group}/num_targets"]) if targets else None,
        "num_contextual": jnp.minimum(jnp.asarray(GOLDEN[f"{group}/lengths"]), contextual)
        if contextual
        else None,
    }
    mask = AttentionMask(window=window or None, full_rows=full_rows, context_sink=False)

    @jax.jit
    def run(q, k, v, g):
        def attend(q, k, v):
            options = {
                "mask": mask,
                "scale": 1 / int(GOLDEN["max_seq_len"]),
                "implementation": "triton",
                **counts,
            }
            return hstu_attention(
                q, k, v, GOLDEN[f"{group}/offsets"], alpha=float(GOLDEN["alpha"]), **options
            )

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(g)

    for what, got in zip(("out", "dq", "dk", "dv"), run(q, k, v, g), strict=True):
        assert largest_error(got, GOLDEN[f"{name}/{what}"]) < 3e-6, what


@pytest.mark.parametrize(
    "mask", [AttentionMask(), AttentionMask(window=256, full_rows=64)], ids=["causal", "semi-local"]
)
@pytest.mark.parametrize("width", [64, 128])
def test_65536_rows(mask, width):
    """Compilers have been wrong at sizes where small tests pass."""
    lengths = np.random.default_rng(0).multinomial(65000, np.ones(24) / 24)
    case = Case(tuple(int(n) for n in lengths), 536, 1, width, width, "bfloat16")
    want, got = (
        case.out_and_gradients(case.inputs(), mask=mask, implementation=name)
        for name in ("xla", "triton")
    )
    for name in ("out", *(f"d {x}" for x in GRADIENTS[:3])):
        assert largest_error(got[name], want[name]) < 2e-2, name
