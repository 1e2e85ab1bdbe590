"""The implementation `mosaic_fp8` of `hstu_attention`: products in float8 on Hopper, by name only.

Q and K have a scale for each row and head, V one for each head, weights P a constant one. There is
no gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.hstu_attention.mosaic import attention as mosaic
from kernels.hstu_attention.mosaic.padding import padded
from kernels.hstu_attention.mosaic.schedule import make_schedules
from kernels.hstu_attention.mosaic_fp8.forward import (
    FP8,
    ORDER,
    Float8Operands,
    forward,
    work_list,
)
from kernels.hstu_attention.plan import AttentionPlan, AttentionSpec
from kernels.typing import THK, THV, Scale

LARGEST = 448.0  # of e4m3


def unsupported(spec: AttentionSpec) -> str | None:
    """Why these calls cannot run on the current device, or None: as `mosaic`."""
    return mosaic.unsupported(spec, "mosaic_fp8")


def prepare(plan: AttentionPlan, spec: AttentionSpec) -> AttentionPlan:
    """The plan with the list of work of these calls, made once for every layer."""
    lists = [work_list(spec.heads)]
    return plan.storing(lists, make_schedules(plan, lists))


def attention(
    q_THK: THK,
    k_THK: THK,
    v_THV: THV,
    plan: AttentionPlan,
    *,
    alpha: float,
    scale: Scale,
    bias: None,
    deterministic: bool = False,
) -> THV:
    """See `hstu_attention`. The output has the same bits on every run."""
    if q_THK.shape[0] == 0:
        return jnp.zeros_like(v_THV)
    scale = jnp.asarray(scale, jnp.float32)
    return _without_gradient((q_THK, k_THK, v_THV), plan, scale, alpha)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _without_gradient(qkv, plan, scale, alpha):
    return forward(quantize(*qkv, plan), plan, scale, alpha, qkv[0].dtype)[: plan.num_rows]


def _forward(qkv, plan, scale, alpha):
    raise NotImplementedError(
        "mosaic_fp8 has no gradient: train with implementation='mosaic', which takes the same "
        "inputs"
    )


_without_gradient.defvjp(_forward, lambda alpha, saved, g: (None, None, None))


def quantize(
    q: THK,
    k: THK,
    v: THV,
    plan: AttentionPlan,
) -> Float8Operands:
    """Operands in e4m3: each vector's largest entry is at the type's largest number.

    For V the largest entry is that of each head.
    """
    rows = plan.num_rows
    real_T11 = (jnp.arange(rows) < plan.num_real)[:, None, None]
    q, k, v = (padded(jnp.where(real_T11, x.astype(jnp.float32), 0)) for x in (q, k, v))

    def rounded(
        x: Float[Array, "T H _"], axes: tuple[int, ...]
    ) -> tuple[Float[Array, "T H _"], Float[Array, "..."]]:
        largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
        scale = jnp.where(largest > 0, largest, 1) / LARGEST
        return (x / scale).astype(FP8), scale.squeeze(axes)

    (q8, q_scale_TH), (k8, k_scale_TH) = rounded(q, (2,)), rounded(k, (2,))
    v8, v_scale_H = rounded(v, (0, 2))
    v8 = v8.transpose(1, 2, 0)
    v8 = v8.reshape(*v8.shape[:2], -1, 16)[..., ORDER].reshape(v8.shape)
    return Float8Operands(q8, k8, v8, q_scale_TH.T, k_scale_TH.T, v_scale_H)
