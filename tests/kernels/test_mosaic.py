"""`mosaic` without a GPU: kernels in the interpreter, lists of work, what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hstu_attention import AttentionSpec, hstu_attention, make_plan, reference
from kernels.hstu_attention.mosaic import attention as mosaic
from kernels.hstu_attention.mosaic import schedule
from kernels.hstu_attention.mosaic.backward import backward_config, gradients
from kernels.hstu_attention.mosaic.backward_keys import key_gradients
from kernels.hstu_attention.mosaic.backward_shared import BackwardInputs
from kernels.hstu_attention.mosaic.forward import ForwardConfig, forward
from kernels.hstu_attention.mosaic.padding import clean_tails, padded, rounded_up
from kernels.hstu_attention.mosaic.schedule import BackwardConfig, WorkList
from kernels.mask import AttentionMask
from tests.kernels.mosaic_interpreter import interpreted

LENGTHS = np.array([0, 1, 97, 40, 0, 150])
MASKS = {
    "causal": AttentionMask(),
    "semi-local": AttentionMask(window=60, full_rows=20),
    "prefix": AttentionMask(window=60, full_rows=20, prefix=10, context_sink=False),
}


# Compiled whole, as in a step: alone, hundreds of operations are compiled one by one. The kernels
# below are for the same reason.
planned = jax.jit(make_plan, static_argnums=(0, 2))


def schedule_of(plan, wanted):
    return _schedule_of(plan, wanted, schedule.WORKERS)


def with_schedules(plan, wanted):
    return _with_schedules(plan, wanted, schedule.WORKERS)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _schedule_of(plan, wanted, workers):
    return plan.find(wanted)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _with_schedules(plan, wanted, workers):
    return plan.storing(wanted, schedule.make_schedules(plan, wanted))


class Batch:
    """Jagged inputs whose padding rows hold NaN, and the results of `reference`."""

    def __init__(self, mask, k_width, v_width, row_scale=False, lengths=LENGTHS, counted=True):
        rng = np.random.default_rng(0)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self.real, self.rows = int(self.offsets[-1]), int(self.offsets[-1]) + 9
        draw = [
            rng.standard_normal((self.rows, 1, w), dtype=np.float32)
            for w in (k_width, k_width, v_width, v_width)
        ]
        self.q, self.k, self.v = (
            jnp.asarray(x, jnp.bfloat16).at[self.real :].set(jnp.nan) for x in draw[:3]
        )
        self.g = jnp.asarray(draw[3], jnp.bfloat16).at[self.real :].set(0)
        scale = rng.uniform(0.01, 1, self.rows).astype(np.float32)
        scale[self.real :] = np.nan
        self.scale = jnp.asarray(scale) if row_scale else jnp.float32(1 / 64)
        counts = (np.minimum(lengths // 4, 9), np.minimum(lengths // 5, 3)) if counted else ()
        self.plan = planned(mask, self.offsets, self.rows, *counts)

        def plain(*qkv):
            return reference.attention(
                *(x.astype(jnp.float32) for x in qkv),
                self.plan,
                alpha=0.1,
                scale=self.scale,
                bias=None,
            )

        def with_gradients(*qkv):
            out, pull = jax.vjp(plain, *qkv)
            return out, *pull(self.g.astype(jnp.float32))

        self.want = dict(
            zip(
                ("out", "dq", "dk", "dv"),
                jax.jit(with_gradients)(self.q, self.k, self.v),
                strict=True,
            )
        )

    def padded(self):
        return tuple(padded(x) for x in (self.q, self.k, self.v, self.g))

    def check(self, got):
        for name, x in got.items():
            x, want = np.asarray(x, np.float64), np.asarray(self.want[name], np.float64)
            assert np.isfinite(x).all(), name
            assert not x[self.real :].any(), name
            assert np.linalg.norm(x[: self.rows] - want) < 4e-3 * np.linalg.norm(want), name


def test_forward(monkeypatch):
    batch = Batch(MASKS["prefix"], 128, 64, row_scale=True)
    monkeypatch.setattr(schedule, "WORKERS", 2)
    config = ForwardConfig(block_k=64, stages=2)
    run = jax.jit(lambda *of_batch: forward(*of_batch, 0.1, config))
    with interpreted(monkeypatch):
        batch.check({"out": run(*batch.padded()[:3], batch.plan, batch.scale)})


@pytest.mark.parametrize(
    ("passes", "mask", "widths", "row_scale"),
    [
        (1, "causal", (64, 64), False),
        (1, "prefix", (128, 128), True),
        (1, "semi-local", (128, 256), False),
        (2, "causal", (64, 64), True),
        (2, "semi-local", (128, 128), False),
        (2, "prefix", (256, 128), False),
    ],
    ids=["64", "128", "256", "64 in two", "128 in two", "256 in two"],
)
def test_gradients(passes, mask, widths, row_scale, monkeypatch):
    batch = Batch(MASKS[mask], *widths, row_scale)
    # in one pass dQ is summed in memory, which the interpreter does not do atomically
    monkeypatch.setattr(schedule, "WORKERS", passes)
    config = backward_config(AttentionSpec("bfloat16", 1, *widths), batch.plan, passes)
    run = jax.jit(lambda *of_batch: gradients(*of_batch, 0.1, config))
    with interpreted(monkeypatch):
        got = run(*batch.padded(), batch.plan, batch.scale)
    batch.check(dict(zip(("dq", "dk", "dv"), got, strict=True)))


def test_items_in_fixed_turns(monkeypatch):
    """A plan whose tiles are all light: no thread block draws, none gets more than another."""
    batch = Batch(AttentionMask(window=60), 64, 64, counted=False)
    assert schedule.in_turns(batch.plan)
    monkeypatch.setattr(schedule, "WORKERS", 2)
    forward_config, back = ForwardConfig(block_k=64, stages=2), BackwardConfig(128, 64, 2, passes=2)

    @jax.jit
    def run(q, k, v, do, plan, scale):
        out = forward(q, k, v, plan, scale, 0.1, forward_config)
        return out, *gradients(q, k, v, do, plan, scale, 0.1, back)

    with interpreted(monkeypatch):
        got = run(*batch.padded(), batch.plan, batch.scale)
    batch.check(dict(zip(("out", "dq", "dk", "dv"), got, strict=True)))


def test_split_tiles(monkeypatch):
    batch = Batch(MASKS["causal"], 64, 64, lengths=np.array([640]))
    monkeypatch.setattr(schedule, "WORKERS", 8)
    parts = [
        schedule_of(batch.plan, wanted).parts
        for wanted in (
            WorkList.forward(1, 64),
            WorkList.backward(1, BackwardConfig(128, 64, 2)),
        )
    ]
    assert all((np.asarray(x)[:, 3] > 1).any() for x in parts)
    config = ForwardConfig(block_k=64, stages=2)
    back = BackwardConfig(128, 64, 2, passes=2)

    @jax.jit
    def kernels(q, k, v, do, plan, scale):
        tails, factor = clean_tails(plan, q, k, do), scale.reshape(1)
        out = forward(q, k, v, plan, scale, 0.1, config)
        return out, *key_gradients(BackwardInputs(q, k, v, do, tails, plan, factor, 0.1), back)

    with interpreted(monkeypatch):
        got = kernels(*batch.padded(), batch.plan, batch.scale)
    batch.check(dict(zip(("out", "dk", "dv"), got, strict=True)))


@pytest.mark.parametrize("num_workers", [10, 132])
@pytest.mark.parametrize("mask", MASKS)
def test_lists_of_work_cover_the_mask_once(mask, num_workers, monkeypatch):
    monkeypatch.setattr(schedule, "WORKERS", num_workers)
    lengths, rows, heads, block = np.array([300, 0, 1, 97, 625, 130]), 1200, 2, 64
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    counts = (np.minimum(lengths // 4, 200), np.minimum(lengths // 5, 150))
    plan = planned(MASKS[mask], offsets, rows, *counts)
    size = rounded_up(rows)
    dense = np.zeros((size, size), bool)
    dense[:rows, :rows] = np.asarray(MASKS[mask].dense(offsets, rows, *counts))
    back = [BackwardConfig(tile, block, 2) for tile in (64, 128)]
    wanted = [
        WorkList.forward(heads, block),
        *(WorkList.backward(heads, config) for config in back),
    ]
    together = with_schedules(plan, tuple(wanted))
    assert together.stored_keys == tuple(wanted)
    for each in wanted:
        work = together.find(each)
        check_work(plan, work, dense if each.kind == "forward" else dense.T, each)
        alone = schedule_of(plan, each)
        used = np.asarray(alone.records)[:, schedule.TILE] >= 0
        np.testing.assert_array_equal(
            np.asarray(work.records)[: used.sum()], np.asarray(alone.records)[used]
        )


def test_no_tile_is_split_where_none_can_be_heavy():
    """Nothing is summed then: half of the kernels of a forward pass."""
    offsets, rows = np.array([0, 200, 900], np.int32), 1000
    for mask, sequences in (
        (AttentionMask(window=60), offsets),
        (AttentionMask(), np.r_[offsets, [900] * 9].astype(np.int32)),
    ):
        plan = planned(mask, sequences, rows)
        size = rounded_up(rows)
        dense = np.zeros((size, size), bool)
        dense[:rows, :rows] = np.asarray(mask.dense(offsets, rows))
        wanted = WorkList.forward(2, 64)
        work = schedule_of(plan, wanted)
        check_work(plan, work, dense, wanted)
        check_halves(np.asarray(work.records), dense, wanted)
        assert not work.parts.size and (np.asarray(work.records)[:, schedule.SLOT] < 0).all()
    assert schedule.may_split(make_plan(AttentionMask(window=60), offsets, rows, np.array([3, 0])))
    assert schedule.may_split(make_plan(AttentionMask(window=60, full_rows=5), offsets, rows))


def check_halves(records, dense, wanted):
    """LATE and EARLY say exactly which end a half leaves out."""
    tile, block = wanted.tile, wanted.block
    used = records[records[:, schedule.TILE] >= 0]
    assert used[:, schedule.LATE].any() and used[:, schedule.EARLY].any()
    for r in used:
        met = [
            i + r[schedule.SHIFT0 + (i >= r[schedule.CUT1]) + (i >= r[schedule.CUT2])]
            for i in range(r[schedule.COUNT])
        ]
        for half, at, field in ((1, met[0], schedule.LATE), (0, met[-1], schedule.EARLY)):
            first = r[schedule.TILE] * tile + half * tile // 2
            seen = dense[first : first + tile // 2, at * block : (at + 1) * block].any()
            assert r[field] == (len(met) > 1 and not seen)


def check_work(plan, work, dense, wanted):
    size, tile, block, heads = dense.shape[0], wanted.tile, wanted.block, wanted.heads
    place = np.arange(size)[None, :]
    bounds = np.asarray(work.bounds)[:, :, None]
    seen = [(place >= bounds[2 * i]) & (place < bounds[2 * i + 1]) for i in range(3)]
    np.testing.assert_array_equal(sum(x.astype(int) for x in seen), dense.astype(int))
    visits = np.zeros((heads, size // tile, size // block), int)
    slots: dict = {}
    records = np.asarray(work.records)
    used = records[records[:, schedule.TILE] >= 0]
    assert (records[len(used) :, schedule.TILE] < 0).all() and len(records) > len(used)
    if schedule.heads_together(plan):
        np.testing.assert_array_equal(used[:, schedule.HEAD], np.arange(len(used)) % heads)
        assert (np.diff(used[:, schedule.COUNT]) <= 0).all(), "heaviest first"
    else:
        same_head = np.diff(used[:, schedule.HEAD]) == 0
        assert same_head.sum() == len(used) - heads, "head after head"
        lighter = np.diff(used[:, schedule.COUNT])[same_head] <= 0
        if wanted.by_sequence:  # in all heads but the last
            lighter = lighter[used[1:, schedule.HEAD][same_head] == heads - 1]
        assert lighter.all(), "heaviest first"
    for r in used:
        for i in range(r[schedule.COUNT]):
            shift = schedule.SHIFT0 + (i >= r[schedule.CUT1]) + (i >= r[schedule.CUT2])
            at = i + r[shift]
            visits[r[schedule.HEAD], r[schedule.TILE], at] += 1
            rows = np.s_[r[schedule.TILE] * tile : (r[schedule.TILE] + 1) * tile]
            columns = np.s_[at * block : (at + 1) * block]
            inside = [
                r[first] <= at < r[first + 1]
                for first in (schedule.FULL0, schedule.FULL1, schedule.FULL2)
            ]
            if any(inside):
                assert dense[rows, columns].all()
            elif not any(
                r[first] <= at < r[first + 1] for first in (schedule.OTHER0, schedule.OTHER1)
            ):
                np.testing.assert_array_equal(seen[0][rows, columns], dense[rows, columns])
        if r[schedule.SLOT] >= 0:
            slots.setdefault((r[schedule.TILE], r[schedule.HEAD]), []).append(r[schedule.SLOT])
    needed = dense.reshape(size // tile, tile, size // block, block).any((1, 3))
    assert (visits <= 1).all() and (visits[:, needed] == 1).all()
    parts = {
        (t, h): [first + heads * i for i in range(n)]
        for t, h, first, n in np.asarray(work.parts)
        if n
    }
    assert {key: sorted(value) for key, value in slots.items()} == parts
    room = schedule.part_slots(plan, wanted)
    assert max((max(x) for x in slots.values()), default=-1) < room


def inputs(width, dtype):
    return [jnp.zeros((64, 1, width), dtype)] * 3


def test_refuses_with_a_reason():
    offsets = np.array([0, 64], np.int32)
    for width, dtype, reason in (
        (64, "bfloat16", "Hopper"),
        (64, "float32", "float32"),
        (96, "bfloat16", "K = 96"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            hstu_attention(
                *inputs(width, dtype), offsets, alpha=0.1, scale=1.0, implementation="mosaic"
            )
    assert "bias" in mosaic.unsupported(AttentionSpec("bfloat16", 1, 64, 64, biased=True))
