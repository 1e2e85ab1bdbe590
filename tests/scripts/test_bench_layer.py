"""The benchmarks of layers and of long training steps, small and on a CPU."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from experiments import configs
from kernels import device, triton_call
from scripts.bench import layer as bench_layer
from scripts.bench import long as bench_long
from scripts.bench import step as bench_step
from scripts.bench.program import full_batch, temporaries
from ultra_hstu import flops
from ultra_hstu.fields import changed
from ultra_hstu.profiling import Kernel, Profile
from ultra_hstu.retrieval.recipe import Recipe

ROWS = 512
SMALL = dict(
    width=32,
    heads=2,
    qk_width=16,
    v_width=16,
    dtype="float32",
    implementation="xla",
    window=(16,),
    full_rows=(16,),
)


def small_config(**model):
    config = configs.named("long_ultra")
    data = dataclasses.replace(config.data, max_history=128, batch_tokens=ROWS)
    return dataclasses.replace(
        config, data=data, model=dataclasses.replace(config.model, **SMALL | model)
    )


@pytest.mark.parametrize("v_width, chunk_rows", [(16, None), (32, None), (16, 64)])
def test_memory_of_a_layer(v_width, chunk_rows):
    """By the compiler's count: input and attention output, and the statistics of two norms.

    They are float32, and the statistics two a row and norm.
    """
    memory = {}
    for depth in (1, 3):
        config = small_config(
            layers=depth,
            truncate_after=None,
            truncate_length=None,
            chunk_rows=chunk_rows,
            v_width=v_width,
        )
        run, _ = bench_layer.stack_of(config, ROWS)
        memory[depth] = temporaries(run)
    kept = 4 * (32 + 2 * v_width) + 4 * 4
    assert (memory[3] - memory[1]) / 2 / ROWS == pytest.approx(kept, rel=0.08)


def test_a_long_step():
    config = small_config(layers=2, truncate_after=1, truncate_length=32)
    step = bench_long.Step(bench_long.with_model(config, bench_long.OF_ULTRA["fp8"]))
    found = step.compile()
    assert "error" not in found
    found |= step.measure(0.01)
    assert found["model"]["projection"] == "fp8" and found["step_ms"] > 0
    counted = flops.count(config, 128, items=20000)
    assert found["training_TFLOP_a_sample"] == pytest.approx(counted.training / 1e12)
    assert (
        counted.training
        < flops.count(bench_long.with_model(config, bench_long.WHOLE), 128, items=20000).training
    )


def test_a_full_step_says_where_its_time_goes(capsys):
    config = small_config(layers=1, truncate_after=None, truncate_length=None)
    found = bench_step.measure_full_batches(config, 0.01)
    assert found["MFU"] is None  # of a CPU nobody knows the peak
    counted = flops.count(config, 128, items=20000)
    work = (counted.training - counted.recomputed) * config.data.batch_users
    assert found["TFLOP_a_second"] == pytest.approx(work / found["step_ms"] / 1e9)
    kinds = found["profile"]["kinds"]
    assert {"attention", "matrix products", "nothing runs"} <= kinds.keys()
    assert f"a step of {config.name}" in capsys.readouterr().out


def test_the_encoder_of_long_ultra_meets_the_published_operations():
    config = configs.named("long_ultra")
    counted = flops.count(config, config.data.max_history)
    assert 0.43e12 < counted.projections + counted.attention < 0.45e12  # table 2: 0.436 TFLOP


def test_the_layer_that_the_paper_writes_down(monkeypatch):
    """Its operations; and a step of it lowers for a Hopper GPU, every product by `mosaic`.

    The Triton kernels between the products need a GPU to be lowered: they give zeros here.
    """
    config = configs.named("long_ultra_paper")
    counted = flops.count(config, config.data.max_history)
    assert (counted.projections + counted.attention) / 1e12 == pytest.approx(0.345, abs=5e-4)
    config = changed(
        config,
        data={"max_history": 128, "batch_tokens": 512},
        model={"layers": 1, "truncate_after": None, "truncate_length": None},
        loss={"negatives": 8},
    )
    zeros = lambda kernel, arrays, outs, **_: [jnp.zeros(x.shape, x.dtype) for x in outs]  # noqa: E731
    monkeypatch.setattr(triton_call, "launch", zeros)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H200", (9, 0)))
    recipe = Recipe(config, 100, devices=jax.devices()[:1])
    state, batch = jax.eval_shape(lambda: (recipe.init(0), full_batch(config, 100)))
    lowered = jax.jit(recipe.step).trace(state, batch).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert all(name in text for name in ("linear_streamed", "hstu_parts", "hstu_backward_dkv"))


def test_a_case_of_a_layer():
    found = bench_layer.prepare("32 x 2048 causal", "none", "inference", small=True)()
    workload = dataclasses.replace(
        bench_layer.WORKLOADS["32 x 2048 causal"], users=2, length=128, width=32, head_width=16
    )
    counted = flops.count(workload.config(1, {}), 128)
    assert found["TFLOP"] == pytest.approx(2e-12 * (counted.projections + counted.attention))
    assert found["depths"] == [1, 2] and "kernels" not in found


def test_the_kernels_of_a_layer_are_what_a_deeper_stack_has_more():
    def profile(layers):
        kernels = [Kernel("matrix products", "product", "a.py:f", 2.0 * layers, 0.25 * layers)]
        kernels.append(Kernel("copies", "once", "", 1.0, 0.125))
        return Profile(1, 1.0, 1.0, tuple(kernels))

    (kernel,) = bench_layer.difference(profile(1), profile(3), 2)
    assert (kernel["name"], kernel["calls"], kernel["ms"]) == ("product", 2.0, 250.0)
