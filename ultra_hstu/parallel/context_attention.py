"""HSTU attention over a flat buffer whose rows are sharded over the mesh axis `context`: `context_parallel_attention`, and its two halves for
code that runs inside `shard_map` already: `plan_context`, once a batch, and `attend_context`, once a layer."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from kernels.hstu_attention.api import RelativeBias, hstu_attention
from kernels.hstu_attention.partial import partial_attention
from kernels.mask import AttentionMask
from ultra_hstu.parallel.frame import Frame, Prepare, Sequences, heads_at_a_time
from ultra_hstu.parallel.halo import Halo
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import CONTEXT
from ultra_hstu.parallel.ring import Gather, Ring
from ultra_hstu.parallel.ulysses import Ulysses

Strategy = Literal["gather", "ring", "ulysses", "halo"]
ContextPlan = Gather | Ring | Ulysses | Halo


def plan_context(strategy: str, frame: Frame, prepare: Prepare = lambda plan: plan) -> ContextPlan:
    """What a strategy must know of a batch, computed once and shared by all layers of a mask. Inside `shard_map`.

    Args:
      prepare: takes the plan of each attention call and may add an implementation's own lists to it (`prepare_plan`).
    """
    kinds: dict[str, Any] = {"gather": Gather, "ring": Ring, "ulysses": Ulysses, "halo": Halo}
    return kinds[strategy].of(frame, prepare)


def heads_of_a_call(strategy: str, layout: Layout, heads: int) -> int:
    """How many of all heads an attention call of a strategy has: those that plans are prepared for."""
    if strategy == "ulysses":
        return heads // layout.shards
    return heads_at_a_time(layout.rows_per_shard, heads)


def attend_context(
    plan: ContextPlan,
    q_tHK: Float[Array, "t H K"],
    k_tHK: Float[Array, "t H K"],
    v_tHV: Float[Array, "t H V"],
    *,
    real_t: Shaped[Array, " t"],
    alpha: float,
    scale: Any,
    bias: RelativeBias | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "t H V"]:
    """Attention of the t rows of this shard. Inside `shard_map`.

    Args:
      real_t: rows that are no padding, which may hold NaN, and 0 * NaN is NaN; here it would stand among rows that are keys of others.
      alpha, scale, bias, implementation: as in `hstu_attention`; the bias takes times of the t rows, and goes with `ulysses` alone.
    """
    q, k, v = (
        jnp.where(real_t[:, None, None], x, jnp.zeros((), x.dtype)) for x in (q_tHK, k_tHK, v_tHV)
    )
    scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))
    scale = jnp.where(real_t, scale, 0.0) if scale.ndim else scale
    if isinstance(plan, Ulysses):
        return plan(
            q,
            k,
            v,
            scale,
            bias,
            functools.partial(hstu_attention, alpha=alpha, implementation=implementation),
        )
    return plan(
        q,
        k,
        v,
        scale,
        functools.partial(partial_attention, alpha=float(alpha), implementation=implementation),
    )


def context_parallel_attention(
    q_THK: Shaped[Any, "..."],
    k_THK: Shaped[Any, "..."],
    v_THV: Shaped[Any, "..."],
    offsets: Int[Any, "..."],
    *,
    mesh: Mesh,
    strategy: str,
    mask: AttentionMask = AttentionMask(),  # noqa: B008 - frozen
    num_targets: Any = None,
    num_contextual: Any = None,
    alpha: float,
    scale: Any,
    bias: RelativeBias | None = None,
    implementation: str | Sequence[str] | None = None,
    layout: Layout | None = None,
    max_targets: int | None = None,
    max_contextual: int | None = None,
) -> Float[Array, "T H V"]:
    """`hstu_attention` of rows that lie on several devices: the same arguments and, to rounding, the same result and gradients.

    | strategy | how | bytes a shard and layer |
    |---|---|---|
    | `gather` | all-gathers k, v; reduce-scatters their gradients | O(T) |
    | `ring` | k, v travel from shard to shard; partial outputs add | O(T), memory O(T / C) |
    | `ulysses` | all-to-all between rows and heads | O(T / C) |
    | `halo` | semi-local masks: the window's keys from the neighbours, the few full rows and targets visit every shard | independent of T |

    Args:
      q_THK, k_THK, v_THV: sharded (or shardable) over `context` on their first axis; masks and offsets are in coordinates of the whole buffer.
      mesh: has the axis `context`; other axes see copies.
      layout: which rows each shard holds, and so the order in which q, k, v come; None: contiguous slices. `Layout.balanced` evens out full
        causal masks.
      max_targets, max_contextual: most of them in any sequence; needed by `halo` where the counts are traced, otherwise found. Traced counts that
        add up to more give NaN.

    Raises:
      ValueError: T not divisible by the shards, heads not by them (`ulysses`), `halo` with a mask without window, a bound that is too small.
      NotImplementedError: a relative bias with any strategy but `ulysses`.
    """
    if CONTEXT not in mesh.shape:
        raise ValueError(
            f"the mesh has axes {tuple(mesh.shape)}, none is {CONTEXT!r}: make it with make_mesh"
        )
    if strategy not in get_args(Strategy):
        raise ValueError(f"{strategy=} must be one of {', '.join(get_args(Strategy))}")
    shards = mesh.shape[CONTEXT]
    if layout is None:
        layout = Layout.contiguous(q_THK.shape[0], shards)
    elif (layout.num_rows, layout.shards) != (q_THK.shape[0], shards):
        raise ValueError(
            f"the layout is for {layout.num_rows} rows and {layout.shards} shards, but there are {q_THK.shape[0]} and {shards}"
        )
    if strategy == "ulysses" and q_THK.shape[1] % shards:
        raise ValueError(
            f"'ulysses' needs a number of heads divisible by the {shards} context shards, got {q_THK.shape[1]}: use 'ring'"
        )
    if strategy == "halo" and (mask.window is None or not layout.is_contiguous):
        raise ValueError(
            f"'halo' is for masks with a window over contiguous slices, got {mask} and blocks of {layout.block} rows: use 'ring', 'ulysses' or 'gather' for full masks"
        )
    if bias is not None and strategy != "ulysses":
        raise NotImplementedError(
            f"{strategy!r} takes no relative bias, whose positions are those of the whole buffer: use 'ulysses'"
        )
    bounds = strategy == "halo"
    sequences = Sequences(
        jnp.asarray(offsets, jnp.int32),
        None if num_targets is None else jnp.asarray(num_targets, jnp.int32),
        None if num_contextual is None else jnp.asarray(num_contextual, jnp.int32),
        _most("targets", num_targets, max_targets, bounds),
        _most("contextual", num_contextual, max_contextual, bounds),
    )
    scale = jnp.asarray(scale, jnp.float32)

    def local(
        q: Array,
        k: Array,
        v: Array,
        scale: Array,
        sequences: Sequences,
        layout: Layout,
        bias: RelativeBias | None,
    ) -> Array:
        frame = Frame(sequences, mask, layout, CONTEXT)
        options: dict[str, Any] = dict(
            alpha=alpha, scale=scale, bias=bias, implementation=implementation
        )
        return attend_context(
            plan_context(strategy, frame), q, k, v, real_t=frame.is_real(), **options
        )

    rows, everywhere = PartitionSpec(CONTEXT), PartitionSpec()
    # times have a row each, tables none
    bias_specs = jax.tree.map(
        lambda x: rows if jnp.issubdtype(x.dtype, jnp.integer) else everywhere, bias
    )
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            rows,
            rows,
            rows,
            rows if scale.ndim else everywhere,
            everywhere,
            everywhere,
            bias_specs,
        ),
        out_specs=rows,
        axis_names={CONTEXT},
        check_vma=False,
    )
    return run(q_THK, k_THK, v_THV, scale, sequences, layout, bias)


def _most(name: str, counts: Any, bound: int | None, needed: bool) -> int:
    """The static bound on a count: as given, or the largest of the concrete counts."""
    if counts is None:
        return 0
    if isinstance(counts, jax.core.Tracer):
        if bound is None and needed:
            raise ValueError(
                f"num_{name} is traced, and 'halo' has room for a fixed number: pass max_{name}=, the most of any sequence"
            )
        return bound or 0
    most = int(np.max(np.asarray(counts), initial=0))
    if bound is not None and bound < most:
        raise ValueError(f"max_{name}={bound}, but a sequence has {most}: raise it")
    return most if bound is None else bound
