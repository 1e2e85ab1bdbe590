"""Strategies `gather` and `ring`: every shard's rows meet the keys of all shards, all at once or one shard after another."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.hstu_attention.partial import partial_plan
from kernels.mask import KeyIntervals, RowIntervals
from ultra_hstu.parallel.frame import Attend, Frame, Prepare, in_turns, keeping_inputs


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


class Meeting(NamedTuple):
    """This shard's rows and the keys of one shard."""

    plan: Any  # AttentionPlan
    some: Any  # whether any row sees any key


@functools.partial(jax.tree_util.register_dataclass, data_fields=["own", "others"], meta_fields=["axis", "shards"])
@dataclasses.dataclass(frozen=True)
class Ring:
    """Keys and values travel around the shards; what a shard sees of each is added up. Memory O(T / C), in the backward too: there the
    gradients of keys and values, in float32, travel with them.

    The transfer of a step does not depend on its computation, so that they can overlap; a step without a visible key computes nothing.
    """

    own: Meeting
    others: Meeting  # stacked: the shard before this one, the one before that, ...
    axis: str
    shards: int

    @staticmethod
    def of(frame: Frame, prepare: Prepare) -> "Ring":
        shards, size = frame.layout.shards, frame.layout.rows_per_shard

        def meet(distance: Any, num_keys: int) -> Meeting:
            source = (frame.shard - distance) % shards
            keys, rows = frame.keys_of(frame.shard, source), frame.rows_of(frame.shard, source)
            plan = prepare(partial_plan(keys, rows, num_rows=size, num_keys=num_keys))
            return Meeting(plan, ((keys.hi0 > keys.lo0) | (keys.hi1 > keys.lo1)).any())

        others = jax.lax.map(lambda distance: meet(distance, size), jnp.arange(1, shards))
        return Ring(meet(0, 0), others, frame.axis, shards)

    def __call__(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        @jax.custom_vjp
        def run(q: Array, k: Array, v: Array, scale: Array, this: "Ring") -> Array:
            def of_heads(q: Array, k: Array, v: Array) -> tuple[Array]:
                def add(out: Array, here: Any, step: Any) -> Array:
                    return out + step(q, *here).astype(jnp.float32)

                out = this._round(add, jnp.zeros((*q.shape[:2], v.shape[2]), jnp.float32), (k, v), scale, attend)
                return (out.astype(v.dtype),)

            return in_turns(of_heads, (v,), q, k, v)[0]

        def forward(*inputs: Any) -> tuple[Array, Any]:
            return run(*inputs), inputs

        def backward(saved: Any, g: Array) -> tuple[Any, ...]:
            q, k, v, scale, this = saved
            q, k, v, g = jax.lax.optimization_barrier((q, k, v, g))  # else XLA keeps what the forward has received, see `keeping_inputs`

            def of_heads(q: Array, k: Array, v: Array, g: Array) -> Any:
                def add(sums: Any, here: Any, step: Any) -> Any:
                    parts = jax.vjp(step, q, *here)[1](g)
                    dq, *d_kv = (a + b.astype(jnp.float32) for a, b in zip(sums, parts, strict=True))
                    return dq, *this._send(d_kv)  # after as many steps as there are shards they are at home

                zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
                sums = this._round(add, zeros, (k, v), scale, attend)
                return tuple(total.astype(x.dtype) for total, x in zip(sums, (q, k, v), strict=True))

            return *in_turns(of_heads, (q, k, v), q, k, v, g), None, None

        run.defvjp(forward, backward)
        return run(q, k, v, scale, self)

    def _round(self, add: Callable[..., Any], sums: Any, kv: Any, scale: Array, attend: Attend) -> Any:
        """Folds `add(sums, keys and values that are here, what rows get from them)` over all shards. A loop, so that no more of them is in memory than
        what is here and what is coming.
        """
        plan = self.own.plan
        own = lambda q, k, v: attend(q, k[:0], v[:0], plan=plan, scale=scale, own=(k, v))  # noqa: E731
        if self.shards == 1:
            return add(sums, kv, own)

        def other(number: Any) -> Callable[..., Array]:
            meeting = jax.tree.map(lambda leaf: leaf[number], self.others)
            return lambda q, k, v: jax.lax.cond(
                meeting.some,
                lambda: attend(q, k, v, plan=meeting.plan, scale=scale),
                lambda: jnp.zeros((*q.shape[:2], v.shape[2]), v.dtype),
            )

        def step(number: Array, carry: Any) -> Any:
            sums, here = carry
            coming = self._send(here)
            return add(sums, here, other(number)), coming

        coming = self._send(kv)
        carry = jax.lax.fori_loop(0, self.shards - 2, step, (add(sums, kv, own), coming))
        return add(*carry, other(self.shards - 2))

    def _send(self, x: Any) -> Any:
        """To the next shard; what comes in is the shard's before."""
        onward = [(i, (i + 1) % self.shards) for i in range(self.shards)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, onward), x)
