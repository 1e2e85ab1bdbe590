"""`short` without a GPU: kernels in Triton's interpreter, tiles, promises, what it refuses."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import device, triton_call
from kernels.hstu_attention import AttentionSpec, hstu_attention, make_plan, prepare_plan
from kernels.hstu_attention.triton_short import attention as short
from kernels.hstu_attention.triton_short.attention import WholeTiles
from kernels.mask import AttentionMask
from tests.kernels.attention_contract import (
    BATCHES,
    MASKS,
    ROUND_OFF,
    Case,
    expected,
    largest_error,
)
from tests.kernels.triton_interpreter import interpreted


@pytest.fixture
def hopper(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "jax_triton" or find(name, *rest)
    )
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H200", (9, 0)))


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that are run in the interpreter."""
    names = []
    with interpreted(monkeypatch):
        launch = triton_call.launch

        def recorded(kernel, *arrays, **options):
            names.append(kernel.split(":")[1])
            return launch(kernel, *arrays, **options)

        monkeypatch.setattr(triton_call, "launch", recorded)
        yield names
        monkeypatch.setattr(triton_call, "launch", launch)


LOOPS, PARTS = ["forward", "backward"], ["forward", "backward_in_parts"]
HALVED = ["forward_halves", "backward_halves"]
MORE_BATCHES = {
    "long": ((3, 0, 150, 40), 70),
    "halves": ((65, 3, 0, 128, 64), 150),
}


@pytest.mark.parametrize(
    ("batch", "mask", "bias", "rescale", "counts", "kernels"),
    [
        ("mixed", "all", "both", True, True, LOOPS),
        ("mixed", "causal", None, False, True, LOOPS),
        ("one row each", "window", "time", False, True, LOOPS),
        ("all padding", "full rows", None, False, True, LOOPS),
        ("long", "all", "both", True, True, PARTS),
        ("long", "causal", "position", False, True, PARTS),
        ("halves", "causal", None, False, False, HALVED),
        ("halves", "causal", None, True, False, HALVED),
    ],
)
def test_contract(batch, mask, bias, rescale, counts, kernels, hopper, launched):
    case = Case(*(BATCHES | MORE_BATCHES)[batch], 2, 25, 20, "float16", bias)
    want, yardstick = expected(case.key, MASKS[mask], "float16", rescale, counts)
    scale = case.row_scale() if rescale else 1 / 64
    options = {"mask": MASKS[mask], "counts": counts, "scale": scale}
    got = case.out_and_gradients(case.inputs(), implementation="short", **options)
    assert launched == kernels
    assert set(got) == set(want)
    for name, x in got.items():
        assert np.isfinite(np.asarray(x)).all(), f"{name}: NaN of padding came through"
        allowed = 2 * largest_error(yardstick[name], want[name]) + ROUND_OFF["float16"]
        assert largest_error(x, want[name]) <= allowed, name
        assert x.ndim == 1 or not np.asarray(x[case.real :]).any(), name


@pytest.mark.parametrize(("longest", "rows"), [(1, 128), (50, 128), (64, 128), (65, 128), (9, 16)])
def test_tiles_hold_whole_sequences(longest, rows):
    lengths = np.random.default_rng(0).integers(0, longest + 1, 40)
    lengths[7:11], lengths[20] = 0, longest
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    size = int(offsets[-1]) + 150

    @jax.jit
    def tiles_of(offsets):
        return make_plan(AttentionMask(), offsets, size, longest=longest).find(WholeTiles(rows))

    tiles = np.asarray(tiles_of(offsets))
    assert tiles[0] == 0 and tiles[-1] == offsets[-1] and set(tiles) <= set(offsets)
    assert (np.diff(tiles) >= 0).all() and np.diff(tiles).max() <= rows
    assert len(tiles) <= 2 * size // rows + 2 or longest > rows // 2


def test_no_sequences(hopper):
    plan = make_plan(AttentionMask(), np.zeros(1, np.int32), 128, longest=100)
    x = jnp.full((128, 1, 8), jnp.nan, jnp.float16)
    out = hstu_attention(
        x, x, x, np.zeros(1, np.int32), alpha=1, scale=1, plan=plan, implementation="short"
    )
    assert not np.asarray(out).any()


@pytest.mark.parametrize(
    ("longest", "mask", "counts", "halves"),
    [
        (65, AttentionMask(), {}, True),
        (64, AttentionMask(), {}, False),  # two sequences in a tile
        (100, AttentionMask(full_rows=9, prefix=5), {}, True),  # which say nothing without a window
        (100, AttentionMask(window=100), {}, False),
        (100, AttentionMask(), {"num_targets": [0, 1]}, False),
        (100, AttentionMask(), {"num_contextual": [0, 1]}, False),
    ],
)
def test_halves_are_for_one_causal_sequence_a_tile(longest, mask, counts, halves):
    counts = {name: np.array(count) for name, count in counts.items()}
    plan = make_plan(mask, np.array([0, 60, 100]), 128, longest=longest, **counts)
    assert short.in_halves(plan) is halves
    assert not short.in_halves(plan.for_rows(jnp.array([3])))


def test_a_broken_promise_is_named():
    with pytest.raises(ValueError, match="sequence 1 has 9 rows, more than longest = 8"):
        make_plan(AttentionMask(), np.array([0, 3, 12]), 12, longest=8)


def test_refuses_with_a_reason(hopper):
    spec = AttentionSpec("bfloat16", 2, 64, 64, longest=128)
    assert short.unsupported(spec) is None
    assert short.unsupported(spec._replace(longest=256, biased=True)) is None
    for changed, reason in (
        (dict(longest=None), "promises None.*make_plan"),
        (dict(longest=129), "at most 128 rows.*the plan promises 129"),
        (dict(v_width=200), "V = 200"),
        (dict(dtype="float32"), "got float32"),
        (dict(biased=True, deterministic=True), "deterministic"),
    ):
        assert re.search(reason, short.unsupported(spec._replace(**changed)) or "")


def test_the_default_takes_it_where_sequences_are_short(hopper):
    """The plan knows, whatever the spec says; a call without one asks concrete offsets."""
    offsets, spec = np.array([0, 60, 100]), AttentionSpec("bfloat16", 1, 64, 64)
    for longest, stored in ((100, True), (300, False), (None, False)):

        def planned(offsets, longest=longest):
            return prepare_plan(make_plan(AttentionMask(), offsets, 128, longest=longest), spec)

        plan = jax.eval_shape(planned, offsets)
        assert (WholeTiles(128) in plan.stored_keys) is stored
    x = jnp.zeros((1000, 1, 8), jnp.float16)
    with pytest.raises(NotImplementedError, match="the plan promises 900"):
        hstu_attention(x, x, x, np.array([0, 900]), alpha=1, scale=1, implementation="short")
