"""HSTU attention in Triton (jax-triton), sm80 and later: any head width to 256, the relative bias, float32, bfloat16 and float16.

Forward, and a backward in two passes that recompute the scores, side by side in one launch: over query tiles for dq and the bias tables, over key
tiles for dk and dv (7 products a pair of tiles for the 5 of a single pass, but no adds to memory that many programs share: dq, dk, dv have the
same bits in every run). The gradients of the tables are added in memory in any order, so that their last bits vary.

Products of float32 follow JAX's matmul precision as XLA does on a GPU: TF32 by default, three TF32 products for "high", float32 for "highest".
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels import device
from kernels.hstu_attention.plan import AttentionPlan
from kernels.hstu_attention.relative_bias import RelativeBias, bucket_starts

WIDEST = 256
TABLE_COPIES = 64
MANY_PROGRAMS = 512  # more than run at once: then heavy tiles start first


class Forward(NamedTuple):
    """Query rows and keys of a tile, warps of a program, depth of the load pipeline."""

    block_q: int
    block_k: int
    warps: int
    stages: int


class Backward(NamedTuple):
    """The same for the two passes of the backward, which are one launch: tiles of query rows that walk over keys, tiles of keys that walk over rows."""

    queries: tuple[int, int]  # (query rows, keys)
    keys: tuple[int, int]  # (query rows, keys)
    warps: int
    stages: int


class Tilings(NamedTuple):
    forward: Forward
    backward: Backward


# (bytes of an element, padded width of the widest head) -> sizes. Found on an H200, kept within the shared memory of an sm80; to width 128 also
# within the 99 KiB of the smaller GPUs after it.
TILINGS = {
    (2, 32): Tilings(Forward(64, 64, 4, 3), Backward((64, 64), (64, 64), 4, 2)),
    (2, 64): Tilings(Forward(128, 64, 4, 3), Backward((64, 64), (64, 64), 4, 2)),
    (2, 128): Tilings(Forward(64, 64, 4, 3), Backward((64, 64), (64, 64), 4, 2)),
    (2, 256): Tilings(Forward(64, 32, 4, 2), Backward((64, 32), (32, 64), 8, 2)),
    (4, 32): Tilings(Forward(32, 32, 2, 2), Backward((32, 32), (32, 32), 2, 2)),
    (4, 64): Tilings(Forward(32, 32, 4, 2), Backward((32, 32), (32, 32), 4, 2)),
    (4, 128): Tilings(Forward(32, 32, 4, 2), Backward((32, 32), (32, 32), 4, 2)),
    (4, 256): Tilings(Forward(32, 32, 8, 1), Backward((32, 32), (32, 32), 8, 1)),
}


def tilings(dtype: Any, k_width: int, v_width: int) -> Tilings:
    """Sizes for a dtype and head widths up to `WIDEST`."""
    return TILINGS[jnp.dtype(dtype).itemsize, max(32, _padded(k_width), _padded(v_width))]


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def attention(
    q_THK: Float[Array, "T H K"],
    k_THK: Float[Array, "T H K"],
    v_THV: Float[Array, "T H V"],
    plan: AttentionPlan,
    *,
    alpha: float,
    scale: Any,
    bias: RelativeBias | None,
) -> Float[Array, "T H V"]:
    """See `hstu_attention`. No gradient flows to `scale`. NotImplementedError: no jax-triton, no such GPU, or heads wider than `WIDEST`."""
    widths = (q_THK.shape[2], v_THV.shape[2])
    if not 0 < min(widths) <= max(widths) <= WIDEST:
        raise NotImplementedError(f"triton takes heads of width 1 to {WIDEST}, got K = {widths[0]}, V = {widths[1]}; implementation='xla' takes any")
    _check_device()
    _kernels()
    if q_THK.size == 0:
        return jnp.zeros_like(v_THV)
    tables, times = (None, None), None
    if bias is not None:
        tables = tuple(None if t is None else jnp.asarray(t, jnp.float32) for t in (bias.position_table, bias.time_table))
        times = None if bias.time_table is None else (bias.timestamps, bias.query_timestamps)
    call = _Call(alpha, _precision(), tilings(q_THK.dtype, *widths))
    return _attend(call, q_THK, k_THK, v_THV, tables, _Work(plan, jnp.asarray(scale, jnp.float32), times))


def _check_device() -> None:
    current = device.current()
    if current.platform != "gpu" or current.compute_capability is None or current.compute_capability < (8, 0):
        raise NotImplementedError(f"triton needs an NVIDIA GPU from sm80 (A100) on, the device is {current.kind!r}; implementation='xla' runs anywhere")


def _kernels() -> Any:
    try:
        from kernels.hstu_attention import triton_kernels
    except ImportError as error:
        raise NotImplementedError(f"triton needs jax-triton, see requirements-cuda.txt ({error}); implementation='xla' needs nothing") from error
    return triton_kernels


def _precision() -> str:
    """How float32 products are taken, in Triton's words."""
    name = str(jax.config.jax_default_matmul_precision).lower()
    if name in ("highest", "float32", "f32_f32_f32"):
        return "ieee"
    return "tf32x3" if name == "high" or name.endswith(("x3", "3x", "x6", "x9")) else "tf32"


class _Call(NamedTuple):
    alpha: float
    precision: str
    tilings: Tilings


