"""The stack of HSTU layers: which rows each layer works on, who sees whom in it, and what its backward recomputes."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kernels.hstu_attention.api import (
    AttentionSpec,
    RelativeBias,
    hstu_attention,
    make_plan,
    prepare_plan,
)
from kernels.hstu_attention.plan import AttentionPlan
from kernels.mask import AttentionMask
from ultra_hstu.config import ModelConfig
from ultra_hstu.nn.dropout import KeyOrNone, row_keys, split_key
from ultra_hstu.nn.hstu_layer import Attend, ProductionLayer, ResearchLayer
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.nn.remat import Remat, checkpointed
from ultra_hstu.nn.softmax_ablation import softmax_attention
from ultra_hstu.nn.truncation import Cut, Truncation
from ultra_hstu.parallel import frame, parameters
from ultra_hstu.parallel.context_attention import attend_context, heads_of_a_call, plan_context
from ultra_hstu.parallel.mesh import CONTEXT
from ultra_hstu.parallel.shards import ONE, Shards
from ultra_hstu.sequences import Sequences


class HSTU(nnx.Module):
    """A stack of layers over flat jagged sequences of at most `length` rows; attention is divided by `length` (N), after a truncation too.

    In a mesh (`shards`), `x_TD` of the methods is this device's rows of the T, and so is what comes out.
    """

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
        shards: Shards = ONE,
        most: tuple[int, int] = (0, 0),
    ):
        """
        Args:
          masks: one for all layers, or one a layer.
          truncation: the layers from `truncation.after` on work on the rows that it keeps.
          remat: see `ultra_hstu.nn.remat`.
          most: targets and contextual tokens of a sequence, at most, where its rows lie on several devices.
        """
        self.layers = nnx.List(layers)
        self.length, self.masks, self.truncation = length, tuple(masks), truncation
        self.attention, self.implementation, self.remat = attention, implementation, remat
        self.shards, self.most = shards, most

    @staticmethod
    def from_config(
        config: ModelConfig,
        length: int,
        *,
        layers: int | None = None,
        extra_rows: int = 0,
        contextual: int = 0,
        shards: Shards = ONE,
        rngs: nnx.Rngs,
    ) -> "HSTU":
        """The stack of a configuration.

        Args:
          length: N.
          layers: depth, where it is not `config.layers`: options that hold a value a layer must hold one for each of these.
          extra_rows: most contextual tokens and targets of a sequence, together; truncation keeps room for them.
          contextual: most contextual tokens among them.

        Raises:
          ValueError: options that do not suit this depth.
        """
        depth = config.layers if layers is None else layers
        options: dict[str, Any] = dict(
            bias=None,
            dropout_rate=config.linear_dropout,
            precision=config.projection,
            chunk_rows=config.chunk_rows,
            rngs=rngs,
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
                raise ValueError(
                    f"model.truncate_after={config.truncate_after} must be below the number of layers, {depth}"
                )
            truncation = Truncation(
                config.truncate_after, config.truncate_length, extra_rows, shards
            )
        return HSTU(
            [layer() for _ in range(depth)],
            length,
            masks=layer_masks(config, depth),
            truncation=truncation,
            attention=config.attention,
            implementation=config.implementation,
            remat=config.remat,
            shards=shards,
            most=(extra_rows - contextual, contextual),
        )

    def __call__(
        self, x_TD: Float[Array, "T D"], sequences: Sequences, key: KeyOrNone = None
    ) -> Float[Array, "T D"]:
        """The sequences after all layers; rows of padding may hold anything, and what comes out there means nothing.

        With a truncation, rows that it dropped come out 0: leave them out of losses, see `kept`.

        Raises:
          NotImplementedError: a truncation of rows that lie on several devices: `rows` gives those that are needed.
        """
        x_SD, cut = self.encode_kept(x_TD, sequences, key)
        if cut is not None and self.shards.context > 1:
            raise NotImplementedError(
                f"all {cut.place_T.shape[0]} rows behind a truncation, over several devices: ask for some with `rows`"
            )
        return x_SD if cut is None else cut.restore(x_SD)

    def rows(
        self,
        x_TD: Float[Array, "T D"],
        sequences: Sequences,
        rows_P: Int[Array, " P"],
        key: KeyOrNone = None,
    ) -> Float[Array, "p D"]:
        """The rows `rows_P` of `__call__`, without a buffer of T rows above a truncation; numbers of T and more give zeros.

        In a mesh the P rows are divided among the devices, as `Shards.part` divides what belongs to them.
        """
        x_SD, cut = self.encode_kept(x_TD, sequences, key)
        num_rows = sequences.num_rows if cut is None else cut.sequences.num_rows
        place_P = (
            rows_P if cut is None else cut.place_T.at[rows_P].get(mode="fill", fill_value=num_rows)
        )
        return self.shards.take(x_SD, place_P, num_rows)

    def kept(self, sequences: Sequences) -> Bool[Array, " T"]:
        """The real rows that reach the last layer: contextual tokens, targets and the newest history rows; all, without a truncation."""
        return (
            jnp.asarray(sequences.real_T)
            if self.truncation is None
            else self.truncation.kept(sequences)
        )

    def encode_kept(
        self, x_TD: Float[Array, "T D"], sequences: Sequences, key: KeyOrNone = None
    ) -> tuple[Float[Array, "S D"], Cut | None]:
        """The rows that reach the last layer, after it, in a buffer of their own, and which they are (None: all)."""
        shards = self.shards
        x_TD = jnp.where(
            shards.real(sequences.offsets, sequences.num_rows)[:, None],
            x_TD,
            jnp.zeros((), x_TD.dtype),
        )
        cut: Cut | None = None
        attends: dict[AttentionMask, Attend] = {}
        for number, (layer, layer_key) in enumerate(
            zip(self.layers, split_key(key, len(self.layers)), strict=True)
        ):
            if self.truncation is not None and number == self.truncation.after:
                cut = self.truncation.cut(sequences)
                x_TD, sequences, attends = cut.move(x_TD, shards), cut.sequences, {}
            mask = self.layer_masks[number]
            if mask not in attends:
                attends[mask] = self.attend(sequences, mask, x_TD.dtype)
            row_T = shards.rows(sequences.num_rows)
            keys_T = row_keys(
                layer_key,
                sequences.offsets,
                row_T,
                shards.first_sequence(sequences.offsets.shape[0] - 1),
            )

            if shards.devices > 1:
                graph, params = nnx.split(layer)
                x_TD, params = parameters.in_order(x_TD, params)
                layer = nnx.merge(graph, params)

            def run(x_TD: Array, layer: Any, keys_T: Any, attend: Attend) -> Array:
                return parameters.whole(layer, x_TD.dtype, shards)(x_TD, attend, keys_T)

            run = functools.partial(run, layer=layer, keys_T=keys_T, attend=attends[mask])
            x_TD = checkpointed(run, self.remat, forget_weights=shards.fsdp)(x_TD)
        return x_TD, cut

    @property
    def layer_masks(self) -> tuple[AttentionMask, ...]:
        """The mask of every layer."""
        return tuple(
            self.masks[min(number, len(self.masks) - 1)] for number in range(len(self.layers))
        )

    def attend(self, sequences: Sequences, mask: AttentionMask, dtype: Any) -> Attend:
        """Attention over the sequences of a batch; its plan is computed here, once for all layers of this mask."""
        if self.attention == "softmax":
            return lambda q, k, v, *, alpha, bias: softmax_attention(
                q, k, v, sequences, bias=bias, length=self.length
            )
        if self.shards.context > 1:
            return self._attend_over_devices(sequences, mask, dtype)
        counts = (sequences.num_targets, sequences.num_contextual)
        plan = self._prepare(make_plan(mask, sequences.offsets, sequences.num_rows, *counts), dtype)

        @functools.partial(
            jax.jit, static_argnames="alpha"
        )  # traced and lowered once, not once a layer
        def run(
            q_THK: Array, k_THK: Array, v_THV: Array, bias: RelativeBias | None, *, alpha: float
        ) -> Array:
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

        def attend(
            q: Array, k: Array, v: Array, *, alpha: float, bias: RelativeBiasTables | None
        ) -> Array:
            flat = None if bias is None else bias.flat(sequences.time_T, sequences.next_time_T)
            return run(q, k, v, flat, alpha=alpha)

        return attend

    def _attend_over_devices(self, sequences: Sequences, mask: AttentionMask, dtype: Any) -> Attend:
        """The same where the rows lie on several devices."""
        shards, biased = self.shards, self.layers[0].bias is not None
        whole = frame.Sequences(
            sequences.offsets, sequences.num_targets, sequences.num_contextual, *self.most
        )
        strategy = shards.strategy_of(mask, biased)
        view = frame.Frame(whole, mask, shards.layout(sequences.num_rows), CONTEXT)
        heads = heads_of_a_call(strategy, view.layout, self.layers[0].heads)
        plan = plan_context(strategy, view, lambda plan: self._prepare(plan, dtype, heads))
        real_t, times_t = view.is_real(), shards.local((sequences.time_T, sequences.next_time_T))

        @functools.partial(jax.jit, static_argnames="alpha")
        def run(
            q_tHK: Array, k_tHK: Array, v_tHV: Array, bias: RelativeBias | None, *, alpha: float
        ) -> Array:
            options: dict[str, Any] = dict(
                real_t=real_t, scale=1.0 / self.length, implementation=self.implementation
            )
            return attend_context(plan, q_tHK, k_tHK, v_tHV, alpha=alpha, bias=bias, **options)

        def attend(
            q: Array, k: Array, v: Array, *, alpha: float, bias: RelativeBiasTables | None
        ) -> Array:
            return run(q, k, v, None if bias is None else bias.flat(*times_t), alpha=alpha)

        return attend

    def _prepare(self, plan: AttentionPlan, dtype: Any, heads: int | None = None) -> AttentionPlan:
        layer = self.layers[0]
        spec = AttentionSpec(
            dtype, heads or layer.heads, layer.qk_width, layer.v_width, layer.bias is not None
        )
        return prepare_plan(plan, spec, self.implementation)


def layer_masks(config: ModelConfig, layers: int) -> tuple[AttentionMask, ...]:
    """The mask of every layer, from `window`, `full_rows` and `prefix`: one value for all layers, or one a layer.

    A window longer than the sequences is a legal one: plain causal attention.

    Raises:
      ValueError: another number of values.
    """
    values = {name: getattr(config, name) for name in ("window", "full_rows", "prefix")}
    for name, given in values.items():
        if len(given) not in (0, 1, layers):
            raise ValueError(
                f"model.{name}={given} must hold one value, or one for each of {layers} layers"
            )

    def mask(number: int) -> AttentionMask:
        window, full_rows, prefix = (
            given[number % len(given)] if given else default
            for given, default in zip(values.values(), (-1, 0, 0), strict=True)
        )
        return AttentionMask(None if window == -1 else window, full_rows, prefix)

    return tuple(mask(number) for number in range(layers))
