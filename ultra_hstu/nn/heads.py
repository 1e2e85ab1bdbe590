"""Heads on top of encoders."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels.layer_norm import layer_norm
from ultra_hstu.nn.initializers import param, xavier_uniform
from ultra_hstu.nn.mini_sequence import chunked

EPS = 1e-6


class MultiTaskHead(nnx.Module):
    """`silu(LN(h) @ hidden + b) @ output + b'`, in float32.

    The tasks share one hidden layer; each has one output: it is the logit of a binary task, or the
    value of a regression.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        tasks: int,
        *,
        chunk_rows: int | None = None,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          chunk_rows: rows whose hidden layer exists at one time; None: all.
        """
        self.norm_weight, self.norm_bias = (
            nnx.Param(jnp.ones(width, jnp.float32)),
            nnx.Param(jnp.zeros(width, jnp.float32)),
        )
        self.hidden = param(xavier_uniform, rngs, width, hidden_width)
        self.hidden_bias = nnx.Param(jnp.zeros(hidden_width, jnp.float32))
        self.output = param(xavier_uniform, rngs, hidden_width, tasks)
        self.output_bias = nnx.Param(jnp.zeros(tasks, jnp.float32))
        self.chunk_rows = chunk_rows

    def __call__(self, h_PD: Float[Array, "P D"]) -> Float[Array, "P K"]:
        return chunked(self._logits, h_PD, chunk_rows=self.chunk_rows)

    def _logits(self, h_PD: Float[Array, "P D"]) -> Float[Array, "P K"]:
        normed_PD = layer_norm(
            h_PD.astype(jnp.float32),
            self.norm_weight[...],
            self.norm_bias[...],
            eps=EPS,
            implementation="xla",
        )
        hidden_PX = jax.nn.silu(normed_PD @ self.hidden[...] + self.hidden_bias[...][None])
        return hidden_PX @ self.output[...] + self.output_bias[...][None]
