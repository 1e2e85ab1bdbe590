"""Strategy `ulysses` (DeepSpeed-Ulysses): all rows of some heads in place of some rows of all heads."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.hstu_attention.api import RelativeBias
from kernels.hstu_attention.plan import make_plan
from ultra_hstu.parallel.frame import Frame, Prepare


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["plan", "offsets", "order", "back"],
    meta_fields=["axis"],
)
@dataclasses.dataclass(frozen=True)
class Ulysses:
    """Four all-to-alls of O(T / C) bytes a shard; attention itself is that of one device, over whole sequences."""

    plan: Any  # AttentionPlan
    offsets: Any
    order: Any  # the rows of the buffer as the shards hold them, and the inverse; None: in order
    back: Any
    axis: str

    @staticmethod
    def of(frame: Frame, prepare: Prepare) -> "Ulysses":
        sequences, order = (
            frame.sequences,
            None if frame.layout.is_contiguous else frame.layout.permutation(),
        )
        plan = make_plan(
            frame.mask,
            sequences.offsets,
            frame.layout.num_rows,
            sequences.num_targets,
            sequences.num_contextual,
        )
        return Ulysses(
            prepare(plan),
            sequences.offsets,
            order,
            None if order is None else jnp.argsort(order),
            frame.axis,
        )

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        scale: Array,
        bias: RelativeBias | None,
        attend: Callable[..., Array],
    ) -> Array:
        """`attend` is `hstu_attention`, its constants filled in."""
        if bias is not None and bias.times is not None:
            queries, keys = (self._rows(x) for x in bias.times)
            bias = dataclasses.replace(bias, timestamps=keys, query_timestamps=queries)
        scale = self._rows(scale) if jnp.ndim(scale) else scale
        mask = self.plan.mask
        out = attend(
            self._whole(q),
            self._whole(k),
            self._whole(v),
            self.offsets,
            mask=mask,
            scale=scale,
            bias=bias,
            plan=self.plan,
        )
        out = out if self.order is None else out[self.order]
        return jax.lax.all_to_all(out, self.axis, split_axis=0, concat_axis=1, tiled=True)

    def _whole(self, x: Array) -> Array:
        """[T / C, H, *] to [T, H / C, *], rows in the order of the buffer."""
        x = jax.lax.all_to_all(x, self.axis, split_axis=1, concat_axis=0, tiled=True)
        return x if self.back is None else x[self.back]

    def _rows(self, x: Array) -> Array:
        x = jax.lax.all_gather(x, self.axis, tiled=True)
        return x if self.back is None else x[self.back]
