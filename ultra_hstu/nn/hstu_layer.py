"""One HSTU layer, in two forms: of the published research code and of the production code.

A layer knows nothing of batches or masks: it calls `attend`, which the stack makes once for a batch
and a mask. What is before and after attention works on each row alone, and so in chunks of rows if
`chunk_rows` says so.
"""

import abc
import itertools
import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels.typing import QHK, QHV, SHK, SHV, THK, THV
from ultra_hstu.nn.dropout import KeysOrNone, apply_dropout, dropout_mask
from ultra_hstu.nn.fp8 import Precision, linear
from ultra_hstu.nn.initializers import linear_bias, normal_002, param, xavier_uniform
from ultra_hstu.nn.mini_sequence import chunked
from ultra_hstu.nn.norms import layer_norm
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.nn.remat import ATTENTION_OUTPUT, LAYER_INPUT
from ultra_hstu.sequences import Activations

EPS = 1e-6
Projected = tuple[Array, Array, Array, Array]  # u, v, q, k
# Of the projection's weights [D, X] and bias [X]: those columns that are wanted.
Columns = Callable[[Array], Array]


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


def all_columns(weights: Array) -> Array:
    return weights


class Layer(nnx.Module):
    """What both layers share: a projection to u, v, q, k, attention, a gate, a projection back."""

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
        u_TY, v_THV, q_THK, k_THK = chunked(self._project, x_TD, chunk_rows=self.chunk_rows)
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
        u_PY, v_PHV, q_PHK, k_PHK = chunked(self._project, x_PD, chunk_rows=self.chunk_rows)
        own = (k_PHK, v_PHV)
        a_PHV = attend(q_PHK, k_THK, v_THV, own, alpha=self.alpha, bias=self.bias)
        return self._after(x_PD, u_PY, a_PHV, key)

    def _after(self, x_TD: Array, u_TY: Array, a_THV: THV, key: KeysOrNone) -> Activations:
        """What follows attention."""
        a_TY = checkpoint_name(a_THV.reshape(u_TY.shape), ATTENTION_OUTPUT)
        # Drawn for all rows at once, so that it does not depend on the chunks.
        mask_TZ = dropout_mask(key, self.dropout_rate, (x_TD.shape[0], self.output.shape[0]))
        return chunked(self._finish, x_TD, u_TY, a_TY, mask_TZ, chunk_rows=self.chunk_rows)

    def keys_and_values(self, x_TD: Activations) -> tuple[THK, THV]:
        """What other rows see of these: all that a cache needs of the last layer."""
        inner, wide = self.heads * self.v_width, self.heads * self.qk_width

        def of_keys(weights: Array) -> Array:
            v, k = weights[..., inner : 2 * inner], weights[..., 2 * inner + wide :]
            return jnp.concatenate([v, k], axis=-1)

        def project(x_CD: Array) -> tuple[Array, Array]:
            _, v_CHV, _, k_CHK = self._project(x_CD, of_keys)
            return k_CHK, v_CHV

        return chunked(project, x_TD, chunk_rows=self.chunk_rows)

    @abc.abstractmethod
    def _project(self, x_TD: Activations, columns: Columns = all_columns) -> Projected:
        """u [T, H * V], v [T, H, V], q and k [T, H, K] of each row.

        Where `columns` leaves v and k alone, u and q have no width.
        """

    @abc.abstractmethod
    def _gated(self, u_TY: Array, a_TY: Array) -> Float[Array, "T Z"]:
        """What `output` multiplies, from the gate and the attention output."""

    def _finish(self, x_TD: Array, u_TY: Array, a_TY: Array, mask_TZ: Array | None) -> Activations:
        """The layer's output; `mask_TZ` is the dropout mask of what `output` multiplies."""
        bias = None if self.output_bias is None else self.output_bias[...]
        y_TZ = apply_dropout(self._gated(u_TY, a_TY), mask_TZ, self.dropout_rate)
        return linear(y_TZ, self.output[...], bias, residual_TY=x_TD, precision=self.precision)

    def _split(self, uvqk_TX: Float[Array, "T X"]) -> Projected:
        """Columns u, v, q, k, or v and k alone, in each a block per head.

        u stays joined [T, H * V], the others become [T, H, width].
        """
        rows, (inner, wide) = uvqk_TX.shape[0], (self.v_width, self.qk_width)
        asks = uvqk_TX.shape[1] == 2 * self.heads * (inner + wide)
        widths = [inner * asks, inner, wide * asks, wide]  # of a head
        ends = itertools.accumulate(self.heads * width for width in widths)
        u_TY, *parts = jnp.split(uvqk_TX, list(ends)[:-1], axis=1)
        v_THV, q_THK, k_THK = (
            part.reshape(rows, self.heads, width)
            for part, width in zip(parts, widths[1:], strict=True)
        )
        return u_TY, v_THV, q_THK, k_THK


class ResearchLayer(Layer):
    """HSTU, arXiv 2402.17152, equations 1 to 3, with the choices of its published research code:

    u, v, q, k = split(silu(LN(x) @ uvqk))                      LN without affine, uvqk without bias
    a          = sum over earlier keys of silu(q . k + bias) / N * v
    x'         = x + dropout(u * LN(a)) @ output + output_bias  LN over all heads together
    """

    def _draw(self, width: int, inner: int, joined: int, rngs: nnx.Rngs) -> None:
        self.uvqk = param(normal_002, rngs, width, joined)
        self.output = param(xavier_uniform, rngs, inner, width)
        self.output_bias = param(linear_bias(inner), rngs, width)

    def _project(self, x_TD: Activations, columns: Columns = all_columns) -> Projected:
        normed_TD, weights = layer_norm(x_TD, eps=EPS), columns(self.uvqk[...])
        return self._split(jax.nn.silu(linear(normed_TD, weights, precision=self.precision)))

    def _gated(self, u_TY: Array, a_TY: Array) -> Array:
        return u_TY * layer_norm(a_TY, eps=EPS)


class ProductionLayer(Layer):
    """The layer of the published production code ("STU").

    It differs from the research layer in affine norms, a bias in uvqk, SiLU on u only, a scale on
    the scores (alpha, 1/sqrt(qk_width) unless given), and an output without bias over more inputs:

        x' = x + dropout(concat[u, a, u * LN(a)]) @ output        a without norm in the middle
    """

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

    def _project(self, x_TD: Activations, columns: Columns = all_columns) -> Projected:
        normed_TD = layer_norm(
            x_TD, self.input_norm_weight[...], self.input_norm_bias[...], eps=EPS
        )
        weights, bias = columns(self.uvqk[...]), columns(self.uvqk_bias[...])
        u_TY, v_THV, q_THK, k_THK = self._split(
            linear(normed_TD, weights, bias, precision=self.precision)
        )
        return jax.nn.silu(u_TY), v_THV, q_THK, k_THK

    def _gated(self, u_TY: Array, a_TY: Array) -> Array:
        weight, bias = self.output_norm_weight[...], self.output_norm_bias[...]
        n_TY = layer_norm(a_TY, weight, bias, eps=EPS)
        return jnp.concatenate([u_TY, a_TY, u_TY * n_TY], axis=1)


# By `ModelConfig.preset`.
LAYERS: dict[str, type[Layer]] = {"research": ResearchLayer, "production": ProductionLayer}
