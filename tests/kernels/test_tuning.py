"""The table of measured sizes: what it may hold, who finds what, and the tuner that fills it."""

import json
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import device
from kernels.hstu_attention import AttentionSpec, make_plan, tuning
from kernels.hstu_attention.triton import sizes as triton
from kernels.hstu_attention.workloads import Workload
from kernels.mask import AttentionMask
from kernels.timing import chained, device_time
from scripts import tune_attention

SIZES = {
    kernel: {"block_q": 64, "block_k": 64, "warps": 4, "stages": 3}
    for kernel in ("forward", "queries", "keys")
}
ENTRY = {
    "device": "NVIDIA H200",
    "implementation": "triton",
    "bytes": 2,
    "width": 128,
    "mask": "causal",
    "length": "long",
    "sizes": SIZES,
}


def text(*entries):
    return json.dumps({"entries": entries})


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H200", (9, 0)))


@pytest.fixture
def table(monkeypatch):
    """A table of this test alone."""
    made = {}
    monkeypatch.setattr(tuning, "table", lambda: made)
    return made


def plan(rows=8192, sequences=4, mask=AttentionMask()):  # noqa: B008 - frozen
    return make_plan(mask, np.linspace(0, rows, sequences + 1).astype(np.int32), rows)


def test_what_is_shipped_is_sound():
    tuning.table.cache_clear()
    assert tuning.table() == tuning.parse(tuning.PATH.read_text(), "tuning.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"implementation": "cuda"},
            "entry 0: implementation is 'cuda', not one of triton, mosaic; make it with "
            "python -m scripts.tune_attention",
        ),
        ({"mask": "full"}, "mask is 'full', not one of causal, windowed"),
        ({"length": 3}, "length is 3, not one of short, long"),
        ({"sizes": {"forward": {}}}, "sizes must be given for forward, queries, keys, got"),
        (
            {"sizes": SIZES | {"keys": {"warps": 0}}},
            "sizes of keys must be whole numbers from 1 on, got {'warps': 0}",
        ),
        ({"sizes": SIZES | {"keys": {"warps": 4.0}}}, "got {'warps': 4.0}"),
    ],
)
def test_wrong_entries(changes, message):
    with pytest.raises(ValueError, match="sizes.json, entry 0") as error:
        tuning.parse(text(ENTRY | changes), "sizes.json")
    assert message in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"entries": [{"device": "x"}]}'])
def test_wrong_files(content):
    with pytest.raises(ValueError, match="sizes.json.*scripts.tune_attention"):
        tuning.parse(content, "sizes.json")


def test_an_entry_twice():
    with pytest.raises(ValueError, match="entry 1 repeats"):
        tuning.parse(text(ENTRY, ENTRY), "sizes.json")


def test_a_call_finds_its_entry_and_no_other(h200, table):
    table.update(tuning.parse(text(ENTRY), "sizes.json"))
    spec = AttentionSpec(jnp.bfloat16, 2, 128, 100)
    found = triton.find_sizes(spec, plan())
    assert found == triton.KernelSizes(*(triton.LaunchSizes(64, 64, 4, 3),) * 3)
    heuristic = triton.heuristic((9, 0), spec)
    assert heuristic != found
    fewer = triton.find_sizes(spec._replace(biased=True), plan())
    assert fewer == triton.KernelSizes(*(triton.LaunchSizes(64, 64, 4, 2),) * 3), (
        "a bias takes shared memory"
    )
    assert triton.find_sizes(spec, plan(mask=AttentionMask(window=3))) == heuristic
    assert triton.find_sizes(spec, plan(sequences=17)) == heuristic, "481 rows a sequence are short"
    for dtype, k_width, v_width in (
        (jnp.float32, 128, 128),
        (jnp.bfloat16, 64, 64),
        (jnp.bfloat16, 129, 1),
    ):
        other = AttentionSpec(dtype, 2, k_width, v_width)
        assert triton.find_sizes(other, plan()) == triton.heuristic((9, 0), other)


def test_another_device_finds_nothing(table):
    table.update(tuning.parse(text(ENTRY), "sizes.json"))
    assert tuning.find("triton", AttentionSpec(jnp.bfloat16, 2, 128, 128), plan()) is None


def test_new_entries_replace_those_of_the_same_key():
    other = ENTRY | {"width": 64}
    new = ENTRY | {"sizes": SIZES | {"keys": SIZES["keys"] | {"warps": 8}}}
    assert tune_attention.merged([ENTRY, other], [new]) == [other, new]


def test_the_tuner_writes_the_fastest(h200, table, tmp_path, monkeypatch):
    """Runs the tuner on trials for a CPU: a product, done once, fifty times, or not at all."""
    tiny = Workload("tiny", (40, 20), 2, 8, 8, dtype="float32")

    def work(times):
        def run(plan, q, k, v, g):
            x = q[:, 0]
            for _ in range(times):
                x = jnp.tanh(x @ (x.T @ x))
            return x

        return run

    def fails(plan, q, k, v, g):
        raise ValueError("does not fit")

    def trials(w, plan, bias):
        for kernel in ("forward", "queries", "keys"):
            yield (
                kernel,
                [
                    tune_attention.Trial({"warps": 1}, work(50), plan),
                    tune_attention.Trial({"warps": 2}, work(1), plan),
                    tune_attention.Trial({"warps": 4}, fails, plan),
                ],
            )

    monkeypatch.setitem(tune_attention.WORKLOADS, "tiny", tiny)
    monkeypatch.setitem(tune_attention.TRIALS, "triton", trials)
    errors = iter([1e-4, 1.0])
    monkeypatch.setattr(tune_attention, "error_of", lambda *_: next(errors))
    output = pathlib.Path(tmp_path / "sizes.json")
    given = SimpleNamespace(
        implementations=["triton"], workloads=["tiny"], output=str(output), jobs=1
    )
    monkeypatch.setattr(tune_attention, "FLAGS", given)
    tune_attention.main([])
    (entry,) = json.loads(output.read_text())["entries"]
    assert entry["sizes"] == {kernel: {"warps": 2} for kernel in ("forward", "queries", "keys")}
    assert (entry["device"], entry["bytes"], entry["width"], entry["mask"], entry["length"]) == (
        "NVIDIA H200",
        4,
        32,
        "causal",
        "short",
    )
    assert entry["error"] == 1e-4 and entry["made"].keys() == {"versions", "commit", "date"}
    with pytest.raises(RuntimeError, match="tiny: triton has error 1.0e"):
        tune_attention.main([])


def test_no_candidate_runs():
    def fails(plan, x):
        raise ValueError("does not fit")

    with pytest.raises(RuntimeError, match="no candidate ran"):
        tune_attention.fastest("x", [tune_attention.Trial({"warps": 1}, fails, 0)], [jnp.zeros(3)])


def test_chained_calls_all_happen():
    """No call is merged with another or moved out of the loop: it takes the time of all of them."""
    x = jax.random.normal(jax.random.key(0), (400, 400)) / 20

    def step(n, x):
        return {"a": x @ (x + n), "b": n + 2}

    once, often = (
        device_time(jax.jit(chained(step, times)), jnp.int32(0), x, repetitions=5).seconds
        for times in (2, 40)
    )
    assert often > 5 * once
    first, _, last = jax.jit(chained(step, 3))(jnp.int32(0), x)
    np.testing.assert_array_equal(first["a"], last["a"])
    np.testing.assert_allclose(last["a"], x @ x, atol=1e-5)
    assert last["b"] == 2
