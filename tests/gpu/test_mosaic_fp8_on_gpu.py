"""`mosaic_fp8` on a Hopper GPU, beside float32 attention of its rounded operands and its inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hstu_attention import hstu_attention, make_plan, reference
from kernels.hstu_attention.mosaic_fp8 import attention as mosaic_fp8
from kernels.mask import AttentionMask
from tests.kernels.attention_contract import BATCHES, MASKS, Case


def distance(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def dequantized(operands, rows):
    q, k = (
        x.astype(jnp.float32) * s.T[:, :, None]
        for x, s in ((operands.q, operands.q_scale), (operands.k, operands.k_scale))
    )
    keys = np.argsort(
        np.arange(operands.v.shape[-1]).reshape(-1, 16)[:, mosaic_fp8.ORDER].reshape(-1)
    )
    v = operands.v.astype(jnp.float32)[:, :, keys] * operands.v_scale[:, None, None]
    return [x[:rows] for x in (q, k, v.transpose(2, 0, 1))]


def expected(key, mask, scale):
    """float32 attention of the rounded operands and of the inputs, on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        case = Case(*key)

        @jax.jit
        def run(q, k, v, scale):
            plan = make_plan(mask, case.offsets, case.rows, case.num_targets, case.num_contextual)
            rounded = dequantized(mosaic_fp8.quantize(q, k, v, plan), case.rows)
            real = (jnp.arange(case.rows) < case.real)[:, None, None]
            wide = [jnp.where(real, x.astype(jnp.float32), 0) for x in (q, k, v)]
            attend = functools.partial(
                reference.attention,
                plan=plan,
                alpha=0.3,
                scale=jnp.where(real[:, 0, 0], scale, 0),
                bias=None,
            )
            return [attend(*x) for x in (rounded, wide)]

        return run(case.q, case.k, case.v, jnp.asarray(scale, jnp.float32))


def check(case, mask, scale=1 / 64):
    got = jax.jit(functools.partial(case.run, mask=mask, scale=scale, implementation="mosaic_fp8"))(
        case.inputs()
    )
    assert got.dtype == case.q.dtype
    assert np.isfinite(np.asarray(got, np.float32)).all(), "NaN of padding came through"
    assert not np.asarray(got[case.real :], np.float32).any(), "padding rows are not 0"
    same_operands, exact = expected(case.key, mask, scale)
    if case.real:
        assert distance(got, same_operands) < 0.04, "beyond the rounding of the weights"
        assert distance(got, exact) < 0.1


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    check(Case(*BATCHES["mixed"], 2, 128, 128, "bfloat16"), MASKS[mask])


@pytest.mark.parametrize("batch", [b for b in BATCHES if b != "mixed"])
def test_batches(batch):
    check(Case(*BATCHES[batch], 1, 128, 128, "bfloat16"), MASKS["full rows"])


@pytest.mark.parametrize(("k_width", "v_width"), [(64, 64), (256, 256), (64, 128), (256, 64)])
def test_widths(k_width, v_width):
    check(Case(*BATCHES["one long"], 2, k_width, v_width, "float16"), MASKS["all"])


def test_scale_per_row():
    case = Case(*BATCHES["mixed"], 2, 64, 64, "bfloat16")
    check(case, MASKS["prefix"], case.row_scale())


def test_same_bits_on_a_second_run():
    case = Case(*BATCHES["one long"], 2, 128, 128, "bfloat16")
    first, second = (
        np.asarray(case.run(case.inputs(), implementation="mosaic_fp8"), np.float32)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_65536_rows():
    """Some rows in float64 on the host: sums of e4m3 products over 16384 keys stay precise."""
    rows, length, width, alpha, scale = 65536, 16384, 128, 128**-0.5, 1 / 16384
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (rows, 1, width)).astype(jnp.bfloat16) for key in keys
    )  # drawn in bfloat16 they would be few
    offsets = np.arange(0, rows + 1, length, dtype=np.int32)
    run = jax.jit(
        lambda *x: hstu_attention(
            *x, offsets, mask=AttentionMask(), alpha=alpha, scale=scale, implementation="mosaic_fp8"
        )
    )
    out = run(q, k, v)
    q, k, v = (np.asarray(x, np.float64)[:, 0] for x in (q, k, v))
    for at in (5, 5000, 16383, 16384 + 300, 40001, 65535):
        first = at // length * length
        score = alpha * k[first : at + 1] @ q[at]
        want = scale * (score / (1 + np.exp(-score))) @ v[first : at + 1]
        assert distance(out[at, 0], want) < 0.08
