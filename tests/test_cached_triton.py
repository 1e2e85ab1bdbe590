"""What of `triton` for cached keys a machine without GPU can check: what it refuses, how it shares the work, what it hands to its kernel.

The kernel is compiled and run by `make test-gpu`.
"""

import jax.numpy as jnp
import pytest
from test_cached_attention import Request

from kernels.cached_attention import triton
from kernels.hstu_attention import triton as whole
from kernels.mask import AttentionMask


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(whole, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(whole, "_check_installed", lambda: None)


def run(**options):
    return Request(**options).cached(AttentionMask(), implementation="triton")


def test_no_gpu():
    with pytest.raises(NotImplementedError, match="NVIDIA GPU.*'cpu'.*implementation='xla'"):
        run()


def test_no_bias(h100):
    with pytest.raises(NotImplementedError, match="no relative bias.*implementation='xla'"):
        run(bias=True)


def test_heads_too_wide(h100, monkeypatch):
    monkeypatch.setattr(whole, "widest", lambda capability: 4)
    with pytest.raises(NotImplementedError, match="1 to 4 here, got K = 8, V = 4"):
        run()


@pytest.mark.parametrize(
    ("rows", "keys", "shares"),
    [(64, 4096, 16), (64, 512, 2), (64, 100, 1), (1024, 4096, 4), (2048, 4096, 2), (4096, 4096, 1), (16384, 16384, 1), (1, 16384, 64)],
)
def test_few_rows_share_their_keys(rows, keys, shares):
    """With four heads and 64 x 64 tiles: about two programs for each processor, and four blocks of keys at least for each."""
    assert triton.splits(rows, keys, 4, whole.Tiling(64, 64, 4, 3)) == shares


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_handed_to_the_kernel(h100, monkeypatch, dtype):
    handed = {}

    def call_kernel(arrays, outs, programs, warps, stages, constants):
        handed.update(constants, arrays=arrays, outs=outs, programs=programs)
        return [jnp.ones(x.shape, x.dtype) for x in outs]

    monkeypatch.setattr(triton, "_call_kernel", call_kernel)
    monkeypatch.setattr(triton, "splits", lambda *_: 3)
    request = Request(dtype)
    out = request.cached(AttentionMask(), implementation="triton")
    rows, keys = int(request.target.sum()), int((~request.target).sum())
    assert [x.shape for x in handed["arrays"]] == [(rows, 2, 8), (keys, 2, 8), (keys, 2, 4), *[(rows,)] * 4]
    assert [(x.shape, x.dtype) for x in handed["outs"]] == [((3, rows, 2, 4), jnp.float32)]
    block = triton.tiling((9, 0), dtype, 8, 4).block_q
    assert handed["programs"] == -(-rows // block) * 2 * 3
    assert (handed["R"], handed["S"], handed["SPLITS"], handed["WK"], handed["APPROXIMATE"]) == (rows, keys, 3, 16, dtype == "bfloat16")
    assert out.dtype == dtype and out.shape == (rows, 2, 4)
