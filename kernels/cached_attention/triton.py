"""Attention to a cache in Triton (jax-triton), sm80 and later: any head width that `hstu_attention`'s Triton takes, no relative bias."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.hstu_attention import triton as whole
from kernels.hstu_attention.relative_bias import RelativeBias
from kernels.mask import KeyIntervals
from kernels.triton_call import triton_call

PROGRAMS = 264  # that run at one time: two for each processor of a Hopper GPU
LEAST_BLOCKS = 4  # of keys, for a program


def attention(
    q_RHK: Float[Array, "R H K"],
    k_SHK: Float[Array, "S H K"],
    v_SHV: Float[Array, "S H V"],
    keys: KeyIntervals,
    *,
    alpha: float,
    bias: RelativeBias | None,
    place_R: Any,
) -> Float[Array, "R H V"]:
    """See `cached_attention`: the sums alone, float32, without scale and own keys.

    NotImplementedError: a bias, no jax-triton, no such GPU, or heads too wide.
    """
    if bias is not None:
        raise NotImplementedError("triton has no relative bias for cached keys; implementation='xla' has")
    capability, widths = whole.compute_capability(), (q_RHK.shape[2], v_SHV.shape[2])
    if not max(widths) <= whole.widest(capability):
        raise NotImplementedError(
            f"triton takes heads of width 1 to {whole.widest(capability)} here, got K = {widths[0]}, V = {widths[1]}; "
            "implementation='xla' takes any"
        )
    whole._check_installed()
    return forward(q_RHK, k_SHK, v_SHV, keys, alpha, tiling(capability, q_RHK.dtype, *widths))


def tiling(capability: tuple[int, int], dtype: Any, k_width: int, v_width: int) -> whole.Tiling:
    """Sizes of a kind of GPU: those of the forward over whole sequences, whose inner loop is the same."""
    return whole.heuristic(capability, dtype, k_width, v_width).forward


def splits(rows: int, num_keys: int, heads: int, sizes: whole.Tiling) -> int:
    """Shares of the keys, a power of two: as many as it takes to give every processor something to do."""
    programs, shares = -(-rows // sizes.block_q) * heads, 1
    while 2 * shares * programs <= PROGRAMS and num_keys >= 2 * shares * LEAST_BLOCKS * sizes.block_k:
        shares *= 2
    return shares


def forward(q: Array, k: Array, v: Array, keys: KeyIntervals, alpha: float, sizes: whole.Tiling) -> Float[Array, "R H V"]:
    (rows, heads, k_width), (num_keys, _, v_width) = q.shape, v.shape
    shares = splits(rows, num_keys, heads, sizes)
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
        "ALPHA": alpha,
        "PRECISION": whole._precision(),
        "APPROXIMATE": q.dtype == jnp.bfloat16,
    }
    programs = -(-rows // sizes.block_q) * heads * shares
    out_like = jax.ShapeDtypeStruct((shares, rows, heads, v_width), jnp.float32)
    (out,) = _call_kernel((q, k, v, *keys), [out_like], programs, sizes.warps, sizes.stages, constants)
    return out[0] if shares == 1 else out.sum(0)


def _call_kernel(arrays: tuple[Array, ...], outs: list[Any], programs: int, warps: int, stages: int, constants: dict[str, Any]) -> Any:
    from kernels.cached_attention import triton_kernels

    call: Any = functools.partial(triton_call, name="cached_attention", num_warps=warps, num_stages=stages)
    return call(*arrays, kernel=triton_kernels.forward, out_shape=outs, grid=(programs,), **constants)
