"""`layer_norm` and `gate`: the contract on a CPU, and what is refused.

`triton` runs in `make test-gpu`; here its launches are looked at.
"""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import device, rowwise, triton_call
from kernels.gate import gate
from kernels.layer_norm import layer_norm, norm_and_residual
from tests.kernels.row_contract import EPS, FORMS, RowContract, Rows


class TestXla(RowContract):
    implementation = "xla"


class TestReference(RowContract):
    implementation = "reference"
    widths = (50,)


def test_bad_input():
    x = jnp.zeros((4, 8), jnp.bfloat16)
    one = jnp.ones(8)
    cases = {
        "layer_norm takes weight and bias or none of them, got no bias": lambda: layer_norm(
            x, one, eps=EPS
        ),
        "gate takes weight and bias or none of them, got no weight": lambda: gate(
            x, x, None, one, eps=EPS, joined=True
        ),
        "u bfloat16[4, 8] and a float32[4, 8] must have one": lambda: gate(
            x, x.astype(jnp.float32), eps=EPS, joined=True
        ),
        "mask of dropout must be [4, 24] as the result, got (4, 8)": lambda: gate(
            x, x, keep_TZ=x > 0, eps=EPS, joined=True
        ),
        "rate=1.0 must be in [0, 1)": lambda: gate(x, x, eps=EPS, joined=True, rate=1.0),
        "no implementation is called 'cuda'": lambda: layer_norm(x, eps=EPS, implementation="cuda"),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_no_gpu():
    x = jnp.zeros((4, 8))
    for call in (layer_norm, norm_and_residual):
        with pytest.raises(NotImplementedError, match="NVIDIA GPU.*'cpu'.*implementation='xla'"):
            call(x, eps=EPS, implementation="triton")


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H200", (9, 0)))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "jax_triton" or find(name, *rest)
    )


def test_what_triton_refuses(h200):
    wide, double = jnp.zeros((1, 8193)), jax.ShapeDtypeStruct((1, 8), jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="1 to 8192, got 8193; implementation='xla'"):
        layer_norm(wide, eps=EPS, implementation="triton")
    assert layer_norm(wide, eps=EPS, implementation=("triton", "xla")).shape == wide.shape
    with pytest.raises(NotImplementedError, match="or float16, got float8_e4m3fn"):
        jax.eval_shape(lambda x: gate(x, x, eps=EPS, joined=True, implementation="triton"), double)


@pytest.mark.parametrize("width", [50, 512, 4096])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_handed_to_the_kernels(h200, monkeypatch, form, width):
    """The launches of a training step: what goes in and out, and how the rows are shared."""
    launches = {}

    def launch(kernel, arrays, outs, *, programs, warps, stages, constants):
        launches[kernel.split(".", 1)[1]] = (arrays, outs, programs, warps, constants)
        return [jnp.ones(x.shape, x.dtype) for x in outs]

    monkeypatch.setattr(triton_call, "launch", launch)
    case = Rows(1000, width, "bfloat16", form)
    results = case.results("triton")
    assert {x.dtype for name, x in results.items() if "d " in name} <= {jnp.dtype("float32")}
    assert launches.keys() == {
        f"{folder}.triton.kernels:{op}_{name}"
        for folder, op in (("layer_norm", "norm"), ("gate", "gate"))
        for name in ("forward", "backward")
    }
    for kernel, (arrays, outs, programs, warps, constants) in launches.items():
        block, padded = constants["BR"], constants["W"]
        assert padded >= width and padded & (padded - 1) == 0
        assert block * padded <= 32 * 32 * warps, "a thread holds at most 32 entries of a block"
        blocks = -(-1000 // block)
        backward = kernel.endswith("backward")
        assert programs == (min(blocks, rowwise.PROGRAMS) if backward else blocks)
        assert constants["AFFINE"] == case.affine
        if backward:
            assert [x.shape for x in outs[-2:]] == [(programs, width)] * 2
        if "gate" in kernel:
            assert (constants["JOINED"], constants["MASKED"]) == (case.joined, case.rate > 0)
            assert case.keep is None or arrays[4].dtype == jnp.int8
            np.testing.assert_allclose(constants["FACTOR"], 1 / (1 - case.rate))
        else:
            assert constants.get("BESIDE", backward) == backward
