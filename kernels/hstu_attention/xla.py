"""Blockwise HSTU attention in plain XLA, for any width, dtype and device, with the relative bias.

Memory is O(T), and tiles that do not meet are skipped. An output is a sum over keys, so the whole
work is a flat list of (query tile, key tile) pairs that may be taken in any order. The list is
never stored: pair number p belongs to the query tile where the running count of key tiles passes p.
A loop takes `group` pairs a step as one batch of small matrix products. The backward is one more
such loop that recomputes the scores (5 products a pair).

On CPU the same input gives the same bits. On a GPU partial sums of a tile are added atomically, in
an order that varies from run to run.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kernels import device
from kernels.hstu_attention.plan import AttentionPlan, AttentionSpec
from kernels.hstu_attention.relative_bias import (
    RelativeBias,
    bucket_starts,
    position_bias,
    time_buckets,
)
from kernels.mask import inside
from kernels.tiles import TileBounds
from kernels.typing import THK, THV, PositionTable, Scalar, Scale, TimeTable
from kernels.zeros import zeros_after

Outputs = Float[Array, "n H b V"]  # n tiles of b rows
Tensors = tuple[Float[Array, "n H b K"], Float[Array, "n H b K"], Outputs]
Tables = tuple[PositionTable | None, TimeTable | None]  # position, time


class PairLoop(NamedTuple):
    """How the loop over pairs of tiles runs.

    Attributes:
      block: rows and keys of a tile.
      group: pairs of tiles a step.
      low_precision: products of 16-bit inputs run in 16 bits (with float32 sums); else in float32.
      scatter: sums by bucket scatter; else they compare and reduce.
    """

    block: int
    group: int
    low_precision: bool
    scatter: bool


def loop_sizes(num_rows: int) -> PairLoop:
    """Sizes for the current device.

    On CPU a step's scores stay in cache; on accelerators a step fills the device.
    """
    if device.current().platform == "cpu":
        return PairLoop(block=64, group=16, low_precision=False, scatter=True)
    group = min(256, max(8, -(-num_rows // 32)))
    return PairLoop(block=128, group=group, low_precision=True, scatter=False)


def unsupported(spec: AttentionSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    if spec.deterministic and device.current().platform == "gpu":
        return (
            "xla adds up blocks in no fixed order on a GPU, deterministic=True asks for one; "
            "use 'mosaic' or 'triton'"
        )
    return None


def prepare(plan: AttentionPlan, spec: AttentionSpec) -> AttentionPlan:
    """The plan as it is: bounds of tiles are cheap beside this implementation's products."""
    return plan


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
    rows = q_THK.shape[0]
    if rows == 0:
        return jnp.zeros_like(v_THV)
    sizes = loop_sizes(rows)
    tables, work = tile_work(sizes, plan, bias)
    tiled = functools.partial(to_tiles, num_real=plan.num_real, block=sizes.block)
    q, k, v = (jnp.swapaxes(tiled(x), 1, 2) for x in (q_THK, k_THK, v_THV))
    out_nHbV = _sums(sizes, alpha, (q, k, v), tables, work)
    out_THV = jnp.swapaxes(out_nHbV, 1, 2).reshape(-1, *v_THV.shape[1:])[:rows]
    return (out_THV * plan.row_scales(scale, rows)[:, None, None]).astype(v_THV.dtype)


class TileWork(NamedTuple):
    """What is not differentiated: n tiles of b rows."""

    bounds: TileBounds
    pairs_before: Int[Array, " n"]  # inclusive running count of pairs
    keys: Int[Array, "n 4 b"]  # key intervals of the rows
    num_real: Scalar
    times: tuple[Int[Array, "n b"], Int[Array, "n b"]] | None  # of queries, of keys


def tile_work(
    sizes: PairLoop, plan: AttentionPlan, bias: RelativeBias | None
) -> tuple[Tables, TileWork]:
    """The tables of a bias, which are differentiated, and the tiles of a plan."""
    tiled = functools.partial(to_tiles, num_real=plan.num_real, block=sizes.block)
    bounds = plan.tile_bounds(sizes.block, sizes.block)
    tables: Tables = (None, None)
    times = None
    if bias is not None:
        tables = (bias.position_table, bias.time_table)
        if bias.times is not None:
            times = (tiled(bias.times[0]), tiled(bias.times[1]))
    work = TileWork(
        bounds=bounds,
        pairs_before=jnp.cumsum((bounds.key_hi - bounds.key_lo).sum(1), dtype=jnp.int32),
        keys=jnp.stack([tiled(x) for x in plan.keys], axis=1),
        num_real=plan.num_real,
        times=times,
    )
    return tables, work


