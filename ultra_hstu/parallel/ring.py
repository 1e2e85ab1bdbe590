"""Strategy `ring`: every shard's rows meet the keys of all shards, one shard after another."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.hstu_attention.partial import partial_plan
from kernels.hstu_attention.plan import AttentionPlan
from kernels.typing import STATIC, Leaf, Scalar
from ultra_hstu.parallel.mesh import CONTEXT
from ultra_hstu.parallel.strategy import AttentionCall, PartialSums, Prepare, ShardMask

Tree = TypeVar("Tree")
Index = int | Scalar
KeysAndValues = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring(PartialSums):
    """Keys and values travel around the shards; what a shard sees of each is added up.

    Memory is O(T / C), in the backward too: there the gradients of keys and values travel behind
    them, in float32 until the last hop, which brings them home.

    The forward begins with the shard's own keys, while others' come; the backward ends with them,
    while gradients go home. No other transfer depends on the computation beside it either.

    Attributes:
      own: plan of the shard's rows and keys.
      others: plans, stacked, of its rows and the keys of the shard 1 before, 2 before, and so on.
      shards: how many there are.
    """

    own: Leaf[AttentionPlan]
    others: Leaf[AttentionPlan]
    shards: int = dataclasses.field(metadata=STATIC)

    @staticmethod
    def of(view: ShardMask, prepare: Prepare) -> "Ring":
        shards, size = view.layout.shards, view.layout.rows_per_shard

        def plan(distance: Index, num_keys: int) -> AttentionPlan:
            source = (view.shard - distance) % shards
            intervals = view.keys_in(source), view.seers_of(source)
            return prepare(
                partial_plan(*intervals, num_rows=size, num_keys=num_keys, own=not num_keys)
            )

        others = jax.lax.map(
            lambda distance: plan(distance, size), jnp.arange(1, shards, dtype=jnp.int32)
        )
        return Ring(plan(0, 0), others, shards)

    def sums(self, q: Array, k: Array, v: Array, call: AttentionCall) -> Array:
        def add(number: Index, out: Array, here: KeysAndValues) -> Array:
            return out + self._part(number, call)(q, *here).astype(jnp.float32)

        def step(number: Array, carry: tuple[Array, KeysAndValues]) -> tuple[Array, KeysAndValues]:
            out, here = carry
            coming = self._send(here)
            return add(number, out, here), coming

        out = self._part(None, call)(q, k, v).astype(jnp.float32)
        if self.shards > 1:
            # In a loop, no more keys are in memory than what is here and what is coming.
            start = (out, self._send((k, v)))
            out, here = jax.lax.fori_loop(0, self.shards - 2, step, start)
            out = add(self.shards - 2, out, here)
        return out.astype(v.dtype)

    def gradients(
        self, q: Array, k: Array, v: Array, g: Array, call: AttentionCall
    ) -> tuple[Array, ...]:
        def parts(number: Index | None, here: KeysAndValues) -> list[Array]:
            found = jax.vjp(self._part(number, call), q, *here)[1](g)
            return [x.astype(jnp.float32) for x in found]

        def add(number: Index, sums: list[Array], here: KeysAndValues) -> list[Array]:
            """The sums; those of keys and values have come with them."""
            return jax.tree.map(jnp.add, [sums[0], *self._send(sums[1:])], parts(number, here))

        def step(
            number: Array, carry: tuple[list[Array], KeysAndValues]
        ) -> tuple[list[Array], KeysAndValues]:
            sums, here = carry
            coming = self._send(here)
            return add(number, sums, here), coming

        kv = (k, v)
        if self.shards == 1:
            return _as((q, *kv), parts(None, kv))
        here = self._send(kv)
        sums = parts(0, here)
        if self.shards > 2:
            start = (sums, self._send(here))
            sums, here = jax.lax.fori_loop(1, self.shards - 2, step, start)
            sums = add(self.shards - 2, sums, here)
        home = (sums[0], *self._send(_as(kv, sums[1:])))
        return _as((q, *kv), jax.tree.map(jnp.add, home, tuple(parts(None, kv))))

    def _part(self, number: Index | None, call: AttentionCall) -> Callable[..., Array]:
        """What rows get from the keys of another shard or of their own (None), given q, k, v."""
        if number is None:
            return lambda q, k, v: call.part(q, k[:0], v[:0], plan=self.own, own=(k, v))
        plan = jax.tree.map(lambda leaf: leaf[number], self.others)
        return functools.partial(call.part, plan=plan)

    def _send(self, x: Tree) -> Tree:
        """To the next shard; what comes in is the shard's before."""
        onward = [(i, (i + 1) % self.shards) for i in range(self.shards)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, CONTEXT, onward), x)


def _as(likes: tuple[Array, ...], found: Iterable[Array]) -> tuple[Array, ...]:
    """What was found, in the dtypes of `likes`."""
    return tuple(x.astype(like.dtype) for x, like in zip(found, likes, strict=True))
