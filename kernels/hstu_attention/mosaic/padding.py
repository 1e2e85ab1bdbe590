"""What the Hopper kernels read in place of padding, which may hold NaN."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.hstu_attention.plan import AttentionPlan
from kernels.typing import THK
from kernels.zeros import zeros_after

COUNTERS = 8  # rows of zeros in front of the last tile's copy: whole tiles of shared memory
TAIL = 128  # rows of the last, partly filled tile, which is passed separately


def rounded_up(rows: int) -> int:
    return -(-rows // TAIL) * TAIL


def padded(x: THK) -> Float[Array, "padded H K"]:
    """The buffer with rows of zeros behind it, up to a whole tile."""
    return jnp.pad(x, ((0, rounded_up(x.shape[0]) - x.shape[0]), (0, 0), (0, 0)))


def tail_start(plan: AttentionPlan) -> Int[Array, " 1"]:
    """First row of the last tile that holds a real row."""
    if plan.first_row:  # rows and keys that stand apart hold no NaN
        return jnp.full(1, rounded_up(plan.num_rows), jnp.int32)
    return (plan.num_real // TAIL * TAIL).astype(jnp.int32).reshape(1)


def padding_start(plan: AttentionPlan) -> Int[Array, " 1"]:
    """The row that padding begins with, for kernels that clean what they have loaded."""
    if plan.first_row:  # rows and keys that stand apart hold no NaN
        return jnp.full(1, rounded_up(plan.num_rows), jnp.int32)
    return plan.num_real.astype(jnp.int32).reshape(1)


def clean_tails(plan: AttentionPlan, *arrays: Float[Array, "_ H _"]) -> jax.Ref:
    """The last tile of each array that holds a real row, with padding rows zeroed.

    The tiles stand side by side: 0 * NaN would be NaN in a product. In front of them are rows of
    zeros, the counters of the kernels that read the tiles, so that no other operation has to make
    these.
    """
    if plan.first_row:
        width = sum(x.shape[2] for x in arrays)
        return jax.new_ref(
            zeros_after(arrays[0], (COUNTERS + TAIL, arrays[0].shape[1], width), arrays[0].dtype)
        )
    first = jnp.minimum(tail_start(plan)[0], arrays[0].shape[0] - TAIL)
    rows = jnp.concatenate([lax.dynamic_slice_in_dim(x, first, TAIL) for x in arrays], axis=2)
    real = (first + jnp.arange(TAIL) < plan.num_real)[:, None, None]
    return jax.new_ref(
        jnp.pad(jnp.where(real, rows, jnp.zeros((), rows.dtype)), ((COUNTERS, 0), (0, 0), (0, 0)))
    )
