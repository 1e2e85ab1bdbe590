"""Attention to a cache in Triton (jax-triton), sm80 and later: any head width that `hstu_attention`'s Triton takes, no relative bias."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import tiles
from kernels.hstu_attention.relative_bias import RelativeBias
from kernels.hstu_attention.triton import attention as whole
from kernels.mask import KeyIntervals
from kernels.triton_call import triton_call

PROGRAMS = 264  # that run at one time: two for each processor of a Hopper GPU
LEAST_BLOCKS = 4  # of keys, for a program
SHORT_SHARES = (
    8  # of the keys: so many are so short that what rows' own keys give is a share of its own
)


class Blocks(NamedTuple):
    """The blocks of keys that tiles of rows see: [first0, end0) of the far intervals, [first1, end1) of the near ones, which begin behind; and of the
    latter those that all rows of a tile see in full. int32 [tiles] each.
    """

    first0: Any
    end0: Any
    first1: Any
    end1: Any
    full_first: Any
    full_end: Any


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
    """See `cached_attention`.

    NotImplementedError: a bias, no jax-triton, no such GPU, or heads too wide.
    """
    if bias is not None:
        raise NotImplementedError(
            "triton has no relative bias for cached keys; implementation='xla' has"
        )
    capability, widths = whole.compute_capability(), (q_RHK.shape[2], v_SHV.shape[2])
    if not max(widths) <= whole.widest(capability):
        raise NotImplementedError(
            f"triton takes heads of width 1 to {whole.widest(capability)} here, got K = {widths[0]}, V = {widths[1]}; "
            "implementation='xla' takes any"
        )
    whole.check_installed()
    return forward(
        q_RHK, k_SHK, v_SHV, keys, own, alpha, scale, tiling(capability, q_RHK.dtype, *widths)
    )


def tiling(capability: tuple[int, int], dtype: Any, k_width: int, v_width: int) -> whole.Tiling:
    """Sizes of a kind of GPU: those of the forward over whole sequences, whose inner loop is the same."""
    return whole.heuristic(capability, dtype, k_width, v_width).forward


def splits(rows: int, num_keys: int, heads: int, sizes: whole.Tiling) -> int:
    """Shares of the keys, a power of two: as many as it takes to give every processor something to do."""
    programs, shares = -(-rows // sizes.block_q) * heads, 1
    while (
        2 * shares * programs <= PROGRAMS and num_keys >= 2 * shares * LEAST_BLOCKS * sizes.block_k
    ):
        shares *= 2
    return shares


def blocks_of(keys: KeyIntervals, sizes: whole.Tiling) -> Blocks:
    """Found once for all layers of a mask, since the same expressions are computed once in a compiled program."""
    tile, block = sizes.block_q, sizes.block_k

    def whole_tiles(x: Array, padding: int = 0) -> Array:
        return jnp.pad(x, (0, -x.shape[0] % tile), constant_values=padding)

    lo0, hi0, lo1, hi1 = map(whole_tiles, keys)
    (first0, end0), (first1, end1) = (
        tiles.hull_blocks(lo0, hi0, tile, block),
        tiles.hull_blocks(lo1, hi1, tile, block),
    )
    joined = (end0 > first1) & (end1 > first0)  # they overlap: one range
    first1 = jnp.where(joined, jnp.minimum(first0, first1), first1)
    end1 = jnp.where(joined, jnp.maximum(end0, end1), end1)
    full_first, full_end = tiles.common_blocks(
        lo1, whole_tiles(keys.hi1, tiles.FAR), tile, block
    )  # rows of padding see everything
    full_first = jnp.clip(full_first, first1, end1)
    full_end = jnp.clip(full_end, full_first, end1)
    return Blocks(
        jnp.where(joined, first1, first0),
        jnp.where(joined, first1, end0),
        first1,
        end1,
        full_first,
        full_end,
    )


def forward(
    q: Array,
    k: Array,
    v: Array,
    keys: KeyIntervals,
    own: tuple[Array, Array] | None,
    alpha: float,
    scale: float,
    sizes: whole.Tiling,
) -> Float[Array, "R H V"]:
    (rows, heads, k_width), (num_keys, _, v_width) = q.shape, v.shape
    shares = splits(rows, num_keys, heads, sizes)
    outs = shares + (own is not None and shares >= SHORT_SHARES)
    constants = {
        "R": rows,
        "S": num_keys,
        "H": heads,
        "K": k_width,
        "V": v_width,
        "WK": whole.padded(k_width),
        "WV": whole.padded(v_width),
        "BR": sizes.block_q,
        "BK": sizes.block_k,
        "SPLITS": shares,
        "OUTS": outs,
        "OWN": own is not None,
        "ALPHA": alpha,
        "SCALE": scale,
        "PRECISION": whole._precision(),
        "APPROXIMATE": q.dtype == jnp.bfloat16,
    }
    programs = -(-rows // sizes.block_q) * heads * outs
    out_like = jax.ShapeDtypeStruct(
        (outs, rows, heads, v_width), q.dtype if outs == 1 else jnp.float32
    )
    arrays = (
        q,
        k,
        v,
        *((k, v) if own is None else own),
        jnp.stack(blocks_of(keys, sizes), axis=1),
        *keys,
    )
    (out,) = _call_kernel(arrays, [out_like], programs, sizes.warps, sizes.stages, constants)
    return out[0] if outs == 1 else out.sum(0).astype(q.dtype)


def _call_kernel(
    arrays: tuple[Array, ...],
    outs: list[Any],
    programs: int,
    warps: int,
    stages: int,
    constants: dict[str, Any],
) -> Any:
    from kernels.cached_attention.triton import kernels as triton_kernels

    call: Any = functools.partial(
        triton_call, name="cached_attention", num_warps=warps, num_stages=stages
    )
    return call(
        *arrays, kernel=triton_kernels.forward, out_shape=outs, grid=(programs,), **constants
    )
