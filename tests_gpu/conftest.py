"""Tests that need a GPU, run by `make test-gpu`: never in CI, where every one of them would be skipped."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
