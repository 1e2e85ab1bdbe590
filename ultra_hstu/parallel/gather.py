"""Strategy `gather`: every shard's rows meet the keys of all shards at once."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.hstu_attention.partial import partial_plan
from kernels.hstu_attention.plan import AttentionPlan
from kernels.mask import KeyIntervals, RowIntervals
from kernels.typing import Leaf, PerRow
from ultra_hstu.parallel.mesh import CONTEXT
from ultra_hstu.parallel.strategy import AttentionCall, PartialSums, Prepare, ShardMask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatheredKeys(PartialSums):
    """All keys and values on every shard, for one layer at a time: memory O(T).

    The transpose of the all-gather reduce-scatters their gradients.

    Attributes:
      plan: of the shard's rows and all keys.
      order: where the rows of the buffer are in what is gathered; None: in order.
    """

    plan: Leaf[AttentionPlan]
    order: Leaf[PerRow] | None

    @staticmethod
    def of(view: ShardMask, prepare: Prepare) -> "GatheredKeys":
        layout = view.layout
        plan = partial_plan(
            KeyIntervals(*(x[view.own_t] for x in view.keys)),
            RowIntervals(*(view.here(x) for x in view.seen_by)),
            num_rows=layout.rows_per_shard,
            num_keys=layout.num_rows,
            own=True,
        )
        order = None if layout.is_contiguous else jnp.argsort(layout.permutation())
        return GatheredKeys(prepare(plan), order)

    def sums(self, q: Array, k: Array, v: Array, call: AttentionCall) -> Array:
        return call.part(q, self._whole(k), self._whole(v), plan=self.plan, own=(k, v))

    def _whole(self, x: Array) -> Array:
        x = jax.lax.all_gather(x, CONTEXT, tiled=True)
        return x if self.order is None else x[self.order]
