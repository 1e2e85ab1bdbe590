"""HSTU attention in Triton (jax-triton), sm80 and later: any head width to 256, the relative bias, float32, bfloat16 and float16.

Forward, and a backward in two passes that recompute the scores: one over query tiles for dq and the bias tables, one over key tiles for dk and
dv (7 products a pair of tiles for the 5 of a single pass, but no adds to memory that many programs share: dq, dk, dv have the same bits in every
run). The gradients of the tables are added in memory in any order, so that their last bits vary.

Products of float32 follow JAX's matmul precision as XLA does on a GPU: TF32 by default, three TF32 products for "high", float32 for "highest".
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import device
from kernels.hstu_attention import tuning
from kernels.hstu_attention.plan import AttentionPlan
from kernels.hstu_attention.relative_bias import RelativeBias, bucket_starts
from kernels.triton_call import triton_call

WIDEST = 256
WIDEST_SMALL = 128  # where a program has less than 163 KiB of shared memory
SHARED_KIB = {
    (8, 0): 163,
    (8, 7): 163,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (11, 0): 227,
}  # by compute capability, 99 elsewhere
TABLE_COPIES = 64
MANY_PROGRAMS = 512  # more than run at once: then heavy tiles start first


class Tiling(NamedTuple):
    """Of one kernel: query rows and keys of a tile, warps of a program, depth of the load pipeline."""

    block_q: int
    block_k: int
    warps: int
    stages: int


class Tilings(NamedTuple):
    forward: Tiling
    queries: Tiling  # backward over query tiles
    keys: Tiling  # backward over key tiles


# What a shape takes that has no entry in tuning.json. (bytes of an element, padded width of the widest head) -> sizes: those that an H200 does long
# causal sequences fastest with. `tests/kernels/test_triton_compiles.py` compiles all of them, and the table's, for each kind of GPU, with and without a
# bias.
TILINGS = {
    (2, 32): Tilings(Tiling(64, 64, 4, 3), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)),
    (2, 64): Tilings(Tiling(64, 64, 4, 3), Tiling(64, 64, 4, 3), Tiling(64, 64, 4, 3)),
    (2, 128): Tilings(Tiling(64, 64, 4, 3), Tiling(128, 64, 8, 3), Tiling(64, 64, 4, 2)),
    (2, 256): Tilings(Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2), Tiling(32, 64, 8, 2)),
    (4, 32): Tilings(Tiling(32, 32, 2, 2), Tiling(32, 32, 2, 2), Tiling(32, 32, 2, 2)),
    (4, 64): Tilings(Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2)),
    (4, 128): Tilings(Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2)),
    (4, 256): Tilings(Tiling(32, 32, 8, 1), Tiling(32, 32, 8, 1), Tiling(32, 32, 8, 1)),
}
# The same where shared memory is scarcer, not measured.
SMALLER_TILINGS = TILINGS | {
    (2, 64): Tilings(Tiling(64, 64, 4, 3), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2)),
    (2, 128): Tilings(Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 2), Tiling(32, 64, 4, 2)),
    (2, 256): Tilings(Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(32, 64, 8, 1)),
}


def shared_kib(compute_capability: tuple[int, int]) -> int:
    """Shared memory that a program may have."""
    return SHARED_KIB.get(compute_capability, 99)


def widest(compute_capability: tuple[int, int]) -> int:
    """Widest head that this kind of GPU takes."""
    return WIDEST if shared_kib(compute_capability) >= 163 else WIDEST_SMALL


def heuristic(
    compute_capability: tuple[int, int], dtype: Any, k_width: int, v_width: int
) -> Tilings:
    """Sizes for a kind of GPU, a dtype and head widths up to `widest`, where nothing was measured."""
    table = TILINGS if shared_kib(compute_capability) >= 227 else SMALLER_TILINGS
    return table[jnp.dtype(dtype).itemsize, max(32, padded(k_width), padded(v_width))]


def tilings(
    compute_capability: tuple[int, int],
    dtype: Any,
    k_width: int,
    v_width: int,
    plan: AttentionPlan,
    biased: bool,
) -> Tilings:
    """Sizes of a call: of the table of measurements, else of the heuristic."""
    found = tuning.find("triton", dtype, k_width, v_width, plan)
    sizes = (
        heuristic(compute_capability, dtype, k_width, v_width)
        if found is None
        else from_table(found)
    )
    return with_bias(sizes, dtype) if biased else sizes


def with_bias(sizes: Tilings, dtype: Any) -> Tilings:
    """16-bit sizes are measured without a bias, which takes shared memory of its own: the loads' pipeline gets a stage less. 32-bit ones are with one."""
    if jnp.dtype(dtype).itemsize > 2:
        return sizes
    return Tilings(*(tiling._replace(stages=max(1, tiling.stages - 1)) for tiling in sizes))


