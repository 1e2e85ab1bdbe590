"""Attention to a cache in plain XLA: tiles of rows against blocks of keys, memory O(rows of a tile x keys of a block), any width, dtype and bias.

On a CPU a tile visits the blocks that its rows see. An accelerator takes all rows as one tile and visits every block, since a loop whose length the
program computes would stop it at each step: what belongs to other users is then computed and masked, so name `triton` for many users at one time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import device
from kernels.hstu_attention.relative_bias import RelativeBias, position_bias, time_buckets
from kernels.mask import KeyIntervals


class Tiling(NamedTuple):
    block_rows: int | None  # None: all
    block_keys: int
    skip: bool  # visit only the blocks that a tile sees
    low_precision: (
        bool  # products of 16-bit inputs run in 16 bits (with float32 sums); otherwise in float32
    )


def tiling() -> Tiling:
    if device.current().platform == "cpu":
        return Tiling(128, 256, skip=True, low_precision=False)
    return Tiling(None, 1024, skip=False, low_precision=True)


class _Rows(NamedTuple):
    """What is known of the rows of a tile."""

    q_RHK: Array
    keys: KeyIntervals
    place_R: Any
    time_R: Any


def attention(
    q_RHK: Float[Array, "R H K"],
    k_SHK: Float[Array, "S H K"],
    v_SHV: Float[Array, "S H V"],
    keys: KeyIntervals,
    *,
    alpha: float,
    scale: float,
    own: tuple[Array, Array] | None,
    bias: RelativeBias | None,
    place_R: Any,
) -> Float[Array, "R H V"]:
    """See `cached_attention`."""
    sum_RHV = _sums(q_RHK, k_SHK, v_SHV, keys, alpha, bias, place_R)
    if own is not None:
        sum_RHV += _own(q_RHK, *own, alpha, bias)
    return (scale * sum_RHV).astype(q_RHK.dtype)


def _sums(
    q_RHK: Array,
    k_SHK: Array,
    v_SHV: Array,
    keys: KeyIntervals,
    alpha: float,
    bias: RelativeBias | None,
    place_R: Any,
) -> Float[Array, "R H V"]:
    """What the cached keys give, float32."""
    sizes, rows = tiling(), q_RHK.shape[0]
    time_R = None if bias is None else bias.query_timestamps
    all_rows = _Rows(q_RHK, keys, place_R, time_R)

    def tile(part: _Rows) -> Array:
        return _tile(sizes, part, k_SHK, v_SHV, alpha, bias)

    if sizes.block_rows is None or rows <= sizes.block_rows:
        return tile(all_rows)
    size = sizes.block_rows

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, -rows % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    return jax.lax.map(tile, jax.tree.map(cut, all_rows)).reshape(-1, *v_SHV.shape[1:])[:rows]


def _own(
    q_RHK: Array, k_RHK: Array, v_RHV: Array, alpha: float, bias: RelativeBias | None
) -> Float[Array, "R H V"]:
    """What each row's own key gives it, float32."""
    score_RH1 = alpha * jnp.sum(
        q_RHK.astype(jnp.float32) * k_RHK.astype(jnp.float32), axis=2, keepdims=True
    )
    if bias is not None and bias.position_table is not None:
        score_RH1 += position_bias(bias.position_table, jnp.zeros((1, 1, 1), jnp.int32))
    if bias is not None and bias.time_table is not None:
        score_RH1 += bias.time_table[0].astype(jnp.float32)
    return jax.nn.silu(score_RH1) * v_RHV.astype(jnp.float32)


def _tile(
    sizes: Tiling, rows: _Rows, k_SHK: Array, v_SHV: Array, alpha: float, bias: RelativeBias | None
) -> Array:
    """The sums of a tile's rows, float32."""
    num_keys, size = k_SHK.shape[0], min(sizes.block_keys, k_SHK.shape[0])
    q_RHK = rows.q_RHK if sizes.low_precision else rows.q_RHK.astype(jnp.float32)
    first, blocks, gap = _blocks(rows.keys, size) if sizes.skip else (0, -(-num_keys // size), None)

    def step(i: Array, sum_RHV: Array) -> Array:
        block = i + first
        if gap is not None:
            block = jnp.where(block >= gap[0], block - gap[0] + gap[1], block)
        # The last block is moved to end with the buffer; what the one before has had already is masked.
        start = jnp.minimum(block * size, num_keys - size)
        k_bHK, v_bHV = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (k_SHK, v_SHV))
        if not sizes.low_precision:
            k_bHK, v_bHV = k_bHK.astype(jnp.float32), v_bHV.astype(jnp.float32)
        key_1b = (start + jnp.arange(size, dtype=jnp.int32))[None, :]
        lo0, hi0, lo1, hi1 = (x[:, None] for x in rows.keys)
        seen_Rb = ((key_1b >= lo0) & (key_1b < hi0)) | ((key_1b >= lo1) & (key_1b < hi1))
        seen_Rb &= key_1b >= block * size
        score_HRb = alpha * jnp.einsum(
            "rhd,khd->hrk", q_RHK, k_bHK, preferred_element_type=jnp.float32
        )
        if bias is not None and bias.position_table is not None:
            score_HRb += position_bias(bias.position_table, key_1b - rows.place_R[:, None])[None]
        if bias is not None and bias.time_table is not None:
            time_b = jax.lax.dynamic_slice_in_dim(bias.timestamps, start, size)
            bucket_Rb = time_buckets(
                rows.time_R[:, None] - time_b[None, :], bias.time_table.shape[0]
            )
            score_HRb += bias.time_table.astype(jnp.float32)[bucket_Rb][None]
        weight_HRb = jnp.where(seen_Rb[None], jax.nn.silu(score_HRb), 0.0).astype(v_bHV.dtype)
        return sum_RHV + jnp.einsum(
            "hrk,khd->rhd", weight_HRb, v_bHV, preferred_element_type=jnp.float32
        )

    return jax.lax.fori_loop(
        0, blocks, step, jnp.zeros((*q_RHK.shape[:2], v_SHV.shape[2]), jnp.float32)
    )


def _blocks(keys: KeyIntervals, size: int) -> tuple[Array, Array, tuple[Array, Array]]:
    """The blocks that a tile sees: the first, how many, and the gap (start, end) between those of its two slots, empty where they meet or overlap."""

    def hull(lo: Array, hi: Array) -> tuple[Array, Array]:
        some = hi > lo
        first, last = (
            jnp.min(jnp.where(some, lo, 2**30)) // size,
            -(-jnp.max(jnp.where(some, hi, 0)) // size),
        )
        return first, jnp.maximum(last, 0)

    (first0, last0), (first1, last1) = hull(keys.lo0, keys.hi0), hull(keys.lo1, keys.hi1)
    none0, none1 = last0 == 0, last1 == 0
    first, last = jnp.minimum(first0, first1), jnp.maximum(last0, last1)
    apart = ~none0 & ~none1 & ((last0 < first1) | (last1 < first0))
    gap_start = jnp.where(apart, jnp.minimum(last0, last1), last)
    gap_end = jnp.where(apart, jnp.maximum(first0, first1), last)
    return first, jnp.maximum(last - first - (gap_end - gap_start), 0), (gap_start, gap_end)
