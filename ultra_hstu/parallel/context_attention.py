"""HSTU attention over a flat buffer whose rows are sharded over the mesh axis `context`.

`context_parallel_attention` is one call for everybody. Code that runs inside `shard_map` already
looks a strategy up, calls its `of` once a batch and the result once a layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from kernels.hstu_attention.api import RelativeBias
from kernels.jagged import Counts
from kernels.mask import AttentionMask
from kernels.typing import THK, THV
from ultra_hstu.parallel.gather import GatheredKeys
from ultra_hstu.parallel.halo import Halo
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import CONTEXT
from ultra_hstu.parallel.ring import Ring
from ultra_hstu.parallel.strategy import Implementation, ShardMask, Strategy
from ultra_hstu.parallel.ulysses import Ulysses

STRATEGIES: dict[str, type[Strategy]] = {
    "gather": GatheredKeys,
    "ring": Ring,
    "ulysses": Ulysses,
    "halo": Halo,
}


def strategy_named(name: str) -> type[Strategy]:
    """Raises ValueError for a strategy that there is not."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy={name!r} must be one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def context_parallel_attention(
    q_THK: Shaped[Array | np.ndarray, "..."],
    k_THK: Shaped[Array | np.ndarray, "..."],
    v_THV: Shaped[Array | np.ndarray, "..."],
    offsets: Int[Array | np.ndarray, "..."],
    *,
    mesh: Mesh,
    strategy: str,
    mask: AttentionMask = AttentionMask(),  # noqa: B008 - frozen
    num_targets: Counts = None,
    num_contextual: Counts = None,
    alpha: float,
    scale: float | Float[Array | np.ndarray, "..."],
    bias: RelativeBias | None = None,
    implementation: Implementation = None,
    layout: Layout | None = None,
    max_targets: int | None = None,
    max_contextual: int | None = None,
) -> Float[Array, "T H V"]:
    """`hstu_attention` of rows that lie on several devices.

    It takes the same arguments and gives, to rounding, the same result and gradients, under
    `jax.jit` and outside.

    | strategy | how | bytes a shard and layer |
    |---|---|---|
    | `gather` | all-gathers k, v; reduce-scatters their gradients | O(T) |
    | `ring` | k, v go from shard to shard; partial outputs add | O(T), memory O(T / C) |
    | `ulysses` | all-to-all between rows and heads | O(T / C) |
    | `halo` | neighbours send the window's keys; full rows and targets visit | independent of T |

    Args:
      q_THK, k_THK, v_THV: sharded (or shardable) over `context` on their first axis; masks and
        offsets are in coordinates of the whole buffer.
      mesh: has the axis `context`; other axes see copies.
      layout: which rows each shard holds, and so the order in which q, k, v come; None: contiguous
        slices. `Layout.balanced` evens out full causal masks.
      max_targets, max_contextual: most of them in any sequence; needed by `halo` where the counts
        are traced, otherwise found. Traced counts that add up to more give NaN.

    Raises:
      ValueError: an unknown strategy, T not divisible by the shards, heads not by them (`ulysses`),
        `halo` with a mask without window, a bound that is too small, a layout whose shards do not
        hold the same number of rows.
      NotImplementedError: a relative bias with any strategy but `ulysses`.
    """
    if CONTEXT not in mesh.shape:
        raise ValueError(
            f"the mesh has axes {tuple(mesh.shape)}, none is {CONTEXT!r}: make it with make_mesh"
        )
    kind = strategy_named(strategy)
    rows, shards = q_THK.shape[0], mesh.shape[CONTEXT]
    layout = Layout.contiguous(rows, shards) if layout is None else layout
    if (layout.num_rows, layout.shards) != (rows, shards):
        raise ValueError(
            f"the layout is for {layout.num_rows} rows and {layout.shards} shards, but there are "
            f"{rows} and {shards}"
        )
    layout.check()
    kind.check(mask, layout, q_THK.shape[1], bias is not None)
    max_targets = _most("targets", num_targets, max_targets, kind.bounded)
    max_contextual = _most("contextual", num_contextual, max_contextual, kind.bounded)
    return _sharded_attention(
        *(jnp.asarray(x) for x in (q_THK, k_THK, v_THV)),
        jnp.asarray(scale, jnp.float32),
        tuple(
            None if x is None else jnp.asarray(x, jnp.int32)
            for x in (offsets, num_targets, num_contextual)
        ),
        layout,
        bias,
        mesh=mesh,
        kind=kind,
        mask=mask,
        alpha=float(alpha),
        implementation=_hashable(implementation),
        max_targets=max_targets,
        max_contextual=max_contextual,
    )


# Compiled, since outside `jit` JAX maps over all axes of a mesh or none, and this over one.
@functools.partial(
    jax.jit,
    static_argnames=(
        "mesh",
        "kind",
        "mask",
        "alpha",
        "implementation",
        "max_targets",
        "max_contextual",
    ),
)
def _sharded_attention(
    q_THK: THK,
    k_THK: THK,
    v_THV: THV,
    scale: Array,
    batch: tuple[Array, Array | None, Array | None],
    layout: Layout,
    bias: RelativeBias | None,
    *,
    mesh: Mesh,
    kind: type[Strategy],
    mask: AttentionMask,
    alpha: float,
    implementation: Implementation,
    max_targets: int,
    max_contextual: int,
) -> THV:
    def local(
        q: Array,
        k: Array,
        v: Array,
        scale: Array,
        batch: tuple[Array, Array | None, Array | None],
        layout: Layout,
        bias: RelativeBias | None,
    ) -> Array:
        view = ShardMask(
            mask, layout, *batch, max_targets=max_targets, max_contextual=max_contextual
        )
        plan = kind.of(view, lambda plan: plan)
        return plan(
            q,
            k,
            v,
            real_t=view.real_t,
            alpha=alpha,
            scale=scale,
            bias=bias,
            implementation=implementation,
        )

    sharded, everywhere = PartitionSpec(CONTEXT), PartitionSpec()
    # Times have a row each, tables none.
    of_bias = jax.tree.map(
        lambda x: sharded if jnp.issubdtype(x.dtype, jnp.integer) else everywhere, bias
    )
    of_scale = sharded if scale.ndim else everywhere
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(sharded, sharded, sharded, of_scale, everywhere, everywhere, of_bias),
        out_specs=sharded,
        axis_names={CONTEXT},
        check_vma=False,
    )
    return run(q_THK, k_THK, v_THV, scale, batch, layout, bias)


def _hashable(implementation: Implementation) -> Implementation:
    if implementation is None or isinstance(implementation, str):
        return implementation
    return tuple(implementation)


def _most(name: str, counts: Counts, bound: int | None, needed: bool) -> int:
    """The static bound on a count: as given, or the largest of the concrete counts."""
    if counts is None:
        return 0
    if isinstance(counts, jax.core.Tracer):
        if bound is None and needed:
            raise ValueError(
                f"num_{name} is traced, and the strategy has room for a fixed number: pass "
                f"max_{name}=, the most of any sequence"
            )
        return bound or 0
    most = int(np.max(np.asarray(counts), initial=0))
    if bound is not None and bound < most:
        raise ValueError(f"max_{name}={bound}, but a sequence has {most}: raise it")
    return most if bound is None else bound
