"""Imports go one way; the CPU path needs no GPU package and no TensorFlow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import from its own layer or from those before it.
LAYERS = [
    ["kernels"],
    ["ultra_hstu.fields", "ultra_hstu.signals", "ultra_hstu.instructions", "ultra_hstu.behind"],
    ["ultra_hstu.paths", "ultra_hstu.json_files"],
    ["ultra_hstu.sections", "ultra_hstu.table_config", "ultra_hstu.feature_config"],
    ["ultra_hstu.model_config"],
    [f"ultra_hstu.{name}" for name in "config effects pieces provenance compilation_cache".split()],
    ["ultra_hstu.parallel"],
    ["ultra_hstu.programs"],
    ["ultra_hstu.sequences"],
    ["ultra_hstu.nn"],
    ["ultra_hstu.sampling", "ultra_hstu.data"],
    [f"ultra_hstu.{name}"
     for name in "optim digests checkpoint workdir starts trackers criteria quantization".split()],
    ["ultra_hstu.entry_updates"],
    [f"ultra_hstu.{name}" for name in "step evaluate flops task vocabulary".split()],
    ["ultra_hstu.retrieval", "ultra_hstu.ranking"],
    [f"ultra_hstu.{name}" for name in "tasks report progress initial".split()],
    ["ultra_hstu.compiling", "ultra_hstu.profiling"],
    ["ultra_hstu.run", "ultra_hstu.windows", "ultra_hstu.train"],
    ["ultra_hstu.serving"],
    ["ultra_hstu.library"],
    ["experiments", "scripts"],
    ["tests"],
]  # fmt: skip


def layer(module):
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def sources():
    for folder in ("kernels", "ultra_hstu", "experiments", "scripts"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield (
                    full
                    if layer(full) is not None and layer(full) != layer(node.module)
                    else node.module
                )


@pytest.mark.parametrize("path", list(sources()), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    own = layer(module)
    if module == "ultra_hstu":
        return  # names modules of all layers, and imports them when they are used
    if module in ("ultra_hstu.retrieval", "ultra_hstu.ranking"):
        assert not path.read_text().strip(), "the package itself imports nothing"
        return
    assert own is not None, f"{module} has no layer: add it to LAYERS"
    for name in imported(path):
        other = layer(name)
        assert other is None or other <= own, (
            f"{module} (layer {own}) imports {name} (layer {other})"
        )


def test_the_rule_can_fail():
    assert layer("ultra_hstu.train") > layer("ultra_hstu.retrieval.batch") > layer("kernels.mask")


@pytest.mark.parametrize(
    "module", ["experiments.train", "experiments.recommend", "kernels.hstu_attention.api"]
)
def test_no_gpu_package_and_no_tensorflow_on_cpu(module):
    names = ("tensorflow", "triton", "jax_triton", "torch")
    code = f"import sys, {module}; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_models_load_no_data():
    """The layers that they are built from load none, either."""
    names = ["ultra_hstu.retrieval.model", "ultra_hstu.ranking.model"]
    names += [f"ultra_hstu.nn.{path.stem}" for path in (ROOT / "ultra_hstu/nn").glob("[a-z]*.py")]
    code = (
        f"import sys, {', '.join(names)}\n"
        "data = ('ultra_hstu.data', 'tensorflow_datasets', 'grain')\n"
        "print([name for name in sys.modules if name.startswith(data)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_files_stay_small():
    """One idea per file: 400 lines, device kernels aside."""
    long = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in sources()
        if not {"mosaic", "triton_short", "triton"} & set(path.parts)
    }
    assert not {path: lines for path, lines in long.items() if lines > 400}
