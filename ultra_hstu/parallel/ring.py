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


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["plan", "order"], meta_fields=["axis"]
)
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
        plan = partial_plan(
            keys, rows, num_rows=layout.rows_per_shard, num_keys=layout.num_rows, own=True
        )
        return Gather(
            prepare(plan),
            None if layout.is_contiguous else jnp.argsort(layout.permutation()),
            frame.axis,
        )

    def __call__(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        return keeping_inputs(self, q, k, v, scale, attend)

    def sums(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        return attend(q, self._whole(k), self._whole(v), plan=self.plan, scale=scale, own=(k, v))

    def gradients(
        self, q: Array, k: Array, v: Array, g: Array, scale: Array, attend: Attend
    ) -> tuple[Array, ...]:
        return jax.vjp(lambda q, k, v: self.sums(q, k, v, scale, attend), q, k, v)[1](g)

    def _whole(self, x: Array) -> Array:
        x = jax.lax.all_gather(x, self.axis, tiled=True)
        return x if self.order is None else x[self.order]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["own", "others"], meta_fields=["axis", "shards"]
)
@dataclasses.dataclass(frozen=True)
class Ring:
    """Keys and values travel around the shards; what a shard sees of each is added up. Memory O(T / C), in the backward too: there the
    gradients of keys and values travel behind them, in float32 until the last hop, which brings them home.

    The forward begins with the shard's own keys, while others' come; the backward ends with them, while gradients go home. No other transfer depends
    on the computation beside it either.
    """

    own: Any  # AttentionPlan of the shard's rows and keys
    others: Any  # AttentionPlan, stacked: of its rows and the keys of the shard before, of the one before that, ...
    axis: str
    shards: int

    @staticmethod
    def of(frame: Frame, prepare: Prepare) -> "Ring":
        shards, size = frame.layout.shards, frame.layout.rows_per_shard

        def meet(distance: Any, num_keys: int) -> Any:
            source = (frame.shard - distance) % shards
            keys, rows = frame.keys_of(frame.shard, source), frame.rows_of(frame.shard, source)
            return prepare(
                partial_plan(keys, rows, num_rows=size, num_keys=num_keys, own=not num_keys)
            )

        others = jax.lax.map(lambda distance: meet(distance, size), jnp.arange(1, shards))
        return Ring(meet(0, 0), others, frame.axis, shards)

    def __call__(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        return keeping_inputs(self, q, k, v, scale, attend)

    def sums(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        def add(number: Any, out: Array, here: Any) -> Array:
            return out + self._part(number, scale, attend)(q, *here).astype(jnp.float32)

        def step(number: Any, carry: Any) -> Any:
            out, here = carry
            coming = self._send(here)
            return add(number, out, here), coming

        out = self._part(None, scale, attend)(q, k, v).astype(jnp.float32)
        if (
            self.shards > 1
        ):  # a loop, so that no more keys are in memory than what is here and what is coming
            out, here = jax.lax.fori_loop(0, self.shards - 2, step, (out, self._send((k, v))))
            out = add(self.shards - 2, out, here)
        return out.astype(v.dtype)

    def gradients(
        self, q: Array, k: Array, v: Array, g: Array, scale: Array, attend: Attend
    ) -> tuple[Array, ...]:
        def parts(number: Any, here: Any) -> list[Array]:
            return [
                x.astype(jnp.float32)
                for x in jax.vjp(self._part(number, scale, attend), q, *here)[1](g)
            ]

        def meet(number: Any, sums: Any, here: Any) -> list[Array]:
            """The sums, of which those of keys and values have come with them."""
            return [
                a + b
                for a, b in zip((sums[0], *self._send(sums[1:])), parts(number, here), strict=True)
            ]

        def step(number: Any, carry: Any) -> Any:
            sums, here = carry
            coming = self._send(here)
            return meet(number, sums, here), coming

        likes, kv = (q, k, v), (k, v)
        if self.shards == 1:
            return tuple(
                x.astype(like.dtype) for x, like in zip(parts(None, kv), likes, strict=True)
            )
        here = self._send(kv)
        sums = parts(0, here)
        if self.shards > 2:
            sums, here = jax.lax.fori_loop(1, self.shards - 2, step, (sums, self._send(here)))
            sums = meet(self.shards - 2, sums, here)
        home = self._send([x.astype(like.dtype) for x, like in zip(sums[1:], kv, strict=True)])
        own = parts(None, kv)
        return tuple(
            (a + b).astype(like.dtype)
            for a, b, like in zip((sums[0], *home), own, likes, strict=True)
        )

    def _part(self, number: Any, scale: Array, attend: Attend) -> Callable[..., Array]:
        """What rows get from the keys of another shard, or from those of their own (None), a function of q, k, v."""
        if number is None:
            return lambda q, k, v: attend(q, k[:0], v[:0], plan=self.own, scale=scale, own=(k, v))
        return functools.partial(
            attend, plan=jax.tree.map(lambda leaf: leaf[number], self.others), scale=scale
        )

    def _send(self, x: Any) -> Any:
        """To the next shard; what comes in is the shard's before."""
        onward = [(i, (i + 1) % self.shards) for i in range(self.shards)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis, onward), x)
