"""Every Hopper kernel lowers to CUDA on a machine without a GPU.

What no longer lowers, or no longer fits shared memory, fails here.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from kernels import device
from kernels.hstu_attention import AttentionSpec, make_plan, tuning
from kernels.hstu_attention.mosaic import attention as mosaic
from kernels.hstu_attention.workloads import WORKLOADS
from kernels.mask import AttentionMask

HOPPER = device.Device("gpu", "some GPU", (9, 0))


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: HOPPER)


MASKS = {
    "causal": AttentionMask(),
    "full rows": AttentionMask(window=100, full_rows=50),
    "all": AttentionMask(window=100, full_rows=50, prefix=9, context_sink=False),
}


def lower(
    rows,
    heads,
    k_width,
    v_width,
    mask,
    dtype="bfloat16",
    batch=2,
    row_scale=False,
    deterministic=False,
    backward=True,
    counted=True,
):
    """Text of the lowered module. counted: with numbers of targets and of contextual tokens."""

    def run(q, k, v, g, scale, offsets, targets, contextual):
        counts = (targets, contextual) if counted else (None, None)
        spec = AttentionSpec(dtype, heads, k_width, v_width, deterministic=deterministic)
        plan = mosaic.prepare(make_plan(mask, offsets, rows, *counts), spec)

        def attend(q, k, v):
            return mosaic.attention(
                q, k, v, plan, alpha=0.1, scale=scale, bias=None, deterministic=deterministic
            )

        if not backward:
            return attend(q, k, v)
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(g)

    wide, narrow = (
        jax.ShapeDtypeStruct((rows, heads, k_width), dtype),
        jax.ShapeDtypeStruct((rows, heads, v_width), dtype),
    )
    counts = jax.ShapeDtypeStruct((batch,), jnp.int32)
    scale = jax.ShapeDtypeStruct((rows,) if row_scale else (), jnp.float32)
    arguments = (
        wide,
        wide,
        narrow,
        narrow,
        scale,
        jax.ShapeDtypeStruct((batch + 1,), jnp.int32),
        counts,
        counts,
    )
    return jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text):
    return text.count("custom_call @mosaic_gpu_v2")


def passes_of(mask):
    """Kernels: forward, backward (two where there is a window), and after each the sums."""
    return 4 if mask.window is None else 6


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads(name):
    """As they are measured; nothing is summed where no tile can be heavy."""
    w = WORKLOADS[name]
    if name.startswith("ml1m"):
        assert mosaic.unsupported(w.spec), "it has a bias, and float32"
        return
    assert mosaic.unsupported(w.spec) is None
    text = lower(
        w.rows, w.heads, w.k_width, w.v_width, w.mask, w.dtype, batch=len(w.lengths), counted=False
    )
    short, light = w.rows < tuning.LONG * len(w.lengths), not w.mask.full_rows
    expected = 3 if light and (short or w.mask.window is not None) else passes_of(w.mask)
    assert kernels(text) == expected


@pytest.mark.parametrize(
    ("k_width", "v_width"), [(64, 128), (128, 64), (64, 256), (256, 128), (256, 256)]
)
def test_widths(k_width, v_width):
    for mask in (MASKS["causal"], MASKS["full rows"]):
        assert kernels(lower(1500, 2, k_width, v_width, mask, "float16")) == passes_of(mask)


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    assert kernels(lower(1500, 2, 128, 128, MASKS[mask], row_scale=True)) == passes_of(MASKS[mask])


@pytest.mark.parametrize("width", mosaic.WIDTHS)
def test_deterministic(width):
    assert kernels(lower(1500, 2, width, width, MASKS["causal"], deterministic=True)) == 6


SHAPES = {"short": (1500, 8), "long": (4000, 2)}  # rows, sequences


def test_measured_sizes(monkeypatch):
    """Every entry of the table, on the device that it is for."""
    found = []
    monkeypatch.setattr(
        tuning,
        "find",
        lambda *call: found.append(tuning.table().get(tuning.key(*call))) or found[-1],
    )
    for key in (key for key in tuning.table() if key.implementation == "mosaic"):
        monkeypatch.setattr(
            device, "current", lambda key=key: device.Device("gpu", key.device, (9, 0))
        )
        rows, sequences = SHAPES[key.length]
        mask = MASKS["causal" if key.mask == "causal" else "full rows"]
        passes = tuning.table()[key]["backward"].get("passes", 1)
        assert (
            kernels(lower(rows, 2, key.width, key.width, mask, batch=sequences)) == 2 + 2 * passes
        )
        assert tuning.table()[key] in found, "the entry is one that calls take"


def test_memory_is_linear_in_rows():
    text = lower(65536, 1, 64, 64, AttentionMask(window=64), backward=False)
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    assert (
        max(math.prod(int(n) for n in shape.rstrip("x").split("x")) for shape in shapes)
        < 65536 * 1024
    )
