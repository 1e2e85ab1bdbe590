"""A ranker taken apart once: its structure, its parameters, and the compiled functions of both."""

import dataclasses
import functools
import hashlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.jagged import Rows, offsets_to_lengths
from ultra_hstu.nn import cached
from ultra_hstu.nn.cached import EncodedHistory, TargetRows
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.key_values import Kind
from ultra_hstu.parallel.parameters import is_matrix_of_layer
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.serving import host_tables, tokens
from ultra_hstu.serving.host_tables import HostTable
from ultra_hstu.serving.inputs import Candidates
from ultra_hstu.serving.tokens import PaddedHistory

Params = Any  # nnx.State of nnx.Param


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Channel:
    """The encoded histories of one channel."""

    encoded: EncodedHistory
    events_B: Any  # int32 [B]: how many events it holds of each user
    last_B: Any  # int32 [B]: time of the newest


class FrozenRanker:
    """A `Ranker` as the functions of `ultra_hstu.serving` work with it. They take a `Ranker` too, and then do this at every call, which costs
    milliseconds. Later changes of the ranker's parameters are not seen here, and the ranker itself is not held: with a table in host memory, drop it.
    """

    def __init__(self, model: Any, *, item_table: Literal["device"] | host_tables.Kind = "device"):
        """
        Args:
          item_table: where the item table is: on the device, or in host memory as one of `host_tables.KINDS`, from where each request takes its rows.

        Raises:
          ValueError: a model that is no ranker, or a kind of table that is none.
        """
        if not isinstance(model, Ranker):
            raise ValueError(
                f"model must be a Ranker or a FrozenRanker, got {type(model).__name__}: candidates are scored by ranking runs"
            )
        self.form, self.sizes = model.form, model.sizes
        graphdef, params = nnx.split(model)
        shapes: Ranker = nnx.merge(
            graphdef, jax.eval_shape(lambda: params)
        )  # without arrays, which would be held beside the rounded ones
        self.encoders: dict[str, HSTU] = {
            name: shapes.encoders[name] for name in sorted(shapes.encoders)
        }  # for their masks and sizes
        self.params = _rounded(params, model)
        self.table: HostTable | None = None
        if item_table != "device":
            path = ("embedding", "item_table")
            leaves = nnx.to_flat_state(self.params)
            self.table = HostTable.of(model.embedding.item_table[...], item_table)
            self.params = nnx.from_flat_state(
                [
                    (key, leaf.replace(leaf[...][:1]) if key == path else leaf)
                    for key, leaf in leaves
                ]
            )
        self.programs = programs(graphdef)
        # What every update of the parameters replaces, and small: whose cache is it?
        self.mark: jax.Array = model.head.output[...]
        self.signature = _signature(model)


def frozen(model: Any) -> FrozenRanker:
    return model if isinstance(model, FrozenRanker) else FrozenRanker(model)


@functools.lru_cache(maxsize=16)
def programs(graphdef: nnx.GraphDef) -> "Programs":
    """Models of one structure share their compiled functions."""
    return Programs(graphdef)


