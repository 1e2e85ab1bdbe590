"""One HSTU layer, in two forms: of the published research code and of the production code.

A layer knows nothing of batches or masks: it calls `attend`, which the stack makes once for a batch
and a mask. What is before and after attention works on each row alone, and so in chunks of rows if
`chunk_rows` says so.
"""

import abc
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels.fp8 import Precision
from kernels.gated_linear import gated_linear
from kernels.norm_linear import norm_linear
from kernels.typing import THK, THV
from ultra_hstu.nn.dropout import KeysOrNone, dropout_mask
from ultra_hstu.nn.initializers import linear_bias, normal_002, param, xavier_uniform
from ultra_hstu.nn.mini_sequence import chunked
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.nn.remat import ATTENTION_OUTPUT, LAYER_INPUT
from ultra_hstu.sequences import Activations

EPS = 1e-6
Projected = tuple[Array, Array, Array, Array]  # u, v, q, k


@runtime_checkable
class Attend(Protocol):
    """Attention over the sequences of a batch under one mask."""

    def __call__(
        self,
        q_THK: THK,
        k_THK: THK,
        v_THV: THV,
        /,
        *,
        alpha: float,
        bias: RelativeBiasTables | None,
    ) -> THV: ...


class Layer(nnx.Module):
    """What both layers share: a projection to u, v, q, k, attention, a gate, a projection back."""

    joined: bool  # the output projection reads u and a, too

    uvqk: nnx.Param  # [D, X]
    uvqk_bias: nnx.Param | None = None
    output: nnx.Param  # [Z, D]
    output_bias: nnx.Param | None = None

    def __init__(
        self,
        width: int,
        heads: int,
        qk_width: int,
        v_width: int,
        *,
        alpha: float | None = None,
        bias: RelativeBiasTables | None = None,
        dropout_rate: float = 0.0,
        precision: Precision = "same",
        chunk_rows: int | None = None,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          alpha: the factor on scores; None: the published one.
          chunk_rows: rows that token-wise work is done for at one time; None: all.
        """
        self.heads, self.qk_width, self.v_width, self.bias = heads, qk_width, v_width, bias
        self.alpha = self._default_alpha() if alpha is None else alpha
        self.dropout_rate, self.precision, self.chunk_rows = dropout_rate, precision, chunk_rows
        self._draw(width, heads * v_width, 2 * heads * (v_width + qk_width), rngs)

    def _default_alpha(self) -> float:
        return 1.0

    @abc.abstractmethod
    def _draw(self, width: int, inner: int, joined: int, rngs: nnx.Rngs) -> None:
        """Initial parameters; `inner` is H * V, `joined` the width of u, v, q and k together."""

    def __call__(self, x_TD: Activations, attend: Attend, key: KeysOrNone = None) -> Activations:
        """x plus what the layer adds to it, in the dtype of x. `key`: one, or one a row."""
        x_TD = checkpoint_name(x_TD, LAYER_INPUT)
        if self.chunk_rows is None:
            (u_TY, v_THV, q_THK, k_THK), x_TD = self._project(x_TD)
        else:
            u_TY, v_THV, q_THK, k_THK = self._projected(x_TD)
        a_THV = attend(q_THK, k_THK, v_THV, alpha=self.alpha, bias=self.bias)
        a_TY = checkpoint_name(a_THV.reshape(u_TY.shape), ATTENTION_OUTPUT)
        # Drawn for all rows at once, so that it does not depend on the chunks.
        mask_TZ = dropout_mask(key, self.dropout_rate, (x_TD.shape[0], self.output.shape[0]))
        return chunked(self._finish, x_TD, u_TY, a_TY, mask_TZ, chunk_rows=self.chunk_rows)

    def keys_and_values(self, x_TD: Activations) -> tuple[THK, THV]:
        """What other rows see of these: all that a cache needs of the last layer."""
        _, v_THV, _, k_THK = self._projected(x_TD)
        return k_THK, v_THV

    def _projected(self, x_TD: Activations) -> Projected:
        return chunked(lambda x_TD: self._project(x_TD)[0], x_TD, chunk_rows=self.chunk_rows)

    def _project(self, x_TD: Activations) -> tuple[Projected, Activations]:
        """u before its SiLU [T, H * V], v [T, H, V], q and k [T, H, K] of each row; and x again.

        What is added to x later gives its gradient to the norm's backward, which adds it.
        """
        inner, qk = self.heads * self.v_width, self.heads * self.qk_width
        (u_TY, *vqk), x_TD = norm_linear(
            x_TD,
            self._input_norm(),
            self.uvqk[...],
            _value(self.uvqk_bias),
            widths=(inner, inner, qk, qk),
            eps=EPS,
            precision=self.precision,
        )
        v_THV, q_THK, k_THK = (
            self._activated(part).reshape(part.shape[0], self.heads, -1) for part in vqk
        )
        return (u_TY, v_THV, q_THK, k_THK), x_TD

    def _finish(self, x_TD: Array, u_TY: Array, a_TY: Array, mask_TZ: Array | None) -> Activations:
        """The layer's output; `mask_TZ` is the dropout mask of what `output` multiplies."""
        return gated_linear(
            u_TY,
            a_TY,
            self._output_norm(),
            self.output[...],
            _value(self.output_bias),
            x_TD,
            mask_TZ,
            eps=EPS,
            joined=self.joined,
            rate=self.dropout_rate,
            precision=self.precision,
        )

    def _input_norm(self) -> tuple[Array, Array] | None:
        """Weight and bias of the norm of x, where it has them."""
        return None

    def _output_norm(self) -> tuple[Array, Array] | None:
        """Weight and bias of the norm of the attention output, where it has them."""
        return None

    def _activated(self, part_TX: Float[Array, "T X"]) -> Float[Array, "T X"]:
        """v, q or k as attention sees them."""
        return part_TX


def _value(parameter: nnx.Param | None) -> Array | None:
    return None if parameter is None else parameter[...]


class ResearchLayer(Layer):
    """HSTU, arXiv 2402.17152, equations 1 to 3, with the choices of its published research code:

    u, v, q, k = split(silu(LN(x) @ uvqk))                      LN without affine, uvqk without bias
    a          = sum over earlier keys of silu(q . k + bias) / N * v
    x'         = x + dropout(u * LN(a)) @ output + output_bias  LN over all heads together
    """

    joined = False

    def _draw(self, width: int, inner: int, joined: int, rngs: nnx.Rngs) -> None:
        self.uvqk = param(normal_002, rngs, width, joined)
        self.output = param(xavier_uniform, rngs, inner, width)
        self.output_bias = param(linear_bias(inner), rngs, width)

    def _activated(self, part_TX: Float[Array, "T X"]) -> Float[Array, "T X"]:
        return jax.nn.silu(part_TX)


class ProductionLayer(Layer):
    """The layer of the published production code ("STU").

    It differs from the research layer in affine norms, a bias in uvqk, SiLU on u only, a scale on
    the scores (alpha, 1/sqrt(qk_width) unless given), and an output without bias over more inputs:

        x' = x + dropout(concat[u, a, u * LN(a)]) @ output        a without norm in the middle
    """

    joined = True

    def _default_alpha(self) -> float:
        return 1.0 / math.sqrt(self.qk_width)

    def _draw(self, width: int, inner: int, joined: int, rngs: nnx.Rngs) -> None:
        self.input_norm_weight = nnx.Param(jnp.ones(width, jnp.float32))
        self.input_norm_bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.uvqk = param(xavier_uniform, rngs, width, joined)
        self.uvqk_bias = nnx.Param(jnp.zeros(joined, jnp.float32))
        self.output_norm_weight = nnx.Param(jnp.ones(inner, jnp.float32))
        self.output_norm_bias = nnx.Param(jnp.zeros(inner, jnp.float32))
        self.output = param(xavier_uniform, rngs, 3 * inner, width)

    def _input_norm(self) -> tuple[Array, Array]:
        return self.input_norm_weight[...], self.input_norm_bias[...]

    def _output_norm(self) -> tuple[Array, Array]:
        return self.output_norm_weight[...], self.output_norm_bias[...]


# By `ModelConfig.preset`.
LAYERS: dict[str, type[Layer]] = {"research": ResearchLayer, "production": ProductionLayer}
