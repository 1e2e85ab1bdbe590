"""The paper's softmax ablation of HSTU, as the published research code computes it.

It is dense and works on padded sequences, with the quirks of that code.
"""

import math

import jax
import jax.numpy as jnp

from kernels.jagged import pad, unpad
from kernels.typing import THK, THV
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.sequences import Sequences


def published_softmax(
    q_THK: THK,
    k_THK: THK,
    v_THV: THV,
    sequences: Sequences,
    *,
    bias: RelativeBiasTables | None,
    length: int,
) -> THV:
    """`a_i = sum_{j <= i} A_ij v_j` with `A = softmax((q_i . k_j + bias_ij) / sqrt(K))`.

    The softmax is over ALL `length` columns of the padded sequence, so it is not causal: future
    rows and padding (where q = k = 0, and the time is 0) stay in the denominator; their weights are
    zeroed afterwards and the rest is not scaled up again. One softmax serves all heads: q . k runs
    over the H * K values of all of them. Memory is O(B N^2).
    """
    (rows, _, width), offsets = q_THK.shape, sequences.offsets
    keep_T1 = sequences.real_T[:, None]  # a padded layout has padding inside its sequences
    q_BNX, k_BNX = (
        pad(jnp.where(keep_T1, x_THK.reshape(rows, -1), 0.0), offsets, length)
        for x_THK in (q_THK, k_THK)
    )
    score_BNN = jnp.einsum("bqx,bkx->bqk", q_BNX, k_BNX, preferred_element_type=jnp.float32)
    if bias is not None:
        next_time_BN = pad(sequences.next_time_T, offsets, length)
        # The slot behind a history holds the target's time, which only the row before it knows.
        # Further slots hold 0.
        time_BN = jnp.concatenate(
            [pad(sequences.time_T, offsets, length)[:, :1], next_time_BN[:, :-1]], axis=1
        )
        score_BNN = score_BNN + bias.padded(time_BN, next_time_BN)
    weight_BNN = (
        jax.nn.softmax(score_BNN / math.sqrt(width), axis=-1)
        * jnp.tri(length, dtype=jnp.float32)[None]
    )
    return unpad(
        jnp.einsum("bqk,bkhv->bqhv", weight_BNN.astype(v_THV.dtype), pad(v_THV, offsets, length)),
        offsets,
        rows,
    )
