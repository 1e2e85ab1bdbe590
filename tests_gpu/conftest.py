"""Tests that need a GPU, run by `make test-gpu`: never in CI, where every one of them would be skipped."""

import os

# The reference's products need no search for the fastest algorithm, which would take most of the time; and several processes share the GPU.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
