"""The stack of HSTU layers: on which rows a layer works, who sees whom, and what is recomputed."""

import functools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kernels.hstu_attention.api import (
    AttentionSpec,
    hstu_attention,
    make_plan,
    prepare_plan,
)
from kernels.hstu_attention.softmax import softmax_attention
from kernels.jagged import Rows
from kernels.mask import AttentionMask, layer_masks
from kernels.typing import QHK, QHV, SHK, SHV, THK, THV, Scale
from ultra_hstu.config import ModelConfig
from ultra_hstu.nn.divisor import Divisor
from ultra_hstu.nn.dropout import KeyOrNone, row_keys, split_key
from ultra_hstu.nn.encoder import Encoder
from ultra_hstu.nn.hstu_layer import LAYERS, Attend, AttendRows, Layer
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.nn.remat import Remat, RunLayer, policy_of, run_layer
from ultra_hstu.nn.softmax_ablation import published_softmax
from ultra_hstu.nn.truncation import Cut, Kept, Truncation
from ultra_hstu.parallel.context_attention import strategy_named
from ultra_hstu.parallel.parameters import CallLayer
from ultra_hstu.parallel.strategy import ShardMask
from ultra_hstu.parallel.visiting import VisitingRows
from ultra_hstu.sequences import Activations, Sequences

Attention = Literal["silu", "softmax", "masked_softmax"]


