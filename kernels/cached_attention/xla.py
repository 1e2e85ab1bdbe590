"""Attention to a cache in plain XLA: tiles of rows against blocks of keys, any width and dtype.

Memory is O(rows of a tile x keys of a block). On a CPU a tile visits the blocks that its rows see.
An accelerator takes all rows as one tile and visits every block, since a loop whose length the
program computes would stop it at each step: keys of other users are then computed and masked, so
name `triton` for many users at one time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from kernels import device
from kernels.hstu_attention.plan import AttentionSpec
from kernels.hstu_attention.relative_bias import RelativeBias
from kernels.mask import KeyIntervals, inside
from kernels.tiles import FAR
from kernels.typing import RHK, RHV, SHK, SHV, PerQuery, Scalar


class KeyLoop(NamedTuple):
    """How the loop over blocks of keys runs.

    Attributes:
      block_rows: rows of a tile; None takes all.
      block_keys: keys of a block.
      skip: visit only the blocks that a tile sees.
      low_precision: products of 16-bit inputs run in 16 bits (with float32 sums); else in float32.
    """

    block_rows: int | None
    block_keys: int
    skip: bool
    low_precision: bool


def loop_sizes() -> KeyLoop:
    """Sizes for the current device."""
    if device.current().platform == "cpu":
        return KeyLoop(128, 256, skip=True, low_precision=False)
    return KeyLoop(None, 1024, skip=False, low_precision=True)


class RowTile(NamedTuple):
    """What is known of the rows of a tile."""

    q_RHK: RHK
    keys: KeyIntervals
    place_R: PerQuery | None
    time_R: PerQuery | None


def unsupported(spec: AttentionSpec) -> None:
    """Nothing: any call is taken."""


def attention(
    q_RHK: RHK,
    k_SHK: SHK,
    v_SHV: SHV,
    keys: KeyIntervals,
    *,
    alpha: float,
    scale: float,
    own: tuple[RHK, RHV] | None,
    bias: RelativeBias | None,
    place_R: PerQuery | None,
) -> RHV:
    """See `cached_attention`."""
    sizes, rows = loop_sizes(), q_RHK.shape[0]
    time_R = None if bias is None else bias.query_timestamps
    all_rows = RowTile(q_RHK, keys, place_R, time_R)
    size = sizes.block_rows or rows

    def tile(part: RowTile) -> Float[Array, "r H V"]:
        return _tile(sizes, part, k_SHK, v_SHV, alpha, bias)

    def cut(x: Shaped[Array, "R ..."]) -> Shaped[Array, "tiles r ..."]:
        x = jnp.pad(x, [(0, -rows % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    if rows <= size:
        sum_RHV = tile(all_rows)
    else:
        tiles = jax.lax.map(tile, jax.tree.map(cut, all_rows))
        sum_RHV = tiles.reshape(-1, *v_SHV.shape[1:])[:rows]
    if own is not None:
        sum_RHV += _own(q_RHK, *own, alpha, bias)
    return (scale * sum_RHV).astype(q_RHK.dtype)


def _own(
    q_RHK: RHK,
    k_RHK: RHK,
    v_RHV: RHV,
    alpha: float,
    bias: RelativeBias | None,
) -> RHV:
    """What each row's own key gives it, float32."""
    score_RH1 = alpha * jnp.sum(
        q_RHK.astype(jnp.float32) * k_RHK.astype(jnp.float32), axis=2, keepdims=True
    )
    if bias is not None:
        score_RH1 = bias.added_to(score_RH1, *[jnp.zeros((1, 1, 1), jnp.int32)] * 2)
    return jax.nn.silu(score_RH1) * v_RHV.astype(jnp.float32)


def _tile(
    sizes: KeyLoop,
    rows: RowTile,
    k_SHK: SHK,
    v_SHV: SHV,
    alpha: float,
    bias: RelativeBias | None,
) -> RHV:
    """The sums of a tile's rows, float32."""
    num_keys, size = k_SHK.shape[0], min(sizes.block_keys, k_SHK.shape[0])
    q_RHK = rows.q_RHK if sizes.low_precision else rows.q_RHK.astype(jnp.float32)
    every = (0, -(-num_keys // size), None)
    first, blocks, gap = visited_blocks(rows.keys, size) if sizes.skip else every

    def step(i: Scalar, sum_RHV: RHV) -> RHV:
        block = i + first
        if gap is not None:
            block = jnp.where(block >= gap[0], block - gap[0] + gap[1], block)
        # The last block is moved to end with the buffer; keys of the block before are masked.
        start = jnp.minimum(block * size, num_keys - size)
        k_bHK, v_bHV = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (k_SHK, v_SHV))
        if not sizes.low_precision:
            k_bHK, v_bHV = k_bHK.astype(jnp.float32), v_bHV.astype(jnp.float32)
        key_1b = (start + jnp.arange(size, dtype=jnp.int32))[None, :]
        seen_Rb = inside(key_1b, (bound[:, None] for bound in rows.keys)) & (key_1b >= block * size)
        score_HRb = alpha * jnp.einsum(
            "rhd,khd->hrk", q_RHK, k_bHK, preferred_element_type=jnp.float32
        )
        if bias is not None:
            distance = None if rows.place_R is None else (key_1b - rows.place_R[:, None])[None]
            elapsed = None
            if bias.timestamps is not None and rows.time_R is not None:
                time_b = jax.lax.dynamic_slice_in_dim(bias.timestamps, start, size)
                elapsed = (rows.time_R[:, None] - time_b[None, :])[None]
            score_HRb = bias.added_to(score_HRb, distance, elapsed)
        weight_HRb = jnp.where(seen_Rb[None], jax.nn.silu(score_HRb), 0.0).astype(v_bHV.dtype)
        return sum_RHV + jnp.einsum(
            "hrk,khd->rhd", weight_HRb, v_bHV, preferred_element_type=jnp.float32
        )

    return jax.lax.fori_loop(
        0, blocks, step, jnp.zeros((*q_RHK.shape[:2], v_SHV.shape[2]), jnp.float32)
    )


def visited_blocks(keys: KeyIntervals, size: int) -> tuple[Scalar, Scalar, tuple[Scalar, Scalar]]:
    """The blocks that a tile sees: the first, how many, and a gap (start, end).

    The gap is between the blocks of the two slots; it is empty where they meet or overlap.
    """

    def hull(lo: PerQuery, hi: PerQuery) -> tuple[Scalar, Scalar]:
        some = hi > lo
        first = jnp.min(jnp.where(some, lo, FAR)) // size
        last = -(-jnp.max(jnp.where(some, hi, 0)) // size)
        return first, jnp.maximum(last, 0)

    (first0, last0), (first1, last1) = hull(keys.lo0, keys.hi0), hull(keys.lo1, keys.hi1)
    none0, none1 = last0 == 0, last1 == 0
    first, last = jnp.minimum(first0, first1), jnp.maximum(last0, last1)
    apart = ~none0 & ~none1 & ((last0 < first1) | (last1 < first0))
    gap_start = jnp.where(apart, jnp.minimum(last0, last1), last)
    gap_end = jnp.where(apart, jnp.maximum(first0, first1), last)
    return first, jnp.maximum(last - first - (gap_end - gap_start), 0), (gap_start, gap_end)
