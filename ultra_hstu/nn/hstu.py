"""HSTU: layers of the published research code and of the published production code, and the stack of them.

A layer knows nothing of batches or masks: it calls `attend(q, k, v, alpha=, bias=)`, which the stack makes once for a batch and all its layers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.hstu_attention.api import hstu_attention, make_plan
from kernels.jagged import is_real
from kernels.mask import AttentionMask
from ultra_hstu.config import ModelConfig
from ultra_hstu.data.sequences import Sequences
from ultra_hstu.nn import initializers
from ultra_hstu.nn.dropout import KeyOrNone, dropout, split_key
from ultra_hstu.nn.norms import layer_norm
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.nn.softmax_ablation import softmax_attention

EPS = 1e-6


Attend = Callable[..., Array]  # (q_THK, k_THK, v_THV, *, alpha: float, bias: RelativeBiasTables | None) -> a_THV


class ResearchLayer(nnx.Module):
    """HSTU, arXiv 2402.17152, equations 1 to 3, with the choices of its published research code:

        u, v, q, k = split(silu(LN(x) @ uvqk))                      LN without affine, uvqk without bias
        a          = sum over earlier keys of silu(q . k + bias) / N * v
        x'         = x + dropout(u * LN(a)) @ output + output_bias  LN over all heads together

    `concat_ua` replaces `u * LN(a)` by `concat[u, LN(a), u * LN(a)]`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_width: int,
        v_width: int,
        *,
        bias: RelativeBiasTables | None = None,
        concat_ua: bool = False,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        inner = heads * v_width
        fan_in = 3 * inner if concat_ua else inner
        self.uvqk = initializers.param(initializers.normal_002, rngs, width, 2 * inner + 2 * heads * qk_width)
        self.output = initializers.param(initializers.xavier_uniform, rngs, fan_in, width)
        self.output_bias = initializers.param(initializers.linear_bias(fan_in), rngs, width)
        self.bias = bias
        self.heads, self.v_width, self.concat_ua, self.dropout_rate = heads, v_width, concat_ua, dropout_rate

    def __call__(self, x_TD: Float[Array, "T D"], attend: Attend, key: KeyOrNone = None) -> Float[Array, "T D"]:
        uvqk_TX = jax.nn.silu(layer_norm(x_TD, eps=EPS) @ self.uvqk[...].astype(x_TD.dtype))
        u_TY, v_THV, q_THK, k_THK = _split_uvqk(uvqk_TX, self.heads, self.v_width)
        a_TY = layer_norm(attend(q_THK, k_THK, v_THV, alpha=1.0, bias=self.bias).reshape(u_TY.shape), eps=EPS)
        y_TY = jnp.concatenate([u_TY, a_TY, u_TY * a_TY], axis=1) if self.concat_ua else u_TY * a_TY
        return (
            x_TD
            + dropout(y_TY, self.dropout_rate, key) @ self.output[...].astype(x_TD.dtype)
            + self.output_bias[...].astype(x_TD.dtype)[None]
        )