def to_tiles(
    x: Shaped[Array, "T ..."], *, num_real: Scalar, block: int
) -> Shaped[Array, "n b ..."]:
    """[T, ...] to [n, block, ...], padding rows zeroed: they may hold NaN, and 0 * NaN is NaN."""
    real = (jnp.arange(x.shape[0], dtype=jnp.int32) < num_real).reshape((-1,) + (1,) * (x.ndim - 1))
    x = jnp.where(real, x, jnp.zeros((), x.dtype))
    x = jnp.pad(x, [(0, -x.shape[0] % block)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, block, *x.shape[1:])


class TilePairs(NamedTuple):
    """The g pairs of one step."""

    query: Int[Array, " g"]
    key: Int[Array, " g"]
    mask: Bool[Array, "g b b"]
    bucket: Int[Array, "g b b"] | None


def pairs_of_step(step: Scalar, sizes: PairLoop, work: TileWork, tables: Tables) -> TilePairs:
    number_g = step * sizes.group + jnp.arange(sizes.group, dtype=jnp.int32)
    total = work.pairs_before[-1]
    tiles = work.pairs_before.shape[0]
    query_g = jnp.searchsorted(
        work.pairs_before, number_g, side="right", method="scan_unrolled"
    ).astype(jnp.int32)
    query_g = jnp.minimum(query_g, tiles - 1)
    lo_g3, hi_g3 = work.bounds.key_lo[query_g], work.bounds.key_hi[query_g]
    count_g3 = hi_g3 - lo_g3
    place_g = number_g - (work.pairs_before[query_g] - count_g3.sum(1))
    first_g, second_g = count_g3[:, 0], count_g3[:, 0] + count_g3[:, 1]
    later_g = jnp.where(place_g < second_g, lo_g3[:, 1] - first_g, lo_g3[:, 2] - second_g)
    key_g = place_g + jnp.where(place_g < first_g, lo_g3[:, 0], later_g)
    key_g = jnp.clip(key_g, 0, tiles - 1)  # numbers past the last pair
    # Without the barrier XLA fuses the search into every gather that uses its result, and repeats
    # it for every element.
    query_g, key_g = jax.lax.optimization_barrier((query_g, key_g))
    place = jnp.arange(sizes.block, dtype=jnp.int32)
    row_gb1 = (query_g[:, None] * sizes.block + place[None, :])[:, :, None]
    key_g1b = (key_g[:, None] * sizes.block + place[None, :])[:, None, :]
    seen = inside(key_g1b, (work.keys[query_g, i][:, :, None] for i in range(4)))
    seen |= (key_g1b == row_gb1) & (row_gb1 < work.num_real)
    seen &= (number_g < total)[:, None, None]
    bucket = None
    if work.times is not None and tables[1] is not None:
        gap = work.times[0][query_g][:, :, None] - work.times[1][key_g][:, None, :]
        bucket = time_buckets(gap, tables[1].shape[0])
    return TilePairs(query_g, key_g, seen, bucket)


def scores(
    q_gHbK: Float[Array, "g H b K"],
    k_gHbK: Float[Array, "g H b K"],
    alpha: float,
    tables: Tables,
    pairs: TilePairs,
    block: int,
) -> Float[Array, "g H b b"]:
    score = alpha * jnp.einsum(
        "ghqd,ghkd->ghqk", q_gHbK, k_gHbK, preferred_element_type=jnp.float32
    )
    position_table, time_table = tables
    if position_table is not None:
        inside = jnp.arange(block, dtype=jnp.int32)
        distance = ((pairs.key - pairs.query) * block)[:, None, None] + (
            inside[None, :] - inside[:, None]
        )[None]
        score += position_bias(position_table, distance)[:, None]
    if time_table is not None:
        score += (
            time_table.astype(jnp.float32).at[pairs.bucket].get(mode="promise_in_bounds")[:, None]
        )
    # The barrier keeps the scores from being computed once for each of their uses.
    # silu and its derivative are exactly 0 here, so that nothing after this needs the mask
    return jax.lax.optimization_barrier(jnp.where(pairs.mask[:, None], score, -1e30))


def steps(sizes: PairLoop, work: TileWork) -> Scalar:
    return -(-work.pairs_before[-1] // sizes.group)


def cast(sizes: PairLoop, *arrays: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    return [x if sizes.low_precision else x.astype(jnp.float32) for x in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(sizes: PairLoop, alpha: float, qkv: Tensors, tables: Tables, work: TileWork) -> Outputs:
    """Unscaled outputs, float32."""
    q, k, v = cast(sizes, *qkv)

    def step(i: Scalar, out: Outputs) -> Outputs:
        pairs = pairs_of_step(i, sizes, work, tables)
        score = scores(q[pairs.query], k[pairs.key], alpha, tables, pairs, sizes.block)
        weight = jax.nn.silu(score).astype(v.dtype)
        part = jnp.einsum(
            "ghqk,ghkd->ghqd", weight, v[pairs.key], preferred_element_type=jnp.float32
        )
        return out.at[pairs.query].add(part, mode="promise_in_bounds")

    return jax.lax.fori_loop(0, steps(sizes, work), step, jnp.zeros(v.shape, jnp.float32))


def _sums_forward(
    sizes: PairLoop, alpha: float, qkv: Tensors, tables: Tables, work: TileWork
) -> tuple[Outputs, tuple[Tensors, Tables, TileWork]]:
    return _sums(sizes, alpha, qkv, tables, work), (qkv, tables, work)


def _sums_backward(
    sizes: PairLoop,
    alpha: float,
    saved: tuple[Tensors, Tables, TileWork],
    g: Outputs,
) -> tuple[Tensors, Tables, None]:
    qkv, tables, work = saved
    q, k, v = cast(sizes, *qkv)
    g = g.astype(v.dtype)
    block = sizes.block

    def step(i: Scalar, sums: tuple[Tensors, Tables]) -> tuple[Tensors, Tables]:
        (dq, dk, dv), d_tables = sums
        pairs = pairs_of_step(i, sizes, work, tables)
        q_g, k_g, v_g, g_g = q[pairs.query], k[pairs.key], v[pairs.key], g[pairs.query]
        score = scores(q_g, k_g, alpha, tables, pairs, block)
        gate = jax.nn.sigmoid(score)
        silu = score * gate
        d_weight = jnp.einsum("ghqd,ghkd->ghqk", g_g, v_g, preferred_element_type=jnp.float32)
        d_score = d_weight * (gate + silu * (1 - gate))
        weight, d_score, bucket = jax.lax.optimization_barrier(
            (silu.astype(v.dtype), d_score, pairs.bucket)
        )
        low = d_score.astype(q.dtype)
        add = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dv = dv.at[pairs.key].add(add("ghqk,ghqd->ghkd", weight, g_g), mode="promise_in_bounds")
        dk = dk.at[pairs.key].add(add("ghqk,ghqd->ghkd", low, q_g), mode="promise_in_bounds")
        dq = dq.at[pairs.query].add(add("ghqk,ghkd->ghqd", low, k_g), mode="promise_in_bounds")
        pairs = pairs._replace(bucket=bucket)
        return (dq, dk, dv), add_table_gradients(d_tables, d_score.sum(1), pairs, sizes)

    zeros = tuple(zeros_after(g, x.shape) for x in (q, k, v))
    table_zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tables)
    (dq, dk, dv), d_tables = jax.lax.fori_loop(0, steps(sizes, work), step, (zeros, table_zeros))
    gradients = (alpha * dq, alpha * dk, dv), d_tables
    like = (qkv, tables)
    return *jax.tree.map(lambda x, y: x.astype(y.dtype), gradients, like), None


_sums.defvjp(_sums_forward, _sums_backward)


def add_table_gradients(
    tables: Tables, per_pair: Float[Array, "g b b"], pairs: TilePairs, sizes: PairLoop
) -> Tables:
    """With what a step's pairs add; `per_pair`: gradients of scores, summed over heads."""
    d_position, d_time = tables
    if d_position is not None:
        d_position = d_position + _diagonal_sums(
            per_pair, (pairs.key - pairs.query) * sizes.block, d_position.shape[0]
        )
    if d_time is not None:
        assert pairs.bucket is not None
        d_time = d_time + _bucket_sums(per_pair, pairs.bucket, d_time.shape[0], sizes.scatter)
    return d_position, d_time


def _diagonal_sums(
    x_gbb: Float[Array, "g b b"], shift_g: Int[Array, " g"], size: int
) -> PositionTable:
    """Gradient of a table read at `size // 2 + shift + j - i`: sums over diagonals.

    Padding rows to 2b - 1 + 1 columns and reading the buffer with one column less moves row i by i
    columns: diagonals become columns.
    """
    group, block, _ = x_gbb.shape
    flipped = x_gbb[:, ::-1]  # row i moves right by i; flipped, so that j - i becomes i' + j
    wide = jnp.pad(flipped, ((0, 0), (0, 0), (0, block)))
    skewed = wide.reshape(group, -1)[:, : block * (2 * block - 1)].reshape(
        group, block, 2 * block - 1
    )
    sum_gd = skewed.sum(1)  # column d holds the diagonal j - i = d - (block - 1)
    place_gd = size // 2 + shift_g[:, None] + jnp.arange(1 - block, block, dtype=jnp.int32)[None, :]
    return (
        jnp.zeros(size, jnp.float32)
        .at[jnp.clip(place_gd, 0, size - 1)]
        .add(sum_gd, mode="promise_in_bounds")
    )


def _bucket_sums(
    x_gbb: Float[Array, "g b b"], bucket_gbb: Int[Array, "g b b"], size: int, scatter: bool
) -> TimeTable:
    """Gradient of a table read at `bucket`: its sums by bucket.

    On CPU a scatter is cheap. On accelerators it is millions of atomic additions to a few
    addresses; there every bucket that int32 gaps can reach takes part in one fused comparison
    and reduction, first over a tile, then over the tiles.
    """
    if scatter:
        return jnp.zeros(size, jnp.float32).at[bucket_gbb].add(x_gbb, mode="promise_in_bounds")
    reached = min(size, 1 + int((bucket_starts(size)[1:] < 2**31 - 1).sum()))
    bucket_111r = jnp.arange(reached, dtype=jnp.int32)[None, None, None, :]
    sum_r = (
        jnp.where(bucket_gbb[..., None] == bucket_111r, x_gbb[..., None], 0.0).sum((1, 2)).sum(0)
    )
    return jnp.pad(sum_r, (0, size - reached))
