"""The stack of HSTU layers: which rows each layer works on, who sees whom in it, and what its backward recomputes."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kernels.hstu_attention.api import RelativeBias, hstu_attention, make_plan, prepare_plan
from kernels.jagged import is_real
from kernels.mask import AttentionMask
from ultra_hstu.config import ModelConfig
from ultra_hstu.data.sequences import Sequences
from ultra_hstu.nn.dropout import KeyOrNone, split_key
from ultra_hstu.nn.hstu_layer import Attend, ProductionLayer, ResearchLayer
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.nn.remat import Remat, checkpointed
from ultra_hstu.nn.softmax_ablation import softmax_attention
from ultra_hstu.nn.truncation import Cut, Truncation


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
        remat: Remat = "none",
    ):
        """
        Args:
          masks: one for all layers, or one a layer.
          truncation: the layers from `truncation.after` on work on the rows that it keeps.
          remat: see `ultra_hstu.nn.remat`.
        """
        self.layers = nnx.List(layers)
        self.length, self.masks, self.truncation = length, tuple(masks), truncation
        self.attention, self.implementation, self.remat = attention, implementation, remat

    @staticmethod
    def from_config(config: ModelConfig, length: int, *, layers: int | None = None, extra_rows: int = 0, rngs: nnx.Rngs) -> "HSTU":
        """The stack of a configuration.

        Args:
          length: N.
          layers: depth, where it is not `config.layers`: options that hold a value a layer must hold one for each of these.
          extra_rows: most contextual tokens and targets of a sequence, together; truncation keeps room for them.

        Raises:
          ValueError: options that do not suit this depth.
        """
        depth = config.layers if layers is None else layers
        options: dict[str, Any] = dict(
            bias=None, dropout_rate=config.linear_dropout, precision=config.projection, chunk_rows=config.chunk_rows, rngs=rngs
        )
        if config.preset == "production":
            options["alpha"] = config.alpha

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
            remat=config.remat,
        )

    def __call__(self, x_TD: Float[Array, "T D"], sequences: Sequences, key: KeyOrNone = None) -> Float[Array, "T D"]:
        """The sequences after all layers; rows of padding may hold anything, and what comes out there means nothing.

        With a truncation, rows that it dropped come out 0: leave them out of losses, see `kept`.
        """
        x_SD, cut = self.encode_kept(x_TD, sequences, key)
        return x_SD if cut is None else cut.restore(x_SD)

    def rows(self, x_TD: Float[Array, "T D"], sequences: Sequences, rows_P: Int[Array, " P"], key: KeyOrNone = None) -> Float[Array, "P D"]:
        """The rows `rows_P` of `__call__`, without a buffer of T rows above a truncation; numbers of T and more give zeros."""
        x_SD, cut = self.encode_kept(x_TD, sequences, key)
        place_P = rows_P if cut is None else cut.place_T.at[rows_P].get(mode="fill", fill_value=x_SD.shape[0])
        return x_SD.at[place_P].get(mode="fill", fill_value=0)

    def kept(self, sequences: Sequences) -> Bool[Array, " T"]:
        """The real rows that reach the last layer: contextual tokens, targets and the newest history rows; all, without a truncation."""
        return jnp.asarray(sequences.real_T) if self.truncation is None else self.truncation.kept(sequences)

    def encode_kept(self, x_TD: Float[Array, "T D"], sequences: Sequences, key: KeyOrNone = None) -> tuple[Float[Array, "S D"], Cut | None]:
        """The rows that reach the last layer, after it, in a buffer of their own, and which they are (None: all)."""
        x_TD = jnp.where(is_real(sequences.offsets, x_TD.shape[0])[:, None], x_TD, jnp.zeros((), x_TD.dtype))
        cut: Cut | None = None
        attends: dict[AttentionMask, Attend] = {}
        for number, (layer, layer_key) in enumerate(zip(self.layers, split_key(key, len(self.layers)), strict=True)):
            if self.truncation is not None and number == self.truncation.after:
                cut = self.truncation.cut(sequences)
                x_TD, sequences, attends = cut.take(x_TD), cut.sequences, {}
            mask = self.layer_masks[number]
            if mask not in attends:
                attends[mask] = self.attend(sequences, mask, x_TD.dtype)
            run = functools.partial(layer, attend=attends[mask], key=layer_key)
            x_TD = checkpointed(run, self.remat)(x_TD)
        return x_TD, cut

    @property
    def layer_masks(self) -> tuple[AttentionMask, ...]:
        """The mask of every layer."""
        return tuple(self.masks[min(number, len(self.masks) - 1)] for number in range(len(self.layers)))

    def attend(self, sequences: Sequences, mask: AttentionMask, dtype: Any) -> Attend:
        """Attention over the sequences of a batch; its plan is computed here, once for all layers of this mask."""
        if self.attention == "softmax":
            return lambda q, k, v, *, alpha, bias: softmax_attention(q, k, v, sequences, bias=bias, length=self.length)
        plan = make_plan(mask, sequences.offsets, sequences.num_rows, sequences.num_targets, sequences.num_contextual)
        layer = self.layers[0]
        sizes: dict[str, int] = dict(heads=layer.heads, k_width=layer.qk_width, v_width=layer.v_width)
        plan = prepare_plan(plan, self.implementation, dtype=dtype, biased=layer.bias is not None, **sizes)

        @functools.partial(jax.jit, static_argnames="alpha")  # traced and lowered once, not once a layer
        def run(q_THK: Array, k_THK: Array, v_THV: Array, bias: RelativeBias | None, *, alpha: float) -> Array:
            return hstu_attention(
                q_THK,
                k_THK,
                v_THV,
                sequences.offsets,
                mask=mask,
                num_targets=sequences.num_targets,
                num_contextual=sequences.num_contextual,
                alpha=alpha,
                scale=1.0 / self.length,
                bias=bias,
                implementation=self.implementation,
                plan=plan,
            )

        def attend(q: Array, k: Array, v: Array, *, alpha: float, bias: RelativeBiasTables | None) -> Array:
            flat = None if bias is None else bias.flat(sequences.time_T, sequences.next_time_T)
            return run(q, k, v, flat, alpha=alpha)

        return attend


def layer_masks(config: ModelConfig, layers: int) -> tuple[AttentionMask, ...]:
    """The mask of every layer, from `window`, `full_rows` and `prefix`: one value for all layers, or one a layer.

    A window longer than the sequences is a legal one: plain causal attention.

    Raises:
      ValueError: another number of values.
    """
    values = {name: getattr(config, name) for name in ("window", "full_rows", "prefix")}
    for name, given in values.items():
        if len(given) not in (0, 1, layers):
            raise ValueError(f"model.{name}={given} must hold one value, or one for each of {layers} layers")

    def mask(number: int) -> AttentionMask:
        window, full_rows, prefix = (
            given[number % len(given)] if given else default for given, default in zip(values.values(), (-1, 0, 0), strict=True)
        )
        return AttentionMask(None if window == -1 else window, full_rows, prefix)

    return tuple(mask(number) for number in range(layers))
