"""What a context shard knows of the whole batch: who sees whom, in coordinates of the flat buffer and of any shard."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from kernels.hstu_attention.plan import AttentionPlan
from kernels.jagged import segment_ids
from kernels.mask import AttentionMask, KeyIntervals, RowIntervals
from kernels.zeros import zeros_after
from ultra_hstu.parallel.layout import Layout

Attend = Callable[
    ..., Array
]  # kernels.hstu_attention.partial.partial_attention, its constants filled in
ROWS_AT_A_TIME = (
    2**20
)  # rows times heads of an attention call, at most: work enough for a GPU, and 256 MiB of bfloat16 of width 128
Prepare = Callable[[AttentionPlan], AttentionPlan]  # adds an implementation's own lists to a plan


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["offsets", "num_targets", "num_contextual"],
    meta_fields=["max_targets", "max_contextual"],
)
@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of a whole buffer: int32 arrays that every shard holds."""

    offsets: Any  # int32[B + 1]
    num_targets: Any  # int32[B] or None
    num_contextual: Any  # int32[B] or None
    max_targets: int  # most targets of a sequence
    max_contextual: int  # most contextual tokens of a sequence

    @property
    def num_sequences(self) -> int:
        return self.offsets.shape[0] - 1


class Frame:
    """The mask of a batch, seen from the shard that this code runs on (inside `shard_map`)."""

    def __init__(self, sequences: Sequences, mask: AttentionMask, layout: Layout, axis: str):
        self.sequences, self.mask, self.layout, self.axis = sequences, mask, layout, axis
        self.shard = jax.lax.axis_index(axis)
        counts = (sequences.num_targets, sequences.num_contextual)
        self.keys: KeyIntervals = mask.intervals(sequences.offsets, layout.num_rows, *counts)
        self.rows: RowIntervals = mask.row_intervals(sequences.offsets, layout.num_rows, *counts)

    def is_real(self) -> Bool[Array, " t"]:
        """Which rows of this shard are no padding."""
        return self.layout.rows(self.shard) < self.sequences.offsets[-1]

    def keys_of(self, row_shard: Any, key_shard: Any) -> KeyIntervals:
        """Keys of one shard that the rows of another see, in places of the two."""
        row = self.layout.rows(row_shard)
        return KeyIntervals(*(self.layout.rank(x[row], key_shard) for x in self.keys))

    def rows_of(self, row_shard: Any, key_shard: Any) -> RowIntervals:
        """`keys_of` transposed: rows of one shard that see the keys of another."""
        key = self.layout.rows(key_shard)
        return RowIntervals(*(self.layout.rank(x[key], row_shard) for x in self.rows))


def places(sequences: Sequences, num_rows: int) -> tuple[Array, Array, Array, Array]:
    """For each row of the buffer: start of its sequence, end of the contextual tokens, end of the history, end of the sequence; 0 on padding."""
    zeros = jnp.zeros_like(sequences.offsets[1:])
    length = sequences.offsets[1:] - sequences.offsets[:-1]
    targets = zeros if sequences.num_targets is None else jnp.clip(sequences.num_targets, 0, length)
    contextual = (
        zeros
        if sequences.num_contextual is None
        else jnp.clip(sequences.num_contextual, 0, length - targets)
    )
    start, stop = sequences.offsets[:-1], sequences.offsets[1:]
    segment = jnp.minimum(segment_ids(sequences.offsets, num_rows), sequences.num_sequences - 1)
    real = jnp.arange(num_rows) < sequences.offsets[-1]
    ends = (start, start + contextual, stop - targets, stop)
    return tuple(jnp.where(real, x[segment], 0) for x in ends)  # type: ignore[return-value]


def heads_at_a_time(rows: int, heads: int) -> int:
    """How many heads of a shard's rows are computed together. What came from elsewhere, its gradients and the buffers of the kernels exist for these alone:
    of many rows, in the backward of one layer, all heads' would take more memory than two layers keep.
    """
    return max(
        (h for h in range(1, heads + 1) if heads % h == 0 and rows * h <= ROWS_AT_A_TIME), default=1
    )


def in_turns(
    function: Callable[..., tuple[Array, ...]], likes: tuple[Array, ...], *x_tHX: Array
) -> tuple[Array, ...]:
    """`function` of arrays of all heads, `heads_at_a_time`; results are shaped like `likes`."""
    heads = x_tHX[0].shape[1]
    some = heads_at_a_time(x_tHX[0].shape[0], heads)
    if some == heads:
        return function(*x_tHX)

    def turn(number: Array, results: tuple[Array, ...]) -> tuple[Array, ...]:
        found = function(
            *(jax.lax.dynamic_slice_in_dim(x, number * some, some, axis=1) for x in x_tHX)
        )
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, number * some, axis=1)
            for x, y in zip(results, found, strict=True)
        )

    # As in `mini_sequence`: the buffers of all layers' loops must not be there from the start of the program on.
    return jax.lax.fori_loop(
        0,
        heads // some,
        turn,
        tuple(zeros_after(x_tHX[-1], like.shape, like.dtype) for like in likes),
    )


@runtime_checkable
class Sharing(Protocol):
    """How shards share the rows and keys of a layer: a pytree with two functions of some heads."""

    def sums(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array: ...

    def gradients(
        self, q: Array, k: Array, v: Array, g: Array, scale: Array, attend: Attend
    ) -> tuple[Array, ...]:
        """Of q, k and v."""


def keeping_inputs(
    sharing: Sharing, q: Array, k: Array, v: Array, scale: Array, attend: Attend
) -> Array:
    """The sums of all heads, `heads_at_a_time`. The backward keeps the inputs and nothing else: what came from other shards is sent again.

    Kernels keep their inputs alone, so the forward kernel does not run again. The barrier keeps XLA from finding that what is sent again was there before,
    and holding it from one to the other.
    """

    @jax.custom_vjp
    def kept(q: Array, k: Array, v: Array, scale: Array, sharing: Any) -> Array:
        return in_turns(lambda *qkv: (sharing.sums(*qkv, scale, attend),), (v,), q, k, v)[0]

    def forward(*inputs: Any) -> tuple[Array, Any]:
        return kept(*inputs), inputs

    def backward(saved: Any, g: Array) -> tuple[Any, ...]:
        q, k, v, scale, sharing = saved
        q, k, v, g = jax.lax.optimization_barrier((q, k, v, g))
        return (
            *in_turns(lambda *qkvg: sharing.gradients(*qkvg, scale, attend), (q, k, v), q, k, v, g),
            None,
            None,
        )

    kept.defvjp(forward, backward)
    return kept(q, k, v, scale, sharing)
