"""Softmax over the keys that a row sees: the ablation of HSTU's SiLU, blockwise in plain XLA.

    o_t = sum over allowed k of p_tk * v_k
    p_t = softmax over allowed k of alpha * q_t . k_k + bias

Every row sees itself, so a softmax is never empty. The loops are those of `xla`, over the same list
of tile pairs: the largest score of each row first, then the sums. Memory is O(T). The backward
makes the scores again from their log-sum-exp.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.hstu_attention.plan import AttentionPlan
from kernels.hstu_attention.relative_bias import RelativeBias
from kernels.hstu_attention.xla import (
    Outputs,
    PairLoop,
    Tables,
    Tensors,
    TilePairs,
    TileWork,
    add_table_gradients,
    cast,
    loop_sizes,
    pairs_of_step,
    scores,
    steps,
    tile_work,
    to_tiles,
)
from kernels.typing import THK, THV, Scalar
from kernels.zeros import zeros_after

PerTileRow = Float[Array, "n H b"]


def softmax_attention(
    q_THK: THK,
    k_THK: THK,
    v_THV: THV,
    plan: AttentionPlan,
    *,
    alpha: float,
    bias: RelativeBias | None = None,
) -> THV:
    """Softmax attention under any mask of a plan, one softmax a head; 0 on padding.

    Args:
      alpha: the factor on q . k; the bias is added behind it.
    """
    rows = q_THK.shape[0]
    if rows == 0:
        return jnp.zeros_like(v_THV)
    sizes = loop_sizes(rows)
    tables, work = tile_work(sizes, plan, bias)
    q, k, v = (jnp.swapaxes(to_tiles(x, num_real=plan.num_real, block=sizes.block), 1, 2)
               for x in (q_THK, k_THK, v_THV))  # fmt: skip
    out_nHbV = _softmax(sizes, alpha, (q, k, v), tables, work)
    out_THV = jnp.swapaxes(out_nHbV, 1, 2).reshape(-1, *v_THV.shape[1:])[:rows]
    return out_THV.astype(v_THV.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax(
    sizes: PairLoop, alpha: float, qkv: Tensors, tables: Tables, work: TileWork
) -> Outputs:
    return _softmax_forward(sizes, alpha, qkv, tables, work)[0]


Saved = tuple[Tensors, Tables, TileWork, Outputs, PerTileRow]


def _softmax_forward(
    sizes: PairLoop, alpha: float, qkv: Tensors, tables: Tables, work: TileWork
) -> tuple[Outputs, Saved]:
    q, k, v = cast(sizes, *qkv)
    per_row = q.shape[:3]

    def score_of(i: Scalar) -> tuple[TilePairs, Float[Array, "g H b b"]]:
        pairs = pairs_of_step(i, sizes, work, tables)
        return pairs, scores(q[pairs.query], k[pairs.key], alpha, tables, pairs, sizes.block)

    def largest(i: Scalar, most: PerTileRow) -> PerTileRow:
        pairs, score = score_of(i)
        return most.at[pairs.query].max(score.max(-1), mode="promise_in_bounds")

    def add(i: Scalar, sums: tuple[Outputs, PerTileRow]) -> tuple[Outputs, PerTileRow]:
        pairs, score = score_of(i)
        weight = _weights(score, most[pairs.query], pairs)
        part = jnp.einsum(
            "ghqk,ghkd->ghqd",
            weight.astype(v.dtype),
            v[pairs.key],
            preferred_element_type=jnp.float32,
        )
        out, total = sums
        out = out.at[pairs.query].add(part, mode="promise_in_bounds")
        return out, total.at[pairs.query].add(weight.sum(-1), mode="promise_in_bounds")

    count = steps(sizes, work)
    most = jax.lax.fori_loop(0, count, largest, jnp.full(per_row, -1e30, jnp.float32))
    zeros = (jnp.zeros(v.shape, jnp.float32), jnp.zeros(per_row, jnp.float32))
    out, total = jax.lax.fori_loop(0, count, add, zeros)
    total = jnp.where(total > 0, total, 1.0)  # of padding
    out = out / total[..., None]
    return out, (qkv, tables, work, out, most + jnp.log(total))


def _softmax_backward(
    sizes: PairLoop, alpha: float, saved: Saved, g: Outputs
) -> tuple[Tensors, Tables, None]:
    qkv, tables, work, out, log_sum = saved
    q, k, v = cast(sizes, *qkv)
    drift = jnp.sum(g * out, axis=-1)  # sum over keys of p * dp
    g = g.astype(v.dtype)

    def step(i: Scalar, sums: tuple[Tensors, Tables]) -> tuple[Tensors, Tables]:
        (dq, dk, dv), d_tables = sums
        pairs = pairs_of_step(i, sizes, work, tables)
        q_g, k_g, v_g, g_g = q[pairs.query], k[pairs.key], v[pairs.key], g[pairs.query]
        score = scores(q_g, k_g, alpha, tables, pairs, sizes.block)
        weight = _weights(score, log_sum[pairs.query], pairs)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_weight = product("ghqd,ghkd->ghqk", g_g, v_g)
        d_score = weight * (d_weight - drift[pairs.query][..., None])
        low, weight = d_score.astype(q.dtype), weight.astype(v.dtype)
        dv = dv.at[pairs.key].add(product("ghqk,ghqd->ghkd", weight, g_g))
        dk = dk.at[pairs.key].add(product("ghqk,ghqd->ghkd", low, q_g))
        dq = dq.at[pairs.query].add(product("ghqk,ghkd->ghqd", low, k_g))
        return (dq, dk, dv), add_table_gradients(d_tables, d_score.sum(1), pairs, sizes)

    zeros = tuple(zeros_after(g, x.shape) for x in (q, k, v))
    table_zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tables)
    (dq, dk, dv), d_tables = jax.lax.fori_loop(0, steps(sizes, work), step, (zeros, table_zeros))
    gradients = (alpha * dq, alpha * dk, dv), d_tables
    return *jax.tree.map(lambda x, y: x.astype(y.dtype), gradients, (qkv, tables)), None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def _weights(
    score: Float[Array, "g H b b"], shift: Float[Array, "g H b"], pairs: TilePairs
) -> Float[Array, "g H b b"]:
    """exp(score - shift of the row); 0 where a row does not see a key, in padding too."""
    return jnp.where(pairs.mask[:, None], jnp.exp(score - shift[..., None]), 0.0)
