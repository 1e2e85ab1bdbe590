"""HSTU attention over a flat buffer whose rows are sharded over the mesh axis `context`: `context_parallel_attention`."""

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
from ultra_hstu.parallel.frame import Frame, Sequences
from ultra_hstu.parallel.halo import halo
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import CONTEXT
from ultra_hstu.parallel.ring import gather, ring
from ultra_hstu.parallel.ulysses import ulysses

Strategy = Literal["gather", "ring", "ulysses", "halo"]


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
        raise ValueError(f"the mesh has axes {tuple(mesh.shape)}, none is {CONTEXT!r}: make it with make_mesh")
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
        raise ValueError(f"'ulysses' needs a number of heads divisible by the {shards} context shards, got {q_THK.shape[1]}: use 'ring'")
    if strategy == "halo" and (mask.window is None or not layout.is_contiguous):
        raise ValueError(
            f"'halo' is for masks with a window over contiguous slices, got {mask} and blocks of {layout.block} rows: use 'ring', 'ulysses' or 'gather' for full masks"
        )
    if bias is not None and strategy != "ulysses":
        raise NotImplementedError(f"{strategy!r} takes no relative bias, whose positions are those of the whole buffer: use 'ulysses'")
    bounds = strategy == "halo"
    sequences = Sequences(
        jnp.asarray(offsets, jnp.int32),
        None if num_targets is None else jnp.asarray(num_targets, jnp.int32),
        None if num_contextual is None else jnp.asarray(num_contextual, jnp.int32),
        _most("targets", num_targets, max_targets, bounds),
        _most("contextual", num_contextual, max_contextual, bounds),
    )
    attend = functools.partial(partial_attention, alpha=float(alpha), implementation=implementation)
    scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))

    def frame_of(sequences: Sequences, layout: Layout) -> Frame:
        return Frame(sequences, mask, layout, CONTEXT)

    def local(q: Array, k: Array, v: Array, scale: Array, sequences: Sequences, layout: Layout, bias: RelativeBias | None) -> Array:
        frame = frame_of(sequences, layout)
        # Padding may hold NaN, and 0 * NaN is NaN; here it stands among rows that are keys of others.
        real_t = frame.is_real()
        q, k, v = (jnp.where(real_t[:, None, None], x, jnp.zeros((), x.dtype)) for x in (q, k, v))
        scale = jnp.where(real_t, scale, 0.0) if scale.ndim else scale
        if strategy == "gather":
            return gather(q, k, v, scale, frame, attend)
        if strategy == "ring":
            return ring(q, k, v, scale, (sequences, layout), frame_of, attend)
        if strategy == "halo":
            return halo(q, k, v, scale, frame, attend)
        whole = functools.partial(hstu_attention, mask=mask, alpha=alpha, implementation=implementation)
        return ulysses(q, k, v, scale, bias, frame, whole)

    rows, everywhere = PartitionSpec(CONTEXT), PartitionSpec()
    bias_specs = None if bias is None else RelativeBias(everywhere, everywhere, rows, rows)
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, rows, rows if scale.ndim else everywhere, everywhere, everywhere, bias_specs),
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
            raise ValueError(f"num_{name} is traced, and 'halo' has room for a fixed number: pass max_{name}=, the most of any sequence")
        return bound or 0
    most = int(np.max(np.asarray(counts), initial=0))
    if bound is not None and bound < most:
        raise ValueError(f"max_{name}={bound}, but a sequence has {most}: raise it")
    return most if bound is None else bound