def from_table(sizes: tuning.Sizes) -> Tilings:
    return Tilings(**{kernel: Tiling(**values) for kernel, values in sizes.items()})


def padded(width: int) -> int:
    """Width that products compute with: a power of two."""
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
    deterministic: bool = False,
) -> Float[Array, "T H V"]:
    """See `hstu_attention`. No gradient flows to `scale`.

    NotImplementedError: no jax-triton, no such GPU, heads wider than `widest`, or `deterministic` with a bias, whose tables' gradients are summed by atomic
    additions.
    """
    if deterministic and bias is not None:
        raise NotImplementedError(
            "triton sums gradients of bias tables in no fixed order, deterministic=True asks for one; use bias=None"
        )
    capability, widths = compute_capability(), (q_THK.shape[2], v_THV.shape[2])
    if not 0 < min(widths) <= max(widths) <= widest(capability):
        raise NotImplementedError(
            f"triton takes heads of width 1 to {widest(capability)} here, got K = {widths[0]}, V = {widths[1]}; implementation='xla' takes any"
        )
    check_installed()
    if q_THK.size == 0:
        return jnp.zeros_like(v_THV)
    call = Call(
        alpha, _precision(), tilings(capability, q_THK.dtype, *widths, plan, bias is not None)
    )
    return forward(call, q_THK, k_THK, v_THV, *bias_and_work(plan, scale, bias))


def bias_and_work(plan: AttentionPlan, scale: Any, bias: RelativeBias | None) -> tuple[Any, "Work"]:
    """Tables, which are differentiated, and the rest of the inputs, which is not."""
    tables: tuple[Any, ...] = (None, None)
    times = None
    if bias is not None:
        tables = tuple(
            None if t is None else jnp.asarray(t, jnp.float32)
            for t in (bias.position_table, bias.time_table)
        )
        times = None if bias.time_table is None else (bias.timestamps, bias.query_timestamps)
    return tables, Work(plan, jnp.asarray(scale, jnp.float32), times)


def compute_capability() -> tuple[int, int]:
    current = device.current()
    if (
        current.platform != "gpu"
        or current.compute_capability is None
        or current.compute_capability < (8, 0)
    ):
        raise NotImplementedError(
            f"triton needs an NVIDIA GPU from sm80 (A100) on, the device is {current.kind!r}; implementation='xla' runs anywhere"
        )
    return current.compute_capability


def check_installed() -> None:
    for package in ("jax_triton", "triton"):
        if importlib.util.find_spec(package) is None:
            raise NotImplementedError(
                f"triton needs {package}: pip install -r requirements-cuda.txt; implementation='xla' needs nothing more"
            )


def _precision() -> str:
    """How float32 products are taken, in Triton's words."""
    name = str(jax.config.jax_default_matmul_precision).lower()
    if name in ("highest", "float32", "f32_f32_f32"):
        return "ieee"
    return "tf32x3" if name == "high" or name.endswith(("x3", "3x", "x6", "x9")) else "tf32"


