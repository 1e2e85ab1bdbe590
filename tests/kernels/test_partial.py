"""Attention to the keys of another buffer: the parts of a sequence add up to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hstu_attention import hstu_attention, make_plan
from kernels.hstu_attention.mosaic.schedule import BackwardConfig, WorkList
from kernels.hstu_attention.partial import partial_attention, partial_plan
from kernels.jagged import Rows
from kernels.mask import AttentionMask, KeyIntervals, RowIntervals

ROWS, HEADS, WIDTH = 96, 2, 8
OFFSETS = np.array([0, 30, 31, 90], np.int32)
COUNTS = {
    "num_targets": np.array([4, 0, 7], np.int32),
    "num_contextual": np.array([2, 0, 3], np.int32),
}
MASKS = {"causal": AttentionMask(), "all": AttentionMask(window=20, full_rows=5, prefix=4)}


def arrays():
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((ROWS, HEADS, WIDTH), dtype=np.float32)).at[90:].set(0)
        for _ in range(4)
    )
    return q, k, v, g


def between(bounds, first, size):
    """Intervals of the buffer as indices of its rows [first, first + size)."""
    return type(bounds)(*(jnp.clip(x - first, 0, size) for x in bounds))


def cut(mask):
    """Keys and rows intervals of the whole buffer."""
    counts = tuple(COUNTS.values())
    rows = Rows.of(OFFSETS, ROWS, *counts)
    return mask.keys_of(rows), mask.rows_of(rows)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("edge", [7, 40])
def test_parts_add_up(mask, edge, implementation):
    """Every row against the keys before `edge`, plus every row against the keys from it on.

    One of the two has the rows' own keys.
    """
    keys, rows = cut(MASKS[mask])
    scale = jnp.asarray(np.random.default_rng(1).uniform(0.1, 1, ROWS), jnp.float32)
    q, k, v, g = arrays()

    def parts(q, k, v):
        out = 0.0
        for first, stop, own in ((0, edge, None), (edge, ROWS, (k, v))):
            seen_by = RowIntervals(*(x[first:stop] for x in rows))
            seen = between(keys, first, stop - first)
            out += partial_attention(
                q,
                k[first:stop],
                v[first:stop],
                seen,
                seen_by,
                alpha=0.3,
                scale=scale,
                own=own,
                implementation=implementation,
            )
        return out

    def whole(q, k, v):
        return hstu_attention(
            q,
            k,
            v,
            OFFSETS,
            mask=MASKS[mask],
            alpha=0.3,
            scale=scale,
            implementation="reference",
            **COUNTS,
        )

    def run(attend):
        out, pull = jax.vjp(attend, q, k, v)
        return (out.at[90:].set(0), *pull(g))

    for got, want in zip(jax.jit(lambda: run(parts))(), run(whole), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


def test_no_keys_at_all():
    """A square buffer, as the ring's first step: all keys are own ones."""
    keys, rows = cut(AttentionMask())
    q, k, v, _ = arrays()
    got = partial_attention(
        q, k[:0], v[:0], keys, rows, alpha=0.3, scale=1.0, own=(k, v), implementation="reference"
    )
    want = hstu_attention(
        q, k, v, OFFSETS, alpha=0.3, scale=1.0, implementation="reference", **COUNTS
    )
    np.testing.assert_allclose(got[:90], want[:90], atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_lists_of_the_hopper_kernels(mask):
    """What the kernels mask with holds exactly the rows that see a key, or the keys of a row."""
    keys, rows = cut(MASKS[mask])
    edge = 40
    plan = partial_plan(
        between(keys, 0, edge),
        RowIntervals(*(x[:edge] for x in rows)),
        num_rows=ROWS,
        num_keys=edge,
        own=False,
    )
    size = plan.num_rows
    seen = np.asarray(plan.keys.dense(0))  # without the diagonal
    for wanted, want in (
        (WorkList.backward(1, BackwardConfig(128, 64, 3)), seen.T[:edge]),
        (WorkList.forward(1, 64), seen),
    ):
        bounds = plan.find(wanted).bounds
        lo, hi = np.asarray(bounds[0::2]), np.asarray(bounds[1::2])
        place = np.arange(size)
        got = ((place >= lo[:, :size, None]) & (place < hi[:, :size, None])).any(0)[: len(want)]
        got[np.arange(len(want)), np.arange(len(want))] = want[
            np.arange(len(want)), np.arange(len(want))
        ]  # own places: zero queries or keys
        np.testing.assert_array_equal(got, want)


def test_whole_plans_keep_their_bounds():
    """Tile bounds of an ordinary batch are what they were: rows touch their keys."""
    plan = make_plan(MASKS["all"], OFFSETS, ROWS, *COUNTS.values())
    bounds = plan.tile_bounds(16, 16)
    dense = np.asarray(plan.keys.dense(plan.num_real)).reshape(6, 16, 6, 16).any((1, 3))
    for tile in range(6):
        met = np.zeros(6, bool)
        for lo, hi in zip(
            np.asarray(bounds.row_lo[tile]), np.asarray(bounds.row_hi[tile]), strict=True
        ):
            met[lo:hi] = True
        assert (met >= dense[:, tile]).all()


def test_empty_intervals_stay_empty():
    nothing = KeyIntervals(*(jnp.zeros(3, jnp.int32) + 5 for _ in range(4)))
    q = jnp.ones((3, 1, 4))
    seen_by = RowIntervals(*(jnp.zeros(8, jnp.int32) + 2 for _ in range(6)))
    assert not np.any(
        partial_attention(
            q, jnp.ones((8, 1, 4)), jnp.ones((8, 1, 4)), nothing, seen_by, alpha=1.0, scale=1.0
        )
    )
