"""The Triton kernel for cached keys on a GPU, against the dense reference and against `xla`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.cached_attention import cached_attention
from kernels.cached_attention.triton import attention as triton
from kernels.mask import AttentionMask, KeyIntervals
from tests.kernels.attention_contract import MASKS, ROUND_OFF, keys_at
from tests.kernels.test_cached_attention import Request


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shares", [1, 4, 8])
def test_targets_against_the_keys_of_their_history(monkeypatch, mask, dtype, shares):
    monkeypatch.setattr(triton, "key_shares", lambda *_: shares)
    exact, request = np.asarray(Request().whole(MASKS[mask])), Request(dtype)
    with dispatch.record() as choices:
        got = request.cached(MASKS[mask], implementation="triton")
    assert [choice.implementation for choice in choices] == ["triton"]
    got, plain = np.asarray(got, np.float32), np.asarray(request.whole(MASKS[mask]), np.float32)
    error, allowed = (np.abs(x - exact).max() / np.abs(exact).max() for x in (got, plain))
    assert error <= 2 * allowed + ROUND_OFF[dtype]


@pytest.mark.parametrize("width", [25, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_long_histories(width, rows):
    """Rows of the middle of three users against 3,001 keys, bfloat16, beside `xla` in float32."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32))  # noqa: E731
    q, k, v = draw(rows, 2, width), draw(4500, 2, width), draw(4500, 2, width)
    start, length = (jnp.full(rows, x, jnp.int32) for x in (700, 3001))
    options = dict(alpha=width**-0.5, scale=1 / 3001)
    for mask in (AttentionMask(), AttentionMask(window=256), AttentionMask(window=100, prefix=70)):
        keys: KeyIntervals = keys_at(mask, start, length, jnp.zeros_like(length), length)
        want = np.asarray(cached_attention(q, k, v, keys, implementation="xla", **options))
        half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
        got = np.asarray(
            cached_attention(*half, keys, implementation="triton", **options), np.float32
        )
        again = np.asarray(
            cached_attention(*half, keys, implementation="triton", **options), np.float32
        )
        np.testing.assert_array_equal(got, again)
        assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()


def test_calls_may_be_recorded_in_cuda_graphs():
    """They go through the one handler of jaxlib that XLA records, and not through the older one."""
    request = Request("bfloat16")
    lowered = (
        jax.jit(lambda: request.cached(MASKS["causal"], implementation="triton")).lower().as_text()
    )
    assert "triton_kernel_call_ffi" in lowered and "@triton_kernel_call(" not in lowered
