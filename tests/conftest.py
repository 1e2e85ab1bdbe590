"""Strict numerics for every test, programs that compile fast, and one store of them for all test processes."""

import os
import pathlib
import tempfile

import jax

# Environment variables, so that the commands that tests start share the store too. Its keys are the programs themselves.
# Machine code is not optimised: tests compile for longer than they compute.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
    tempfile.gettempdir(), "ultra_hstu_compiled_tests"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_disable_most_optimizations", True)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Tests in `gpu` need a GPU; `make test-gpu` runs them.
collect_ignore = [] if any(pathlib.Path("/dev").glob("nvidia[0-9]*")) else ["gpu"]
