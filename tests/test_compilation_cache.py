"""Compiled programs on the disk: a second start finds them, and trouble costs a warning."""

import logging
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from ultra_hstu import compilation_cache
from ultra_hstu.compilation_cache import SUFFIX, ProgramFiles, default_folder, processor

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax import monitoring
from ultra_hstu import compilation_cache
compilation_cache.LEAST_SECONDS = 0
events = []
monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/")[-1]))
compilation_cache.use(sys.argv[1] if len(sys.argv) > 1 else None)
assert float(jax.jit(lambda x: (jnp.sin(x) @ x).sum())(jnp.ones((8, 8)))) > 0
print(events.count("cache_hits"), events.count("cache_misses"))
"""


def compile_once(*arguments, home, **variables):
    """What a process prints that compiles: programs found and programs written; and its errors."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "XDG_", "ULTRA_HSTU_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        cwd=ROOT,
        env=kept | {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split())), done.stderr


def test_a_second_start_finds_the_programs_of_the_first(tmp_path):
    (found, written), errors = compile_once(home=tmp_path)
    assert found == 0 and written > 0 and not errors
    (folder,) = (tmp_path / ".cache" / "ultra-hstu").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    programs = sorted(folder.glob("*" + SUFFIX))
    assert len(programs) == written

    programs[0].write_bytes(programs[0].read_bytes()[:-9])  # killed in the middle of a write
    (found, again), errors = compile_once(home=tmp_path)
    assert (found, again) == (written - 1, 1)
    assert errors.count("is damaged; its program is compiled again") == 1
    assert compile_once(home=tmp_path)[0] == (written, 0)


def test_off_and_folders_of_no_use(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(compilation_cache.VARIABLE, "off")
    try:
        compilation_cache.use()
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").touch()
    compilation_cache.use(str(tmp_path / "file" / "folder"))
    assert jax.config.jax_compilation_cache_dir == before
    assert "compiled programs are not kept" in caplog.text
    monkeypatch.delenv(compilation_cache.VARIABLE)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", before)
    compilation_cache.use()  # the variable of JAX is left to JAX
    assert jax.config.jax_compilation_cache_dir == before


@pytest.fixture
def files(tmp_path):
    return ProgramFiles(tmp_path / "programs")


def test_a_full_disk_costs_one_warning(files, caplog):
    files.put("small", b"small")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for name in ("first", "second"):
            files.put(name, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(caplog.records) == 1 and "new programs are not kept" in caplog.text
    assert (files.get("small"), files.get("first")) == (b"small", None)
    assert len(list(files._path.iterdir())) == 1


def test_a_read_only_folder_is_read(files, caplog, monkeypatch):
    files.put("there", b"program")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compilation_cache.tempfile, "mkstemp", refuse)
    monkeypatch.setattr(compilation_cache.os, "utime", refuse)
    assert files.get("there") == b"program" and not caplog.records
    files.put("new", b"program")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_what_was_not_used_for_longest_goes(files, monkeypatch):
    for age, name in enumerate("abc"):
        files.put(name, b"x" * 100)
        os.utime(files._file(name), (time.time() - 1000 + age,) * 2)
    other = files._path / "notes.txt"
    other.write_bytes(b"x" * 1000)
    assert files.get("a") == b"x" * 100  # used now
    monkeypatch.setattr(compilation_cache, "LIMIT", 300)
    left = ProgramFiles(files._path)
    assert [left.get(name) is not None for name in "abc"] == [True, False, True]
    assert other.exists()


def test_the_folder_is_that_of_the_user_and_the_processor(tmp_path, monkeypatch):
    kinds = []
    for flags in ("fpu avx2", "fpu avx2 avx512f"):
        told = tmp_path / "cpuinfo"
        told.write_text(f"model name\t: A\nflags\t: {flags}\ncpu MHz\t: 1\n" * 2)
        kinds.append(processor(told))
        told.write_text(f"model name\t: A\nflags\t: {flags}\ncpu MHz\t: 2\n")
        assert processor(told) == kinds[-1]
    assert kinds[0] != kinds[1] != processor(tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder().parent == tmp_path / "ultra-hstu"
    assert default_folder().name.endswith(processor())
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    assert default_folder().parents[1] == Path.home() / ".cache"
