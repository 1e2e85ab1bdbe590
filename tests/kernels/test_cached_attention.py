"""Attention to a cache: the last rows of every sequence against its keys.

They get what the whole batch gives, for every mask; and bad input is named.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.cached_attention import api, cached_attention, xla
from kernels.hstu_attention import RelativeBias, hstu_attention
from kernels.mask import AttentionMask, KeyIntervals
from tests.kernels.attention_contract import MASKS, ROUND_OFF, keys_at

HEADS, K, V, N = 2, 8, 4, 64
# (contextual, history, targets) of each sequence
BATCH = ((2, 60, 5), (0, 0, 3), (1, 0, 0), (3, 7, 1), (0, 40, 0), (0, 31, 30))


class Request:
    """A batch of sequences, and the same with its targets taken away from its keys."""

    def __init__(self, dtype="float32", bias=False, seed=0):
        rng = np.random.default_rng(seed)
        self.counts = np.array(BATCH, np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(self.counts.sum(1))]).astype(np.int32)
        rows = int(self.offsets[-1])

        def draw(*shape):
            return jnp.asarray(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)

        self.q, self.k, self.v = draw(rows, HEADS, K), draw(rows, HEADS, K), draw(rows, HEADS, V)
        self.bias = None
        if bias:
            times = np.cumsum(np.exp(rng.uniform(0, 12, rows))).astype(np.int32)
            # a target asks at its own time
            self.bias = RelativeBias(
                draw(2 * N - 1), draw(129), jnp.asarray(times), jnp.asarray(times)
            )
        segment = np.repeat(np.arange(len(BATCH)), self.counts.sum(1))
        position = np.arange(rows) - self.offsets[segment]
        end = self.counts[:, :2].sum(1)
        self.target = position >= end[segment]
        self.key_offsets = np.concatenate([[0], np.cumsum(end)]).astype(np.int32)
        self.user, self.position = segment[self.target], position[self.target]

    def whole(self, mask):
        return hstu_attention(
            self.q,
            self.k,
            self.v,
            self.offsets,
            mask=mask,
            num_targets=self.counts[:, 2],
            num_contextual=self.counts[:, 0],
            alpha=0.3,
            scale=1 / N,
            bias=self.bias,
            implementation="reference",
        )[self.target]

    def cached(self, mask, **options):
        start = self.key_offsets[self.user]
        keys = keys_at(
            mask, *(jnp.asarray(x) for x in (start, self.position, *self.counts[self.user, :2].T))
        )
        bias = self.bias
        if bias is not None:
            bias = RelativeBias(
                bias.position_table,
                bias.time_table,
                bias.timestamps[~self.target],
                bias.query_timestamps[self.target],
            )
        k, v = self.k[~self.target], self.v[~self.target]
        own = (self.k[self.target], self.v[self.target])
        place = jnp.asarray(start + self.position)
        return cached_attention(
            self.q[self.target],
            k,
            v,
            keys,
            alpha=0.3,
            scale=options.pop("scale", 1 / N),
            own=own,
            bias=bias,
            place_R=place,
            **options,
        )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "sizes",
    [xla.KeyLoop(16, 8, True, False), xla.KeyLoop(None, 32, False, True)],
    ids=["skip", "whole"],
)
def test_targets_against_the_keys_of_their_history(mask, sizes, monkeypatch):
    """As small tiles, which straddle sequences, and as an accelerator does it."""
    monkeypatch.setattr(xla, "loop_sizes", lambda: sizes)
    for bias in {mask in ("causal", "all"), False}:
        request = Request(bias=bias)
        factor_R11 = np.linspace(1, 1 + bias, len(request.user), dtype=np.float32)[:, None, None]
        want = request.whole(MASKS[mask]) * factor_R11
        options = {"scale": jnp.asarray(factor_R11[:, 0, 0] / N)} if bias else {}
        with dispatch.record() as choices:
            got = jax.jit(functools.partial(request.cached, MASKS[mask], **options))()
        assert [choice.implementation for choice in choices] == ["xla"]
        np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


def test_low_precision_inputs():
    request, exact = Request("bfloat16"), Request()
    want = np.asarray(exact.whole(MASKS["all"]))
    error = (
        np.abs(np.asarray(request.cached(MASKS["all"]), np.float32) - want).max()
        / np.abs(want).max()
    )
    plain = (
        np.abs(np.asarray(request.whole(MASKS["all"]), np.float32) - want).max()
        / np.abs(want).max()
    )
    assert error <= 2 * plain + ROUND_OFF["bfloat16"]


@pytest.mark.parametrize("mask", MASKS)
def test_only_blocks_that_are_seen_are_visited(mask):
    """The blocks of a tile hold all its keys.

    The blocks of a window far from a prefix leave out what lies between.
    """
    request, size = Request(), 8
    start = jnp.asarray(request.key_offsets[request.user])
    keys = keys_at(
        MASKS[mask],
        start,
        jnp.asarray(request.position),
        *(jnp.asarray(x) for x in request.counts[request.user, :2].T),
    )
    for rows in (slice(0, 5), slice(3, 9), slice(9, 39)):
        tile = KeyIntervals(*(x[rows] for x in keys))
        first, count, (gap_start, gap_end) = jax.tree.map(int, xla.visited_blocks(tile, size))
        blocks = [first + i for i in range(count)]
        blocks = [int(b - gap_start + gap_end if b >= gap_start else b) for b in blocks]
        seen = {
            key // size
            for lo, hi in ((tile.lo0, tile.hi0), (tile.lo1, tile.hi1))
            for start, stop in zip(lo.tolist(), hi.tolist(), strict=True)
            for key in range(start, stop)
        }
        assert seen <= set(blocks) and len(set(blocks)) == len(blocks)
    far = keys_at(AttentionMask(window=5, prefix=6), *(jnp.asarray([x]) for x in (0, 998, 0, 1000)))
    assert int(xla.visited_blocks(far, size)[1]) == 2


def test_no_keys_and_no_rows():
    nothing = KeyIntervals(*(jnp.zeros(3, jnp.int32) for _ in range(4)))
    q, v = jnp.ones((3, 1, 4)), jnp.ones((3, 1, 2))
    assert not np.any(cached_attention(q, q[:0], v[:0], nothing, alpha=1.0, scale=1.0))
    with pytest.raises(
        NotImplementedError, match="NVIDIA GPU"
    ):  # a name never falls back, though there is nothing to attend to
        cached_attention(q, q[:0], v[:0], nothing, alpha=1.0, scale=1.0, implementation="triton")
    timed = RelativeBias(None, jnp.ones(3), jnp.zeros(0, jnp.int32), jnp.zeros(len(q), jnp.int32))
    assert not np.any(cached_attention(q, q[:0], v[:0], nothing, alpha=1.0, scale=1.0, bias=timed))
    own = cached_attention(q, q[:0], v[:0], nothing, alpha=1.0, scale=0.5, own=(q, v))
    np.testing.assert_allclose(own, 0.5 * jax.nn.silu(4.0) * np.ones((3, 1, 2)), rtol=1e-6)
    none = KeyIntervals(*(x[:0] for x in nothing))
    assert cached_attention(q[:0], q, v, none, alpha=1.0, scale=1.0).shape == (0, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q_RHK=jnp.ones((3, 4))), r"q must be \[rows, H, width\], got shape \(3, 4\)"),
        (dict(k_SHK=jnp.ones((5, 1, 4), jnp.int8)), "k has dtype int8; cast it"),
        (dict(k_SHK=jnp.ones((5, 2, 4))), r"must be \[R, H, K\]"),
        (dict(v_SHV=jnp.ones((5, 1, 2), jnp.bfloat16)), "mix dtypes"),
        (
            dict(keys=KeyIntervals(*(jnp.zeros(2, jnp.int32) for _ in range(4)))),
            r"keys must be four int32\[3\]",
        ),
        (dict(own=(jnp.ones((3, 1, 4)), jnp.ones((3, 1, 4)))), "own must be a key"),
        (dict(bias=RelativeBias(position_table=jnp.ones(3))), "needs place_R"),
        (
            dict(bias=RelativeBias(time_table=jnp.ones(3), timestamps=jnp.zeros(3, jnp.int32))),
            r"RelativeBias.timestamps must be int32\[5\]",
        ),
        (dict(scale=jnp.ones(2)), r"one factor for each of the 3 rows, got shape \(2,\)"),
        (dict(implementation="mosaic"), "no implementation is called 'mosaic'"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "q_RHK": jnp.ones((3, 1, 4)),
        "k_SHK": jnp.ones((5, 1, 4)),
        "v_SHV": jnp.ones((5, 1, 2)),
        "keys": KeyIntervals(*(jnp.zeros(3, jnp.int32) for _ in range(4))),
        "alpha": 1.0,
        "scale": 1.0,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        cached_attention(**arguments)


def test_implementations_are_those_of_the_folder():
    assert set(api.implementations()) >= {"xla"}
