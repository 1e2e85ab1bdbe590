"""The implementation `triton` of `hstu_attention` (jax-triton), for GPUs from sm80 on.

It takes head widths to 256, the relative bias, float32, bfloat16 and float16. The backward has two
passes that recompute the scores: one over query tiles for dq and the bias tables, one over key
tiles for dk and dv. Seven products a pair instead of five, but no sums that programs share: dq, dk
and dv have the same bits in every run. The gradients of the tables are added in memory in any
order, so that their last bits vary.

Products of float32 follow JAX's matmul precision as XLA does on a GPU: TF32 by default, three TF32
products for "high", float32 for "highest".
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import triton_call
from kernels.hstu_attention.plan import AttentionPlan, AttentionSpec, Derived, TileSizes
from kernels.hstu_attention.relative_bias import RelativeBias, bucket_starts
from kernels.hstu_attention.triton.sizes import (
    KernelSizes,
    LaunchSizes,
    find_sizes,
    padded,
    refusal,
)
from kernels.typing import THK, THV, PerRow, PerTile, PositionTable, Scale, TimeTable

TABLE_COPIES = 64
MANY_PROGRAMS = 512  # more than run at once: then heavy tiles start first

Kernel = Literal["forward", "backward_queries", "backward_keys"]
Tensors = tuple[THK, THK, THV]
Tables = tuple[PositionTable | None, TimeTable | None]  # position, time


def unsupported(spec: AttentionSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    if spec.deterministic and spec.biased:
        return (
            "triton sums gradients of bias tables in no fixed order, deterministic=True asks for "
            "one; use bias=None"
        )
    return refusal(spec)


def prepare(plan: AttentionPlan, spec: AttentionSpec) -> AttentionPlan:
    """The plan with the tile bounds and orders of these calls, made once for every layer."""
    return prepare_for(plan, spec.heads, find_sizes(spec, plan))


def prepare_for(plan: AttentionPlan, heads: int, sizes: KernelSizes) -> AttentionPlan:
    """`prepare` for given sizes."""
    for kernel, each in sizes._asdict().items():
        keys = kernel == "keys"
        bounds = plan.find(each.tiles)
        plan = plan.storing([each.tiles], [bounds])
        if (bounds.row_lo if keys else bounds.key_lo).shape[0] * heads > MANY_PROGRAMS:
            order = TileOrder(each.tiles, keys)
            plan = plan.storing([order], [plan.find(order)])
    return plan


@dataclasses.dataclass(frozen=True)
class TileOrder(Derived[PerTile]):
    """Tiles of rows, or of keys, by falling number of the blocks that they meet."""

    tiles: TileSizes
    keys: bool

    def make(self, plan: AttentionPlan) -> PerTile:
        bounds = plan.find(self.tiles)
        lo, hi = (bounds.row_lo, bounds.row_hi) if self.keys else (bounds.key_lo, bounds.key_hi)
        return jnp.argsort((lo - hi).sum(1)).astype(jnp.int32)


class TritonCall(NamedTuple):
    """What of a call is static.

    Attributes:
      alpha: as in `hstu_attention`.
      precision: of products, in Triton's words.
      sizes: of the kernels.
    """

    alpha: float
    precision: str
    sizes: KernelSizes


class RowInputs(NamedTuple):
    """What is not differentiated.

    Attributes:
      scale: float32, one or one a row.
      times: seconds of rows as keys and as queries, where there is a time table.
    """

    plan: AttentionPlan
    scale: Float[Array, "..."]
    times: tuple[PerRow, PerRow] | None


def attention(
    q_THK: THK,
    k_THK: THK,
    v_THV: THV,
    plan: AttentionPlan,
    *,
    alpha: float,
    scale: Scale,
    bias: RelativeBias | None,
    deterministic: bool = False,
) -> THV:
    """See `hstu_attention`. No gradient flows to `scale`."""
    if q_THK.size == 0:
        return jnp.zeros_like(v_THV)
    _, heads, k_width = q_THK.shape
    spec = AttentionSpec(q_THK.dtype, heads, k_width, v_THV.shape[2], bias is not None)
    call = TritonCall(alpha, triton_call.product_precision(), find_sizes(spec, plan))
    return forward(call, (q_THK, k_THK, v_THV), *tables_and_rows(plan, scale, bias))


def tables_and_rows(
    plan: AttentionPlan, scale: Scale, bias: RelativeBias | None
) -> tuple[Tables, RowInputs]:
    """The tables, which are differentiated, and the inputs that are not."""
    factor = jnp.asarray(scale, jnp.float32)
    if bias is None:
        return (None, None), RowInputs(plan, factor, None)
    position, time = (
        None if table is None else jnp.asarray(table, jnp.float32)
        for table in (bias.position_table, bias.time_table)
    )
    times = None if bias.times is None else (bias.times[1], bias.times[0])
    return (position, time), RowInputs(plan, factor, times)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def forward(call: TritonCall, qkv: Tensors, tables: Tables, rows: RowInputs) -> THV:
    v = qkv[2]
    return _launch("forward", call, qkv, tables, rows, [jax.ShapeDtypeStruct(v.shape, v.dtype)])[0]


def _forward(
    call: TritonCall, qkv: Tensors, tables: Tables, rows: RowInputs
) -> tuple[THV, tuple[Tensors, Tables, RowInputs]]:
    return forward(call, qkv, tables, rows), (qkv, tables, rows)


def _backward(
    call: TritonCall, saved: tuple[Tensors, Tables, RowInputs], g: THV
) -> tuple[Tensors, Tables, None]:
    dq, d_tables = query_gradients(call, *saved, g)
    dk, dv = key_gradients(call, *saved, g)
    return (dq, dk, dv), d_tables, None


def query_gradients(
    call: TritonCall, qkv: Tensors, tables: Tables, rows: RowInputs, g: THV
) -> tuple[THK, Tables]:
    """dq, and the gradients of both tables: the pass over query tiles."""
    q, (positions, buckets) = qkv[0], table_lengths(tables)
    tiles = -(-q.shape[0] // call.sizes.queries.block_q)
    copies = min(TABLE_COPIES, tiles * q.shape[1])
    outs = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((copies, max(1, positions + buckets)), jnp.float32),
    ]
    dq, copied = _launch("backward_queries", call, (*qkv, g), tables, rows, outs, copies)
    d_tables = copied.sum(0)
    return dq, (
        None if tables[0] is None else d_tables[:positions],
        None if tables[1] is None else d_tables[positions:],
    )


def key_gradients(
    call: TritonCall, qkv: Tensors, tables: Tables, rows: RowInputs, g: THV
) -> list[Float[Array, "T H _"]]:
    """dk and dv: the pass over key tiles."""
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv[1:]]
    return _launch("backward_keys", call, (*qkv, g), tables, rows, outs)


forward.defvjp(_forward, _backward)


def table_lengths(tables: Tables) -> tuple[int, int]:
    position, time = (0 if table is None else table.shape[0] for table in tables)
    return position, time


def _launch(
    kernel: Kernel,
    call: TritonCall,
    tensors: tuple[Float[Array, "T H _"], ...],
    tables: Tables,
    rows: RowInputs,
    outs: list[jax.ShapeDtypeStruct],
    copies: int | None = None,
) -> list[Array]:
    """Runs a kernel, a program for every tile and head.

    Args:
      tensors: q, k, v, and in the backward the output's gradient.
      copies: of the tables' gradients, which are the second output.
    """
    plan, keys = rows.plan, kernel == "backward_keys"
    sizes: LaunchSizes = getattr(call.sizes, kernel.removeprefix("backward_"))
    bounds = plan.find(sizes.tiles)
    plan = plan.storing([sizes.tiles], [bounds])
    lo, hi = (bounds.row_lo, bounds.row_hi) if keys else (bounds.key_lo, bounds.key_hi)
    near = (plan.rows.near_lo, plan.rows.near_hi) if keys else ()
    (num_rows, heads, k_width), v_width = tensors[0].shape, tensors[2].shape[2]
    programs = lo.shape[0] * heads
    ordered = programs > MANY_PROGRAMS
    order = plan.find(TileOrder(sizes.tiles, keys)) if ordered else lo  # which is not read
    positions, buckets = table_lengths(tables)
    arrays = (*tensors, rows.scale, plan.num_real.reshape(1), order, lo, hi, *plan.keys, *near)
    constants = {
        "T": num_rows,
        "H": heads,
        "K": k_width,
        "V": v_width,
        "WK": padded(k_width),
        "WV": padded(v_width),
        "BQ": sizes.block_q,
        "BK": sizes.block_k,
        "ALPHA": call.alpha,
        "ROW_SCALE": rows.scale.ndim == 1,
        "ORDERED": ordered,
        "POSITIONS": positions,
        "BUCKETS": buckets,
        "PRECISION": call.precision,
        "APPROXIMATE": tensors[0].dtype == jnp.bfloat16,
    }
    return triton_call.launch(
        f"kernels.hstu_attention.triton.kernels:{kernel}",
        (*arrays, *bias_arrays(tables, rows)),
        outs,
        programs=programs,
        warps=sizes.warps,
        stages=sizes.stages,
        constants=constants if copies is None else constants | {"COPIES": copies},
        zeroed=() if copies is None else (1,),
    )


def bias_arrays(tables: Tables, rows: RowInputs) -> tuple[Array, ...]:
    """Position table, time table, bucket starts, times, query times.

    Where the bias has none, the kernel gets an array that it does not read.
    """
    none = rows.scale.reshape(-1)
    position, time = (none if table is None else table for table in tables)
    if rows.times is None:
        return (position, time, none, none, none)
    return (position, time, jnp.asarray(bucket_starts(time.shape[0])), *rows.times)
