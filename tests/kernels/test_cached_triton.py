"""`triton` for cached keys, as far as a machine without a GPU can check it.

What it refuses, how it shares the work, and what it hands to its kernel; `make test-gpu` runs that.
"""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import device, triton_call
from kernels.cached_attention.triton import attention as triton
from kernels.hstu_attention import AttentionSpec
from kernels.hstu_attention.triton import sizes
from kernels.hstu_attention.triton.sizes import LaunchSizes
from kernels.mask import AttentionMask, KeyIntervals
from tests.kernels.test_cached_attention import Request


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H100", (9, 0)))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "jax_triton" or find(name, *rest)
    )


def run(**options):
    return Request(**options).cached(AttentionMask(), implementation="triton")


def test_no_gpu():
    with pytest.raises(NotImplementedError, match="NVIDIA GPU.*'cpu'.*implementation='xla'"):
        run()


def test_no_bias(h100):
    with pytest.raises(NotImplementedError, match="no relative bias.*implementation='xla'"):
        run(bias=True)


def test_heads_too_wide(h100, monkeypatch):
    monkeypatch.setattr(sizes, "widest", lambda capability: 4)
    with pytest.raises(NotImplementedError, match="1 to 4 here, got K = 8, V = 4"):
        run()


@pytest.mark.parametrize(
    ("rows", "keys", "shares"),
    [
        (64, 4096, 16),
        (64, 512, 2),
        (64, 100, 1),
        (1024, 4096, 4),
        (2048, 4096, 2),
        (4096, 4096, 1),
        (16384, 16384, 1),
        (1, 16384, 64),
    ],
)
def test_few_rows_share_their_keys(rows, keys, shares):
    """With four heads and 64 x 64 tiles: about two programs for each processor.

    Each has four blocks of keys at least.
    """
    assert triton.key_shares(rows, keys, 4, LaunchSizes(64, 64, 4, 3)) == shares


@pytest.mark.parametrize(
    ("dtype", "shares", "outs"),
    [("float32", 1, 1), ("bfloat16", 1, 1), ("float32", 3, 3), ("bfloat16", 8, 9)],
)
def test_what_is_handed_to_the_kernel(h100, monkeypatch, dtype, shares, outs):
    handed = {}

    def launch(kernel, arrays, outs, *, programs, warps, stages, constants):
        handed.update(constants, arrays=arrays, outs=outs, programs=programs)
        return [jnp.ones(x.shape, x.dtype) for x in outs]

    monkeypatch.setattr(triton_call, "launch", launch)
    monkeypatch.setattr(triton, "key_shares", lambda *_: shares)
    request = Request(dtype)
    out = request.cached(AttentionMask(), implementation="triton")
    rows, keys = int(request.target.sum()), int((~request.target).sum())
    block = triton.find_sizes(AttentionSpec(dtype, 2, 8, 4)).block_q
    assert [x.shape for x in handed["arrays"]] == [
        (rows, 2, 8),
        (keys, 2, 8),
        (keys, 2, 4),
        (rows, 2, 8),
        (rows, 2, 4),
        (-(-rows // block), 6),
        *[(rows,)] * 4,
    ]
    assert [(x.shape, x.dtype) for x in handed["outs"]] == [
        ((outs, rows, 2, 4), dtype if outs == 1 else jnp.float32)
    ]
    assert handed["programs"] == -(-rows // block) * 2 * outs
    assert (handed["R"], handed["S"], handed["SPLITS"], handed["OUTS"], handed["WK"]) == (
        rows,
        keys,
        shares,
        outs,
        16,
    )
    assert (handed["OWN"], handed["SCALE"], handed["APPROXIMATE"]) == (
        True,
        1 / 64,
        dtype == "bfloat16",
    )
    assert out.dtype == dtype and out.shape == (rows, 2, 4)


@pytest.mark.parametrize("seed", range(20))
def test_blocks_hold_what_rows_see(seed):
    """Every key that a row of a tile sees lies in the tile's blocks, in one range.

    All rows of the tile see the whole of the blocks that are called full.
    """
    rng = np.random.default_rng(seed)
    rows, size, num_keys = 23, LaunchSizes(8, 4, 4, 1), 50
    bounds = [np.sort(rng.integers(0, num_keys + 1, (rows, 2)), axis=1) for _ in range(2)]
    if seed % 2:  # one user: far intervals before near ones
        bounds[0] //= 3
        bounds[1] = np.minimum(bounds[1] // 2 + 25, num_keys)
    bounds[0][rng.random(rows) < 0.3] = 0
    keys = KeyIntervals(*(jnp.asarray(x, jnp.int32) for bound in bounds for x in bound.T))
    found = np.stack(triton.blocks_of(keys, size), axis=1)
    assert len(found) == 3
    for tile, (first0, end0, first1, end1, full_first, full_end) in enumerate(found):
        assert (
            first0 <= end0 <= first1 <= full_first <= full_end <= end1
            or first0 == end0
            and first1 <= full_first <= full_end <= end1
        )
        walked = [*range(first0, end0), *range(first1, end1)]
        assert len(set(walked)) == len(walked)
        for row in range(8 * tile, min(8 * tile + 8, rows)):
            seen = {key for bound in bounds for key in range(*bound[row])}
            assert seen <= {key for block in walked for key in range(4 * block, 4 * block + 4)}
            assert {
                key
                for block in range(full_first, full_end)
                for key in range(4 * block, 4 * block + 4)
            } <= set(range(*bounds[1][row]))
