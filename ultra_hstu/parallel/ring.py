"""Strategies `gather` and `ring`: every shard's rows meet the keys of all shards, all at once or one shard after another."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.hstu_attention.partial import partial_plan
from kernels.mask import KeyIntervals, RowIntervals
from ultra_hstu.parallel.frame import Attend, Frame, Prepare, keeping_inputs


@functools.partial(jax.tree_util.register_dataclass, data_fields=["plan", "order"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class Gather:
    """All keys and values on every shard; the transpose of the all-gather reduce-scatters their gradients. Memory O(T), for one layer at a time."""

    plan: Any  # AttentionPlan
    order: Any  # places of the rows of the buffer in what is gathered; None: in order
    axis: str

    @staticmethod
    def of(frame: Frame, prepare: Prepare) -> "Gather":
        row, layout = frame.layout.rows(frame.shard), frame.layout
        keys = KeyIntervals(*(x[row] for x in frame.keys))
        rows = RowIntervals(*(layout.rank(x, frame.shard) for x in frame.rows))
        plan = partial_plan(keys, rows, num_rows=layout.rows_per_shard, num_keys=layout.num_rows)
        return Gather(prepare(plan), None if layout.is_contiguous else jnp.argsort(layout.permutation()), frame.axis)

    def __call__(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        def run(q: Array, k: Array, v: Array, scale: Array, this: "Gather") -> Array:
            return attend(q, this._whole(k), this._whole(v), plan=this.plan, scale=scale, own=(k, v))

        return keeping_inputs(run, q, k, v, scale, self)

    def _whole(self, x: Array) -> Array:
        x = jax.lax.all_gather(x, self.axis, tiled=True)
        return x if self.order is None else x[self.order]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["plans", "some"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class Ring:
    """Keys and values travel around the shards; what a shard sees of each is added up. Memory O(T / C), in the backward too: there the
    gradients of keys and values, in float32, travel with them.

    The transfer of a step does not depend on its computation, so that they can overlap; a step without a visible key computes nothing.
    """

    plans: Any  # AttentionPlan of this shard's rows and the keys of the shard so many before it
    some: Any  # bool scalars: whether they see any
    axis: str

    @staticmethod
    def of(frame: Frame, prepare: Prepare) -> "Ring":
        plans, some, size = [], [], frame.layout.rows_per_shard
        for distance in range(frame.layout.shards):
            source = (frame.shard - distance) % frame.layout.shards
            keys, rows = frame.keys_of(frame.shard, source), frame.rows_of(frame.shard, source)
            plans.append(prepare(partial_plan(keys, rows, num_rows=size, num_keys=size if distance else 0)))
            some.append(((keys.hi0 > keys.lo0) | (keys.hi1 > keys.lo1)).any())
        return Ring(tuple(plans), tuple(some), frame.axis)

    def __call__(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        @jax.custom_vjp
        def run(q: Array, k: Array, v: Array, scale: Array, this: "Ring") -> Array:
            out, travelling = jnp.zeros((*q.shape[:2], v.shape[2]), jnp.float32), (k, v)
            for distance in range(len(this.plans)):
                here = travelling
                travelling = this._send(travelling) if distance + 1 < len(this.plans) else travelling
                out = out + this._step(distance, scale, attend)(q, *here).astype(jnp.float32)
            return out.astype(v.dtype)

        def forward(*inputs: Any) -> tuple[Array, Any]:
            return run(*inputs), inputs

        def backward(saved: Any, g: Array) -> tuple[Any, ...]:
            q, k, v, scale, this = saved
            travelling = (k, v)
            dq, *d_kv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
            for distance in range(len(this.plans)):
                here = travelling
                travelling = this._send(travelling) if distance + 1 < len(this.plans) else travelling
                parts = jax.vjp(this._step(distance, scale, attend), q, *here)[1](g)
                dq, *d_kv = (a + b.astype(jnp.float32) for a, b in zip((dq, *d_kv), parts, strict=True))
                d_kv = this._send(d_kv)  # after as many steps as there are shards they are at home
            return dq.astype(q.dtype), d_kv[0].astype(k.dtype), d_kv[1].astype(v.dtype), None, None

        run.defvjp(forward, backward)
        return run(q, k, v, scale, self)

    def _send(self, x: Any) -> Any:
        """To the next shard; what comes in is the shard's before."""
        shards = len(self.plans)
        onward = [(i, (i + 1) % shards) for i in range(shards)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, onward), x)

    def _step(self, distance: int, scale: Array, attend: Attend) -> Callable[..., Array]:
        """What this shard's rows get from the keys of the shard `distance` before it: a function of q, k, v."""
        plan = self.plans[distance]
        if distance == 0:
            return lambda q, k, v: attend(q, k[:0], v[:0], plan=plan, scale=scale, own=(k, v))
        return lambda q, k, v: jax.lax.cond(
            self.some[distance],
            lambda: attend(q, k, v, plan=plan, scale=scale),
            lambda: jnp.zeros((*q.shape[:2], v.shape[2]), v.dtype),
        )
