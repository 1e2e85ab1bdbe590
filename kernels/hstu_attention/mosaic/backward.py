"""The backward on Hopper: how many passes it takes, and which kernels make them."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.hstu_attention import tuning
from kernels.hstu_attention.mosaic import (
    backward_keys,
    backward_one_pass,
    backward_queries,
    backward_wide,
)
from kernels.hstu_attention.mosaic.backward_shared import BackwardInputs
from kernels.hstu_attention.mosaic.padding import clean_tails
from kernels.hstu_attention.mosaic.schedule import BackwardConfig, WorkList, in_turns
from kernels.hstu_attention.plan import AttentionPlan, AttentionSpec
from kernels.typing import SHK, SHV, THK, THV


def backward_config(
    spec: AttentionSpec, plan: AttentionPlan, passes: int | None = None
) -> BackwardConfig:
    """Sizes of a call.

    Args:
      passes: 1 or 2. None takes two where the gradients must be deterministic; else those of the
        table of measurements where it has this call; else two where short sequences or a window
        leave a tile few blocks: what dQ costs beside its products, float32 memory to be zeroed and
        rounded, is then the most.
    """
    k_width, v_width = _padded_widths(spec.k_width, spec.v_width)
    if passes is None and spec.deterministic:
        passes = 2
    if passes is None:
        found = tuning.find("mosaic", spec._replace(k_width=k_width, v_width=v_width), plan)
        few_blocks = plan.mask.windowed or tuning.is_short(plan)
        measured = {} if found is None else found["backward"]
        passes = measured.get("passes", 2 if few_blocks else 1)
    widest = max(k_width, v_width)
    if widest > 128:
        config = BackwardConfig(tile=64, block_q=64, stages=2)
    elif passes == 2:
        config = BackwardConfig(tile=128, block_q=64, stages=3 if widest > 64 else 4)
    elif widest > 64:
        config = BackwardConfig(tile=128, block_q=64, stages=3)
    else:
        config = BackwardConfig(tile=128, block_q=128, stages=2)
    return dataclasses.replace(config, passes=passes)


def work_lists(heads: int, config: BackwardConfig) -> list[WorkList]:
    """The lists of work that `gradients` draws from."""
    queries = [backward_queries.work_list(heads)] if config.passes == 2 else []
    return [WorkList.backward(heads, config), *queries]


def _padded_widths(k_width: int, v_width: int) -> tuple[int, int]:
    """Widths that the backward computes with: 64 only beside 64."""
    return (64, 64) if k_width == v_width == 64 else (max(k_width, 128), max(v_width, 128))


def gradients(
    q: THK,
    k: SHK,
    v: SHV,
    do: THV,
    plan: AttentionPlan,
    scale: Float[Array, "..."],
    alpha: float,
    config: BackwardConfig,
) -> tuple[THK, SHK, SHV]:
    """(dQ, dK, dV) of padded buffers (lengths a multiple of 128).

    In one pass every key tile adds its part of dQ to float32 memory, in the order in which they
    come; in two, dQ has one of its own, seven products a pair instead of five.
    """
    k_width, v_width = q.shape[2], v.shape[2]
    k_wide, v_wide = _padded_widths(k_width, v_width)
    q, k = (jnp.pad(x, ((0, 0), (0, 0), (0, k_wide - k_width))) for x in (q, k))
    v, do = (jnp.pad(x, ((0, 0), (0, 0), (0, v_wide - v_width))) for x in (v, do))
    if scale.ndim == 1:
        do, scale = _scaled_rows(do, plan.row_scales(scale, q.shape[0]))
    is_wide = max(k_wide, v_wide) > 128
    cleaned = in_turns(plan) and config.passes == 2 and not is_wide
    tails = None if cleaned else clean_tails(plan, q, k, do)
    inputs = BackwardInputs(q, k, v, do, tails, plan, scale.reshape(1), alpha)
    if config.passes == 1:
        one_pass = backward_wide if is_wide else backward_one_pass
        dq, dk, dv = one_pass.all_gradients(inputs, config)
    else:
        key_pass = backward_wide if is_wide else backward_keys
        dk, dv = key_pass.key_gradients(inputs, config)
        dq = backward_queries.query_gradients(inputs)
    return dq[..., :k_width], dk[..., :k_width], dv[..., :v_width]


def _scaled_rows(do: THV, scale_T: Float[Array, " T"]) -> tuple[THV, Float[Array, ""]]:
    """(dO with a factor a row, the constant factor that is left).

    The largest row factor is 1, for float16.
    """
    largest = jnp.max(jnp.abs(scale_T))
    relative_T = scale_T / jnp.where(largest > 0, largest, 1.0)
    return (do * relative_T[:, None, None]).astype(do.dtype), largest