class Call(NamedTuple):
    alpha: float
    precision: str
    tilings: Tilings


class Work(NamedTuple):
    """What is not differentiated."""

    plan: AttentionPlan
    scale: Any  # float32, scalar or [T]
    times: Any  # None, or int32[T] of rows as keys, as queries


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def forward(call: Call, q: Array, k: Array, v: Array, tables: Any, work: Work) -> Array:
    tiling = call.tilings.forward
    bounds = work.plan.tile_bounds(tiling.block_q, tiling.block_k)
    inputs = (q, k, v, work.scale, work.plan.num_real.reshape(1))
    out_like = [jax.ShapeDtypeStruct(v.shape, v.dtype)]
    (out,) = _launch(
        "forward",
        call,
        tables,
        work,
        tiling,
        inputs,
        work.plan.keys,
        bounds.key_lo,
        bounds.key_hi,
        out_like,
    )
    return out


def _forward(call: Call, q: Array, k: Array, v: Array, tables: Any, work: Work) -> Any:
    return forward(call, q, k, v, tables, work), (q, k, v, tables, work)


def _backward(call: Call, saved: Any, g: Array) -> Any:
    q, k, v, tables, work = saved
    dq, d_tables = query_gradients(call, q, k, v, g, tables, work)
    dk, dv = key_gradients(call, q, k, v, g, tables, work)
    return dq, dk, dv, d_tables, None


def query_gradients(
    call: Call, q: Array, k: Array, v: Array, g: Array, tables: Any, work: Work
) -> Any:
    """dq, and the gradients of both tables: the pass over query tiles."""
    plan, tiling = work.plan, call.tilings.queries
    bounds = plan.tile_bounds(tiling.block_q, tiling.block_k)
    positions, buckets = _sizes(tables)
    copies = min(TABLE_COPIES, bounds.key_lo.shape[0] * q.shape[1])
    inputs = (q, k, v, g, work.scale, plan.num_real.reshape(1))
    outs = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((copies, max(1, positions + buckets)), jnp.float32),
    ]
    walk = (plan.keys, bounds.key_lo, bounds.key_hi)
    dq, d_tables = _launch(
        "backward_queries",
        call,
        tables,
        work,
        tiling,
        inputs,
        *walk,
        outs,
        zeroed=(1,),
        COPIES=copies,
    )
    d_tables = d_tables.sum(0)
    return dq, (
        None if tables[0] is None else d_tables[:positions],
        None if tables[1] is None else d_tables[positions:],
    )


def key_gradients(
    call: Call, q: Array, k: Array, v: Array, g: Array, tables: Any, work: Work
) -> Any:
    """dk and dv: the pass over key tiles."""
    plan, tiling = work.plan, call.tilings.keys
    bounds = plan.tile_bounds(tiling.block_q, tiling.block_k)
    intervals = (*plan.keys, plan.rows.near_lo, plan.rows.near_hi)
    inputs = (q, k, v, g, work.scale, plan.num_real.reshape(1))
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    return _launch(
        "backward_keys",
        call,
        tables,
        work,
        tiling,
        inputs,
        intervals,
        bounds.row_lo,
        bounds.row_hi,
        outs,
    )


forward.defvjp(_forward, _backward)


def prepare(
    plan: AttentionPlan, heads: int, dtype: Any, k_width: int, v_width: int, biased: bool = False
) -> AttentionPlan:
    """The plan with the tile bounds and orders that this implementation needs for these sizes: made once a batch, used by every layer."""
    return prepared(
        plan, heads, tilings(compute_capability(), dtype, k_width, v_width, plan, biased)
    )


