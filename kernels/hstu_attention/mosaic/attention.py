"""The implementation `mosaic` of `hstu_attention`: Pallas Mosaic GPU kernels for Hopper.

This file is what the op calls; docs/attention_kernel.md explains the kernels.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import device
from kernels.hstu_attention.mosaic.backward import backward_config, gradients, work_lists
from kernels.hstu_attention.mosaic.forward import forward, forward_config
from kernels.hstu_attention.mosaic.padding import padded
from kernels.hstu_attention.mosaic.schedule import WorkList, make_schedules
from kernels.hstu_attention.plan import AttentionPlan, AttentionSpec
from kernels.typing import SHK, SHV, THK, THV, Scale

ROWS_APART = True  # queries may come without the rows before `plan.first_row`, which are only keys
WIDTHS = (64, 128, 256)


def unsupported(spec: AttentionSpec, name: str = "mosaic") -> str | None:
    """Why these calls cannot run on the current device, or None."""
    dtype = jnp.dtype(spec.dtype)
    if spec.biased:
        return f"{name} takes no relative bias; use 'triton' or 'xla', or bias=None"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"{name} takes bfloat16 or float16, got {dtype.name}; cast q, k, v or use 'xla'"
    for side, width in (("K", spec.k_width), ("V", spec.v_width)):
        if width not in WIDTHS:
            return (
                f"{name} takes head widths {WIDTHS}, got {side} = {width}; "
                "pad q, k, v with zeros or use 'xla'"
            )
    if not device.current().is_hopper:
        kind = device.current().kind
        return f"{name} needs a Hopper GPU (H100, H200), the device is {kind!r}; use 'xla'"
    return None


def prepare(plan: AttentionPlan, spec: AttentionSpec) -> AttentionPlan:
    """The plan with the lists of work of these calls, made once for every layer."""
    config = forward_config(spec, plan)
    lists = [
        WorkList.forward(spec.heads, config.block_k),
        *work_lists(spec.heads, backward_config(spec, plan)),
    ]
    lists = list(dict.fromkeys(lists))
    return plan.storing(lists, make_schedules(plan, lists))


def attention(
    q_THK: THK,
    k_SHK: SHK,
    v_SHV: SHV,
    plan: AttentionPlan,
    *,
    alpha: float,
    scale: Scale,
    bias: None,
    deterministic: bool = False,
) -> THV:
    """See `hstu_attention`. S is T, or `plan.num_keys` (see `partial`).

    With `deterministic`, a second pass makes dQ. Otherwise dQ is summed in memory in no fixed
    order.
    """
    rows, heads, k_width = q_THK.shape
    if rows == 0:
        return jnp.zeros((0, *v_SHV.shape[1:]), v_SHV.dtype)
    spec = AttentionSpec(q_THK.dtype, heads, k_width, v_SHV.shape[2], deterministic=deterministic)
    qkv = (padded(q_THK), padded(k_SHK), padded(v_SHV))
    return _padded_attention(qkv, plan, jnp.asarray(scale, jnp.float32), alpha, spec)[:rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _padded_attention(qkv, plan, scale, alpha, spec):
    return forward(*qkv, plan, scale, alpha, forward_config(spec, plan))


def _forward(qkv, plan, scale, alpha, spec):
    return _padded_attention(qkv, plan, scale, alpha, spec), (qkv, plan, scale)


def _backward(alpha, spec, saved, g):
    qkv, plan, scale = saved
    config = backward_config(spec, plan)
    return gradients(*qkv, g, plan, scale, alpha, config), None, None


_padded_attention.defvjp(_forward, _backward)
