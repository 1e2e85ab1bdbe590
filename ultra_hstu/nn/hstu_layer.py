"""One HSTU layer, in two forms: of the published research code and of the production code.

A layer knows nothing of batches or masks: it calls `attend`, which the stack makes once for a batch
and a mask. What is before and after attention works on each row alone, and so in chunks of rows if
`chunk_rows` says so.
"""

import abc
import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels.fp8 import Gradient, Precision
from kernels.gated_linear import gated_linear
from kernels.norm_linear import norm_linear
from kernels.typing import QHK, QHV, SHK, SHV, THK, THV
from ultra_hstu.nn.dropout import KeysOrNone, another_key, dropout_mask
from ultra_hstu.nn.feed_forward import FeedForward
from ultra_hstu.nn.initializers import linear_bias, normal, param, xavier_uniform
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


@runtime_checkable
class AttendRows(Protocol):
    """Attention of some rows to all rows of a batch, and to their `own` keys and values."""

    def __call__(
        self,
        q_PHK: QHK,
        k_THK: SHK,
        v_THV: SHV,
        own: tuple[QHK, QHV],
        /,
        *,
        alpha: float,
        bias: RelativeBiasTables | None,
    ) -> QHV: ...


class Layer(nnx.Module):
    """What both layers share: a projection to u, v, q, k, attention, a gate, a projection back.

    And a feed-forward block behind it, where it is asked for.
    """

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
        gradient: Gradient = "same",
        implementation: str | None = None,
        chunk_rows: int | None = None,
        feed_forward: int | None = None,
        uvqk_std: float = 0.02,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          alpha: the factor on scores; None: the published one.
          precision, gradient: of the projections, see `kernels.fp8.linear`.
          implementation: of `kernels.norm_linear` and `kernels.gated_linear`.
          chunk_rows: rows that token-wise work is done for at one time; None: all.
          feed_forward: hidden width of a block behind the layer; None: there is none.
          uvqk_std: of that projection's first values, in the research layer.
        """
        self.heads, self.qk_width, self.v_width, self.bias = heads, qk_width, v_width, bias
        self.alpha = self._default_alpha() if alpha is None else alpha
        self.dropout_rate, self.chunk_rows = dropout_rate, chunk_rows
        self.precision, self.gradient, self.implementation = precision, gradient, implementation
        self.uvqk_std = uvqk_std
        self._draw(width, heads * v_width, 2 * heads * (v_width + qk_width), rngs)
        self.feed_forward = (
            None
            if feed_forward is None
            else FeedForward(
                width,
                feed_forward,
                dropout_rate=dropout_rate,
                precision=precision,
                gradient=gradient,
                implementation=implementation,
                chunk_rows=chunk_rows,
                rngs=rngs,
            )
        )

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
        return self._after(x_TD, u_TY, a_THV, key)

    def of_rows(
        self,
        x_TD: Activations,
        pick: Callable[[Array], Array],
        attend: AttendRows,
        key: KeysOrNone = None,
    ) -> Float[Array, "P D"]:
        """`__call__` for the rows that `pick` takes, which see all rows: the others are keys alone.

        `key`: one, or one for each of these rows.
        """
        x_TD = checkpoint_name(x_TD, LAYER_INPUT)
        x_PD, (k_THK, v_THV) = pick(x_TD), self.keys_and_values(x_TD)
        u_PY, v_PHV, q_PHK, k_PHK = self._projected(x_PD)
        own = (k_PHK, v_PHV)
        a_PHV = attend(q_PHK, k_THK, v_THV, own, alpha=self.alpha, bias=self.bias)
        return self._after(x_PD, u_PY, a_PHV, key)

    def _after(self, x_TD: Array, u_TY: Array, a_THV: THV, key: KeysOrNone) -> Activations:
        """What follows attention."""
        a_TY = checkpoint_name(a_THV.reshape(u_TY.shape), ATTENTION_OUTPUT)
        # Drawn for all rows at once, so that it does not depend on the chunks.
        mask_TZ = dropout_mask(key, self.dropout_rate, (x_TD.shape[0], self.output.shape[0]))
        x_TD = chunked(self._finish, x_TD, u_TY, a_TY, mask_TZ, chunk_rows=self.chunk_rows)
        return x_TD if self.feed_forward is None else self.feed_forward(x_TD, another_key(key))

    def keys_and_values(self, x_TD: Activations) -> tuple[THK, THV]:
        """What other rows see of these: all that a cache needs of the last layer."""
        inner, wide = self.heads * self.v_width, self.heads * self.qk_width

        def of_keys(weights: Array) -> Array:
            v, k = weights[..., inner : 2 * inner], weights[..., 2 * inner + wide :]
            return jnp.concatenate([v, k], axis=-1)

        def project(x_CD: Array) -> tuple[Array, Array]:
            (v_CY, k_CX), _ = self._linear(x_CD, of_keys, (inner, wide))
            return self._of_heads(k_CX), self._of_heads(v_CY)

        return chunked(project, x_TD, chunk_rows=self.chunk_rows)

    def _projected(self, x_TD: Activations) -> Projected:
        return chunked(lambda x_TD: self._project(x_TD)[0], x_TD, chunk_rows=self.chunk_rows)

    def _project(self, x_TD: Activations) -> tuple[Projected, Activations]:
        """u before its SiLU [T, H * V], v [T, H, V], q and k [T, H, K] of each row; and x again.

        What is added to x later gives its gradient to the norm's backward, which adds it.
        """
        inner, wide = self.heads * self.v_width, self.heads * self.qk_width
        (u_TY, *vqk), x_TD = self._linear(x_TD, lambda w: w, (inner, inner, wide, wide))
        v_THV, q_THK, k_THK = map(self._of_heads, vqk)
        return (u_TY, v_THV, q_THK, k_THK), x_TD

    def _linear(
        self, x_TD: Activations, columns: Callable[[Array], Array], widths: tuple[int, ...]
    ) -> tuple[list[Float[Array, "T _"]], Activations]:
        """Those columns of the projection of LN(x) that `columns` takes, in parts; and x."""
        bias = None if self.uvqk_bias is None else columns(self.uvqk_bias[...])
        return norm_linear(
            x_TD,
            self._input_norm(),
            columns(self.uvqk[...]),
            bias,
            widths=widths,
            eps=EPS,
            precision=self.precision,
            gradient=self.gradient,
            implementation=self.implementation,
        )

    def _of_heads(self, part_TX: Float[Array, "T X"]) -> Float[Array, "T H _"]:
        """v, q or k as attention sees them."""
        return part_TX.reshape(part_TX.shape[0], self.heads, -1)

    def _finish(self, x_TD: Array, u_TY: Array, a_TY: Array, mask_TZ: Array | None) -> Activations:
        """The layer's output; `mask_TZ` is the dropout mask of what `output` multiplies."""
        return gated_linear(
            u_TY,
            a_TY,
            self._output_norm(),
            self.output[...],
            None if self.output_bias is None else self.output_bias[...],
            x_TD,
            mask_TZ,
            eps=EPS,
            joined=self.joined,
            rate=self.dropout_rate,
            precision=self.precision,
            gradient=self.gradient,
            implementation=self.implementation,
        )

    def _input_norm(self) -> tuple[Array, Array] | None:
        """Weight and bias of the norm of x, where it has them."""
        return None

    def _output_norm(self) -> tuple[Array, Array] | None:
        """Weight and bias of the norm of the attention output, where it has them."""
        return None


class ResearchLayer(Layer):
    """HSTU, arXiv 2402.17152, equations 1 to 3, with the choices of its published research code:

    u, v, q, k = split(silu(LN(x) @ uvqk))                      LN without affine, uvqk without bias
    a          = sum over earlier keys of silu(q . k + bias) / N * v
    x'         = x + dropout(u * LN(a)) @ output + output_bias  LN over all heads together
    """

    joined = False

    def _draw(self, width: int, inner: int, joined: int, rngs: nnx.Rngs) -> None:
        self.uvqk = param(normal(self.uvqk_std), rngs, width, joined)
        self.output = param(xavier_uniform, rngs, inner, width)
        self.output_bias = param(linear_bias(inner), rngs, width)

    def _of_heads(self, part_TX: Float[Array, "T X"]) -> Float[Array, "T H _"]:
        return super()._of_heads(jax.nn.silu(part_TX))


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
