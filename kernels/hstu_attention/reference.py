"""HSTU attention as one dense computation in float32: the definition of correct.

Memory is O(H T^2): for small inputs only.
"""

import jax
import jax.numpy as jnp

from kernels.hstu_attention.plan import AttentionPlan, AttentionSpec
from kernels.hstu_attention.relative_bias import RelativeBias
from kernels.typing import THK, THV, Scale


def unsupported(spec: AttentionSpec) -> None:
    """Nothing: any call is taken."""


def prepare(plan: AttentionPlan, spec: AttentionSpec) -> AttentionPlan:
    return plan


def attention(
    q_THK: THK,
    k_THK: THK,
    v_THV: THV,
    plan: AttentionPlan,
    *,
    alpha: float,
    scale: Scale,
    bias: RelativeBias | None,
    deterministic: bool = False,
) -> THV:
    """See `hstu_attention`. JAX differentiates it; its bits are the same on every run."""
    rows = q_THK.shape[0]
    mask_TT = plan.keys.dense(plan.num_real)
    # Padding may hold NaN, and 0 * NaN is NaN: it is replaced before any product.
    real_T11 = (jnp.arange(rows, dtype=jnp.int32) < plan.num_real)[:, None, None]
    q, k, v = (jnp.where(real_T11, x.astype(jnp.float32), 0.0) for x in (q_THK, k_THK, v_THV))
    score_HTT = alpha * jnp.einsum("qhd,khd->hqk", q, k, precision="highest")
    if bias is not None:
        score_HTT += jnp.where(mask_TT, bias.dense(rows), 0.0)[None]
    weight_HTT = jnp.where(mask_TT[None], jax.nn.silu(score_HTT), 0.0)
    out_THV = jnp.einsum("hqk,khd->qhd", weight_HTT, v, precision="highest")
    return (out_THV * plan.row_scales(scale, rows)[:, None, None]).astype(q_THK.dtype)
