"""HSTU attention of new rows to keys that lie in a cache: the public function and its checks.

An output is a plain sum over keys, so what a row gets from a cache and what it gets from its own
key simply add up, and several parts of the keys may be computed side by side. Queries and keys
are buffers of different length here, neither is copied, and nothing is planned for a batch beyond
the ranges of keys that tiles of rows see. Forward only: nothing here has a gradient of its own.
"""

import dataclasses
from collections.abc import Sequence
from types import ModuleType

import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels import dispatch
from kernels.hstu_attention.api import check_tensors, check_times
from kernels.hstu_attention.plan import AttentionSpec
from kernels.hstu_attention.relative_bias import RelativeBias
from kernels.mask import KeyIntervals
from kernels.typing import RHV, Scale, Unchecked

_OP = dispatch.Op[AttentionSpec](
    "cached_attention",
    modules={
        "triton": "kernels.cached_attention.triton.attention",
        "xla": "kernels.cached_attention.xla",
    },
    order={"gpu": ("triton", "xla")},
)


def implementations() -> dict[str, str]:
    """Names of the implementations, with their modules."""
    return dict(_OP.modules)


def cached_attention(
    q_RHK: Unchecked,
    k_SHK: Unchecked,
    v_SHV: Unchecked,
    keys: KeyIntervals,
    *,
    alpha: float,
    scale: Scale,
    own: tuple[Unchecked, Unchecked] | None = None,
    bias: RelativeBias | None = None,
    place_R: Int[Array, "..."] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> RHV:
    """`o_r = scale * sum over the keys that r sees of silu(alpha * q_r . k + bias) * v`.

    The result has the dtype of q; sums are in float32. The buffers of keys and values must hold no
    NaN. Rows whose intervals are empty get 0, or what their own key gives.

    Args:
      q_RHK, k_SHK, v_SHV: [R, H, K], [S, H, K], [S, H, V] of one dtype: float32, bfloat16 or
        float16.
      keys: two intervals of 0..S for each of the R rows. Where they overlap a key still counts
        once.
      alpha: factor on the scores.
      scale: factor on the outputs, a constant or float[R], one a row. (Kernels take a constant: one
        a row is multiplied with what they give, rounded once more.)
      own: key [R, H, K] and value [R, H, V] of each row itself, which it sees too. None: it sees
        none, or one that the intervals hold.
      bias: relative bias: `timestamps` [S] of the keys, `query_timestamps` [R] of the rows. A row's
        own key is at distance 0 in position and in time.
      place_R: int32[R], where a row would stand in the buffer of keys: distances of the position
        table are counted from there.
      implementation: a name, which never falls back; a sequence, tried in order; None, the order of
        the platform.

    Raises:
      ValueError: inputs that no implementation could take.
      NotImplementedError: the named implementation cannot take these inputs, or none can; with the
        reasons.
    """
    _check(q_RHK, k_SHK, v_SHV, keys, own, bias, place_R)
    if jnp.shape(scale) not in ((), (q_RHK.shape[0],)):
        raise ValueError(
            f"scale must be a constant or one factor for each of the {q_RHK.shape[0]} rows, got "
            f"shape {jnp.shape(scale)}"
        )

    if q_RHK.shape[0] == 0:
        return jnp.zeros((*q_RHK.shape[:2], v_SHV.shape[2]), q_RHK.dtype)
    if k_SHK.shape[0] == 0:  # a key of zeros that nobody sees: kernels want something to point at
        k_SHK, v_SHV = (jnp.zeros((1, *x.shape[1:]), x.dtype) for x in (k_SHK, v_SHV))
        if bias is not None and bias.timestamps is not None:
            bias = dataclasses.replace(bias, timestamps=jnp.zeros(1, jnp.int32))

    of_rows = jnp.ndim(scale) > 0

    def run(module: ModuleType) -> Array:
        return module.attention(
            q_RHK,
            k_SHK,
            v_SHV,
            keys,
            alpha=float(alpha),
            scale=1.0 if of_rows else float(scale),
            own=own,
            bias=bias,
            place_R=place_R,
        )

    _, heads, k_width = q_RHK.shape
    spec = AttentionSpec(q_RHK.dtype, heads, k_width, v_SHV.shape[2], bias is not None)
    out_RHV = _OP.call(implementation, spec, run)
    if not of_rows:
        return out_RHV
    return (out_RHV * jnp.asarray(scale)[:, None, None]).astype(out_RHV.dtype)


def _check(
    q: Unchecked,
    k: Unchecked,
    v: Unchecked,
    keys: KeyIntervals,
    own: tuple[Unchecked, Unchecked] | None,
    bias: RelativeBias | None,
    place: Array | None,
) -> None:
    check_tensors(q, k, v)
    if q.shape[1:] != k.shape[1:] or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must be [R, H, K], [S, H, K] and [S, H, V]"
        )
    rows = q.shape[0]
    if any(bound.shape != (rows,) for bound in keys):
        raise ValueError(
            f"keys must be four int32[{rows}], one bound a row of q, "
            f"got shapes {[bound.shape for bound in keys]}"
        )
    if own is not None and (own[0].shape != q.shape or own[1].shape != (*q.shape[:2], v.shape[2])):
        raise ValueError(
            f"own must be a key {q.shape} and a value {(*q.shape[:2], v.shape[2])} a row, "
            f"got {own[0].shape}, {own[1].shape}"
        )
    if bias is None:
        return
    if bias.position_table is not None and (place is None or place.shape != (rows,)):
        raise ValueError(
            f"a position bias needs place_R, int32[{rows}]: "
            "where each row would stand among the keys"
        )
    check_times(bias, keys=k.shape[0], queries=rows)
