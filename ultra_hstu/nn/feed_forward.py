"""A feed-forward block behind an HSTU layer, which the published encoder does without.

It is what mini-sequences (arXiv 2407.15892) save most on, beside the softmax over a catalogue: a
hidden layer several times as wide as the residual stream, which then exists for one chunk of rows.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from kernels.fp8 import Gradient, Precision, linear
from kernels.norm_linear import norm_linear
from ultra_hstu.nn.dropout import KeysOrNone, dropout
from ultra_hstu.nn.initializers import param, xavier_uniform
from ultra_hstu.nn.mini_sequence import chunked
from ultra_hstu.nn.remat import FEED_FORWARD_INPUT
from ultra_hstu.sequences import Activations

EPS = 1e-6


class FeedForward(nnx.Module):
    """`x + dropout(silu(LN(x) @ hidden + hidden_bias)) @ output + output_bias`, row by row.

    The norm has neither weight nor bias: the projection behind it could undo both.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        *,
        dropout_rate: float = 0.0,
        precision: Precision = "same",
        gradient: Gradient = "same",
        implementation: str | None = None,
        chunk_rows: int | None = None,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          width, hidden_width: D, and that of the hidden layer.
          precision, gradient: of both projections, see `kernels.fp8.linear`.
          implementation: of `kernels.norm_linear`.
          chunk_rows: rows whose hidden layer exists at one time; None: all.
        """
        self.hidden = param(xavier_uniform, rngs, width, hidden_width)
        self.hidden_bias = nnx.Param(jnp.zeros(hidden_width, jnp.float32))
        self.output = param(xavier_uniform, rngs, hidden_width, width)
        self.output_bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.dropout_rate, self.chunk_rows = dropout_rate, chunk_rows
        self.precision, self.gradient, self.implementation = precision, gradient, implementation

    def __call__(self, x_TD: Activations, key: KeysOrNone = None) -> Activations:
        """x plus what the block adds to it, in the dtype of x. `key`: one, or one a row."""
        x_TD = checkpoint_name(x_TD, FEED_FORWARD_INPUT)
        if key is not None and key.ndim == 0:  # one a row, so that chunks draw what all rows would
            key = jax.random.split(key, x_TD.shape[0])
        return chunked(self._rows, x_TD, key, chunk_rows=self.chunk_rows)

    def _rows(self, x_CD: Array, key_C: KeysOrNone) -> Activations:
        (hidden_CF,), x_CD = norm_linear(
            x_CD,
            None,
            self.hidden[...],
            self.hidden_bias[...],
            widths=(self.hidden.shape[1],),
            eps=EPS,
            precision=self.precision,
            gradient=self.gradient,
            implementation=self.implementation,
        )
        return linear(
            dropout(jax.nn.silu(hidden_CF), self.dropout_rate, key_C),
            self.output[...],
            self.output_bias[...],
            residual_TY=x_CD,
            precision=self.precision,
            gradient=self.gradient,
        )
