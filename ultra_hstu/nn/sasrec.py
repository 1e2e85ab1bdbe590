"""SASRec (arXiv 1808.09781), as the published HSTU research code builds it for its baseline."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kernels.fp8 import linear
from kernels.jagged import Offsets, pad, unpad
from kernels.layer_norm import layer_norm
from ultra_hstu.config import ModelConfig
from ultra_hstu.nn.dropout import KeyOrNone, KeysOrNone, dropout, row_keys, sequence_keys, split_key
from ultra_hstu.nn.encoder import Encoder
from ultra_hstu.nn.initializers import linear_bias, param, xavier_normal
from ultra_hstu.nn.mini_sequence import chunked
from ultra_hstu.nn.remat import (
    ATTENTION_OUTPUT,
    FEED_FORWARD_INPUT,
    LAYER_INPUT,
    Remat,
    RunLayer,
    policy_of,
    run_layer,
)
from ultra_hstu.nn.truncation import Kept
from ultra_hstu.sequences import Activations, Sequences

EPS = 1e-8


class SASRecLayer(nnx.Module):
    """Attention and a feed-forward net, each with a residual:

        Q  = LN(x)                                       without affine
        y  = LN(Q + attention(Q Wq, x Wk, x Wv) Wo)      causal softmax; the residual is Q
        x' = y + relu(y W1) W2                           every product with a bias

    Dropout acts on attention weights, on the hidden units and on the output of the feed-forward
    net.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        ffn_width: int,
        length: int,
        *,
        dropout_rate: float = 0.0,
        chunk_rows: int | None = None,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          chunk_rows: rows whose hidden units exist at one time; None: all.

        Raises:
          ValueError: heads that do not divide the width.
        """
        if width % heads:
            raise ValueError(
                f"{heads=} must divide {width=}: SASRec splits the width over the heads"
            )
        self.qkv = param(xavier_normal, rngs, width, 3 * width)
        self.qkv_bias = nnx.Param(jnp.zeros(3 * width, jnp.float32))
        self.output = param(xavier_normal, rngs, width, width)
        self.output_bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.ffn1 = param(xavier_normal, rngs, width, ffn_width)
        self.ffn1_bias = param(linear_bias(width), rngs, ffn_width)
        self.ffn2 = param(xavier_normal, rngs, ffn_width, width)
        self.ffn2_bias = param(linear_bias(ffn_width), rngs, width)
        self.heads, self.length, self.dropout_rate = heads, length, dropout_rate
        self.chunk_rows = chunk_rows

    def __call__(
        self, x_TD: Activations, sequences: Sequences, key: KeyOrNone = None
    ) -> Activations:
        x_TD = checkpoint_name(x_TD, LAYER_INPUT)
        attention_key, *row_key = split_key(key, 3)
        keys_B = None if attention_key is None else sequence_keys(attention_key, sequences)
        hidden_key, output_key = (row_keys(one, sequences) for one in row_key)
        query_TD = layer_norm(x_TD, eps=EPS, implementation="xla")
        attended_TD = self._attention(query_TD, x_TD, sequences.offsets, keys_B)
        sum_TD = checkpoint_name(query_TD + attended_TD, FEED_FORWARD_INPUT)
        y_TD = layer_norm(sum_TD, eps=EPS, implementation="xla")
        return chunked(self._feed_forward, y_TD, hidden_key, output_key, chunk_rows=self.chunk_rows)

    def _feed_forward(
        self, y_CD: Activations, hidden_key_C: KeysOrNone, output_key_C: KeysOrNone
    ) -> Activations:
        hidden_CF = jax.nn.relu(linear(y_CD, self.ffn1[...], self.ffn1_bias[...]))
        hidden_CF = dropout(hidden_CF, self.dropout_rate, hidden_key_C)
        z_CD = linear(hidden_CF, self.ffn2[...], self.ffn2_bias[...])
        return y_CD + dropout(z_CD, self.dropout_rate, output_key_C)

    def _attention(
        self,
        query_TD: Activations,
        x_TD: Activations,
        offsets: Offsets,
        keys_B: KeysOrNone,
    ) -> Activations:
        rows, width = x_TD.shape
        weight, bias = self.qkv[...], self.qkv_bias[...]
        q_TD = linear(query_TD, weight[:, :width], bias[:width])
        k_TD, v_TD = jnp.split(linear(x_TD, weight[:, width:], bias[width:]), 2, axis=1)
        q_BNHK, k_BNHK, v_BNHK = (
            pad(y_TD.reshape(rows, self.heads, -1), offsets, self.length)
            for y_TD in (q_TD, k_TD, v_TD)
        )
        score_BHNN = jnp.einsum(
            "bqhk,bshk->bhqs", q_BNHK, k_BNHK, preferred_element_type=jnp.float32
        ) / math.sqrt(width // self.heads)
        # This hides the padding too: it lies behind the rows.
        causal_NN = jnp.tri(self.length, dtype=bool)
        weight_BHNN = jax.nn.softmax(
            jnp.where(causal_NN[None, None], score_BHNN, -jnp.inf), axis=-1
        )
        weight_BHNN = dropout(weight_BHNN, self.dropout_rate, keys_B).astype(x_TD.dtype)
        a_BNHK = jnp.einsum("bhqs,bshk->bqhk", weight_BHNN, v_BNHK)
        a_TD = checkpoint_name(unpad(a_BNHK, offsets, rows).reshape(rows, width), ATTENTION_OUTPUT)
        return linear(a_TD, self.output[...], self.output_bias[...])


class SASRec(Encoder):
    """A stack of layers; rows of item 0 are zeroed after each. There is no final norm."""

    def __init__(self, layers: list[SASRecLayer], *, remat: Remat = "none"):
        self.layers, self.remat = nnx.List(layers), remat
        self.run_layer: RunLayer = run_layer

    @staticmethod
    def from_config(config: ModelConfig, length: int, *, rngs: nnx.Rngs) -> "SASRec":
        return SASRec(
            [
                SASRecLayer(
                    config.width,
                    config.heads,
                    config.ffn_width,
                    length,
                    dropout_rate=config.linear_dropout,
                    chunk_rows=config.chunk_rows,
                    rngs=rngs,
                )
                for _ in range(config.layers)
            ],
            remat=config.remat,
        )

    def encode_kept(self, x_TD: Activations, sequences: Sequences, key: KeyOrNone = None) -> Kept:
        keep_T1 = (sequences.real_T & sequences.rows.real)[:, None]
        x_TD = jnp.where(keep_T1, x_TD, 0)
        policy = policy_of(self.remat)
        for layer, layer_key in zip(self.layers, split_key(key, len(self.layers)), strict=True):
            call = functools.partial(SASRecLayer.__call__, sequences=sequences, key=layer_key)
            x_TD = jnp.where(keep_T1, self.run_layer(call, layer, x_TD, policy), 0)
        return x_TD, None
