"""`triton` of the softmax losses, as far as a machine without a GPU can check it.

What it refuses, what it hands to its kernels, and that they compile for Hopper and fit its shared
memory; `make test-gpu` runs them. Needs Triton, but no GPU.
"""

import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton.runtime import JITFunction

from kernels import device, triton_call
from kernels.full_softmax import full_softmax
from kernels.full_softmax.triton import tiles
from kernels.hstu_attention.triton.sizes import shared_kib
from kernels.sampled_softmax import Negatives, sampled_softmax
from kernels.sampled_softmax.triton import chunks
from tests.kernels.softmax_contract import Rows
from tests.kernels.triton_compiler import HOPPER, shared_memory, triton_cache  # noqa: F401

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32"}


@pytest.fixture
def launches(monkeypatch):
    """On an H100 whose kernels do nothing: what each launch was given, checked by its signature."""
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H100", HOPPER))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "jax_triton" or find(name, *rest)
    )
    seen = {}

    def launch(kernel, arrays, outs, *, programs, warps, stages, constants):
        module, name = kernel.split(":")
        function = getattr(importlib.import_module(module), name)
        assert isinstance(function, JITFunction) and programs > 0
        given = [one for one in function.arg_names if one not in constants]
        assert set(constants) <= set(function.arg_names) and len(given) == len(arrays) + len(outs)
        pointers = {
            one: POINTERS[x.dtype.name] for one, x in zip(given, (*arrays, *outs), strict=True)
        }
        seen[name] = (
            function,
            constants,
            pointers,
            tiles.SoftmaxTiles(0, 0, warps, stages),
            programs,
        )
        return [jnp.ones(x.shape, x.dtype) for x in outs]

    monkeypatch.setattr(triton_call, "launch", launch)
    return seen


def loss_of(rows, kind, **options):
    inputs = (rows.q, rows.e, rows.positive, rows.weight)
    if kind == "full":
        return full_softmax(*inputs, implementation="triton", **options)[0]
    return sampled_softmax(*inputs, rows.negative, implementation="triton", **options)[0]


@pytest.mark.parametrize(("width", "dtype"), [(50, "float32"), (50, "bfloat16"), (128, "bfloat16")])
@pytest.mark.parametrize("kind", ["sampled", "full"])
def test_kernels_compile_and_fit(launches, kind, width, dtype):
    rows = Rows(70, 300, width, 33, dtype)
    with jax.default_matmul_precision("tensorfloat32"):
        loss = loss_of(rows, kind, **({} if kind == "full" else {"shift_I": rows.shift}))
    assert np.isfinite(loss)
    assert set(launches) == {"rows", "items"}
    for function, constants, pointers, sizes, _ in launches.values():
        assert (
            shared_memory(function, constants, pointers, sizes, HOPPER) <= shared_kib(HOPPER) * 1024
        )


def test_places_of_items(launches, monkeypatch):
    """Items get their places in a chunk, in order; rows that do not count are none's."""
    given = []
    monkeypatch.setattr(
        triton_call,
        "launch",
        lambda _, arrays, outs, **options: given.append(arrays) or [arrays[4]],
    )
    id_CX = jnp.asarray([[3, 1, 3], [3, 5, 1], [2, 0, 2], [1, 1, 4]], jnp.int32)
    weight_C, q_CD, de_ID = jnp.asarray([1.0, 1.0, 0.0, 1.0]), jnp.ones((4, 8)), jnp.ones((6, 8))
    chunks.add_to_items(q_CD, id_CX, jnp.ones((4, 3)), weight_C, de_ID)
    ((_, order_N, _, begin_I, _),) = given
    places = [order_N[begin_I[i] : begin_I[i + 1]].tolist() for i in range(6)]
    assert places == [[], [1, 5, 9, 10], [], [0, 2, 3], [11], [4]]


def test_what_it_refuses(launches):
    wide = Rows(8, 5, 2000, 3, "float32")
    for kind in ("sampled", "full"):
        with pytest.raises(NotImplementedError, match="got D = 2000.*implementation='xla'"):
            loss_of(wide, kind)
    rows = Rows(8, 5, 16, 3, "float32")
    rows.negative = Negatives(rows.negative, 3, lambda x, _: x, rows_per_draw=4)
    with pytest.raises(NotImplementedError, match="4 rows share.*them.*implementation='xla'"):
        loss_of(rows, "sampled")


def test_an_older_gpu(launches, monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA A10G", (8, 6)))
    rows = Rows(8, 5, 16, 3, "float32")
    loss_of(rows, "sampled")
    with pytest.raises(NotImplementedError, match="shared memory of sm90.*has 99 KiB"):
        loss_of(rows, "full")


@pytest.mark.parametrize(("tiles_of_items", "blocks", "shares"), [(31, 288, 9), (300, 288, 1)])
def test_shares_of_rows(tiles_of_items, blocks, shares):
    assert tiles.shares_of_rows(tiles_of_items, blocks) == shares
    assert tiles.shares_of_rows(tiles_of_items, 1) == 1
