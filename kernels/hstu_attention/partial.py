"""Attention of some rows to the keys of another buffer: one summand of an output.

An output is a plain sum over keys, so sharded sequences and cached keys need nothing but such
summands. There is no kernel of its own: keys and rows are numbered in one line, keys first, and the
plan says that only the rows see anything.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from kernels.hstu_attention.api import attention_apart
from kernels.hstu_attention.plan import AttentionPlan
from kernels.mask import AttentionMask, KeyIntervals, RowIntervals
from kernels.typing import QHK, QHV, SHK, SHV

TILE = 128  # of the kernels


def partial_attention(
    q_QHK: QHK,
    k_SHK: SHK,
    v_SHV: SHV,
    keys: KeyIntervals | None = None,
    rows: RowIntervals | None = None,
    *,
    alpha: float,
    scale: ArrayLike,
    own: tuple[QHK, QHV] | None = None,
    implementation: str | Sequence[str] | None = None,
    plan: AttentionPlan | None = None,
) -> QHV:
    """`o_q = scale_q * sum over keys in the intervals of q of silu(alpha q . k) v`.

    Differentiable in q, k, v and `own`. The buffers must hold no NaN. Work follows the intervals,
    and one tile for every tile of keys.

    Args:
      keys: two disjoint intervals of keys for each of the Q rows; number S + i is the own key of
        row i.
      rows: the same transposed: three disjoint intervals of 0..Q for each of the S keys, or of the
        S + Q with the own ones.
      scale: a constant or one value a row, [Q].
      own: keys and values of the rows themselves: each row sees its own, and others where an
        interval says so. None: none.
      implementation: as in `hstu_attention`.
      plan: of `partial_plan`, in place of `keys` and `rows`: made once a batch, it serves every
        layer.

    Raises:
      ValueError: neither a plan nor both kinds of intervals.
    """
    num_rows, num_keys = q_QHK.shape[0], k_SHK.shape[0]
    if plan is None:
        if keys is None or rows is None:
            raise ValueError(
                "partial attention needs plan=, or both keys and rows, "
                f"got {plan=}, {keys=}, {rows=}"
            )
        plan = partial_plan(keys, rows, num_rows=num_rows, num_keys=num_keys, own=own is not None)
    elif plan.num_rows != plan.first_row + num_rows or plan.own_keys != (own is not None):
        raise ValueError(
            f"the plan is for {plan.num_rows - plan.first_row} rows and own_keys={plan.own_keys}, "
            f"but there are {num_rows} rows and {own=}"
        )
    k, v = (jnp.pad(x, ((0, plan.first_row - num_keys), (0, 0), (0, 0))) for x in (k_SHK, v_SHV))
    if own is not None:
        k, v = (jnp.concatenate([x, y]) for x, y in zip((k, v), own, strict=True))
    return attention_apart(
        q_QHK, k, v, plan, alpha=alpha, scale=scale, implementation=implementation
    )


def partial_plan(
    keys: KeyIntervals,
    rows: RowIntervals,
    *,
    num_rows: int,
    num_keys: int,
    own: bool,
    mask: AttentionMask = AttentionMask(),  # noqa: B008 - frozen
    plain: bool = False,
) -> AttentionPlan:
    """The plan of `partial_attention`.

    Rows are numbered behind the keys, from where a tile of a kernel may begin.

    Args:
      keys, rows: as `partial_attention` takes them.
      own: whether the rows are keys, too.
      mask, plain: what kernels choose their sizes by; `plain` with a window alone promises that
        the rows of a key are one interval.
    """
    first = -(-num_keys // TILE) * TILE
    gap = first - num_keys
    own_rows = [x[num_keys:] for x in rows] if own else [jnp.zeros(num_rows, jnp.int32)] * 6
    seen_by = [
        jnp.concatenate([jnp.pad(x[:num_keys], (0, gap)), jnp.pad(y, (0, num_rows - y.shape[0]))])
        for x, y in zip(rows, own_rows, strict=True)
    ]
    return AttentionPlan(
        keys=KeyIntervals(
            *(jnp.pad(x, (first, 0)) for x in _tidy(_past_gap(keys, num_keys, gap), 0))
        ),
        rows=RowIntervals(*_tidy(seen_by, first)),
        num_real=jnp.int32(first + num_rows),
        mask=mask,
        sequences=1,
        plain=plain,
        first_row=first,
        own_keys=own,
    )


def _past_gap(
    bounds: Sequence[Int[Array, " Q"]], num_keys: int, gap: int
) -> list[Int[Array, " Q"]]:
    """Ends of intervals of keys; own keys come `gap` later. Keys in the gap are zeros."""
    first_moved = (num_keys, num_keys + 1) * 2  # a begin that is an own key, an end behind one
    return [jnp.where(x >= first, x + gap, x) for first, x in zip(first_moved, bounds, strict=True)]


def _tidy(bounds: Sequence[Int[Array, "..."]], shift: int) -> list[Int[Array, "..."]]:
    """Ends of intervals, moved by `shift`; empty ones are (0, 0)."""
    pairs = zip(bounds[::2], bounds[1::2], strict=True)
    return [
        jnp.where(hi > lo, x + shift, 0).astype(jnp.int32) for lo, hi in pairs for x in (lo, hi)
    ]
