"""`mosaic` on a Hopper GPU: the attention contract, repeatable gradients, 65536 rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hstu_attention import hstu_attention, make_plan
from kernels.hstu_attention.mosaic import schedule
from kernels.mask import AttentionMask
from tests.kernels.attention_contract import (
    MASKS,
    ROUND_OFF,
    AttentionContract,
    Case,
    largest_error,
    plain,
)


class TestMosaic(AttentionContract):
    implementation = "mosaic"
    dtypes = ("bfloat16", "float16")
    widths = ((2, 64, 64), (1, 128, 128), (2, 256, 256), (1, 64, 128), (1, 256, 64))
    supports_bias = False
    repeatable_gradients = False  # dQ is summed in memory


class TestMosaicWidth128(TestMosaic):
    widths = ((2, 128, 128),)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("mask", [AttentionMask(), AttentionMask(window=100)], ids=["", "window"])
def test_items_in_fixed_turns(mask, width):
    """Plans whose tiles are all light, NaN in their padding; the same bits on a second run."""
    lengths = np.random.default_rng(0).integers(0, 200, 60)
    case = Case(lengths, 300, 2, width, width, "bfloat16")
    case.num_targets = case.num_contextual = None
    assert schedule.in_turns(make_plan(mask, case.offsets, case.rows))
    inputs, options = case.inputs(), {"mask": mask}
    got, again = (
        case.out_and_gradients(inputs, implementation="mosaic", deterministic=True, **options)
        for _ in range(2)
    )
    wide = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    want = case.out_and_gradients(wide, implementation="reference", **options)
    yardstick = plain(case, inputs, mask, "bfloat16")
    for name, x in got.items():
        host = np.asarray(x, np.float32)
        np.testing.assert_array_equal(host, np.asarray(again[name], np.float32))
        assert not host[case.real :].any(), name
        allowed = 2 * largest_error(yardstick[name], want[name]) + ROUND_OFF["bfloat16"]
        assert largest_error(x, want[name]) <= allowed, name


def random_inputs(rows, heads, width, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, (rows, heads, width), jnp.bfloat16) for key in keys]


@pytest.mark.parametrize("width", [64, 128, 256])
def test_deterministic_gradients_have_the_same_bits(width):
    offsets = np.array([0, 700, 701, 1900], np.int32)
    q, k, v, g = random_inputs(2000, 2, width)
    g = g.at[1900:].set(0)
    options = {
        "mask": MASKS["full rows"],
        "implementation": "mosaic",
        "alpha": 0.1,
        "scale": 1 / 64,
    }

    def run(deterministic):
        def attend(*qkv):
            return hstu_attention(*qkv, offsets, deterministic=deterministic, **options)

        return jax.jit(lambda g: jax.vjp(attend, q, k, v)[1](g))(g)

    first, second, other = run(True), run(True), run(False)
    for a, b, c in zip(first, second, other, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        assert distance(a, c) < 2e-3


def distance(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize(
    "mask",
    [AttentionMask(), AttentionMask(window=256, full_rows=256)],
    ids=["causal", "semi-local"],
)
def test_65536_rows(mask):
    """Some rows and keys in float64 on the host: the compiler's hazards show in long buffers."""
    rows, length, width, alpha, scale = 65536, 16384, 128, 128**-0.5, 1 / 16384
    q, k, v, g = random_inputs(rows, 1, width)
    offsets = np.arange(0, rows + 1, length, dtype=np.int32)

    def attend(*qkv):
        return hstu_attention(
            *qkv, offsets, mask=mask, alpha=alpha, scale=scale, implementation="mosaic"
        )

    out, (dq, dk, dv) = jax.jit(lambda g: (attend(q, k, v), jax.vjp(attend, q, k, v)[1](g)))(g)
    q, k, v, g = (np.asarray(x, np.float64)[:, 0] for x in (q, k, v, g))
    lo0, hi0, lo1, hi1 = (np.asarray(x) for x in mask.intervals(offsets, rows))
    place = np.arange(rows)

    def silu(x):
        gate = 1 / (1 + np.exp(-x))
        return x * gate, gate * (1 + x * (1 - gate))

    for at in (0, 5000, 16383, 16384, 40001, 65535):
        seen = (
            ((place >= lo0[at]) & (place < hi0[at]))
            | ((place >= lo1[at]) & (place < hi1[at]))
            | (place == at)
        )
        weight, slope = silu(alpha * k[seen] @ q[at])
        assert distance(out[at, 0], scale * weight @ v[seen]) < 5e-3
        assert distance(dq[at, 0], alpha * scale * (slope * (v[seen] @ g[at])) @ k[seen]) < 5e-3
        seers = ((lo0 <= at) & (at < hi0)) | ((lo1 <= at) & (at < hi1)) | (place == at)
        weight, slope = silu(alpha * q[seers] @ k[at])
        assert distance(dv[at, 0], scale * weight @ g[seers]) < 5e-3
        assert distance(dk[at, 0], alpha * scale * (slope * (g[seers] @ v[at])) @ q[seers]) < 5e-3
