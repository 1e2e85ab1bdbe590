"""DIN (arXiv 1706.06978), the target attention of deep recommendation models, to compare with.

Nothing is encoded: every target weighs the events of the history by itself and adds them up.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.fp8 import linear
from kernels.jagged import Rows, pad
from kernels.layer_norm import layer_norm
from kernels.typing import Scalar
from ultra_hstu.config import ModelConfig
from ultra_hstu.nn.dropout import KeyOrNone, dropout, row_keys
from ultra_hstu.nn.encoder import Encoder
from ultra_hstu.nn.initializers import linear_bias, param, xavier_normal
from ultra_hstu.nn.remat import RunLayer, run_layer
from ultra_hstu.nn.truncation import Kept
from ultra_hstu.sequences import Activations, Sequences

EPS = 1e-6
CHUNK = 64  # targets whose weights exist at one time


class TargetAttention(nnx.Module):
    """For target t and the events j of its history, with contextual tokens c:

        w_tj = silu(x_j A + x_t B + (x_j * x_t) C + b) w + b'       one number; no softmax
        p_t  = LN(sum_j w_tj x_j)                                   LN without affine
        y_t  = silu([x_t, p_t, x_t * p_t, mean_c x_c] D + b) E + b

    A difference x_j - x_t, which the paper's unit reads, is in A and B. It normalises hidden units
    by the statistics of a batch (Dice); here the sum is normed, whose length is the history's.
    """

    def __init__(self, width: int, hidden: int, *, dropout_rate: float, rngs: nnx.Rngs):
        self.of_event = param(xavier_normal, rngs, width, hidden)
        self.of_target = param(xavier_normal, rngs, width, hidden)
        self.of_product = param(xavier_normal, rngs, width, hidden)
        self.unit_bias = nnx.Param(jnp.zeros(hidden, jnp.float32))
        self.weight = param(linear_bias(hidden), rngs, hidden)
        self.weight_bias = nnx.Param(jnp.zeros((), jnp.float32))
        self.ffn1 = param(xavier_normal, rngs, 4 * width, hidden)
        self.ffn1_bias = nnx.Param(jnp.zeros(hidden, jnp.float32))
        self.ffn2 = param(xavier_normal, rngs, hidden, width)
        self.ffn2_bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x_TD: Activations,
        sequences: Sequences,
        row_P: Int[Array, " P"],
        length: int,
        key: KeyOrNone = None,
    ) -> Float[Array, "P D"]:
        rows = Rows.of(sequences.offsets, row_P, *sequences.counts)
        target_PD = x_TD.at[row_P].get(mode="fill", fill_value=0)
        pooled_PD = self._pooled(x_TD, target_PD, rows, length)
        context_PD = _contextual(x_TD, sequences)[rows.segment]
        pooled_PD = layer_norm(pooled_PD, eps=EPS, implementation="xla").astype(x_TD.dtype)
        parts = (target_PD, pooled_PD, target_PD * pooled_PD, context_PD)
        hidden_PX = linear(jnp.concatenate(parts, axis=1), self.ffn1[...], self.ffn1_bias[...])
        keys_P = row_keys(key, sequences, rows)
        hidden_PX = dropout(jax.nn.silu(hidden_PX), self.dropout_rate, keys_P)
        return linear(hidden_PX, self.ffn2[...], self.ffn2_bias[...])

    def _pooled(
        self, x_TD: Activations, target_PD: Float[Array, "P D"], rows: Rows, length: int
    ) -> Float[Array, "P D"]:
        """The weighted sums, float32; the backward makes again what a chunk of targets makes."""
        key_TX = linear(x_TD, self.of_event[...])
        query_PX = linear(target_PD, self.of_target[...], self.unit_bias[...])
        # Behind the last row a slice of `length` rows may begin.
        x_SD, key_SX = (jnp.pad(x, ((0, length), (0, 0))) for x in (x_TD, key_TX))
        product_DX = self.of_product[...].astype(x_TD.dtype)

        @jax.checkpoint
        def pooled(
            one: tuple[Float[Array, " D"], Float[Array, " X"], Scalar, Scalar],
        ) -> Float[Array, " D"]:
            target_D, query_X, start, count = one
            x_ND, key_NX = (jax.lax.dynamic_slice_in_dim(x, start, length) for x in (x_SD, key_SX))
            hidden_NX = jax.nn.silu(key_NX + query_X[None] + (x_ND * target_D[None]) @ product_DX)
            weight_N = hidden_NX.astype(jnp.float32) @ self.weight[...] + self.weight_bias[...]
            seen_N = jnp.arange(length, dtype=jnp.int32) < count
            weight_N = jnp.where(seen_N, weight_N, 0.0).astype(x_ND.dtype)
            x_ND = jnp.where(seen_N[:, None], x_ND, 0)
            return jnp.einsum("n,nd->d", weight_N, x_ND, preferred_element_type=jnp.float32)

        first_P = rows.start + rows.contextual
        history_P = jnp.where(rows.real, rows.history, 0)
        each = (target_PD, query_PX, first_P, history_P)
        return jax.lax.map(pooled, each, batch_size=CHUNK)


def _contextual(x_TD: Activations, sequences: Sequences) -> Float[Array, "B D"]:
    """The mean of each sequence's contextual tokens, 0 without any."""
    most, counts = sequences.max_contextual, sequences.num_contextual
    if not most or counts is None:
        return jnp.zeros((sequences.num_sequences, x_TD.shape[1]), x_TD.dtype)
    x_BND = pad(x_TD, sequences.offsets, most)
    here_BN = jnp.arange(most, dtype=jnp.int32)[None] < jnp.asarray(counts)[:, None]
    total_BD = jnp.where(here_BN[..., None], x_BND, 0).sum(1)
    return total_BD / jnp.maximum(jnp.asarray(counts), 1)[:, None].astype(x_TD.dtype)


class DIN(Encoder):
    """One `TargetAttention`. It has an output for targets alone."""

    def __init__(self, layer: TargetAttention, length: int):
        self.layers = nnx.List([layer])
        self.length = length
        self.run_layer: RunLayer = run_layer

    @staticmethod
    def from_config(
        config: ModelConfig, length: int, *, layers: int | None = None, rngs: nnx.Rngs
    ) -> "DIN":
        """`layers` is not read: there is one."""
        layer = TargetAttention(
            config.width, config.ffn_width, dropout_rate=config.linear_dropout, rngs=rngs
        )
        return DIN(layer, length)

    def rows(
        self,
        x_TD: Activations,
        sequences: Sequences,
        rows_P: Int[Array, " P"],
        key: KeyOrNone = None,
    ) -> Float[Array, "p D"]:
        """What the model makes of the targets in these rows, of each alone."""
        x_TD = jnp.where(sequences.rows.real[:, None], x_TD, 0)
        call = functools.partial(
            TargetAttention.__call__,
            sequences=sequences,
            row_P=rows_P,
            length=self.length,
            key=key,
        )
        return self.run_layer(call, self.layers[0], x_TD, None)

    def encode_kept(self, x_TD: Activations, sequences: Sequences, key: KeyOrNone = None) -> Kept:
        """Raises NotImplementedError: a history has no rows of its own."""
        raise NotImplementedError(
            "DIN encodes no history, so that not all rows have an output: ask for targets by `rows`"
        )
