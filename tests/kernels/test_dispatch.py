"""Who runs: names, order, the error that tells why nothing fits; what no implementation takes."""

import importlib
import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import device, dispatch
from kernels.hstu_attention import RelativeBias, hstu_attention, implementations, make_plan
from kernels.hstu_attention.mosaic import attention as mosaic
from kernels.mask import AttentionMask


def module(result, **refuses):
    def run():
        if isinstance(result, Exception):
            raise result
        return result

    made = types.ModuleType("made")
    made.unsupported = lambda spec: refuses.get(spec)
    made.run = run
    return made


@pytest.fixture
def modules(monkeypatch):
    made = {
        "narrow": module(0, wide="K = 50; it takes 64 or 128"),
        "absent": module(NotImplementedError("no GPU")),
        "broken": module(RuntimeError("a bug")),
        "good": module(42),
    }
    for name, x in made.items():
        monkeypatch.setitem(sys.modules, f"made_{name}", x)
    return {name: f"made_{name}" for name in made}


def call(modules, implementation, order=("narrow", "good")):
    with dispatch.record() as choices:
        op = dispatch.Op("op", modules, {"cpu": order})
        result = op.call(implementation, "wide", lambda m: m.run())
    return result, [choice.implementation for choice in choices]


def test_none_moves_on_at_not_implemented_only(modules):
    assert call(modules, None) == (42, ["good"])
    with pytest.raises(RuntimeError, match="a bug"):
        call(modules, None, order=("broken", "good"))


def test_a_sequence_is_an_order(modules):
    assert call(modules, ["absent", "good", "broken"]) == (42, ["good"])


def test_a_name_never_falls_back(modules):
    with pytest.raises(NotImplementedError, match="K = 50"):
        call(modules, "narrow")


def test_nothing_fits_lists_every_reason(modules):
    with pytest.raises(NotImplementedError) as error:
        call(modules, None, order=("narrow", "absent"))
    assert "narrow: K = 50; it takes 64 or 128" in str(error.value) and "absent: no GPU" in str(
        error.value
    )


def test_unknown_and_empty_names(modules):
    with pytest.raises(ValueError, match="'fast'; there are narrow, absent, broken, good"):
        call(modules, "fast")
    with pytest.raises(ValueError, match="'fast'"):
        call(modules, ["good", "fast"])
    with pytest.raises(ValueError, match="empty sequence"):
        call(modules, [])


def test_records_nest(modules):
    with dispatch.record() as outer:
        assert call(modules, "good") == (42, ["good"])
    assert outer == [dispatch.Choice("op", "good")]


def test_the_first_supported_module(modules):
    """Nothing runs: what is made beforehand is made by the module that would."""
    op = dispatch.Op("op", modules, {"cpu": ("narrow", "broken", "good")})
    assert op.first_supported(None, "wide") is sys.modules["made_broken"]
    assert op.first_supported("narrow", "wide") is None
    assert op.first_supported("narrow", "slim") is sys.modules["made_narrow"]
    with pytest.raises(ValueError, match="'fast'"):
        op.first_supported("fast", "wide")


def test_platforms_without_an_order_take_xla(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Device("rocm", "a GPU", None))
    with dispatch.record() as choices:
        attend()
    assert choices == [("hstu_attention", "xla")]


def test_device_is_the_cpu_here():
    assert device.current().platform == "cpu"
    assert device.current().compute_capability is None and not device.current().is_hopper


ROWS = 6
GOOD = {"q": (ROWS, 1, 4), "k": (ROWS, 1, 4), "v": (ROWS, 1, 2)}


def attend(shapes=(), dtypes=(), offsets=(0, 2, 5), scale=0.1, **options):
    shapes, dtypes = (
        {**GOOD, **dict(shapes)},
        {"q": "float32", "k": "float32", "v": "float32", **dict(dtypes)},
    )
    arrays = [jnp.ones(shapes[n], dtypes[n]) for n in "qkv"]
    return hstu_attention(*arrays, np.array(offsets), alpha=1.0, scale=scale, **options)


def test_default_on_cpu_is_xla():
    with dispatch.record() as choices:
        attend()
    assert choices == [("hstu_attention", "xla")]


