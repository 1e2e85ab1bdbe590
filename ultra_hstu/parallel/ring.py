"""Strategies `gather` and `ring`: every shard's rows meet the keys of all shards, all at once or one shard after another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.mask import KeyIntervals, RowIntervals
from ultra_hstu.parallel.frame import Frame, Sequences
from ultra_hstu.parallel.layout import Layout

Attend = Callable[..., Array]  # kernels.hstu_attention.partial.partial_attention, its constants filled in


def gather(q: Array, k: Array, v: Array, scale: Array, frame: Frame, attend: Attend) -> Array:
    """All keys and values on every shard; the transpose of the all-gather reduce-scatters their gradients. Memory O(T)."""
    order = None if frame.layout.is_contiguous else jnp.argsort(frame.layout.permutation())

    def whole(x: Array) -> Array:
        x = jax.lax.all_gather(x, frame.axis, tiled=True)
        return x if order is None else x[order]

    row = frame.layout.rows(frame.shard)
    keys = KeyIntervals(*(x[row] for x in frame.keys))
    rows = RowIntervals(*(frame.layout.rank(x, frame.shard) for x in frame.rows))
    return attend(q, whole(k), whole(v), keys, rows, scale=scale, own=(k, v))


def ring(
    q: Array, k: Array, v: Array, scale: Array, batch: tuple[Sequences, Layout], frame_of: Callable[..., Frame], attend: Attend
) -> Array:
    """Keys and values travel around the shards; what a shard sees of each is added up. Memory O(T / C), in the backward too: there the
    gradients of keys and values, in float32, travel with them.

    The transfer of a step does not depend on its computation, so that they can overlap; a step without a visible key computes nothing.
    """

    @jax.custom_vjp
    def run(q: Array, k: Array, v: Array, scale: Array, batch: tuple[Sequences, Layout]) -> Array:
        frame, out, travelling = frame_of(*batch), jnp.zeros((*q.shape[:2], v.shape[2]), jnp.float32), (k, v)
        for distance in range(frame.layout.shards):
            here = travelling
            travelling = _send(travelling, frame)
            out = out + _step(frame, distance, scale, attend)(q, *here).astype(jnp.float32)
        return out.astype(v.dtype)

    def forward(*inputs: Any) -> tuple[Array, Any]:
        return run(*inputs), inputs

    def backward(saved: Any, g: Array) -> tuple[Any, ...]:
        q, k, v, scale, batch = saved
        frame, travelling = frame_of(*batch), (k, v)
        dq, *d_kv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
        for distance in range(frame.layout.shards):
            here = travelling
            travelling = _send(travelling, frame)
            parts = jax.vjp(_step(frame, distance, scale, attend), q, *here)[1](g)
            dq, *d_kv = (a + b.astype(jnp.float32) for a, b in zip((dq, *d_kv), parts, strict=True))
            d_kv = _send(d_kv, frame)
        return dq.astype(q.dtype), d_kv[0].astype(k.dtype), d_kv[1].astype(v.dtype), None, None

    run.defvjp(forward, backward)
    return run(q, k, v, scale, batch)


def _send(x: Any, frame: Frame) -> Any:
    """To the next shard; what comes in is the shard's before. After as many steps as there are shards everything is at home."""
    onward = [(i, (i + 1) % frame.layout.shards) for i in range(frame.layout.shards)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, frame.axis, onward), x)


def _step(frame: Frame, distance: int, scale: Array, attend: Attend) -> Callable[..., Array]:
    """What this shard's rows get from the keys of the shard `distance` before it: a function of q, k, v."""
    source = (frame.shard - distance) % frame.layout.shards
    keys, rows = frame.keys_of(frame.shard, source), frame.rows_of(frame.shard, source)
    if distance == 0:
        return lambda q, k, v: attend(q, k[:0], v[:0], keys, rows, scale=scale, own=(k, v))
    some = ((keys.hi0 > keys.lo0) | (keys.hi1 > keys.lo1)).any()
    return lambda q, k, v: jax.lax.cond(
        some,
        lambda: attend(q, k, v, keys, rows, scale=scale),
        lambda: jnp.zeros((*q.shape[:2], v.shape[2]), v.dtype),
    )
