"""Strategy `ulysses` (DeepSpeed-Ulysses): all rows of some heads for some rows of all heads."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels.hstu_attention.api import hstu_attention
from kernels.hstu_attention.plan import AttentionPlan, make_plan
from kernels.mask import AttentionMask
from kernels.typing import Leaf, PerRow
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import CONTEXT
from ultra_hstu.parallel.strategy import AttentionCall, Output, Prepare, ShardMask, Strategy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ulysses(Strategy):
    """Four all-to-alls of O(T / C) bytes a shard.

    Attention itself is that of one device, over whole sequences, so it takes a relative bias.

    Attributes:
      plan: of the whole buffer.
      order, back: the rows of the buffer as the shards hold them, and the inverse; None: in order.
    """

    plan: Leaf[AttentionPlan]
    offsets: Leaf[Int[Array, " B1"]]
    order: Leaf[PerRow] | None
    back: Leaf[PerRow] | None

    takes_bias = True

    @staticmethod
    def of(view: ShardMask, prepare: Prepare) -> "Ulysses":
        layout = view.layout
        order = None if layout.is_contiguous else layout.permutation()
        plan = make_plan(view.mask, view.offsets, layout.num_rows, *view.counts)
        back = None if order is None else jnp.argsort(order)
        return Ulysses(prepare(plan), jnp.asarray(view.offsets), order, back)

    @classmethod
    def check(cls, mask: AttentionMask, layout: Layout, heads: int, biased: bool) -> None:
        super().check(mask, layout, heads, biased)
        if heads % layout.shards:
            raise ValueError(
                f"'ulysses' needs a number of heads divisible by the {layout.shards} context "
                f"shards, got {heads}: use 'ring'"
            )

    @staticmethod
    def heads_of_a_call(layout: Layout, heads: int) -> int:
        return heads // layout.shards

    def attend(self, q_tHK: Array, k_tHK: Array, v_tHV: Array, call: AttentionCall) -> Output:
        bias = call.bias
        if bias is not None and bias.times is not None:
            queries, keys = (self._rows(x) for x in bias.times)
            bias = dataclasses.replace(bias, timestamps=keys, query_timestamps=queries)
        out = hstu_attention(
            self._whole(q_tHK),
            self._whole(k_tHK),
            self._whole(v_tHV),
            self.offsets,
            mask=self.plan.mask,
            alpha=call.alpha,
            scale=call.of_rows(self._rows).scale,
            bias=bias,
            implementation=call.implementation,
            plan=self.plan,
        )
        out = out if self.order is None else out[self.order]
        return jax.lax.all_to_all(out, CONTEXT, split_axis=0, concat_axis=1, tiled=True)

    def _whole(self, x: Array) -> Array:
        """[T / C, H, *] to [T, H / C, *], rows in the order of the buffer."""
        x = jax.lax.all_to_all(x, CONTEXT, split_axis=1, concat_axis=0, tiled=True)
        return x if self.back is None else x[self.back]

    def _rows(self, x: Array) -> Array:
        x = jax.lax.all_gather(x, CONTEXT, tiled=True)
        return x if self.back is None else x[self.back]
