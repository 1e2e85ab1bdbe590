"""ptxas serialises no product of the Hopper kernels.

It does so where registers are short. That costs half the speed and raises no error.
"""

import os
import subprocess
import sys

import pytest

COMPILE = """
import sys
import jax, jax.numpy as jnp
from kernels.hstu_attention import make_plan
from kernels.hstu_attention.mosaic import attention as mosaic
from kernels.mask import AttentionMask

width, window, deterministic = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
mask = AttentionMask(window or None, 256 if window else 0)
rows = jax.ShapeDtypeStruct((4096, 2, width), jnp.bfloat16)

def run(q, k, v, g, offsets):
    plan = make_plan(mask, offsets, 4096)
    attend = lambda *qkv: mosaic.attention(
        *qkv, plan, alpha=0.1, scale=0.1, bias=None, deterministic=deterministic
    )
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(g)

jax.jit(run).lower(rows, rows, rows, rows, jax.ShapeDtypeStruct((3,), jnp.int32)).compile()
"""


@pytest.mark.parametrize(
    ("width", "window", "deterministic"),
    [(w, *x) for w in (64, 128, 256) for x in ((0, False), (256, False), (0, True))],
)
def test_no_product_is_serialised(width, window, deterministic):
    command = [sys.executable, "-c", COMPILE, str(width), str(window), str(deterministic)]
    environment = {
        **os.environ,
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-2000:]
    assert "hstu_backward" in said, "ptxas was not heard"
    assert "serialized" not in said, [line for line in said.splitlines() if "serialized" in line]
