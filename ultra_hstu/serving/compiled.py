"""A ranker taken apart once: its structure, its parameters, and the compiled functions of both."""

import functools
import hashlib
import operator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import KeyPath
from jaxtyping import Array, Float, Float32, Int, Int32

from kernels.jagged import Rows, offsets_to_lengths
from ultra_hstu import quantization
from ultra_hstu.nn import cached
from ultra_hstu.nn.cached import CachedRows, Implementation, TargetRows
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.key_values import CacheDtype
from ultra_hstu.parallel.parameters import is_matrix_of_layer
from ultra_hstu.quantization import HostKind, ItemTable
from ultra_hstu.ranking.form import Form
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.serving import tokens
from ultra_hstu.serving.artefact import padded
from ultra_hstu.serving.inputs import (
    ROW_SIZES,
    AnyArray,
    Candidates,
    UserHistory,
    bucket_size,
)
from ultra_hstu.step import Params

Channels = dict[str, tuple[CachedRows, ...]]


class CompiledRanker:
    """A `Ranker` as the functions of `ultra_hstu.serving` work with it.

    They take a `Ranker` too, and then make one of these at every call, which costs milliseconds.
    Later changes of the ranker's parameters are not seen here. The ranker itself is not held: with
    a table in host memory, drop it.
    """

    def __init__(self, model: Ranker, *, host_table: HostKind | None = None):
        """
        Args:
          host_table: None leaves the item table on the device. A kind keeps it in host memory, from
            where each request takes its rows.

        Raises:
          ValueError: a model that is no ranker, or a kind of table that is none.
        """
        if not isinstance(model, Ranker):
            raise ValueError(
                f"model must be a Ranker or a CompiledRanker, got {type(model).__name__}: "
                "candidates are scored by ranking runs"
            )
        if host_table is not None and model.embedding.item_features is not None:
            raise ValueError(
                "host_table keeps embeddings in host memory, and this model adds features to them: "
                "give what `RankRecipe.folded` makes of its parameters"
            )
        self.form, self.sizes, self.dtype = model.form, model.sizes, model.embedding.dtype
        graphdef, params = nnx.split(model)
        # Without arrays: they would be held beside the rounded ones.
        shapes: Ranker = nnx.merge(graphdef, jax.eval_shape(lambda: params))
        self.encoders = encoders_of(shapes)
        self.params = _rounded(params, model)
        self.table: ItemTable | None = None
        self._device_rows: Float32[Array, "R D"] | None = None
        if host_table is not None:
            self.table = quantization.host_table(model.embedding.item_table[...], host_table)
            self.params = _with_first_item_alone(self.params)
        self.programs = programs(graphdef)
        # Every update of the parameters replaces it, and it is small: it says whose cache one is.
        self.mark: Float[Array, ...] = model.head.output[...]
        self.signature = _signature(model)

    def take_items(
        self, *ids: Int32[AnyArray, "..."]
    ) -> tuple[Float32[Array, "R D"] | None, list[Int32[AnyArray, "..."]]]:
        """The rows of the items that a request names, each once, behind a row of padding, on the
        device, and the ids as numbers of these rows, from 1. With the whole table on the device:
        None, and the ids."""
        if self.table is None:
            return None, list(ids)
        item_R, number_T = np.unique(np.concatenate(ids), return_inverse=True)
        numbers_T = number_T.reshape(-1).astype(np.int32) + 1
        parts = np.split(numbers_T, np.cumsum([len(part) for part in ids])[:-1])
        return self._on_device(item_R), [*parts]

    def reserve_items(self, rows: int) -> None:
        """From now on requests name at most so many different items: their rows travel to one
        buffer on the device, so that nothing but the copy is compiled for their number. Compiles
        the copies. Without a table in host memory nothing is done."""
        if self.table is None:
            return
        size = bucket_size(min(rows, self.table.shape[0]), ROW_SIZES)
        self._device_rows = self._no_rows(size)
        count = 1
        while count <= size:
            wide = bucket_size(count, ROW_SIZES)
            self._on_device(np.zeros(wide, np.int64))
            count = wide + 1

    def _on_device(self, item_N: Int[np.ndarray, " N"]) -> Float32[Array, "R D"]:
        assert self.table is not None
        size = bucket_size(len(item_N), ROW_SIZES)
        packed = quantization.take(self.table, item_N)
        rows = jax.tree.map(lambda leaf: padded(leaf, size), packed)
        if self._device_rows is None:
            return _filled(self._no_rows(size), rows)
        self._device_rows = _filled(self._device_rows, rows)
        return self._device_rows

    def _no_rows(self, size: int) -> Float32[Array, "R D"]:
        assert self.table is not None
        return jnp.zeros((size + 1, self.table.shape[1]))


