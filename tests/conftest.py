"""Settings of every test: strict numerics, programs that compile fast, one store of programs.

This file is imported before all other test files, and makes no backend: a `conftest.py` of a folder
may still set the backend's flags.
"""

import gc
import os
import pathlib
import signal
import tempfile

import hypothesis
import jax

# Tracing makes many small objects and little garbage. With Python's limits the collector takes a
# tenth of the time of the tests.
gc.set_threshold(50_000, 10, 10)

# The commands that tests start get these settings too, as environment variables, and share the
# store. A program is found there by its text, or that of a run by what makes it, so the store never
# has to be emptied. Machine code is not optimised: tests compile for longer than they compute.
# XLA's older emitters, one module a program, compile in 40 % of the time of the newer ones.
os.environ["ULTRA_HSTU_COMPILATION_CACHE"] = os.path.join(
    tempfile.gettempdir(), "ultra_hstu_compiled_tests"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
# Prepared data of tests that name no folder; not the user's own.
_DATA = tempfile.TemporaryDirectory(prefix="ultra_hstu_data_")
os.environ["ULTRA_HSTU_DATA"] = _DATA.name
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_disable_most_optimizations", True)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# asyncio, which Orbax reads with, prints the arrays of a result where SIGINT has Python's handler.
signal.signal(signal.SIGINT, lambda *caught: signal.default_int_handler(*caught))

# Property tests draw the same examples in every run, so that a failure is of the change under test;
# `make fuzz` draws others.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("fuzz", derandomize=False, deadline=None)
hypothesis.settings.load_profile("suite")

# The tests in `gpu` need a GPU; `make test-gpu` runs them.
collect_ignore = [] if any(pathlib.Path("/dev").glob("nvidia[0-9]*")) else ["gpu"]


def pytest_sessionstart():
    """Imports what the hook of jaxtyping has to see, so not before pytest has installed it."""
    from ultra_hstu import compilation_cache

    compilation_cache.use()


def pytest_collection_finish():
    """Modules and collected tests live to the end: the garbage collector need not look at them."""
    gc.collect()
    gc.freeze()
