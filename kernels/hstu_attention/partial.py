"""Attention of some rows to the keys of another buffer: one summand of an output whose keys lie in several places.

An output is a plain sum over keys, so sharded sequences and cached keys need nothing but such summands. There is no kernel of its own: keys and
rows are put behind one another in one buffer, whose plan says that only the latter see anything.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.hstu_attention.api import hstu_attention
from kernels.hstu_attention.plan import AttentionPlan
from kernels.mask import AttentionMask, KeyIntervals, RowIntervals


def partial_attention(
    q_QHK: Float[Array, "Q H K"],
    k_SHK: Float[Array, "S H K"],
    v_SHV: Float[Array, "S H V"],
    keys: KeyIntervals | None = None,
    rows: RowIntervals | None = None,
    *,
    alpha: float,
    scale: Any,
    own: tuple[Array, Array] | None = None,
    implementation: str | Sequence[str] | None = None,
    plan: AttentionPlan | None = None,
) -> Float[Array, "Q H V"]:
    """`o_q = scale_q * sum over keys in the intervals of q of silu(alpha q . k) v`. Differentiable in q, k, v and `own`.

    The buffers must hold no NaN. Work follows the intervals, and one tile for every tile of keys.

    Args:
      keys: two disjoint intervals of keys for each of the Q rows; number S + i is the own key of row i.
      rows: the same transposed: three disjoint intervals of 0..Q for each of the S keys, or of the S + Q with the own ones.
      scale: a constant or one value a row, [Q].
      own: keys [Q, H, K] and values [Q, H, V] of the rows themselves: each row sees its own, and others where an interval says so. None: none.
      implementation: as in `hstu_attention`.
      plan: of `partial_plan`, in place of `keys` and `rows`: made once a batch, it serves every layer.

    Raises:
      ValueError: neither a plan nor both kinds of intervals.
    """
    num_rows, num_keys = q_QHK.shape[0], k_SHK.shape[0]
    if plan is None:
        if keys is None or rows is None:
            raise ValueError(f"partial attention needs plan=, or both keys and rows, got {plan=}, {keys=}, {rows=}")
        plan = partial_plan(keys, rows, num_rows=num_rows, num_keys=num_keys)
    own_k, own_v = (jnp.zeros_like(q_QHK), jnp.zeros((num_rows, *v_SHV.shape[1:]), v_SHV.dtype)) if own is None else own
    q = jnp.concatenate([jnp.zeros((num_keys, *q_QHK.shape[1:]), q_QHK.dtype), q_QHK])
    k, v = jnp.concatenate([k_SHK, own_k]), jnp.concatenate([v_SHV, own_v])
    scale = jnp.asarray(scale, jnp.float32)
    if scale.ndim:
        scale = jnp.pad(scale, (num_keys, 0))
    offsets = jnp.asarray([0, num_keys + num_rows], jnp.int32)
    return hstu_attention(q, k, v, offsets, alpha=alpha, scale=scale, implementation=implementation, plan=plan)[num_keys:]


def partial_plan(keys: KeyIntervals, rows: RowIntervals, *, num_rows: int, num_keys: int) -> AttentionPlan:
    """The plan of the joined buffer: first the keys, whose rows see nothing, then the rows."""
    behind = num_keys + num_rows - rows.near_lo.shape[0]
    return AttentionPlan(
        keys=KeyIntervals(*(jnp.pad(x, (num_keys, 0)) for x in _tidy(keys, 0))),
        rows=RowIntervals(*(jnp.pad(x, (0, behind)) for x in _tidy(rows, num_keys))),
        num_real=jnp.int32(num_keys + num_rows),
        stored={},
        mask=AttentionMask(),
        sequences=1,
        plain=False,
    )


def _tidy(bounds: Sequence[Array], shift: int) -> list[Array]:
    """Ends of intervals, moved by `shift`; empty ones are (0, 0)."""
    pairs = zip(bounds[::2], bounds[1::2], strict=True)
    return [jnp.where(hi > lo, x + shift, 0).astype(jnp.int32) for lo, hi in pairs for x in (lo, hi)]