@functools.partial(jax.jit, donate_argnums=0)
def _filled(table_RD: Float32[Array, "R D"], rows: ItemTable) -> Float32[Array, "R D"]:
    """The table with other rows behind row 0, which is padding."""
    return jax.lax.dynamic_update_slice(table_RD, quantization.dense(rows), (1, 0))


def encoders_of(model: Ranker) -> dict[str, HSTU]:
    """The stacks of a ranker by channel, in the order that the head reads them in.

    Raises:
      NotImplementedError: one that keeps nothing of a history, as `cached.require_sums`.
    """
    return {name: cached.require_sums(model.encoders[name]) for name in sorted(model.encoders)}


def compiled(model: Ranker | CompiledRanker) -> CompiledRanker:
    """The model itself, or one that is compiled anew."""
    return model if isinstance(model, CompiledRanker) else CompiledRanker(model)


def count_programs(*functions: jax.stages.Wrapped) -> int:
    """How many programs these functions have been compiled to."""
    return sum(map(operator.methodcaller("_cache_size"), functions))


@functools.lru_cache(maxsize=16)
def programs(graphdef: nnx.GraphDef) -> "Programs":
    """Models of one structure share their compiled functions."""
    return Programs(graphdef)


class Programs:
    """The compiled functions of a structure. Each is compiled once for each bucket."""

    def __init__(self, graphdef: nnx.GraphDef):
        self._graphdef = graphdef
        self.encode = jax.jit(self._encode, static_argnames=("name", "kind"))
        self.extend = jax.jit(
            self._extend,
            static_argnames=("name", "new_rows", "kept_rows", "kind", "implementation"),
        )
        self.score = jax.jit(self._score, static_argnames=("step", "implementation"))
        self.best = jax.jit(_best, static_argnames="k")

    def model(self, params: Params, table_RD: Float32[Array, "R D"] | None) -> Ranker:
        """The ranker, with the item rows of a request for a table if there are such."""
        model = nnx.merge(self._graphdef, params)
        if table_RD is not None:
            model.embedding.item_table = nnx.Param(table_RD)
        return model

    def _encode(
        self,
        params: Params,
        history: UserHistory,
        used_B: Int[Array, " B"],
        table_RD: Float32[Array, "R D"] | None,
        *,
        name: str,
        kind: CacheDtype,
    ) -> tuple[CachedRows, ...]:
        model = self.model(params, table_RD)
        rows_of = tokens.history_tokens(model.form, history, used_B, name)
        return cached.encode(
            encoders_of(model)[name],
            model.input(name, rows_of),
            rows_of.sequences,
            contextual=model.form.contextual,
            kind=kind,
        )

    def _extend(
        self,
        params: Params,
        old: tuple[CachedRows, ...],
        history: UserHistory,
        used_B: Int[Array, " B"],
        keep_B: Int[Array, " B"],
        keep_kept_B: Int[Array, " B"],
        table_RD: Float32[Array, "R D"] | None,
        *,
        name: str,
        new_rows: int,
        kept_rows: int,
        kind: CacheDtype,
        implementation: Implementation,
    ) -> tuple[CachedRows, ...]:
        model = self.model(params, table_RD)
        rows_of = tokens.history_tokens(model.form, history, used_B, name)
        suffix = cached.suffix_of(rows_of.sequences, keep_B, new_rows)
        return cached.extend(
            encoders_of(model)[name],
            old,
            rows_of.sequences,
            model.input(name, tokens.token_rows(rows_of, suffix.row_R, suffix.offsets[-1])),
            keep_B,
            keep_kept_B,
            kept_rows=kept_rows,
            kind=kind,
            implementation=implementation,
        )

    def _score(
        self,
        params: Params,
        channels: Channels,
        candidates: Candidates,
        table_RD: Float32[Array, "R D"] | None,
        *,
        step: int,
        implementation: Implementation,
    ) -> Float32[Array, "C K"]:
        """Logits of all candidates, `step` of them at a time; rows of padding hold anything."""
        model = self.model(params, table_RD)
        dense = {
            name: tuple(part.unpacked(model.embedding.dtype) for part in parts)
            for name, parts in channels.items()
        }
        behind = {name: events_behind(model.form, parts[0]) for name, parts in channels.items()}
        size, signals = candidates.item_C.shape[0], len(model.sizes.signals)
        user_C = Rows.of(candidates.offsets, size).segment
        rows_C = (
            candidates.item_C,
            candidates.feature_CF,
            candidates.time_C,
            candidates.slot_C,
            user_C,
        )

        def score(i: Int[Array, ""], logit_CK: Float[Array, "C K"]) -> Float[Array, "C K"]:
            item_R, feature_RF, time_R, slot_R, user_R = (
                jax.lax.dynamic_slice_in_dim(jnp.asarray(x), i * step, step) for x in rows_C
            )
            outputs = []
            for name, encoder in encoders_of(model).items():
                events_B, last_B = behind[name]
                behind_R = (events_B[user_R], last_B[user_R])
                targets = tokens.target_tokens(
                    model.form, item_R, feature_RF, time_R, signals, *behind_R
                )
                x_RD = cached.targets(
                    encoder,
                    dense[name],
                    model.input(name, targets),
                    TargetRows(user_R, slot_R, time_R),
                    implementation=implementation,
                )
                outputs.append(x_RD)
            logit_RK = model.head(jnp.concatenate(outputs, axis=1))
            return jax.lax.dynamic_update_slice_in_dim(logit_CK, logit_RK, i * step, 0)

        logit_CK = jnp.zeros((size, len(model.sizes.kinds)), jnp.float32)
        if size == step:
            return score(jnp.int32(0), logit_CK)
        # As many steps as there are candidates for: a bucket costs memory, not time.
        steps = -(-jnp.asarray(candidates.offsets)[-1] // step)
        return jax.lax.fori_loop(0, steps, score, logit_CK)


def events_behind(form: Form, part: CachedRows) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many events each history holds, and the time of its newest, 0 without any."""
    frame = part.frame
    row_B = offsets_to_lengths(frame.offsets)
    if frame.num_contextual is not None:
        row_B -= jnp.asarray(frame.num_contextual)
    last_B = jnp.asarray(frame.time_T)[jnp.maximum(jnp.asarray(frame.offsets)[1:] - 1, 0)]
    return row_B // form.per_event, jnp.where(row_B > 0, last_B, 0)


def _best(
    logit_CK: Float[Array, "C K"],
    weight_K: Float[Array, " K"],
    offsets: Int[Array, " B1"],
    *,
    k: int,
) -> tuple[Int[Array, "B k"], Float[Array, "B k"]]:
    """The k best candidates of each user: their positions among them, -1 where there are fewer, and
    their weighted logits."""
    size, count_B = logit_CK.shape[0], offsets_to_lengths(offsets)
    # Task by task: in a matrix product equal logits could have sums that differ by rounding.
    value_C = functools.reduce(operator.add, logit_CK.T * weight_K[:, None])
    # Padding comes behind all users; the order is stable: of equal ones the first.
    at = Rows.of(offsets, size)
    order_C = jnp.lexsort((-value_C, at.segment, ~at.real))
    position_BK = offsets[:-1, None] + jnp.arange(k, dtype=jnp.int32)[None, :]
    here_BK = jnp.arange(k, dtype=jnp.int32)[None, :] < count_B[:, None]
    best_BK = order_C[jnp.minimum(position_BK, size - 1)].astype(jnp.int32)
    return (
        jnp.where(here_BK, best_BK - offsets[:-1, None], -1),
        jnp.where(here_BK, value_C[best_BK], -jnp.inf),
    )


def _rounded(params: Params, model: Ranker) -> Params:
    """Parameters with the matrices of layers in the dtype that layers compute in.

    They would be rounded to it in every step, which takes a step of few candidates as long as their
    products. fp8 rounds the float32 ones.
    """
    layers = [layer for encoder in encoders_of(model).values() for layer in encoder.layers]
    if any(layer.precision != "same" for layer in layers):
        return params

    def rounded(path: KeyPath, leaf: nnx.Variable) -> nnx.Variable:
        if not is_matrix_of_layer(path, leaf):
            return leaf
        return leaf.replace(leaf[...].astype(model.embedding.dtype))

    return jax.tree_util.tree_map_with_path(
        rounded, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def _with_first_item_alone(params: Params) -> Params:
    """Parameters whose item table has only row 0: the others are in host memory."""
    leaves = [
        (path, leaf.replace(leaf[...][:1]) if path == ("embedding", "item_table") else leaf)
        for path, leaf in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(leaves)


def _signature(model: Ranker) -> str:
    """What decides the meaning of a cache, besides the parameters."""
    said = [repr(model.form), repr(model.sizes), str(model.embedding.dtype)]
    for name, encoder in encoders_of(model).items():
        said.append(repr((name, encoder.divisor, encoder.layer_masks, encoder.truncation)))
        for layer in encoder.layers:
            sizes = (layer.heads, layer.qk_width, layer.v_width, layer.alpha, layer.precision)
            said.append(repr((type(layer).__name__, sizes)))
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
