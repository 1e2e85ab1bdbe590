"""Plans of intervals of a user's own: every implementation's view of them, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hstu_attention import hstu_attention, plan_of_intervals
from kernels.hstu_attention.mosaic import schedule
from kernels.hstu_attention.mosaic.schedule import BackwardConfig, WorkList
from kernels.mask import KeyIntervals, RowIntervals
from tests.kernels.test_mosaic import check_work

ROWS, REAL = 256, 250
OFFSETS = np.array([0, REAL], np.int32)
ROW, KEY = np.arange(ROWS)[:, None], np.arange(ROWS)[None, :]
PERMUTED = np.random.default_rng(0).permutation(ROWS // 8)

MASKS = {
    "window to both sides": abs(ROW - KEY) <= 20,
    "prefix that sees itself": (KEY < 90) | (KEY <= ROW) & (ROW >= 90),
    "own block and the first": (ROW // 32 == KEY // 32) & (KEY <= ROW) | (KEY < 9),
    "later keys alone": (KEY > ROW + 40) & (KEY < 200),
    "some other block": PERMUTED[ROW // 8] == KEY // 8,
    "far block and newest keys": (PERMUTED[ROW // 8] == KEY // 8) & (KEY < ROW - 50)
    | (KEY >= ROW - 3) & (KEY < ROW),
    "itself": ROW == KEY,
}


def allowed(name):
    """The mask, on real rows and keys, with the diagonal."""
    return (MASKS[name] | (ROW == KEY)) & (ROW < REAL) & (KEY < REAL)


def plan_of(name):
    return plan_of_intervals(KeyIntervals.from_dense(allowed(name)), num_real=REAL)


@pytest.mark.parametrize("name", MASKS)
def test_attention_follows_the_mask(name):
    """Output and gradients of `reference` and `xla` against attention written out."""
    rng = np.random.default_rng(1)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((ROWS, 2, 8), dtype=np.float32)) for _ in range(4)
    )
    g = g.at[REAL:].set(0)
    plan = plan_of(name)

    def written_out(q, k, v):
        weight = jax.nn.silu(0.3 * jnp.einsum("qhd,khd->hqk", q, k))
        return 0.1 * jnp.einsum("hqk,khd->qhd", jnp.where(allowed(name)[None], weight, 0), v)

    def run(attend):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(g)

    want = jax.jit(lambda: run(written_out))()
    for implementation in ("reference", "xla"):

        def attend(q, k, v, implementation=implementation):
            return hstu_attention(
                q, k, v, OFFSETS, alpha=0.3, scale=0.1, plan=plan, implementation=implementation
            )

        for got, x in zip(jax.jit(lambda: run(attend))(), want, strict=True):  # noqa: B023
            np.testing.assert_allclose(got, x, atol=3e-6 * np.abs(x).max())


@pytest.mark.parametrize("name", MASKS)
def test_tile_bounds_and_lists_of_work_hold_the_mask(name, monkeypatch):
    """What `triton` walks over, and what `mosaic` walks over and masks with."""
    plan, dense = plan_of(name), allowed(name)
    for block_q, block_k in ((16, 16), (32, 64), (128, 32)):
        bounds = plan.tile_bounds(block_q, block_k)
        met = dense.reshape(ROWS // block_q, block_q, ROWS // block_k, block_k).any((1, 3))
        for lo, hi, want in (
            (bounds.key_lo, bounds.key_hi, met),
            (bounds.row_lo, bounds.row_hi, met.T),
        ):
            block = np.arange(want.shape[1])
            inside = (block >= np.asarray(lo)[..., None]) & (block < np.asarray(hi)[..., None])
            assert (inside.sum(1) <= 1).all(), "ranges are disjoint"
            assert inside.any(1)[want].all()
    monkeypatch.setattr(schedule, "WORKERS", 10)
    for wanted in (WorkList.forward(2, 64), WorkList.backward(2, BackwardConfig(64, 64, 2))):
        work = jax.jit(plan.find, static_argnums=0)(wanted)
        check_work(plan, work, dense if wanted.kind == "forward" else dense.T, wanted)


def test_intervals_may_be_traced():
    plan = plan_of("own block and the first")
    traced = jax.jit(plan_of_intervals)(plan.keys, plan.rows, plan.num_real)
    jax.tree.map(np.testing.assert_array_equal, traced, plan)


def intervals(**changes):
    """Of four rows that see the key before them, with other bounds for row 2."""
    bounds = {"lo0": [0] * 4, "hi0": [0] * 4, "lo1": [0, 0, 1, 2], "hi1": [0, 1, 2, 3]}
    for name, value in changes.items():
        bounds[name][2] = value
    return KeyIntervals(*(jnp.asarray(x, jnp.int32) for x in bounds.values()))


@pytest.mark.parametrize(
    ("keys", "num_real", "message"),
    [
        (intervals(lo0=1, hi0=2), None, "row 2 are not disjoint"),
        (intervals(hi1=9), None, "row 2 are not disjoint intervals inside the buffer"),
        (intervals(hi1=3), None, "row 2 hold the row itself"),
        (intervals(lo1=3, hi1=4), 3, "row 2 touch padding, which begins at row 3"),
        (intervals(), 3, "row 3 touch padding"),
    ],
)
def test_wrong_intervals_are_named(keys, num_real, message):
    with pytest.raises(ValueError, match=message):
        plan_of_intervals(keys, num_real=num_real)


def test_a_key_that_scattered_rows_see():
    mask = np.zeros((9, 9), bool)
    mask[[3, 5, 7], 1] = True
    with pytest.raises(ValueError, match=r"key 1 is seen by 3 intervals .* \[3, 5, 7\]"):
        plan_of_intervals(KeyIntervals.from_dense(mask))


def test_rows_that_are_given_are_taken():
    keys = intervals()
    nothing = RowIntervals(*(jnp.zeros(4, jnp.int32) for _ in range(6)))
    assert plan_of_intervals(keys, nothing).rows is nothing
