"""A few rows that attend to a whole buffer: their queries visit its shards, the sums come home.

An output is a sum over keys. So a shard's part of it needs that shard's keys alone, whatever the
mask, and whatever strategy divides a layer of all rows: O(P) bytes are sent, independent of T.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kernels.hstu_attention.partial import partial_attention, partial_plan
from kernels.hstu_attention.plan import AttentionPlan
from kernels.mask import KeyIntervals, RowIntervals
from kernels.typing import STATIC, Leaf, Scale
from ultra_hstu.parallel.mesh import CONTEXT
from ultra_hstu.parallel.strategy import Implementation, Output, Prepare, ShardMask


def visiting_plan(view: ShardMask, row_R: Int[Array, " R"]) -> AttentionPlan:
    """The plan of rows of the buffer, ascending (T in unused entries), and this shard's keys."""
    num_rows, own = view.layout.num_rows, view.own_t
    at_R, used_R = jnp.minimum(row_R, num_rows - 1), row_R < num_rows
    keys = KeyIntervals(*(jnp.where(used_R, view.here(x[at_R]), 0) for x in view.keys))
    ctx_lo, ctx_hi, near_lo, near_hi, tail_lo, tail_hi = (
        jnp.searchsorted(row_R, x[own], method="scan_unrolled").astype(jnp.int32)
        for x in view.seen_by
    )
    # Near rows and the tail are one interval where no visiting row stands between them.
    some_near, some_tail = near_hi > near_lo, tail_hi > tail_lo
    joined = ~some_near | ~some_tail | (near_hi == tail_lo)
    rows = RowIntervals(
        ctx_lo,
        ctx_hi,
        jnp.where(joined, 0, near_lo),
        jnp.where(joined, 0, near_hi),
        jnp.where(joined & some_near, near_lo, tail_lo),
        jnp.where(joined & ~some_tail, near_hi, tail_hi),
    )
    return partial_plan(keys, rows, num_rows=row_R.shape[0], num_keys=own.shape[0], own=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisitingRows:
    """P rows, of which each shard of C has a slice, and the keys of all rows. Inside `shard_map`.

    Attributes:
      plan: of all P rows in ascending order and this shard's keys.
      order_P: `x_P[order_P]` is that order.
      used_p: which of this shard's slice are rows of the buffer.
      shards: C.
    """

    plan: Leaf[AttentionPlan]
    order_P: Leaf[Int[Array, " P"]]
    used_p: Leaf[Bool[Array, " p"]]
    shards: int = dataclasses.field(metadata=STATIC)

    @staticmethod
    def of(
        view: ShardMask, row_P: Int[Array, " P"], row_p: Int[Array, " p"], prepare: Prepare
    ) -> "VisitingRows":
        """
        Args:
          row_P: numbers of all rows, any order; T and more are none. C divides P.
          row_p: those of this shard's slice.
          prepare: as in `Strategy.of`.
        """
        num_rows = view.layout.num_rows
        order_P = jnp.argsort(row_P)
        plan = prepare(visiting_plan(view, jnp.minimum(row_P[order_P], num_rows)))
        return VisitingRows(plan, order_P, row_p < num_rows, view.layout.shards)

    def __call__(
        self,
        q_pHK: Array,
        k_tHK: Array,
        v_tHV: Array,
        own: tuple[Array, Array],
        *,
        alpha: float,
        scale: Scale,
        implementation: Implementation,
    ) -> Output:
        """Attention of this shard's slice of the rows, zeros for those that are none.

        Args:
          k_tHK, v_tHV: of this shard's rows of the buffer.
          own: keys and values of the slice: a row sees its own.
          scale: a constant, or one for each of all P rows.
        """
        q_PHK, scale_P, scale_p11 = q_pHK, scale, scale
        if not isinstance(scale, float):
            rows = q_pHK.shape[0]
            first = 0 if self.shards == 1 else jax.lax.axis_index(CONTEXT) * rows
            scale_P = scale[self.order_P]
            scale_p11 = jax.lax.dynamic_slice_in_dim(scale, first, rows)[:, None, None]
        if self.shards > 1:
            q_PHK = jax.lax.all_gather(q_pHK, CONTEXT, tiled=True)
        part_PHV = partial_attention(
            q_PHK[self.order_P],
            k_tHK,
            v_tHV,
            alpha=alpha,
            scale=scale_P,
            implementation=implementation,
            plan=self.plan,
        )
        sum_pHV = part_PHV[jnp.argsort(self.order_P)].astype(jnp.float32)
        if self.shards > 1:
            sum_pHV = jax.lax.psum_scatter(sum_pHV, CONTEXT, tiled=True)
        q, k, v = (x.astype(jnp.float32) for x in (q_pHK, *own))
        score_pH1 = alpha * jnp.sum(q * k, axis=2, keepdims=True)
        sum_pHV += scale_p11 * jax.nn.silu(score_pH1) * v
        return jnp.where(self.used_p[:, None, None], sum_pHV, 0.0).astype(v_tHV.dtype)