class HSTU(Encoder):
    """A stack of layers over sequences of at most `length` rows.

    Attention is divided by `length` (N), above a truncation too, unless `divisor` says otherwise.
    `run_layer` says how a layer runs: a recipe puts another in its place for a mesh.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        length: int,
        *,
        masks: Sequence[AttentionMask] = (AttentionMask(),),
        truncation: Truncation | None = None,
        divisor: Divisor | None = None,
        attention: Attention = "silu",
        implementation: str | None = None,
        remat: Remat = "none",
    ):
        """
        Args:
          masks: one for all layers, or one a layer.
          truncation: the layers from `truncation.after` on work on the rows that it keeps.
          divisor: of attention; None: `length`. With softmax attention there is none.
          remat: see `ultra_hstu.nn.remat`.

        Raises:
          ValueError: another kind of attention.
        """
        if attention not in (known := get_args(Attention)):
            raise ValueError(f"{attention=} must be one of {', '.join(known)}")
        self.layers = nnx.List(layers)
        self.length, self.masks, self.truncation = length, tuple(masks), truncation
        self.divisor = Divisor(length, length) if divisor is None else divisor
        self.attention, self.implementation, self.remat = attention, implementation, remat
        self.run_layer: RunLayer = run_layer

    @staticmethod
    def from_config(
        config: ModelConfig, length: int, *, layers: int | None = None, rngs: nnx.Rngs
    ) -> "HSTU":
        """The stack of a configuration.

        Args:
          length: N; of its rows, `config.output_slots` are no history.
          layers: depth, where it is not `config.layers`: options that hold a value a layer must
            hold one for each of these.

        Raises:
          ValueError: options that do not suit this depth.
        """
        depth = config.layers if layers is None else layers
        kind, alpha = LAYERS[config.preset], config.alpha
        if alpha is None and config.attention == "masked_softmax":
            alpha = 1.0 / math.sqrt(config.qk_width)
        truncation, kept = None, length
        if config.truncate_after is not None and config.truncate_length is not None:
            if config.truncate_after >= depth:
                whose = "model.layers" if layers is None else "layers"
                raise ValueError(
                    f"model.truncate_after={config.truncate_after} must be below {whose}={depth}"
                )
            truncation = Truncation(config.truncate_after, config.truncate_length)
            kept = min(length, config.truncate_length + config.output_slots)
        return HSTU(
            [
                kind(
                    config.width,
                    config.heads,
                    config.qk_width,
                    config.v_width,
                    alpha=alpha,
                    bias=RelativeBiasTables(length, config.time_buckets, rngs=rngs)
                    if config.relative_bias
                    else None,
                    dropout_rate=config.linear_dropout,
                    precision=config.projection,
                    gradient=config.projection_gradient,
                    implementation=config.layer_implementation,
                    chunk_rows=config.chunk_rows,
                    feed_forward=config.feed_forward,
                    uvqk_std=config.uvqk_std,
                    rngs=rngs,
                )
                for _ in range(depth)
            ],
            length,
            masks=layer_masks(vars(config), depth),
            truncation=truncation,
            divisor=Divisor(length, kept, config.divide_by),
            attention=config.attention,
            implementation=config.implementation,
            remat=config.remat,
        )

    def encode_kept(self, x_TD: Activations, sequences: Sequences, key: KeyOrNone = None) -> Kept:
        return self._encode(x_TD, sequences, key, None)

    def rows(
        self,
        x_TD: Activations,
        sequences: Sequences,
        rows_P: Int[Array, " P"],
        key: KeyOrNone = None,
    ) -> Float[Array, "p D"]:
        """See `Encoder.rows`; to rounding, the values are those of `__call__`.

        Where `reads_few` rows, the last layer makes queries, gates and outputs for these alone, and
        keys and values for all. With softmax attention, and on several context shards with a
        relative bias, whose positions are those of the whole buffer, it computes all rows.
        """
        return self._encode(x_TD, sequences, key, rows_P)[0]

    def _encode(
        self,
        x_TD: Activations,
        sequences: Sequences,
        key: KeyOrNone,
        row_P: Int[Array, " P"] | None,
    ) -> Kept:
        """`encode_kept`, or with `row_P` these rows of it, as `Shards.take` divides them."""
        x_TD = jnp.where(sequences.rows.real[:, None], x_TD, 0)
        cut: Cut | None = None
        attends: dict[AttentionMask, Attend] = {}
        policy = policy_of(self.remat)
        keys = split_key(key, len(self.layers))
        for number, (layer, mask) in enumerate(zip(self.layers, self.layer_masks, strict=True)):
            if self.truncation is not None and number == self.truncation.after:
                cut = self.truncation.cut(sequences)
                x_TD, sequences, attends = cut.move(x_TD), cut.sequences, {}
                if row_P is not None:
                    row_P = cut.row_T.at[row_P].get(mode="fill", fill_value=sequences.num_rows)
            selects = number + 1 == len(self.layers) and self._can_select(sequences)
            if row_P is not None and selects and reads_few(len(row_P), sequences.num_rows):
                call, used_p = self._of_rows(
                    mask, sequences, row_P, keys[number], x_TD.dtype, truncated=cut is not None
                )
                x_pD = self.run_layer(call, layer, x_TD, policy)
                return jnp.where(used_p[:, None], x_pD, 0), cut
            if mask not in attends:
                scale = self.divisor.scale(
                    sequences, sequences.rows.segment, truncated=cut is not None
                )
                attends[mask] = self.attend(sequences, mask, scale, x_TD.dtype)
            keys_T = row_keys(keys[number], sequences)
            call = functools.partial(Layer.__call__, attend=attends[mask], key=keys_T)
            x_TD = self.run_layer(call, layer, x_TD, policy)
        if row_P is not None:
            x_TD = sequences.shards.take(x_TD, row_P, sequences.num_rows)
        return x_TD, cut

    def _can_select(self, sequences: Sequences) -> bool:
        biased = self.layers[-1].bias is not None
        return self.attention == "silu" and not (biased and sequences.shards.context > 1)

    def _of_rows(
        self,
        mask: AttentionMask,
        sequences: Sequences,
        row_P: Int[Array, " P"],
        key: KeyOrNone,
        dtype: jnp.dtype,
        *,
        truncated: bool,
    ) -> tuple[CallLayer, Bool[Array, " p"]]:
        """How a layer is called for some rows, and which of this device's slice are rows."""
        shards, num_rows = sequences.shards, sequences.num_rows
        row_P = jnp.pad(row_P, (0, -len(row_P) % shards.context), constant_values=num_rows)
        row_p = shards.part(row_P)
        spec = self._spec(dtype)
        if spec.biased:
            segment_T = sequences.rows.segment
            scale = self.divisor.scale(sequences, segment_T, truncated=truncated)
            attend = self._scattered(mask, sequences, row_P, scale, spec)
        else:
            segment_P = Rows.of(sequences.offsets, row_P).segment
            scale = self.divisor.scale(sequences, segment_P, truncated=truncated)
            attend = self._visiting(mask, sequences, row_P, row_p, scale, spec)
        rows = Rows.of(sequences.offsets, row_p, *sequences.counts)
        call = functools.partial(
            Layer.of_rows,
            pick=lambda x_TD: shards.take(x_TD, row_P, num_rows),
            attend=attend,
            key=row_keys(key, sequences, rows),
        )
        return call, row_p < num_rows

    def _spec(self, dtype: jnp.dtype) -> AttentionSpec:
        """Of the attention calls of all layers."""
        layer = self.layers[0]
        sizes = (layer.heads, layer.qk_width, layer.v_width)
        return AttentionSpec(dtype, *sizes, layer.bias is not None)

    def _visiting(
        self,
        mask: AttentionMask,
        sequences: Sequences,
        row_P: Int[Array, " P"],
        row_p: Int[Array, " p"],
        scale: Scale,
        spec: AttentionSpec,
    ) -> AttendRows:
        """Queries alone, which visit every shard, whatever `parallel.strategy` is."""
        visiting = VisitingRows.of(
            self._view(sequences, mask),
            row_P,
            row_p,
            lambda plan: prepare_plan(plan, spec, self.implementation),
        )

        def attend(
            q_pHK: QHK,
            k_tHK: SHK,
            v_tHV: SHV,
            own: tuple[QHK, QHV],
            *,
            alpha: float,
            bias: RelativeBiasTables | None,
        ) -> QHV:
            return visiting(
                q_pHK,
                k_tHK,
                v_tHV,
                own,
                alpha=alpha,
                scale=scale,
                implementation=self.implementation,
            )

        return attend

    def _scattered(
        self,
        mask: AttentionMask,
        sequences: Sequences,
        row_P: Int[Array, " P"],
        scale: Scale,
        spec: AttentionSpec,
    ) -> AttendRows:
        """Queries in their places in the buffer, zeros between them: for a relative bias."""
        offsets, num_rows = sequences.offsets, sequences.num_rows
        plan = make_plan(mask, offsets, num_rows, *sequences.counts).for_rows(row_P)
        plan = prepare_plan(plan, spec, self.implementation)
        times_T = (jnp.asarray(sequences.time_T), jnp.asarray(sequences.next_time_T))

        def attend(
            q_PHK: QHK,
            k_THK: THK,
            v_THV: THV,
            own: tuple[QHK, QHV],
            *,
            alpha: float,
            bias: RelativeBiasTables | None,
        ) -> QHV:
            q_THK = jnp.zeros_like(k_THK).at[row_P].set(q_PHK, mode="drop")
            out_THV = hstu_attention(
                q_THK,
                k_THK,
                v_THV,
                offsets,
                mask=mask,
                num_targets=sequences.num_targets,
                num_contextual=sequences.num_contextual,
                alpha=alpha,
                scale=scale,
                bias=None if bias is None else bias.flat(*times_T),
                implementation=self.implementation,
                plan=plan,
            )
            return out_THV.at[row_P].get(mode="fill", fill_value=0)

        return attend

    @property
    def layer_masks(self) -> tuple[AttentionMask, ...]:
        """The mask of every layer."""
        return tuple(
            self.masks[min(number, len(self.masks) - 1)] for number in range(len(self.layers))
        )

    def attend(
        self, sequences: Sequences, mask: AttentionMask, scale: Scale, dtype: jnp.dtype
    ) -> Attend:
        """Attention over the sequences of a batch.

        Its plan is computed here, once for all layers of this mask.

        Args:
          scale: of `Divisor.scale`, for this device's rows.
        """
        if self.attention == "softmax":
            return lambda q, k, v, *, alpha, bias: published_softmax(
                q, k, v, sequences, bias=bias, length=self.length
            )
        times_t = sequences.shards.local((sequences.time_T, sequences.next_time_T))
        if self.attention == "masked_softmax":
            plan = make_plan(mask, sequences.offsets, sequences.num_rows, *sequences.counts)
            soft = jax.jit(functools.partial(softmax_attention, plan=plan), static_argnames="alpha")
            return lambda q, k, v, *, alpha, bias: soft(
                q, k, v, alpha=alpha, bias=None if bias is None else bias.flat(*times_t)
            )
        several, spec = sequences.shards.context > 1, self._spec(dtype)
        made = (self._over_devices if several else self._on_one_device)(sequences, mask, spec)
        made = functools.partial(made, scale=scale, implementation=self.implementation)
        # Traced and lowered once, not once a layer.
        run = jax.jit(made, static_argnames="alpha")

        def attend(
            q_THK: THK, k_THK: THK, v_THV: THV, *, alpha: float, bias: RelativeBiasTables | None
        ) -> THV:
            flat = None if bias is None else bias.flat(*times_t)
            return run(q_THK, k_THK, v_THV, alpha=alpha, bias=flat)

        return attend

    def _on_one_device(
        self, sequences: Sequences, mask: AttentionMask, spec: AttentionSpec
    ) -> functools.partial[Array]:
        plan = make_plan(
            mask, sequences.offsets, sequences.num_rows, *sequences.counts, longest=self.length
        )
        return functools.partial(
            hstu_attention,
            offsets=sequences.offsets,
            mask=mask,
            num_targets=sequences.num_targets,
            num_contextual=sequences.num_contextual,
            plan=prepare_plan(plan, spec, self.implementation),
        )

    def _over_devices(
        self, sequences: Sequences, mask: AttentionMask, spec: AttentionSpec
    ) -> functools.partial[Array]:
        strategy = strategy_named(sequences.shards.strategy_of(mask, spec.biased))
        view = self._view(sequences, mask)
        spec = spec._replace(heads=strategy.heads_of_a_call(view.layout, spec.heads))
        made = strategy.of(view, lambda plan: prepare_plan(plan, spec, self.implementation))
        return functools.partial(made, real_t=view.real_t)

    @staticmethod
    def _view(sequences: Sequences, mask: AttentionMask) -> ShardMask:
        return ShardMask(
            mask,
            sequences.shards.layout(sequences.num_rows),
            sequences.offsets,
            *sequences.counts,
            max_targets=sequences.max_targets,
            max_contextual=sequences.max_contextual,
        )


def reads_few(wanted: int | float, rows: int | float) -> bool:
    """Whether the last layer computes `wanted` rows of so many alone.

    Beside the rows, that moves them out of the buffer and back. At a quarter of them, every product
    of rows is a quarter of what it was.
    """
    return 4 * wanted <= rows
