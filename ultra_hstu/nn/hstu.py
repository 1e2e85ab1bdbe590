"""HSTU: layers of the published research code and of the published production code, and the stack of them.

A layer knows nothing of batches or masks: it calls `attend(q, k, v, alpha=, bias=)`, which the stack makes once for a batch and all its layers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

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
from ultra_hstu.nn.truncation import Cut, Truncation

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
    """A stack of layers over flat jagged sequences of at most `length` rows; attention is divided by `length` (N), after a truncation too."""

    def __init__(
        self,
        layers: Sequence[ResearchLayer | ProductionLayer],
        length: int,
        *,
        masks: Sequence[AttentionMask] = (AttentionMask(),),
        truncation: Truncation | None = None,
        attention: Literal["silu", "softmax"] = "silu",
        implementation: str | None = None,
    ):
        """
        Args:
          masks: one for all layers, or one a layer.
          truncation: the layers from `truncation.after` on work on the rows that it keeps.
        """
        self.layers = nnx.List(layers)
        self.length, self.masks, self.truncation = length, tuple(masks), truncation
        self.attention, self.implementation = attention, implementation

    @staticmethod
    def from_config(config: ModelConfig, length: int, *, layers: int | None = None, extra_rows: int = 0, rngs: nnx.Rngs) -> "HSTU":
        """The stack of a configuration.

        Args:
          length: N.
          layers: depth, where it is not `config.layers`: options that hold a value a layer must hold one for each of these.
          extra_rows: most contextual tokens and targets of a sequence, together; truncation keeps room for them.

        Raises:
          ValueError: options that do not go together.
        """
        depth = config.layers if layers is None else layers
        options: dict[str, Any] = dict(bias=None, dropout_rate=config.linear_dropout, rngs=rngs)
        if config.preset == "production":
            options["alpha"] = config.alpha
        elif config.alpha is not None:
            raise ValueError(f"model.alpha={config.alpha!r} is of the production layer: use model.preset='production', or leave it out")

        def layer() -> ResearchLayer | ProductionLayer:
            if config.relative_bias:
                options["bias"] = RelativeBiasTables(length, config.time_buckets, rngs=rngs)
            kind = ResearchLayer if config.preset == "research" else ProductionLayer
            return kind(config.width, config.heads, config.qk_width, config.v_width, **options)

        truncation = None
        if config.truncate_after is not None and config.truncate_length is not None:
            if config.truncate_after >= depth:
                raise ValueError(f"model.truncate_after={config.truncate_after} must be below the number of layers, {depth}")
            truncation = Truncation(config.truncate_after, config.truncate_length, extra_rows)
        return HSTU(
            [layer() for _ in range(depth)],
            length,
            masks=layer_masks(config, depth),
            truncation=truncation,
            attention=config.attention,
            implementation=config.implementation,
        )

    def __call__(self, x_TD: Float[Array, "T D"], sequences: Sequences, key: KeyOrNone = None) -> Float[Array, "T D"]:
        """The sequences after all layers; rows of padding may hold anything, and what comes out there means nothing.

        With a truncation, rows that it dropped come out 0: leave them out of losses, see `kept`.
        """
        x_SD, cut = self._run(x_TD, sequences, key)
        return x_SD if cut is None else cut.restore(x_SD)

    def rows(self, x_TD: Float[Array, "T D"], sequences: Sequences, rows_P: Int[Array, " P"], key: KeyOrNone = None) -> Float[Array, "P D"]:
        """The rows `rows_P` of `__call__`, without a buffer of T rows above a truncation; numbers of T and more give zeros."""
        x_SD, cut = self._run(x_TD, sequences, key)
        place_P = rows_P if cut is None else cut.place_T.at[rows_P].get(mode="fill", fill_value=x_SD.shape[0])
        return x_SD.at[place_P].get(mode="fill", fill_value=0)

    def kept(self, sequences: Sequences) -> Bool[Array, " T"]:
        """The real rows that reach the last layer: contextual tokens, targets and the newest history rows; all, without a truncation."""
        return jnp.asarray(sequences.real_T) if self.truncation is None else self.truncation.kept(sequences)

    def _run(self, x_TD: Array, sequences: Sequences, key: KeyOrNone) -> tuple[Array, Cut | None]:
        """The rows that are left after all layers, and which they are (None: all)."""
        x_TD = jnp.where(is_real(sequences.offsets, x_TD.shape[0])[:, None], x_TD, jnp.zeros((), x_TD.dtype))
        cut: Cut | None = None
        attends: dict[AttentionMask, Attend] = {}
        for number, (layer, layer_key) in enumerate(zip(self.layers, split_key(key, len(self.layers)), strict=True)):
            if self.truncation is not None and number == self.truncation.after:
                cut = self.truncation.cut(sequences)
                x_TD, sequences, attends = cut.take(x_TD), cut.sequences, {}
            mask = self.masks[min(number, len(self.masks) - 1)]
            if mask not in attends:
                attends[mask] = self._attend(sequences, mask)
            x_TD = layer(x_TD, attends[mask], layer_key)
        return x_TD, cut

    def _attend(self, sequences: Sequences, mask: AttentionMask) -> Attend:
        """Attention over the sequences of a batch; its plan is computed here, once for all layers of this mask."""
        if self.attention == "softmax":
            return lambda q, k, v, *, alpha, bias: softmax_attention(q, k, v, sequences, bias=bias, length=self.length)
        plan = make_plan(mask, sequences.offsets, sequences.num_rows, sequences.num_targets, sequences.num_contextual)
        run = functools.partial(
            hstu_attention,
            mask=mask,
            num_targets=sequences.num_targets,
            num_contextual=sequences.num_contextual,
            scale=1.0 / self.length,
            implementation=self.implementation,
            plan=plan,
        )
        return lambda q, k, v, *, alpha, bias: run(
            q, k, v, sequences.offsets, alpha=alpha, bias=None if bias is None else bias.flat(sequences.time_T, sequences.next_time_T)
        )


def layer_masks(config: ModelConfig, layers: int) -> tuple[AttentionMask, ...]:
    """The mask of every layer, from `window`, `full_rows` and `prefix`: one value for all layers, or one a layer.

    A window longer than the sequences is a legal one: plain causal attention.

    Raises:
      ValueError: another number of values, or a mask for the softmax ablation, which is plain causal.
    """
    values = {name: getattr(config, name) for name in ("window", "full_rows", "prefix")}
    for name, given in values.items():
        if len(given) not in (0, 1, layers):
            raise ValueError(f"model.{name}={given} must hold one value, or one for each of {layers} layers")
        if given and config.attention == "softmax":
            raise ValueError(f"model.{name}={given}: the softmax ablation is plain causal; use model.attention='silu'")

    def mask(number: int) -> AttentionMask:
        window, full_rows, prefix = (
            given[number % len(given)] if given else default for given, default in zip(values.values(), (-1, 0, 0), strict=True)
        )
        return AttentionMask(None if window == -1 else window, full_rows, prefix)

    return tuple(mask(number) for number in range(layers))