class _Work(NamedTuple):
    """What is not differentiated."""

    plan: AttentionPlan
    scale: Any  # float32, scalar or [T]
    times: Any  # None, or int32[T] of rows as keys, as queries


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q: Array, k: Array, v: Array, tables: Any, work: _Work) -> Array:
    tiling = call.tilings.forward
    bounds = work.plan.tile_bounds(tiling.block_q, tiling.block_k)
    programs = bounds.key_lo.shape[0] * v.shape[1]
    ordered = programs > MANY_PROGRAMS
    (out,) = _launch(
        "forward",
        (q, k, v, work.scale, _one(work.plan.num_real), *_walk(bounds.key_lo, bounds.key_hi, ordered), *work.plan.keys, *_bias_arrays(tables, work)),
        [jax.ShapeDtypeStruct(v.shape, v.dtype)],
        programs,
        tiling.warps,
        tiling.stages,
        BQ=tiling.block_q,
        BK=tiling.block_k,
        ORDERED=ordered,
        **_constants(call, q, v, tables, work),
    )
    return out


def _forward(call: _Call, q: Array, k: Array, v: Array, tables: Any, work: _Work) -> Any:
    return _attend(call, q, k, v, tables, work), (q, k, v, tables, work)


def _backward(call: _Call, saved: Any, g: Array) -> Any:
    q, k, v, tables, work = saved
    heads, plan, tiling = q.shape[1], work.plan, call.tilings.backward
    by_query, by_key = plan.tile_bounds(*tiling.queries), plan.tile_bounds(*tiling.keys)
    query_programs, key_programs = by_query.key_lo.shape[0] * heads, by_key.row_lo.shape[0] * heads
    ordered = query_programs + key_programs > MANY_PROGRAMS
    walks = (*_walk(by_query.key_lo, by_query.key_hi, ordered), *_walk(by_key.row_lo, by_key.row_hi, ordered))
    positions, buckets = _sizes(tables)
    copies = min(TABLE_COPIES, query_programs)
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    dq, dk, dv, d_tables = _launch(
        "backward",
        (q, k, v, g, work.scale, _one(plan.num_real), *walks, *plan.keys, plan.rows.near_lo, plan.rows.near_hi, *_bias_arrays(tables, work)),
        [*like, jax.ShapeDtypeStruct((copies, max(1, positions + buckets)), jnp.float32)],
        key_programs + query_programs,
        tiling.warps,
        tiling.stages,
        zeroed=(3,),
        QUERY_BQ=tiling.queries[0],
        QUERY_BK=tiling.queries[1],
        KEY_BQ=tiling.keys[0],
        KEY_BK=tiling.keys[1],
        KEY_PROGRAMS=key_programs,
        COPIES=copies,
        ORDERED=ordered,
        **_constants(call, q, v, tables, work),
    )
    d_tables = d_tables.sum(0)
    d_position = None if tables[0] is None else d_tables[:positions]
    d_time = None if tables[1] is None else d_tables[positions:]
    return dq, dk, dv, (d_position, d_time), None


_attend.defvjp(_forward, _backward)


def _one(scalar: Any) -> Array:
    return jnp.asarray(scalar, jnp.int32).reshape(1)


def _walk(lo: Array, hi: Array, ordered: bool) -> tuple[Array, Array, Array]:
    """Tiles by falling number of blocks (not read unless `ordered`), and their bounds."""
    return (jnp.argsort((lo - hi).sum(1)).astype(jnp.int32) if ordered else lo), lo, hi


def _bias_arrays(tables: Any, work: _Work) -> tuple[Array, ...]:
    """position_table, time_table, bucket starts, times, query times; where the bias has none, an array that is not read."""
    none = work.scale.reshape(-1)
    position, time = (none if table is None else table for table in tables)
    if tables[1] is None:
        return (position, time, none, none, none)
    return (position, time, jnp.asarray(bucket_starts(time.shape[0])), *work.times)


def _sizes(tables: Any) -> tuple[int, int]:
    position, time = (0 if table is None else table.shape[0] for table in tables)
    return position, time


def _constants(call: _Call, q: Array, v: Array, tables: Any, work: _Work) -> dict[str, Any]:
    positions, buckets = _sizes(tables)
    rows, heads, k_width = q.shape
    return {
        "T": rows,
        "H": heads,
        "K": k_width,
        "V": v.shape[2],
        "WK": _padded(k_width),
        "WV": _padded(v.shape[2]),
        "ALPHA": call.alpha,
        "ROW_SCALE": work.scale.ndim == 1,
        "POSITIONS": positions,
        "BUCKETS": buckets,
        "PRECISION": call.precision,
        "APPROXIMATE": q.dtype == jnp.bfloat16,
    }


def _launch(
    name: str, arrays: tuple[Array, ...], outs: list[Any], programs: int, warps: int, stages: int, zeroed: tuple[int, ...] = (), **constants: Any
) -> Any:
    import jax_triton

    return jax_triton.triton_call(
        *arrays,
        kernel=getattr(_kernels(), name),
        out_shape=outs,
        grid=(programs,),
        name=f"hstu_attention_{name}",
        num_warps=warps,
        num_stages=stages,
        zeroed_outputs=zeroed,
        **constants,
    )