class ProductionLayer(nnx.Module):
    """The layer of the published production code ("STU"), which differs from the research layer in affine norms, a bias in uvqk, SiLU on u only, a scale on
    the scores (alpha, 1/sqrt(qk_width) unless given), and an output without bias over more inputs:

        x' = x + dropout(concat[u, a, u * norm(a)]) @ output        a without norm in the middle

    `norm` is a layer norm over all heads together, or a group norm, one group and one scalar weight and bias a head.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_width: int,
        v_width: int,
        *,
        bias: RelativeBiasTables | None = None,
        norm: Literal["layer_norm", "group_norm"] = "layer_norm",
        alpha: float | None = None,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        inner, joined = heads * v_width, 2 * heads * (v_width + qk_width)
        per_norm = inner if norm == "layer_norm" else heads
        self.input_norm_weight, self.input_norm_bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.uvqk = initializers.param(initializers.xavier_uniform, rngs, width, joined)
        self.uvqk_bias = nnx.Param(jnp.zeros(joined))
        self.output_norm_weight, self.output_norm_bias = nnx.Param(jnp.ones(per_norm)), nnx.Param(jnp.zeros(per_norm))
        self.output = initializers.param(initializers.xavier_uniform, rngs, 3 * inner, width)
        self.bias = bias
        self.heads, self.v_width, self.norm, self.dropout_rate = heads, v_width, norm, dropout_rate
        self.alpha = 1.0 / math.sqrt(qk_width) if alpha is None else alpha

    def __call__(self, x_TD: Float[Array, "T D"], attend: Attend, key: KeyOrNone = None) -> Float[Array, "T D"]:
        normed_TD = layer_norm(x_TD, self.input_norm_weight[...], self.input_norm_bias[...], eps=EPS)
        uvqk_TX = normed_TD @ self.uvqk[...].astype(x_TD.dtype) + self.uvqk_bias[...].astype(x_TD.dtype)[None]
        u_TY, v_THV, q_THK, k_THK = _split_uvqk(uvqk_TX, self.heads, self.v_width)
        u_TY = jax.nn.silu(u_TY)
        a_THV = attend(q_THK, k_THK, v_THV, alpha=self.alpha, bias=self.bias)
        weight, bias = self.output_norm_weight[...], self.output_norm_bias[...]
        if self.norm == "layer_norm":
            n_TY = layer_norm(a_THV.reshape(u_TY.shape), weight, bias, eps=EPS)
        else:
            n_TY = layer_norm(a_THV, weight[None, :, None], bias[None, :, None], eps=EPS).reshape(u_TY.shape)
        y_TY = jnp.concatenate([u_TY, a_THV.reshape(u_TY.shape), u_TY * n_TY], axis=1)
        return x_TD + dropout(y_TY, self.dropout_rate, key) @ self.output[...].astype(x_TD.dtype)


def _split_uvqk(uvqk_TX: Float[Array, "T X"], heads: int, v_width: int) -> tuple[Array, Array, Array, Array]:
    """Columns u, v, q, k, in each a block per head; u stays joined [T, H * V], the others become [T, H, width]."""
    rows, inner = uvqk_TX.shape[0], heads * v_width
    u_TY, v_TY, qk_TX = jnp.split(uvqk_TX, [inner, 2 * inner], axis=1)
    q_TX, k_TX = jnp.split(qk_TX, 2, axis=1)
    return u_TY, v_TY.reshape(rows, heads, v_width), q_TX.reshape(rows, heads, -1), k_TX.reshape(rows, heads, -1)


class HSTU(nnx.Module):
    """A stack of layers over flat jagged sequences of at most `length` rows; attention is divided by `length` (N)."""

    def __init__(
        self,
        layers: Sequence[ResearchLayer | ProductionLayer],
        length: int,
        *,
        mask: AttentionMask = AttentionMask(),  # noqa: B008 - frozen
        attention: Literal["silu", "softmax"] = "silu",
        implementation: str | None = None,
    ):
        self.layers = nnx.List(layers)
        self.length, self.mask, self.attention, self.implementation = length, mask, attention, implementation

    @staticmethod
    def from_config(config: ModelConfig, length: int, *, rngs: nnx.Rngs) -> "HSTU":
        kind = ResearchLayer if config.preset == "research" else ProductionLayer
        layers = [
            kind(
                config.width,
                config.heads,
                config.qk_width,
                config.v_width,
                bias=RelativeBiasTables(length, config.time_buckets, rngs=rngs) if config.relative_bias else None,
                dropout_rate=config.linear_dropout,
                rngs=rngs,
            )
            for _ in range(config.layers)
        ]
        return HSTU(layers, length, attention=config.attention, implementation=config.implementation)

    def __call__(self, x_TD: Float[Array, "T D"], sequences: Sequences, key: KeyOrNone = None) -> Float[Array, "T D"]:
        """The sequences after all layers; rows of padding may hold anything, and what comes out there means nothing."""
        attend = self.attend(sequences)
        x_TD = jnp.where(is_real(sequences.offsets, x_TD.shape[0])[:, None], x_TD, jnp.zeros((), x_TD.dtype))
        for layer, layer_key in zip(self.layers, split_key(key, len(self.layers)), strict=True):
            x_TD = layer(x_TD, attend, layer_key)
        return x_TD

    def rows(self, x_TD: Float[Array, "T D"], sequences: Sequences, row_P: Int[Array, " P"], key: KeyOrNone = None) -> Float[Array, "P D"]:
        """The output of some rows."""
        return self(x_TD, sequences, key)[row_P]

    def attend(self, sequences: Sequences) -> Attend:
        """Attention over the sequences of a batch; its plan is computed here, once."""
        if self.attention == "softmax":
            return lambda q, k, v, *, alpha, bias: softmax_attention(q, k, v, sequences, bias=bias, length=self.length)
        plan = make_plan(self.mask, sequences.offsets, sequences.num_rows, sequences.num_targets, sequences.num_contextual)
        run = functools.partial(
            hstu_attention,
            mask=self.mask,
            num_targets=sequences.num_targets,
            num_contextual=sequences.num_contextual,
            scale=1.0 / self.length,
            implementation=self.implementation,
            plan=plan,
        )
        return lambda q, k, v, *, alpha, bias: run(
            q, k, v, sequences.offsets, alpha=alpha, bias=None if bias is None else bias.flat(sequences.time_T, sequences.next_time_T)
        )
