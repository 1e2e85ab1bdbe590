"""`mosaic_fp8` without a GPU: its kernel in the interpreter, its lowering, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import device
from kernels.hstu_attention import hstu_attention, make_plan, reference
from kernels.hstu_attention.mosaic import schedule
from kernels.hstu_attention.mosaic.padding import rounded_up
from kernels.hstu_attention.mosaic_fp8 import attention as mosaic_fp8
from kernels.hstu_attention.mosaic_fp8 import forward as kernel
from kernels.mask import AttentionMask
from tests.kernels import mosaic_interpreter
from tests.kernels.mosaic_interpreter import interpreted

LENGTHS = np.array([0, 1, 97, 40, 0, 150])
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
ROWS = int(OFFSETS[-1]) + 9


def inputs(k_width, v_width, heads=2, rows=ROWS, real=OFFSETS[-1], dtype="bfloat16"):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(rows, heads, width) for width in (k_width, k_width, v_width)]
    # one row thirty times another: what a scale for each row is for
    size = jnp.exp(jax.random.uniform(jax.random.key(1), (rows, heads, 1), minval=-3, maxval=0.5))
    return [
        (jax.random.normal(key, s) * size).astype(dtype).at[real:].set(jnp.nan)
        for key, s in zip(keys, shapes, strict=True)
    ]


def dequantized(operands, rows):
    q, k = (
        np.asarray(x, np.float32) * np.asarray(s).T[..., None]
        for x, s in ((operands.q, operands.q_scale), (operands.k, operands.k_scale))
    )
    v = np.asarray(operands.v, np.float32)
    keys = np.argsort(np.arange(v.shape[-1]).reshape(-1, 16)[:, mosaic_fp8.ORDER].reshape(-1))
    v = (v[..., keys] * np.asarray(operands.v_scale)[:, None, None]).transpose(2, 0, 1)
    return [jnp.asarray(x[:rows]) for x in (q, k, v)]


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_operands_are_within_rounding_of_the_inputs():
    plan = make_plan(AttentionMask(), OFFSETS, ROWS)
    q, k, v = inputs(64, 128)
    operands = mosaic_fp8.quantize(q, k, v, plan)
    assert operands.q.shape[0] == operands.v.shape[2] == rounded_up(ROWS)
    for got, want in zip(dequantized(operands, ROWS), (q, k, v), strict=True):
        want = jnp.where((jnp.arange(ROWS) < OFFSETS[-1])[:, None, None], want, 0)
        assert error(got, want) < 0.03
    assert not np.asarray(operands.v, np.float32)[..., ROWS:].any()


@pytest.mark.parametrize(
    "mask",
    [AttentionMask(), AttentionMask(window=60, full_rows=20, prefix=10)],
    ids=["causal", "semi-local"],
)
def test_kernel(mask, monkeypatch):
    """Against float32 attention of the same rounded operands.

    What is left is the rounding of the weights.
    """
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.01, 1, ROWS).astype(np.float32)
    scale[OFFSETS[-1] :] = np.nan
    scale = jnp.asarray(scale)
    plan = make_plan(mask, OFFSETS, ROWS, np.minimum(LENGTHS // 4, 9), np.minimum(LENGTHS // 5, 3))
    operands = mosaic_fp8.quantize(*inputs(64, 128), plan)
    want = reference.attention(
        *dequantized(operands, ROWS), plan, alpha=0.1, scale=scale, bias=None
    )
    monkeypatch.setattr(schedule, "WORKERS", 2)
    monkeypatch.setattr(mosaic_interpreter, "MODULES", (*mosaic_interpreter.MODULES, kernel))

    def as_operand(p):  # `ORDER`, without an array that kernels may not hold
        return p.reshape(64, -1, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(p.shape)

    monkeypatch.setattr(kernel, "as_operand", as_operand)
    forward = jax.jit(lambda *of_batch: mosaic_fp8.forward(*of_batch, 0.1, jnp.bfloat16))
    with interpreted(monkeypatch):
        got = forward(operands, plan, scale)
    assert np.isfinite(np.asarray(got, np.float32)).all()
    assert not np.asarray(got[OFFSETS[-1] :], np.float32).any()
    assert (
        error(got[:ROWS], jnp.where((jnp.arange(ROWS) < OFFSETS[-1])[:, None, None], want, 0))
        < 0.03
    )


@pytest.mark.parametrize(("k_width", "v_width"), [(64, 64), (128, 128), (256, 256), (64, 256)])
def test_lowers_to_cuda(k_width, v_width):
    def run(q, k, v, offsets):
        plan = make_plan(AttentionMask(window=100, full_rows=50), offsets, 1500)
        return mosaic_fp8.attention(q, k, v, plan, alpha=0.1, scale=0.1, bias=None)

    shapes = [
        jax.ShapeDtypeStruct((1500, 2, width), jnp.bfloat16)
        for width in (k_width, k_width, v_width)
    ]
    offsets = jax.ShapeDtypeStruct((5,), jnp.int32)
    text = jax.jit(run).trace(*shapes, offsets).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 2  # the kernel, and the sums of split tiles
    assert "f8E4M3FN" in text


def test_no_gradient(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H200", (9, 0)))
    q, k, v = inputs(64, 64, real=ROWS)

    def total(q):
        return hstu_attention(
            q, k, v, OFFSETS, alpha=0.1, scale=1.0, implementation="mosaic_fp8"
        ).sum()

    with pytest.raises(NotImplementedError, match="no gradient.*implementation='mosaic'"):
        jax.grad(total)(q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "mosaic_fp8 needs a Hopper GPU.*'cpu'.*'xla'"),
        ({"k_width": 32}, "mosaic_fp8 takes head widths.*K = 32"),
        ({"dtype": "float32"}, "float32"),
    ],
)
def test_refuses(options, message):
    q, k, v = inputs(**{"k_width": 64, "v_width": 64, **options})
    with pytest.raises(NotImplementedError, match=message):
        hstu_attention(q, k, v, OFFSETS, alpha=0.1, scale=1.0, implementation="mosaic_fp8")