def prepared(plan: AttentionPlan, heads: int, sizes: Tilings) -> AttentionPlan:
    """`prepare` for given sizes."""
    stored = dict(plan.stored)
    for kernel, tiling in sizes._asdict().items():
        bounds = plan.tile_bounds(tiling.block_q, tiling.block_k)
        side, lo, hi = (
            ("keys", bounds.row_lo, bounds.row_hi)
            if kernel == "keys"
            else ("queries", bounds.key_lo, bounds.key_hi)
        )
        stored[f"{tiling.block_q}x{tiling.block_k}"] = bounds
        if lo.shape[0] * heads > MANY_PROGRAMS:
            stored[_order_name(side, tiling)] = _order(lo, hi)
    return dataclasses.replace(plan, stored=stored)


def _order_name(side: str, tiling: Tiling) -> str:
    return f"triton, order of tiles of {side}, {tiling.block_q}x{tiling.block_k}"


def _order(lo: Array, hi: Array) -> Array:
    """Tiles by falling number of blocks."""
    return jnp.argsort((lo - hi).sum(1)).astype(jnp.int32)


def _bias_arrays(tables: Any, work: Work) -> tuple[Array, ...]:
    """position_table, time_table, bucket starts, times, query times; where the bias has none, an array that is not read."""
    none = work.scale.reshape(-1)
    position, time = (none if table is None else table for table in tables)
    if tables[1] is None:
        return (position, time, none, none, none)
    return (position, time, jnp.asarray(bucket_starts(time.shape[0])), *work.times)


def _sizes(tables: Any) -> tuple[int, int]:
    position, time = (0 if table is None else table.shape[0] for table in tables)
    return position, time


def _launch(
    kernel: str,
    call: Call,
    tables: Any,
    work: Work,
    tiling: Tiling,
    inputs: tuple[Array, ...],
    intervals: Sequence[Array],
    bounds_lo: Array,
    bounds_hi: Array,
    outs: list[Any],
    zeroed: tuple[int, ...] = (),
    **constants: Any,
) -> Any:
    """Runs a kernel of `triton_kernels`, a program for every tile of `bounds_*` and head: (inputs, order, bounds, intervals, bias) -> outs."""
    rows, heads, k_width = inputs[0].shape
    v_width = inputs[2].shape[2]
    programs = bounds_lo.shape[0] * heads
    ordered = programs > MANY_PROGRAMS
    order = bounds_lo  # not read
    if ordered:
        order = work.plan.stored.get(
            _order_name("keys" if kernel == "backward_keys" else "queries", tiling)
        )
        order = _order(bounds_lo, bounds_hi) if order is None else order
    positions, buckets = _sizes(tables)
    constants |= {
        "T": rows,
        "H": heads,
        "K": k_width,
        "V": v_width,
        "WK": padded(k_width),
        "WV": padded(v_width),
        "BQ": tiling.block_q,
        "BK": tiling.block_k,
        "ALPHA": call.alpha,
        "ROW_SCALE": work.scale.ndim == 1,
        "ORDERED": ordered,
        "POSITIONS": positions,
        "BUCKETS": buckets,
        "PRECISION": call.precision,
        "APPROXIMATE": inputs[0].dtype == jnp.bfloat16,
    }
    arrays = (*inputs, order, bounds_lo, bounds_hi, *intervals, *_bias_arrays(tables, work))
    return _call_kernel(
        kernel, arrays, outs, programs, tiling.warps, tiling.stages, zeroed, constants
    )


def _call_kernel(
    kernel: str,
    arrays: tuple[Array, ...],
    outs: list[Any],
    programs: int,
    warps: int,
    stages: int,
    zeroed: tuple[int, ...],
    constants: dict[str, Any],
) -> Any:
    from kernels.hstu_attention.triton import kernels as triton_kernels

    return triton_call(
        *arrays,
        kernel=getattr(triton_kernels, kernel),
        out_shape=outs,
        grid=(programs,),
        name=f"hstu_attention_{kernel}",
        num_warps=warps,
        num_stages=stages,
        zeroed_outputs=zeroed,
        **constants,
    )
