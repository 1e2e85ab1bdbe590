"""What every strategy builds on: the mask as a shard sees it, and sums over parts of the keys."""

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from kernels.hstu_attention.api import RelativeBias
from kernels.hstu_attention.partial import partial_attention
from kernels.hstu_attention.plan import AttentionPlan
from kernels.jagged import Counts, Offsets, Rows
from kernels.mask import AttentionMask, KeyIntervals, RowIntervals
from kernels.typing import Scalar, Scale
from kernels.zeros import zeros_after
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import CONTEXT

# Rows times heads of an attention call, at most: work enough for a GPU, and 2^28 bytes of bfloat16
# of width 128.
ROWS_AT_A_TIME = 2**20

# `prepare_plan`, its constants filled in: adds an implementation's own lists to a plan.
Prepare = Callable[[AttentionPlan], AttentionPlan]
Implementation = str | Sequence[str] | None
Output = Float[Array, "t H V"]  # of attention, for the rows of a shard


class AttentionCall(NamedTuple):
    """What the attention of a layer is called with, besides q, k and v."""

    alpha: float
    scale: Array  # a constant, or one a row of the shard
    bias: RelativeBias | None
    implementation: Implementation

    def part(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        plan: AttentionPlan | None,
        own: tuple[Array, Array] | None = None,
    ) -> Array:
        """What rows get from some keys, see `partial_attention`."""
        return partial_attention(
            q,
            k,
            v,
            alpha=self.alpha,
            scale=self.scale,
            own=own,
            implementation=self.implementation,
            plan=plan,
        )

    def of_rows(self, pick: Callable[[Array], Array]) -> "AttentionCall":
        """The call for rows that `pick` takes from those of the shard."""
        return self._replace(scale=pick(self.scale)) if self.scale.ndim else self


class ShardMask:
    """The mask of a batch, seen from the shard that this code runs on. Inside `shard_map`."""

    def __init__(
        self,
        mask: AttentionMask,
        layout: Layout,
        offsets: Offsets,
        num_targets: Counts,
        num_contextual: Counts,
        *,
        max_targets: int,
        max_contextual: int,
    ):
        """
        Args:
          offsets, num_targets, num_contextual: of the whole buffer; every shard holds them.
          max_targets, max_contextual: most of them in a sequence.
        """
        self.mask, self.layout, self.offsets = mask, layout, offsets
        self.counts = (num_targets, num_contextual)
        self.max_targets, self.max_contextual = max_targets, max_contextual
        self.shard = 0 if layout.shards == 1 else jax.lax.axis_index(CONTEXT)
        self.own_t = layout.rows(self.shard)
        self.rows = Rows.of(offsets, layout.num_rows, *self.counts)
        self.keys, self.seen_by = mask.keys_of(self.rows), mask.rows_of(self.rows)

    @property
    def real_t(self) -> Bool[Array, " t"]:
        """Which rows of this shard are no padding."""
        return self.rows.real[self.own_t]

    def here(self, row: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """How many rows of this shard come before rows of the buffer."""
        return self.layout.index(row, self.shard)

    def keys_in(self, shard: int | Scalar) -> KeyIntervals:
        """Keys of another shard that this shard's rows see, as indices of that shard."""
        return KeyIntervals(*(self.layout.index(x[self.own_t], shard) for x in self.keys))

    def seers_of(self, shard: int | Scalar) -> RowIntervals:
        """`keys_in` transposed: rows of this shard that see the other one's keys."""
        key = self.layout.rows(shard)
        return RowIntervals(*(self.here(x[key]) for x in self.seen_by))


class Strategy(abc.ABC):
    """How shards share the rows and keys of a layer: a pytree, made once for a batch and a mask.

    A strategy is a file with a subclass, and an entry in `context_attention.STRATEGIES`.
    """

    takes_bias: ClassVar[bool] = False  # a relative bias
    bounded: ClassVar[bool] = False  # by the most targets and contextual tokens of a sequence

    @staticmethod
    @abc.abstractmethod
    def of(view: ShardMask, prepare: Prepare) -> "Strategy":
        """What all layers of a mask share.

        Args:
          prepare: takes the plan of each attention call and may add to it.
        """

    @classmethod
    def check(cls, mask: AttentionMask, layout: Layout, heads: int, biased: bool) -> None:
        """Raises ValueError or NotImplementedError for what the strategy cannot divide."""
        if biased and not cls.takes_bias:
            raise NotImplementedError(
                f"{cls.__name__} takes no relative bias, whose positions are those of the whole "
                "buffer: use 'ulysses'"
            )

    @staticmethod
    def heads_of_a_call(layout: Layout, heads: int) -> int:
        """How many of all heads an attention call has: those that plans are prepared for."""
        return heads_at_a_time(layout.rows_per_shard, heads)

    @abc.abstractmethod
    def attend(self, q_tHK: Array, k_tHK: Array, v_tHV: Array, call: AttentionCall) -> Output:
        """Attention of this shard's rows; padding holds zeros, and zero scales."""

    def __call__(
        self,
        q_tHK: Float[Array, "t H K"],
        k_tHK: Float[Array, "t H K"],
        v_tHV: Float[Array, "t H V"],
        *,
        real_t: Bool[Array, " t"],
        alpha: float,
        scale: Scale,
        bias: RelativeBias | None,
        implementation: Implementation,
    ) -> Output:
        """Attention of this shard's rows, once a layer. Inside `shard_map`.

        Args:
          real_t: rows that are no padding. Padding may hold NaN, and 0 * NaN is NaN: here it would
            stand among rows that are keys of others.
          alpha, scale, bias, implementation: as in `hstu_attention`; the bias takes times of the t
            rows.
        """
        q, k, v = (jnp.where(real_t[:, None, None], x, 0) for x in (q_tHK, k_tHK, v_tHV))
        scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))
        call = AttentionCall(float(alpha), scale, bias, implementation)
        return self.attend(q, k, v, call.of_rows(lambda scale: jnp.where(real_t, scale, 0.0)))


