"""HSTU attention as one dense computation in float32: the definition of correct. Memory O(H T^2): small inputs only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.hstu_attention.plan import AttentionPlan
from kernels.hstu_attention.relative_bias import RelativeBias


def attention(
    q_THK: Float[Array, "T H K"],
    k_THK: Float[Array, "T H K"],
    v_THV: Float[Array, "T H V"],
    plan: AttentionPlan,
    *,
    alpha: float,
    scale: float | Array,
    bias: RelativeBias | None,
    deterministic: bool = False,
) -> Float[Array, "T H V"]:
    """`o_t = scale * sum over allowed k of silu(alpha q_t . k_k + bias) v_k`, differentiated by JAX. `deterministic` changes nothing: a reference."""
    rows = q_THK.shape[0]
    mask_TT = plan.keys.dense(plan.num_real)
    real_T11 = (jnp.arange(rows) < plan.num_real)[:, None, None]
    # Padding may hold NaN, and 0 * NaN is NaN: it is replaced before any product.
    q, k, v = (jnp.where(real_T11, x.astype(jnp.float32), 0.0) for x in (q_THK, k_THK, v_THV))
    score_HTT = alpha * jnp.einsum("qhd,khd->hqk", q, k, precision="highest")
    if bias is not None:
        score_HTT += jnp.where(mask_TT, bias.dense(rows), 0.0)[None]
    weight_HTT = jnp.where(mask_TT[None], jax.nn.silu(score_HTT), 0.0)
    out_THV = jnp.einsum("hqk,khd->qhd", weight_HTT, v, precision="highest")
    scale_T11 = jnp.where(
        real_T11, jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (rows,))[:, None, None], 0.0
    )
    return (out_THV * scale_T11).astype(q_THK.dtype)
