"""`triton`, as far as a machine without a GPU can check it.

It refuses with reason and remedy, its table covers all it takes, and what it hands to a kernel.
`test_triton_compiles.py` compiles its kernels, `make test-gpu` runs them: jax-triton is no
requirement of CPU installs.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import device, triton_call
from kernels.hstu_attention import AttentionSpec, make_plan, tuning
from kernels.hstu_attention.plan import TileSizes
from kernels.hstu_attention.triton import attention as triton
from kernels.hstu_attention.triton import sizes as triton_sizes
from kernels.mask import AttentionMask
from tests.kernels.attention_contract import BATCHES, Case


@pytest.fixture
def a100(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA A100", (8, 0)))


def case(**options):
    return Case(
        *BATCHES["mixed"], **{"heads": 1, "k_width": 8, "v_width": 8, "dtype": "float32", **options}
    )


def run(case):
    return case.run(case.inputs(), implementation="triton")


def test_no_gpu():
    with pytest.raises(NotImplementedError, match="NVIDIA GPU.*'cpu'.*implementation='xla'"):
        run(case())


def test_too_old_a_gpu(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "Tesla V100", (7, 0)))
    with pytest.raises(NotImplementedError, match="sm80.*'Tesla V100'"):
        run(case())


def test_jax_triton_not_installed(a100, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "jax_triton" else find(name, *rest),
    )
    with pytest.raises(NotImplementedError, match="needs jax_triton.*requirements-cuda.txt"):
        run(case())


def test_heads_too_wide(a100):
    with pytest.raises(NotImplementedError, match="1 to 256 here, got K = 8, V = 257"):
        run(case(v_width=257))


def test_heads_too_wide_for_a_small_gpu(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA L4", (8, 9)))
    with pytest.raises(NotImplementedError, match="1 to 128 here, got K = 129, V = 8"):
        run(case(k_width=129))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_width_has_sizes(dtype, capability):
    for width in range(1, triton_sizes.widest(capability) + 1):
        sizes = triton_sizes.heuristic(capability, AttentionSpec(dtype, 1, width, 1))
        assert sizes == triton_sizes.heuristic(capability, AttentionSpec(dtype, 1, 1, width))
        blocks = [block for tiling in sizes for block in tiling[:2]]
        assert all(block >= 16 and block & (block - 1) == 0 for block in blocks), (
            "Triton's products take powers of two from 16 on"
        )


MEASURED = [key for key in tuning.table() if key.implementation == "triton"]


@pytest.mark.parametrize("key", MEASURED, ids=lambda key: "-".join(str(x) for x in key[2:]))
def test_measured_sizes(key):
    """What is in the table can be launched. `test_triton_compiles.py` compiles it."""
    for tiling in triton_sizes.from_table(tuning.table()[key]):
        assert all(block >= 16 and block & (block - 1) == 0 for block in tiling[:2])
        assert tiling.warps in (1, 2, 4, 8)
        assert tiling.block_q * tiling.block_k >= 32 * tiling.warps, "every thread has a score"


def test_there_are_measured_sizes():
    assert MEASURED


@pytest.mark.parametrize(
    ("precision", "products"),
    [
        (None, "tf32"),
        ("default", "tf32"),
        ("tensorfloat32", "tf32"),
        ("high", "tf32x3"),
        ("highest", "ieee"),
        ("float32", "ieee"),
    ],
)
def test_float32_products_follow_the_matmul_precision(precision, products):
    with jax.default_matmul_precision(precision):
        assert triton_call.product_precision() == products


@pytest.fixture
def launched(monkeypatch):
    """(kernel, arrays, outs, options) of every launch; outputs are zeros."""
    launches = []

    def launch(kernel, arrays, outs, **options):
        launches.append((kernel.split(":")[1], arrays, outs, options))
        return [jnp.zeros(x.shape, x.dtype) for x in outs]

    monkeypatch.setattr(triton_call, "launch", launch)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "jax_triton" or find(name, *rest)
    )
    return launches


@pytest.mark.parametrize("bias", [None, "position", "time", "both"])
@pytest.mark.parametrize("rescale", [False, True])
def test_what_is_handed_to_the_kernels(a100, launched, bias, rescale):
    """The launches of one training step: shapes, dtypes and sizes of all that goes in and out."""
    some = case(heads=2, k_width=25, v_width=50, dtype="bfloat16", bias=bias)
    some.out_and_gradients(
        some.inputs(), implementation="triton", scale=some.row_scale() if rescale else 0.5
    )

    launches = {kernel: launch for kernel, *launch in launched}
    assert len(launched) == 3 and launches.keys() == {
        "forward",
        "backward_queries",
        "backward_keys",
    }
    tables = [0 if x is None else x.shape[0] for x in (some.position_table, some.time_table)]
    sizes = triton_sizes.heuristic((8, 0), AttentionSpec("bfloat16", 2, 25, 50))
    key, value = ((some.rows, 2, width) for width in (25, 50))
    blocks = {
        "forward": sizes.forward.block_q,
        "backward_queries": sizes.queries.block_q,
        "backward_keys": sizes.keys.block_k,
    }
    for kernel, (arrays, _, options) in launches.items():
        constants = options["constants"]
        assert options["programs"] == -(-some.rows // blocks[kernel]) * 2, (
            "a program for every tile and head"
        )
        assert [x.shape for x in arrays[:3]] == [key, key, value]
        assert (constants["WK"], constants["WV"], constants["ROW_SCALE"]) == (32, 64, rescale)
        assert [constants["POSITIONS"], constants["BUCKETS"]] == tables
        assert [x.dtype for x in arrays[-3:]] == [jnp.int32 if tables[1] else jnp.float32] * 3, (
            "bucket starts and times"
        )
    outs = {kernel: [(x.shape, x.dtype) for x in launch[1]] for kernel, launch in launches.items()}
    assert outs["forward"] == [(value, jnp.bfloat16)]
    assert outs["backward_keys"] == [(key, jnp.bfloat16), (value, jnp.bfloat16)]
    copies = min(triton.TABLE_COPIES, launches["backward_queries"][2]["programs"])
    assert outs["backward_queries"] == [
        (key, jnp.bfloat16),
        ((copies, max(1, sum(tables))), jnp.float32),
    ]
    zeroed = {kernel: launch[2]["zeroed"] for kernel, launch in launches.items()}
    assert zeroed == {"forward": (), "backward_queries": (1,), "backward_keys": ()}, (
        "the tables' gradients are added to zeros"
    )


def test_heavy_tiles_come_first():
    """Query tiles of 16 rows over 16 keys: sequences of 100, 20 and 40 rows, then padding."""
    plan = make_plan(AttentionMask(), np.array([0, 100, 120, 160], np.int32), 192)
    bounds = plan.tile_bounds(16, 16)
    for keys, lo, hi in (
        (False, bounds.key_lo, bounds.key_hi),
        (True, bounds.row_lo, bounds.row_hi),
    ):
        order = np.asarray(triton.TileOrder(TileSizes(16, 16), keys).make(plan))
        blocks = np.asarray(hi - lo).sum(1)[order]
        assert sorted(order) == list(range(12)) and len(set(blocks)) > 3
        assert (np.diff(blocks) <= 0).all()


@pytest.mark.parametrize("rows", [1000, 40000])
def test_a_prepared_plan_hands_the_same_to_the_kernels(a100, launched, rows):
    """Once for few tiles, which start in any order, and once for many."""
    plan = make_plan(AttentionMask(window=40), np.array([0, 300, rows - 8], np.int32), rows)
    prepared = triton.prepare(plan, AttentionSpec("float32", 1, 8, 16))
    orders = [key for key in prepared.stored_keys if isinstance(key, triton.TileOrder)]
    assert bool(orders) == (rows == 40000)
    q, v = (jnp.zeros((rows, 1, width)) for width in (8, 16))
    for used in (plan, prepared):
        _, pull = jax.vjp(
            lambda q, v, used=used: triton.attention(
                q, q, v, used, alpha=1.0, scale=1.0, bias=None
            ),
            q,
            v,
        )
        pull(v)
    assert len(launched) == 6
    for (_, plain, *_), (_, ready, *_) in zip(launched[:3], launched[3:], strict=True):
        for a, b in zip(plain, ready, strict=True):
            np.testing.assert_array_equal(a, b)
