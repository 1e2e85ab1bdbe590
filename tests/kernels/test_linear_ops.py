"""`norm_linear` and `gated_linear`: the contract on a CPU, and what is refused."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from kernels import device, triton_call
from kernels.gated_linear import gated_linear
from kernels.norm_linear import norm_linear
from kernels.norm_linear.mosaic import product
from tests.kernels.linear_contract import EPS, FORMS, PRECISIONS, Inputs, LinearContract


class TestXla(LinearContract):
    implementation = "xla"


def test_no_rows():
    got = Inputs(0, 24, (8, 8, 16, 16), "bfloat16", "production").of("xla", "same", "same")
    assert got["parts"].shape == (0, 48) and not got["d w"].any()


def test_bad_input():
    x, w = jnp.zeros((4, 8)), jnp.zeros((8, 16))
    cases = {
        "widths=(8, 4) must be positive and add up to the 16": lambda: norm_linear(
            x, None, w, widths=(8, 4), eps=EPS
        ),
        "gradient='fp8' must be 'same', or 'fp8' beside precision='fp8'": lambda: norm_linear(
            x, None, w, widths=(16,), eps=EPS, gradient="fp8"
        ),
        "w [8, 8] must have 24 rows": lambda: gated_linear(
            x, x, None, w[:, :8], None, x, eps=EPS, joined=True
        ),
        "the residual bfloat16 the dtype of u": lambda: gated_linear(
            x, x, None, w[:, :8], None, x.astype(jnp.bfloat16), eps=EPS, joined=False
        ),
        "no implementation is called 'cublas'": lambda: norm_linear(
            x, None, w, widths=(16,), eps=EPS, implementation="cublas"
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H200", (9, 0)))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "jax_triton" or find(name, *rest)
    )


def shapes_of(rows, width, widths, dtype="bfloat16", **options):
    x = jax.ShapeDtypeStruct((rows, width), dtype)
    w = jax.ShapeDtypeStruct((width, sum(widths)), "float32")
    return jax.eval_shape(
        lambda x, w: norm_linear(x, None, w, widths=widths, eps=EPS, **options), x, w
    )


def test_what_mosaic_refuses(h200, monkeypatch):
    cases = {
        "rows in multiples of 128 and widths of 256, got 100 rows": (100, 256, (256,)),
        "widths of 256, got 128 rows of (256, 128)": (128, 256, (128,)),
        "1, 2 or 4 parts, got (256, 256, 256)": (128, 256, (256, 256, 256)),
    }
    for message, shape in cases.items():
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            shapes_of(*shape, implementation="mosaic")
        parts, _ = shapes_of(*shape, implementation=("mosaic", "xla"))
        assert [part.shape for part in parts] == [(shape[0], each) for each in shape[2]]
    with pytest.raises(NotImplementedError, match="bfloat16 or float16, got float32"):
        shapes_of(128, 256, (256,), "float32", implementation="mosaic")
    with pytest.raises(NotImplementedError, match="not in fp8; use 'mosaic' or 'xla'"):
        shapes_of(128, 256, (256,), precision="fp8", implementation="triton")
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA A100", (8, 0)))
    with pytest.raises(NotImplementedError, match="mosaic needs a Hopper GPU.*'NVIDIA A100'"):
        shapes_of(128, 256, (256,), implementation="mosaic")


@pytest.mark.parametrize("precision", PRECISIONS, ids="-".join)
@pytest.mark.parametrize("form", FORMS)
def test_what_mosaic_hands_on(h200, monkeypatch, form, precision):
    """The launches of a training step, which give ones: every value has a gradient of its kind."""
    products = []

    def launch(kernel, arrays, outs, **options):
        return [jnp.ones(x.shape, x.dtype) for x in outs]

    def multiply(parts, w_YX, *_, widths, dtype):
        assert sum(part.shape[1] for part in parts) == w_YX.shape[1]
        assert sum(widths) == w_YX.shape[0] and {part.dtype for part in parts} == {w_YX.dtype}
        products.append((w_YX.dtype.name, len(parts), len(widths)))
        return [jnp.ones((parts[0].shape[0], each), dtype) for each in widths]

    monkeypatch.setattr(triton_call, "launch", launch)
    monkeypatch.setattr(product, "product", multiply)
    case = Inputs(128, 256, (256, 256, 512, 512), "bfloat16", form)
    got, want = (case.of(name, *precision) for name in ("mosaic", "xla"))
    assert {name: (x.shape, x.dtype) for name, x in got.items()} == {
        name: (x.shape, x.dtype) for name, x in want.items()
    }
    small, back = ("float8_e4m3fn" if one == "fp8" else "bfloat16" for one in precision)
    parts = 3 if case.joined and small == "bfloat16" else 1
    expected = [(small, 1, 4), (back, 4 if back == "bfloat16" else 1, 1), (small, parts, 1)]
    expected += [(back, 1, 1)] * (back != "bfloat16")  # else cuBLAS's
    assert sorted(products) == sorted(expected)
