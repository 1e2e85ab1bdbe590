"""The implementation `triton` of `cached_attention` (jax-triton), for GPUs from sm80 on.

It takes any head width that `triton` of `hstu_attention` takes, and no relative bias.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels import device, tiles, triton_call
from kernels.hstu_attention.plan import AttentionSpec
from kernels.hstu_attention.relative_bias import RelativeBias
from kernels.hstu_attention.triton.sizes import LaunchSizes, heuristic, refusal
from kernels.mask import KeyIntervals
from kernels.triton_call import padded
from kernels.typing import RHK, RHV, SHK, SHV, PerQuery, PerTile

PROGRAMS = 264  # that run at one time: two for each processor of a Hopper GPU
LEAST_BLOCKS = 4  # of keys, for a program
# With so many shares of the keys a share is so short that the rows' own keys are a share of theirs.
SHORT_SHARES = 8


class KeyBlocks(NamedTuple):
    """The blocks of keys that tiles of rows see.

    Attributes:
      first0, end0: of the far intervals.
      first1, end1: of the near ones, which begin behind.
      full_first, full_end: of the near ones, those that all rows of a tile see in full.
    """

    first0: PerTile
    end0: PerTile
    first1: PerTile
    end1: PerTile
    full_first: PerTile
    full_end: PerTile


def unsupported(spec: AttentionSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    if spec.biased:
        return "triton has no relative bias for cached keys; implementation='xla' has"
    return refusal(spec)


def find_sizes(spec: AttentionSpec) -> LaunchSizes:
    """Sizes of the forward over whole sequences, whose inner loop is the same."""
    capability = device.current().compute_capability
    assert capability is not None, "no GPU, which `refusal` says"
    return heuristic(capability, spec).forward


def key_shares(rows: int, num_keys: int, heads: int, sizes: LaunchSizes) -> int:
    """Shares of the keys, a power of two: enough to give every processor something to do."""
    programs, shares = -(-rows // sizes.block_q) * heads, 1
    while (
        2 * shares * programs <= PROGRAMS and num_keys >= 2 * shares * LEAST_BLOCKS * sizes.block_k
    ):
        shares *= 2
    return shares


def blocks_of(keys: KeyIntervals, sizes: LaunchSizes) -> KeyBlocks:
    """The blocks of every tile.

    They are found once for all layers of a mask, since a compiled program computes the same
    expressions once.
    """
    tile, block = sizes.block_q, sizes.block_k

    def whole_tiles(x: PerQuery, padding: int = 0) -> Int[Array, " rows"]:
        return jnp.pad(x, (0, -x.shape[0] % tile), constant_values=padding)

    lo0, hi0, lo1, hi1 = map(whole_tiles, keys)
    first0, end0 = tiles.hull_blocks(lo0, hi0, tile, block)
    first1, end1 = tiles.hull_blocks(lo1, hi1, tile, block)
    joined = (end0 > first1) & (end1 > first0)  # they overlap: one range
    first1 = jnp.where(joined, jnp.minimum(first0, first1), first1)
    end1 = jnp.where(joined, jnp.maximum(end0, end1), end1)
    # rows of padding see everything
    padded_hi1 = whole_tiles(keys.hi1, tiles.FAR)
    full_first, full_end = tiles.common_blocks(lo1, padded_hi1, tile, block)
    full_first = jnp.clip(full_first, first1, end1)
    full_end = jnp.clip(full_end, full_first, end1)
    first0, end0 = jnp.where(joined, first1, first0), jnp.where(joined, first1, end0)
    return KeyBlocks(first0, end0, first1, end1, full_first, full_end)


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
    dtype = q_RHK.dtype
    (rows, heads, k_width), (num_keys, _, v_width) = q_RHK.shape, v_SHV.shape
    sizes = find_sizes(AttentionSpec(dtype, heads, k_width, v_width))
    shares = key_shares(rows, num_keys, heads, sizes)
    outs = shares + (own is not None and shares >= SHORT_SHARES)
    own_k, own_v = (k_SHK, v_SHV) if own is None else own
    blocks = jnp.stack(blocks_of(keys, sizes), axis=1)
    out_dtype = dtype if outs == 1 else jnp.float32
    (out,) = triton_call.launch(
        "kernels.cached_attention.triton.kernels:forward",
        (q_RHK, k_SHK, v_SHV, own_k, own_v, blocks, *keys),
        [jax.ShapeDtypeStruct((outs, rows, heads, v_width), out_dtype)],
        programs=-(-rows // sizes.block_q) * heads * outs,
        warps=sizes.warps,
        stages=sizes.stages,
        constants={
            "R": rows,
            "S": num_keys,
            "H": heads,
            "K": k_width,
            "V": v_width,
            "WK": padded(k_width),
            "WV": padded(v_width),
            "BR": sizes.block_q,
            "BK": sizes.block_k,
            "SPLITS": shares,
            "OUTS": outs,
            "OWN": own is not None,
            "ALPHA": alpha,
            "SCALE": scale,
            "PRECISION": triton_call.product_precision(),
            "APPROXIMATE": dtype == jnp.bfloat16,
        },
    )
    return out[0] if outs == 1 else out.sum(0).astype(dtype)
