"""`reference` and `xla`: the contract, the golden numbers, memory, skipping, bias gradients."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import device
from kernels.hstu_attention import RelativeBias, hstu_attention, make_plan, xla
from kernels.hstu_attention.relative_bias import time_buckets
from kernels.hstu_attention.workloads import WORKLOADS
from kernels.mask import AttentionMask
from kernels.timing import Timing, device_time
from tests.kernels.attention_contract import GRADIENTS, AttentionContract, Case, largest_error

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "testdata" / "attention.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN if name.endswith("/options")})
IMPLEMENTATIONS = ("reference", "xla")


class TestReference(AttentionContract):
    implementation = "reference"
    dtypes = ("float32", "bfloat16")


class TestXla(AttentionContract):
    implementation = "xla"
    repeatable = repeatable_gradients = device.current().platform == "cpu"


def golden_case(name):
    targets, contextual, window, full_rows = (int(x) for x in GOLDEN[f"{name}/options"])
    group = "context" if contextual else "plain"
    lengths = GOLDEN[f"{group}/lengths"]
    mask = AttentionMask(window=window or None, full_rows=full_rows, context_sink=False)
    num_targets = jnp.asarray(GOLDEN[f"{group}/num_targets"]) if targets else None
    num_contextual = jnp.minimum(jnp.asarray(lengths), contextual) if contextual else None
    return group, mask, {"num_targets": num_targets, "num_contextual": num_contextual}


def check_golden(group, name, mask, counts, scale, implementation):
    q, k, v, g = (jnp.asarray(GOLDEN[f"{group}/{x}"]) for x in "qkvg")
    offsets = GOLDEN[f"{group}/offsets"]

    def run(q, k, v):
        return hstu_attention(
            q,
            k,
            v,
            offsets,
            mask=mask,
            alpha=GOLDEN["alpha"],
            scale=scale,
            implementation=implementation,
            **counts,
        )

    out, pull = jax.vjp(run, q, k, v)
    for what, got in zip(("out", "dq", "dk", "dv"), (out, *pull(g)), strict=True):
        assert largest_error(got, GOLDEN[f"{name}/{what}"]) < 3e-6, what


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_golden_outputs_and_gradients(name, implementation):
    group, mask, counts = golden_case(name)
    check_golden(group, name, mask, counts, 1 / int(GOLDEN["max_seq_len"]), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["row_scale", "scalar_scale"])
def test_golden_scales(name, implementation):
    group, mask, counts = golden_case("targets")
    scale = jnp.asarray(
        GOLDEN["plain/row_scale"] if name == "row_scale" else GOLDEN["scalar_scale/scale"]
    )
    check_golden(group, name, mask, counts, scale, implementation)


@pytest.mark.parametrize("name", CASES)
def test_golden_masks(name):
    group, mask, counts = golden_case(name)
    offsets = GOLDEN[f"{group}/offsets"]
    dense = np.asarray(mask.dense(offsets, int(offsets[-1]), **counts))
    for b, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        n = stop - start
        np.testing.assert_array_equal(
            dense[start:stop, start:stop], GOLDEN[f"{name}/mask"][b, :n, :n]
        )


def test_time_buckets_are_exact():
    edges = np.exp(0.301 * np.arange(1, 72))
    near_edges = np.floor(edges)[:, None] + np.arange(-2, 4)[None, :]
    spread = np.random.default_rng(0).integers(0, 2**31 - 1, 100_000)
    gaps = np.unique(
        np.concatenate([np.arange(5000), near_edges.ravel(), spread]).clip(0, 2**31 - 1)
    ).astype(np.int64)
    want = np.floor(np.log(np.maximum(gaps, 1).astype(np.float64)) / 0.301)
    for buckets in (129, 21, 1):
        for sign in (1, -1):
            got = time_buckets(jnp.asarray(sign * gaps, jnp.int32), buckets)
            np.testing.assert_array_equal(got, np.minimum(want, buckets - 1))


def test_bias_of_one_pair_by_hand():
    """Row 1 sees key 0: position table entry N - 2, and a time bucket.

    The bucket is that from row 1's next event to row 0's own time.
    """
    position_table, time_table = (
        jnp.asarray([0.0, 0.5, 3.0, 9.0, 9.0]),
        jnp.asarray([0.0, 0.0, 0.0, 0.25, 9.0]),
    )
    timestamps, nexts = (
        jnp.asarray([100, 101], jnp.int32),
        jnp.asarray([101, 103], jnp.int32),
    )  # ln(3) / 0.301 = 3.65
    zeros, v = jnp.zeros((2, 1, 1)), jnp.asarray([1.0, 0.0]).reshape(2, 1, 1)
    for implementation in IMPLEMENTATIONS:
        bias = RelativeBias(position_table, time_table, timestamps, nexts)
        out = hstu_attention(
            zeros,
            zeros,
            v,
            np.array([0, 2]),
            alpha=1.0,
            scale=1.0,
            bias=bias,
            implementation=implementation,
        )
        np.testing.assert_allclose(out[1, 0, 0], jax.nn.silu(0.75), rtol=1e-6)
        np.testing.assert_allclose(
            out[0, 0, 0], jax.nn.silu(3.0), rtol=1e-6
        )  # itself, gap 1: bucket 0


@pytest.mark.parametrize("tiling", [(8, 3, True), (16, 1000, False), (32, 1, True)])
def test_xla_result_does_not_depend_on_the_tiling(tiling, monkeypatch):
    block, group, scatter = tiling
    case = Case((0, 1, 7, 97, 40), 5, 2, 8, 4, "float32", "both")
    mask = AttentionMask(window=12, full_rows=5, prefix=3)
    want = case.out_and_gradients(case.inputs(), mask=mask, implementation="reference")
    monkeypatch.setattr(xla, "loop_sizes", lambda rows: xla.PairLoop(block, group, True, scatter))
    got = case.out_and_gradients(case.inputs(), mask=mask, implementation="xla")
    for name in want:
        assert largest_error(got[name], want[name]) < 3e-6, name


def compiled(rows, mask):
    spec = jax.ShapeDtypeStruct((rows, 1, 16), jnp.float32)
    times = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tables = (jax.ShapeDtypeStruct((401,), jnp.float32), jax.ShapeDtypeStruct((129,), jnp.float32))

    def loss(q, k, v, tables, times, offsets):
        bias = RelativeBias(*tables, times, times)
        out = hstu_attention(
            q, k, v, offsets, mask=mask, alpha=1.0, scale=1.0, bias=bias, implementation="xla"
        )
        return jnp.sum(out)

    offsets = jax.ShapeDtypeStruct((3,), jnp.int32)
    return (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        .lower(spec, spec, spec, tables, times, offsets)
        .compile()
    )


def test_xla_memory_is_linear_in_rows():
    small, large = (
        compiled(rows, AttentionMask()).memory_analysis().temp_size_in_bytes
        for rows in (16384, 65536)
    )
    row_bytes = (large - small) / (65536 - 16384)
    assert (
        row_bytes < 2048
    )  # about ten arrays of 16 floats a row; T^2 scores of one head alone would be 200,000 a row
    assert large < 4.5 * small


def test_xla_skips_tiles_that_do_not_meet():
    def pairs(mask, lengths, rows=8192, **counts):
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        bounds = make_plan(mask, offsets, rows, **counts).tile_bounds(64, 64)
        return int((bounds.key_hi - bounds.key_lo).sum())

    assert pairs(AttentionMask(), [4096]) == 64 * 65 // 2  # as many rows of padding cost nothing
    assert pairs(AttentionMask(), [64] * 64) == 64  # sequences that fit tiles: the diagonal only
    assert pairs(AttentionMask(window=64), [4096]) == 2 * 64 - 1
    assert pairs(AttentionMask(window=64), [8192]) == 2 * 128 - 1  # O(T)
    assert pairs(AttentionMask(window=64, full_rows=64), [4096]) == 2 * 64 - 1 + 62
    assert pairs(AttentionMask(window=64, prefix=64), [4096]) == 2 * 64 - 1 + 62
    # targets far behind a windowed history: sink, window and the tile itself; and contextual rows
    # see all of the history
    targets = {"num_targets": np.array([2048]), "num_contextual": np.array([2])}
    assert pairs(AttentionMask(window=64), [4096], **targets) == (2 * 32 - 1 + 30 + 31) + 32 * 3
    assert pairs(AttentionMask(), []) == 0 and pairs(AttentionMask(), [0, 0]) == 0


def test_no_gradient_crosses_sequences_or_flows_from_the_future():
    case = Case((20, 30), 0, 1, 4, 4, "float32")

    def row_35(q, k, v):
        return case.run({"q": q, "k": k, "v": v}, counts=False, implementation="xla")[35].sum()

    for gradient in jax.grad(row_35, argnums=(1, 2))(case.q, case.k, case.v):
        touched = np.abs(np.asarray(gradient)).sum((1, 2)) > 0
        np.testing.assert_array_equal(touched, (np.arange(50) >= 20) & (np.arange(50) <= 35))


@settings(max_examples=4)
@given(data=st.data())
def test_any_batch_and_mask(data):
    """Random lengths, targets, contextual counts and masks.

    The capacity is fixed, so that shapes compile few times.
    """
    count = st.integers(0, 8)
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=4, max_size=4))
    mask = AttentionMask(
        data.draw(st.integers(0, 30)), data.draw(count), data.draw(count), data.draw(st.booleans())
    )
    case = Case(
        lengths, 170 - sum(lengths), 1, 8, 8, "float32", "both", seed=data.draw(st.integers(0, 99))
    )
    case.num_targets = np.array([data.draw(st.integers(0, n)) for n in lengths], np.int32)
    case.num_contextual = np.array(
        [data.draw(st.integers(0, n - m)) for n, m in zip(lengths, case.num_targets, strict=True)],
        np.int32,
    )
    want, got = (
        case.out_and_gradients(case.inputs(), mask=mask, implementation=i) for i in IMPLEMENTATIONS
    )
    for name in want:
        assert largest_error(got[name], want[name]) < 5e-6, name
    assert {name[2:] for name in want} - {"t"} == set(GRADIENTS)


def test_workloads_are_what_the_kernels_take():
    for workload in WORKLOADS.values():
        assert sum(workload.lengths) <= workload.rows
        assert workload.backward_flops == 2.5 * workload.forward_flops
    assert WORKLOADS["causal_d128_4x8192"].forward_flops == 4 * (8192 * 8193 // 2) * 4 * 4 * 128
    assert sum(WORKLOADS["jagged_d128_65536"].lengths) == 65536
    small = dataclasses.replace(WORKLOADS["ml1m"], lengths=(5, 9), capacity=16, max_length=20)
    arrays = small.arrays()
    out = hstu_attention(
        *(arrays[name] for name in "qkv"),
        small.offsets(),
        mask=small.mask,
        alpha=small.alpha,
        scale=small.scale,
        bias=small.relative_bias(),
    )
    assert (
        out.shape == arrays["g"].shape and np.isfinite(out).all() and not np.asarray(out[14:]).any()
    )


def test_timing_is_a_median_and_rates_follow():
    timing = Timing((3.0, 1.0, 2.0))
    assert timing.seconds == 2.0 and timing.tflops(4e12) == 2.0
    measured = device_time(
        jax.jit(lambda x: x + 1), jnp.zeros(8), repetitions=3, sample_seconds=0.001
    )
    assert len(measured.samples) == 3 and 0 < measured.seconds < 0.1