TIMES = jnp.zeros(ROWS, jnp.int32)
BAD = {
    "dtype mix": ({"dtypes": {"v": "bfloat16"}}, "mix dtypes float32, float32, bfloat16"),
    "no head axis": (
        {"shapes": {"q": (ROWS, 4)}},
        r"q must be \[rows, H, width\], got shape \(6, 4\)",
    ),
    "integers": ({"dtypes": {"k": "int32"}}, "k has dtype int32; cast it"),
    "widths": (
        {"shapes": {"k": (ROWS, 1, 5)}},
        r"q \(6, 1, 4\) and k \(6, 1, 5\) must have the same shape",
    ),
    "offsets of rank 2": (
        {"offsets": ((0, 2, 5),)},
        r"offsets must be int32\[B\+1\], got shape \(1, 3\)",
    ),
    "heads": ({"shapes": {"v": (ROWS, 2, 2)}}, "must share rows and heads"),
    "falling offsets": ({"offsets": (0, 4, 3)}, "never fall"),
    "offsets from 1": ({"offsets": (1, 4, 5)}, "start at 0"),
    "offsets beyond T": ({"offsets": (0, 2, 9)}, "end at 9 but the buffers have only 6 rows"),
    "targets": ({"num_targets": np.array([0, 4])}, "sequence 1 has 3 rows but 4 targets"),
    "targets and contextual": (
        {"num_targets": np.array([1, 2]), "num_contextual": np.array([2, 0])},
        "sequence 0 has 2 rows but 3 targets",
    ),
    "negative targets": (
        {"num_targets": np.array([0, -1])},
        "num_targets must be >= 0, got -1 for sequence 1",
    ),
    "too few counts": (
        {"num_contextual": np.array([1])},
        r"num_contextual must be int32\[B\] with B = 2",
    ),
    "scale": ({"scale": jnp.ones(3)}, r"one value a row, \[6\], got shape \(3,\)"),
    "no tables": ({"bias": RelativeBias()}, "needs position_table or time_table"),
    "even table": ({"bias": RelativeBias(jnp.ones(4))}, "odd length 2N - 1, got 4"),
    "integer table": (
        {"bias": RelativeBias(jnp.ones(3, jnp.int32))},
        "must be one-dimensional and floating",
    ),
    "no times": (
        {"bias": RelativeBias(None, jnp.ones(9), TIMES)},
        r"query_timestamps must be int32\[6\] seconds, got None",
    ),
    "float times": (
        {"bias": RelativeBias(None, jnp.ones(9), TIMES * 1.0, TIMES)},
        "timestamps must be int32",
    ),
    "plan of other rows": (
        {"plan": make_plan(AttentionMask(), np.array([0, 2]), 4)},
        "plan was made for 4 rows, q has 6",
    ),
    "plan of another mask": (
        {"plan": make_plan(AttentionMask(window=1), np.array([0, 2, 5]), 6)},
        "pass the same mask",
    ),
    "unknown name": ({"implementation": "cuda"}, "no implementation is called 'cuda'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        attend(**options)


def test_counts_are_clamped_where_offsets_are_traced():
    """A traced batch cannot be checked; too many targets then means: all targets."""

    @jax.jit
    def traced(offsets, num_targets):
        x = jnp.ones((ROWS, 1, 4))
        return hstu_attention(x, x, x, offsets, alpha=1.0, scale=1.0, num_targets=num_targets)

    got = traced(np.array([0, 2, 5]), np.array([2, 7]))
    np.testing.assert_allclose(
        got[:5, 0, 0], jax.nn.silu(4.0) * np.ones(5), rtol=1e-6
    )  # targets see themselves only


def test_deterministic_reaches_the_implementation(monkeypatch):
    seen = []
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H200", (9, 0)))
    monkeypatch.setattr(
        mosaic,
        "attention",
        lambda q, k, v, plan, **options: seen.append(options["deterministic"]) or v,
    )
    x, offsets = jnp.ones((4, 1, 64), "bfloat16"), np.array([0, 4], np.int32)
    with dispatch.record() as choices:
        for wanted in (False, True):
            hstu_attention(
                x,
                x,
                x,
                offsets,
                alpha=0.1,
                scale=1.0,
                implementation="mosaic",
                deterministic=wanted,
            )
    assert seen == [False, True]
    assert {choice.implementation for choice in choices} == {"mosaic"}
    with pytest.raises(NotImplementedError, match="deterministic"):
        hstu_attention(
            x, x, x, offsets, alpha=0.1, scale=1.0, implementation="xla", deterministic=True
        )


@pytest.mark.parametrize("name", implementations())
def test_every_implementation_takes_the_same_keywords(name):
    parameters = inspect.signature(
        importlib.import_module(implementations()[name]).attention
    ).parameters
    assert [p for p, x in parameters.items() if x.kind is x.KEYWORD_ONLY] == [
        "alpha",
        "scale",
        "bias",
        "deterministic",
    ]
