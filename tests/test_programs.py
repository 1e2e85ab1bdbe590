"""Programs of a run: found by a second start without tracing, and only where they are the same."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache as jax_cache
from rich.console import Console

from tests.small_run import small_config, with_
from ultra_hstu import compilation_cache, programs
from ultra_hstu.report import read_metrics
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.train import train

ROOT = Path(__file__).parent.parent
QUIET = Console(quiet=True)
KEY = """
import jax, numpy as np
from tests.small_run import small_config
from ultra_hstu import programs
from ultra_hstu.retrieval.recipe import Recipe
recipe = Recipe(small_config("data"), 120)
state = jax.eval_shape(lambda: recipe.init(0))
print(programs._key((state, np.int32(3)), ["step", recipe]))
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The folder of the programs that are kept, those of JAX's cache among them."""
    folder = os.environ[compilation_cache.VARIABLE]
    monkeypatch.setenv(compilation_cache.VARIABLE, "")  # which `use` sets
    monkeypatch.setattr(compilation_cache, "_files", None)
    monkeypatch.setattr(jax_cache, "get_file_cache", jax_cache.get_file_cache)
    jax_cache.reset_cache()
    compilation_cache.use(str(tmp_path / "programs"))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax_cache.reset_cache()


def traced(files):
    return sorted(path.name for path in files.glob("traced-*"))


def test_a_second_start_traces_no_step_and_computes_the_same_bits(files, tmp_path, monkeypatch):
    traces = []
    loss = Recipe.loss
    monkeypatch.setattr(Recipe, "loss", lambda *args: traces.append(1) or loss(*args))
    config = small_config(tmp_path / "data", epochs=1)
    train(config, tmp_path / "first", console=QUIET)
    kept, before = traced(files), len(traces)
    assert len(kept) == 2 and before > 0  # a training step and an evaluation
    for path in files.glob("traced-*"):  # as where JAX alone has found its program again
        path.unlink()
    jax.clear_caches()
    train(config, tmp_path / "second", console=QUIET)
    assert traced(files) == kept and len(traces) > before
    before = len(traces)
    jax.clear_caches()
    train(config, tmp_path / "third", console=QUIET)
    assert len(traces) == before
    runs = [
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("first", "second", "third")
    ]
    numbers = [(run[0]["loss"], run[0]["grad_norm"], run[0]["ndcg@10"]) for run in runs]
    assert numbers[0] == numbers[1] == numbers[2]


def begun(function, arguments, closed_over=()):
    with ThreadPoolExecutor(1) as pool:
        found = programs.begin(jax.jit(function), arguments, 0, closed_over, pool)
    return found.program.result()


def test_what_a_program_depends_on_is_in_its_name(files, monkeypatch):
    x = jnp.ones(3)
    begun(lambda x: x.sum(), (x,))
    for closed_over in (["other"], [small_config("data")], [np.arange(3)], [np.arange(1, 4)]):
        begun(lambda x: x.sum(), (x,), closed_over)
    with jax.default_matmul_precision("tensorfloat32"):
        begun(lambda x: x.sum(), (x,))
    begun(lambda x: x.sum(), (jnp.ones(4),))
    begun(lambda x: x.sum(), (jnp.ones(3, jnp.int32),))
    begun(lambda x: x["a"].sum(), ({"a": x},))
    begun(lambda x: x.sum(), (jax.device_put(x, jax.devices()[1]),))
    assert len(traced(files)) == 10
    assert float(begun(lambda x: x.sum() * 0, (x,))(x)) == 3  # it was found, not traced
    assert programs._key((x,), [object()]) is None  # whose name is another in each process
    begun(lambda x: x.sum() * 0, (x,), [object()])
    assert len(traced(files)) == 10


def test_code_and_environment_are_in_its_name(monkeypatch, tmp_path):
    def surroundings():
        programs._surroundings.cache_clear()
        return programs._surroundings()

    first = surroundings()
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_other")
    second = surroundings()
    monkeypatch.undo()
    assert surroundings() == first != second
    (tmp_path / "own_layers.py").write_text("WIDTH = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("own_layers")
    third = surroundings()
    (tmp_path / "own_layers.py").write_text("WIDTH = 4\n")
    assert len({first, third, surroundings()}) == 3
    del sys.modules["own_layers"]
    programs._surroundings.cache_clear()


def test_a_name_is_the_same_in_every_process():
    names = {
        subprocess.run(
            [sys.executable, "-c", KEY],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(names) == 1 and next(iter(names)).startswith("traced-")


def test_programs_of_this_process_alone_are_not_kept(files, caplog):
    def calls_back(x):
        return jax.pure_callback(lambda x: np.asarray(x) + 1, jax.ShapeDtypeStruct((), x.dtype), x)

    assert float(begun(calls_back, (jnp.float32(1),))(jnp.float32(1))) == 2
    assert traced(files) == []
    x = jnp.ones(3)
    begun(lambda x: x.sum(), (x,))
    (name,) = traced(files)
    key = name.removesuffix(compilation_cache.SUFFIX)
    compilation_cache.files().put(key, b"[]\nof another version")
    assert float(begun(lambda x: x.sum(), (x,))(x)) == 3
    assert "cannot be loaded" in caplog.text


def test_a_small_change_of_the_configuration_is_another_program(tmp_path):
    config = small_config(tmp_path)
    recipes = [Recipe(config, 120), Recipe(with_(config, model__linear_dropout=0.25), 120)]
    recipes += [Recipe(config, 121), Recipe(config, 120, np.arange(121))]
    assert len({programs._key((np.int32(1),), [recipe]) for recipe in recipes}) == 4