class Programs:
    """The compiled functions of a structure. Sizes of their arguments are those of capacity classes: each is compiled once a class."""

    def __init__(self, graphdef: nnx.GraphDef):
        self._graphdef = graphdef
        self.encode = jax.jit(self._encode, static_argnames=("name", "rows", "kind"))
        self.extend = jax.jit(
            self._extend,
            static_argnames=("name", "rows", "new_rows", "kept_rows", "kind", "implementation"),
        )
        self.score = jax.jit(self._score, static_argnames=("step", "implementation"))
        self.best = jax.jit(_best, static_argnames="k")

    def model(self, params: Params, table: Any) -> Ranker:
        """The ranker, with the item rows of a request for a table if there are such."""
        model = nnx.merge(self._graphdef, params)
        if table is not None:
            model.embedding.item_table = nnx.Param(host_tables.unpacked(table))
        return model

    def _encode(
        self,
        params: Params,
        request: PaddedHistory,
        table: Any,
        *,
        name: str,
        rows: int,
        kind: Kind,
    ) -> Channel:
        model = self.model(params, table)
        history = tokens.history_tokens(model.form, request, name, rows)
        x_TD = model.embedding(history)
        encoded = cached.encode(
            model.encoders[name],
            x_TD,
            history.sequences,
            contextual=model.form.contextual,
            kind=kind,
        )
        return Channel(encoded, *tokens.last_event(request, name))

    def _extend(
        self,
        params: Params,
        old: Channel,
        request: PaddedHistory,
        keep_B: Int[Array, " B"],
        keep_kept_B: Int[Array, " B"],
        table: Any,
        *,
        name: str,
        rows: int,
        new_rows: int,
        kept_rows: int,
        kind: Kind,
        implementation: Any,
    ) -> Channel:
        model = self.model(params, table)
        history = tokens.history_tokens(model.form, request, name, rows)
        suffix = cached.suffix_of(history.sequences, keep_B, new_rows)
        x_RD = model.embedding(tokens.token_rows(history, suffix.row_R, suffix.offsets[-1]))
        options: dict[str, Any] = dict(
            kept_rows=kept_rows, kind=kind, implementation=implementation
        )
        encoded = cached.extend(
            model.encoders[name],
            old.encoded,
            history.sequences,
            x_RD,
            keep_B,
            keep_kept_B,
            **options,
        )
        return Channel(encoded, *tokens.last_event(request, name))

    def _score(
        self,
        params: Params,
        channels: dict[str, Channel],
        candidates: Candidates,
        table: Any,
        *,
        step: int,
        implementation: Any,
    ) -> Float[Array, "C K"]:
        """Logits of all candidates, `step` of them at a time; rows of padding hold anything."""
        model = self.model(params, table)
        dense = {
            name: channel.encoded.unpacked(model.embedding.dtype)
            for name, channel in channels.items()
        }
        size = candidates.item_C.shape[0]
        user_C = Rows.of(candidates.offsets, size).segment
        rows_C = (
            candidates.item_C,
            candidates.feature_CF,
            candidates.time_C,
            candidates.slot_C,
            user_C,
        )
        signals = len(model.sizes.signals)

        def score(i: Array, logit_CK: Array) -> Array:
            item_R, feature_RF, time_R, slot_R, user_R = (
                jax.lax.dynamic_slice_in_dim(jnp.asarray(x), i * step, step) for x in rows_C
            )
            outputs = []
            for name in sorted(channels):
                channel = channels[name]
                behind = channel.events_B[user_R], channel.last_B[user_R]
                targets = tokens.target_tokens(
                    model.form, item_R, feature_RF, time_R, signals, *behind
                )
                rows = TargetRows(user_R, slot_R, time_R)
                x_RD = model.embedding(targets)
                outputs.append(
                    cached.targets(
                        model.encoders[name], dense[name], x_RD, rows, implementation=implementation
                    )
                )
            logit_RK = model.head(jnp.concatenate(outputs, axis=1))
            return jax.lax.dynamic_update_slice_in_dim(logit_CK, logit_RK, i * step, 0)

        logit_CK = jnp.zeros((size, len(model.sizes.kinds)))
        if size == step:
            return score(jnp.int32(0), logit_CK)
        # As many steps as there are candidates for: a class costs memory, not time.
        steps = -(-jnp.asarray(candidates.offsets)[-1] // step)
        return jax.lax.fori_loop(0, steps, score, logit_CK)


def _best(
    logit_CK: Float[Array, "C K"], weight_K: Float[Array, " K"], offsets: Any, *, k: int
) -> tuple[Array, Array]:
    """The k best candidates of each user: their places among them, -1 where there are fewer, and their weighted logits."""
    offsets = jnp.asarray(offsets)
    size, count_B = logit_CK.shape[0], offsets_to_lengths(offsets)
    value_C = logit_CK @ weight_K
    # Padding comes behind all users; the order is stable: of equal ones the first.
    at = Rows.of(offsets, size)
    order_C = jnp.lexsort((-value_C, at.segment, ~at.real))
    place_BK = offsets[:-1, None] + jnp.arange(k, dtype=jnp.int32)[None, :]
    here_BK = jnp.arange(k)[None, :] < count_B[:, None]
    best_BK = order_C[jnp.minimum(place_BK, size - 1)].astype(jnp.int32)
    return jnp.where(here_BK, best_BK - offsets[:-1, None], -1), jnp.where(
        here_BK, value_C[best_BK], -jnp.inf
    )


def _rounded(params: Params, model: Ranker) -> Params:
    """Parameters with the matrices of layers in the dtype that layers compute in. They would be rounded to it in every step, which takes a step of few
    candidates as long as their products. fp8 rounds the float32 ones.
    """
    if any(
        layer.precision != "same" for encoder in model.encoders.values() for layer in encoder.layers
    ):
        return params

    def rounded(path: Any, leaf: Any) -> Any:
        return (
            leaf.replace(leaf[...].astype(model.embedding.dtype))
            if is_matrix_of_layer(path, leaf)
            else leaf
        )

    return jax.tree_util.tree_map_with_path(
        rounded, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def _signature(model: Ranker) -> str:
    """What decides the meaning of a cache, besides the parameters."""
    parts: list[Any] = [model.form, model.sizes, str(model.embedding.dtype)]
    for name in sorted(model.encoders):
        encoder = model.encoders[name]
        sizes = [
            (
                type(layer).__name__,
                layer.heads,
                layer.qk_width,
                layer.v_width,
                layer.alpha,
                layer.precision,
            )
            for layer in encoder.layers
        ]
        parts.append((name, encoder.length, encoder.layer_masks, encoder.truncation, sizes))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