class PartialSums(Strategy):
    """A strategy whose output is a sum of attention to parts of the keys."""

    @abc.abstractmethod
    def sums(self, q: Array, k: Array, v: Array, call: AttentionCall) -> Array:
        """The output of some heads."""

    def gradients(
        self, q: Array, k: Array, v: Array, g: Array, call: AttentionCall
    ) -> tuple[Array, ...]:
        """Of q, k and v, from that of the output."""
        return jax.vjp(lambda q, k, v: self.sums(q, k, v, call), q, k, v)[1](g)

    def attend(self, q_tHK: Array, k_tHK: Array, v_tHV: Array, call: AttentionCall) -> Output:
        """The sums of all heads, `heads_at_a_time`.

        The backward keeps the inputs and nothing else: what came from other shards is sent again.
        Kernels keep their inputs alone, so the forward kernel does not run again. The barrier hides
        from XLA that what is sent again was there before: it would hold it from one to the other.
        """

        @jax.custom_vjp
        def kept(q: Array, k: Array, v: Array, scale: Array, plan: PartialSums) -> Array:
            here = call._replace(scale=scale)
            return in_turns(lambda q, k, v: (plan.sums(q, k, v, here),), (v,), q, k, v)[0]

        def forward(*inputs: PyTree) -> tuple[Array, tuple[PyTree, ...]]:
            return kept(*inputs), inputs

        def backward(saved: tuple[PyTree, ...], g: Array) -> tuple[Array | None, ...]:
            q, k, v, scale, plan = jax.tree.map(jnp.asarray, saved)  # constants come as NumPy's
            q, k, v, g = jax.lax.optimization_barrier((q, k, v, g))
            here = call._replace(scale=scale)
            found = in_turns(lambda *heads: plan.gradients(*heads, here), (q, k, v), q, k, v, g)
            return *found, None, None

        kept.defvjp(forward, backward)
        return kept(q_tHK, k_tHK, v_tHV, call.scale, self)


def heads_at_a_time(rows: int, heads: int) -> int:
    """How many heads of a shard's rows are computed together.

    What came from elsewhere, its gradients and the buffers of the kernels exist for these alone. Of
    many rows, in the backward of one layer, all heads' would take more memory than two layers keep.
    """
    fitting = (h for h in range(1, heads + 1) if heads % h == 0 and rows * h <= ROWS_AT_A_TIME)
    return max(fitting, default=1)


def in_turns(
    function: Callable[..., tuple[Array, ...]], likes: tuple[Array, ...], *x_tHX: Array
) -> tuple[Array, ...]:
    """`function` of arrays of all heads, `heads_at_a_time`; results are shaped like `likes`."""
    heads = x_tHX[0].shape[1]
    some = heads_at_a_time(x_tHX[0].shape[0], heads)
    if some == heads:
        return function(*x_tHX)

    def turn(number: Array, results: tuple[Array, ...]) -> tuple[Array, ...]:
        parts = (jax.lax.dynamic_slice_in_dim(x, number * some, some, axis=1) for x in x_tHX)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, number * some, axis=1)
            for x, y in zip(results, function(*parts), strict=True)
        )

    # As in `nn.mini_sequence`: the buffers of all layers' loops must not be there from the start of
    # the program on.
    buffers = tuple(zeros_after(x_tHX[-1], like.shape, like.dtype) for like in likes)
    return jax.lax.fori_loop(0, heads // some, turn, buffers)
