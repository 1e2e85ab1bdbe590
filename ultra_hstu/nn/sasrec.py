"""SASRec (arXiv 1808.09781) as the published HSTU research code builds it for its baseline, with its quirks."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kernels.jagged import is_real, pad, unpad
from ultra_hstu.config import ModelConfig
from ultra_hstu.nn import initializers
from ultra_hstu.nn.dropout import KeyOrNone, KeysOrNone, dropout, row_keys, sequence_keys, split_key
from ultra_hstu.nn.norms import layer_norm
from ultra_hstu.parallel import parameters
from ultra_hstu.parallel.shards import ONE, Shards
from ultra_hstu.sequences import Sequences

EPS = 1e-8
ACTIVATIONS = {"relu": jax.nn.relu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


class SASRecLayer(nnx.Module):
    """Attention and a feed-forward net, each with a residual:

        Q  = LN(x)                                       without affine
        y  = LN(Q + attention(Q Wq, x Wk, x Wv) Wo)      causal softmax; k and v from x, the residual from Q
        x' = y + act(y W1) W2                            every product with a bias

    Dropout acts on attention weights, on the hidden units and on the output of the feed-forward net.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        ffn_width: int,
        length: int,
        *,
        activation: Literal["relu", "gelu"] = "relu",
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(
                f"{heads=} must divide {width=}: SASRec splits the width over the heads"
            )
        xavier = initializers.xavier_normal
        self.qkv, self.qkv_bias = (
            initializers.param(xavier, rngs, width, 3 * width),
            nnx.Param(jnp.zeros(3 * width)),
        )
        self.output, self.output_bias = (
            initializers.param(xavier, rngs, width, width),
            nnx.Param(jnp.zeros(width)),
        )
        self.ffn1 = initializers.param(xavier, rngs, width, ffn_width)
        self.ffn1_bias = initializers.param(initializers.linear_bias(width), rngs, ffn_width)
        self.ffn2 = initializers.param(xavier, rngs, ffn_width, width)
        self.ffn2_bias = initializers.param(initializers.linear_bias(ffn_width), rngs, width)
        self.heads, self.length, self.activation, self.dropout_rate = (
            heads,
            length,
            activation,
            dropout_rate,
        )

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        offsets: Int[Array, " B1"],
        key: KeyOrNone = None,
        first_sequence: Any = 0,
    ) -> Float[Array, "T D"]:
        """`first_sequence`: the number of the first one in the batch of all devices."""
        attention_key, *row_key = split_key(key, 3)
        if attention_key is not None:
            attention_key = sequence_keys(attention_key, offsets.shape[0] - 1, first_sequence)
        row_T = jnp.arange(x_TD.shape[0], dtype=jnp.int32)
        hidden_key, output_key = (row_keys(one, offsets, row_T, first_sequence) for one in row_key)
        query_TD = layer_norm(x_TD, eps=EPS)
        y_TD = layer_norm(
            query_TD + self._attention(query_TD, x_TD, offsets, attention_key), eps=EPS
        )
        hidden_TF = ACTIVATIONS[self.activation](_linear(y_TD, self.ffn1[...], self.ffn1_bias[...]))
        hidden_TF = dropout(hidden_TF, self.dropout_rate, hidden_key)
        return y_TD + dropout(
            _linear(hidden_TF, self.ffn2[...], self.ffn2_bias[...]), self.dropout_rate, output_key
        )

    def _attention(
        self, query_TD: Array, x_TD: Array, offsets: Array, key: KeysOrNone
    ) -> Float[Array, "T D"]:
        rows, width = x_TD.shape
        weight, bias = self.qkv[...], self.qkv_bias[...]
        q_TD = _linear(query_TD, weight[:, :width], bias[:width])
        kv_TX = _linear(x_TD, weight[:, width:], bias[width:])
        heads = (self.heads, width // self.heads)
        q_BNHK, k_BNHK, v_BNHK = (
            pad(y.reshape(rows, *heads), offsets, self.length)
            for y in (q_TD, kv_TX[:, :width], kv_TX[:, width:])
        )
        score_BHNN = jnp.einsum(
            "bqhk,bshk->bhqs", q_BNHK, k_BNHK, preferred_element_type=jnp.float32
        ) / math.sqrt(heads[1])
        causal_NN: Bool[Array, "N N"] = jnp.tri(
            self.length, dtype=bool
        )  # hides the padding too: it lies behind the rows
        weight_BHNN = jax.nn.softmax(
            jnp.where(causal_NN[None, None], score_BHNN, -jnp.inf), axis=-1
        )
        weight_BHNN = dropout(weight_BHNN, self.dropout_rate, key).astype(x_TD.dtype)
        a_TD = unpad(jnp.einsum("bhqs,bshk->bqhk", weight_BHNN, v_BNHK), offsets, rows).reshape(
            rows, width
        )
        return _linear(a_TD, self.output[...], self.output_bias[...])


def _linear(
    x_TX: Float[Array, "T X"], weight_XY: Float[Array, "X Y"], bias_Y: Float[Array, " Y"]
) -> Float[Array, "T Y"]:
    return x_TX @ weight_XY.astype(x_TX.dtype) + bias_Y.astype(x_TX.dtype)[None]


class SASRec(nnx.Module):
    """A stack of layers; rows of item 0 are zeroed after each. There is no final norm."""

    def __init__(self, layers: list[SASRecLayer], shards: Shards = ONE):
        self.layers, self.shards = nnx.List(layers), shards

    @staticmethod
    def from_config(
        config: ModelConfig, length: int, *, shards: Shards = ONE, rngs: nnx.Rngs
    ) -> "SASRec":
        make = lambda: SASRecLayer(
            config.width,
            config.heads,
            config.ffn_width,
            length,
            dropout_rate=config.linear_dropout,
            rngs=rngs,
        )  # noqa: E731
        return SASRec([make() for _ in range(config.layers)], shards)

    def __call__(
        self, x_TD: Float[Array, "T D"], sequences: Sequences, key: KeyOrNone = None
    ) -> Float[Array, "T D"]:
        keep_T1 = (sequences.real_T & is_real(sequences.offsets, x_TD.shape[0]))[:, None]
        x_TD = jnp.where(keep_T1, x_TD, jnp.zeros((), x_TD.dtype))
        for layer, layer_key in zip(self.layers, split_key(key, len(self.layers)), strict=True):
            layer = parameters.whole(layer, x_TD.dtype, self.shards)
            first = self.shards.first_sequence(sequences.offsets.shape[0] - 1)
            x_TD = jnp.where(
                keep_T1, layer(x_TD, sequences.offsets, layer_key, first), jnp.zeros((), x_TD.dtype)
            )
        return x_TD
