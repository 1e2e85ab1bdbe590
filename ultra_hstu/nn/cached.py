"""An HSTU stack over histories that are encoded once: their keys and values, what targets add to
them, and how they grow.

This is M-FALCON (HSTU, arXiv 2402.17152, algorithm 1). Nothing in a history depends on the targets
behind it, and a target sees the history and itself. So with the keys and values of every layer at
hand, targets are rows of their own, in any order and as many at a time as one likes. A layer does
not notice: it calls `attend`, as always.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from kernels.cached_attention import cached_attention
from kernels.hstu_attention import RelativeBias
from kernels.jagged import Rows, lengths_to_offsets, offsets_to_lengths
from kernels.mask import AttentionMask, KeyIntervals
from kernels.typing import RHK, RHV, SHK, SHV, THK, THV, Leaf, PositionTable, Scale, TimeTable
from ultra_hstu.nn.encoder import Encoder
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.hstu_layer import Attend
from ultra_hstu.nn.key_values import CacheDtype, KeyValues, pack
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.sequences import Sequences

Implementation = str | Sequence[str] | None  # of `kernels.cached_attention`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedRows:
    """Keys and values of B histories in layers that share their rows. Flat and jagged; no targets.

    Encoded histories are a tuple of these: one without a truncation, else those below it and those
    above it.

    Attributes:
      frame: whose each row is, and when it happened.
      layers: keys and values, one entry a layer, [S, H, width].
      input_SD: what enters the first layer, kept above a truncation, where a history grows from it.
      pool_S: of rows that a server keeps in a pool on the device, where they are; `layers` is then
        empty.
    """

    frame: Sequences
    layers: tuple[KeyValues, ...]
    input_SD: Leaf[Float[Array, "S D"] | None] = None
    pool_S: Leaf[Int[Array | np.ndarray, " S"] | None] = None

    def unpacked(self, dtype: DTypeLike) -> "CachedRows":
        """The rows in a dtype to compute with."""
        return dataclasses.replace(
            self, layers=tuple(KeyValues(*layer.unpacked(dtype)) for layer in self.layers)
        )


class TargetRows(NamedTuple):
    """Where targets stand: behind the history of a user. Padding may hold anything in range."""

    user_R: Int[Array, " R"]
    slot_R: Int[Array, " R"]  # position among the user's targets; a relative bias alone reads it
    time_R: Int[Array, " R"]  # seconds; a relative bias alone reads it


def require_sums(encoder: Encoder) -> HSTU:
    """The stack itself, if targets can add to what is kept of a history.

    Raises:
      NotImplementedError: DIN, and softmax attention.
    """
    if isinstance(encoder, HSTU) and encoder.attention == "silu":
        return encoder
    what = f"attention={encoder.attention!r}" if isinstance(encoder, HSTU) else "kind='din'"
    raise NotImplementedError(
        f"model.{what} has no cached keys and values that candidates add to: it is a baseline, "
        "trained and evaluated, and neither served nor exported; use model.kind='hstu' with "
        "model.attention='silu'"
    )


def encode(
    encoder: HSTU,
    x_TD: Float[Array, "T D"],
    sequences: Sequences,
    *,
    contextual: int,
    kind: CacheDtype = "same",
) -> tuple[CachedRows, ...]:
    """Runs the stack over histories and keeps what targets will need; the last layer only makes its
    keys and values.

    Args:
      sequences: without targets; `num_contextual` None if there are none.
      contextual: most contextual tokens of a sequence.
      kind: dtype of the cache. Keys and values are rounded after use: each layer works on what the
        model computed.
    """
    x_TD = jnp.where(sequences.rows.real[:, None], x_TD, jnp.zeros((), x_TD.dtype))
    truncation = encoder.truncation
    parts: list[CachedRows] = []
    input_SD: Float[Array, "S D"] | None = None
    layers: list[KeyValues] = []
    attends: dict[AttentionMask, Attend] = {}
    for number, (layer, mask) in enumerate(zip(encoder.layers, encoder.layer_masks, strict=True)):
        if truncation is not None and number == truncation.after:
            parts.append(CachedRows(sequences, tuple(layers)))
            cut = truncation.cut(sequences, extra_rows=contextual)
            x_TD, sequences = cut.take(x_TD), cut.sequences
            input_SD, layers, attends = x_TD, [], {}
        if number + 1 == len(encoder.layers):
            layers.append(pack(*layer.keys_and_values(x_TD), kind))
            break
        if mask not in attends:
            scale = encoder.divisor.scale(
                sequences, sequences.rows.segment, truncated=input_SD is not None
            )
            attends[mask] = encoder.attend(sequences, mask, scale, x_TD.dtype)

        def attend(
            q: THK,
            k: THK,
            v: THV,
            *,
            alpha: float,
            bias: RelativeBiasTables | None,
            inner: Attend = attends[mask],
            layers: list[KeyValues] = layers,
        ) -> THV:
            layers.append(pack(k, v, kind))
            return inner(q, k, v, alpha=alpha, bias=bias)

        x_TD = layer(x_TD, attend=attend)
    return (*parts, CachedRows(sequences, tuple(layers), input_SD))


def targets(
    encoder: HSTU,
    encoded: tuple[CachedRows, ...],
    x_RD: Float[Array, "R D"],
    rows: TargetRows,
    *,
    implementation: Implementation = None,
) -> Float[Array, "R D"]:
    """Targets after all layers: the rows that a full pass over histories with these targets behind
    them gives, to rounding.

    Args:
      encoded: unpacked in the dtype of x.
    """
    layers = iter(zip(encoder.layers, encoder.layer_masks, strict=True))
    for place, part in enumerate(encoded):
        frame = part.frame
        scale = encoder.divisor.scale(frame, rows.user_R, truncated=place > 0)
        behind_R = offsets_to_lengths(frame.offsets)[rows.user_R]
        at = Rows.at(frame.offsets, rows.user_R, behind_R, None, frame.num_contextual)
        at = at._replace(real=jnp.ones_like(at.real))
        position_R = at.start + behind_R + rows.slot_R
        runs: dict[AttentionMask, _CachedAttention] = {}
        for kv in part.layers:
            layer, mask = next(layers)
            if mask not in runs:
                keys = mask.keys_of(at)
                runs[mask] = _CachedAttention(
                    keys, position_R, frame.time_T, rows.time_R, scale, implementation
                )

            def attend(
                q: RHK,
                k: RHK,
                v: RHV,
                *,
                alpha: float,
                bias: RelativeBiasTables | None,
                run: _CachedAttention = runs[mask],
                kv: KeyValues = kv,
            ) -> RHV:
                return run(q, kv.k_SHK, kv.v_SHV, (k, v), alpha=alpha, bias=bias)

            x_RD = layer(x_RD, attend=attend)
    return x_RD


def extend(
    encoder: HSTU,
    old: tuple[CachedRows, ...],
    whole: Sequences,
    x_RD: Float[Array, "R D"],
    keep_B: Int[Array, " B"],
    keep_kept_B: Int[Array, " B"],
    *,
    kept_rows: int,
    kind: CacheDtype = "same",
    implementation: Implementation = None,
) -> tuple[CachedRows, ...]:
    """Longer histories: the first `keep_B` rows of each stay as they were, what follows is computed
    anew. No contextual tokens.

    Exact if nothing that the rows before `keep_B` saw has changed: see `serving.score.growth`.
    It costs the new rows of a layer, and a copy of what is kept.

    Args:
      old: the histories before.
      whole: the frame of the longer histories.
      x_RD: input of the stack for the rows of `suffix_of(whole, keep_B, R)`.
      keep_kept_B: the rows that stay above a truncation, counted among those that it keeps; 0 where
        the kept rows begin later than before.
      kept_rows: size of the buffer of rows that are computed anew above a truncation.
    """
    truncation = encoder.truncation
    layers = list(zip(encoder.layers, encoder.layer_masks, strict=True))

    def run(
        number: int,
        before: CachedRows,
        frame: Sequences,
        suffix: Suffix,
        source: _Source,
        x_RD: Float[Array, "R D"],
    ) -> tuple[Float[Array, "R D"], tuple[KeyValues, ...]]:
        """The layers from a number on that share the rows of `before`."""
        grown: list[KeyValues] = []
        scale = encoder.divisor.scale(frame, suffix.rows.segment, truncated=number > 0)
        runs: dict[AttentionMask, _CachedAttention] = {}
        for (layer, mask), kv in zip(layers[number:], before.layers, strict=False):

            def grow(k: RHK, v: RHV, kv: KeyValues = kv) -> KeyValues:
                grown.append(jax.tree.map(source.merge, kv, pack(k, v, kind)))
                return grown[-1]

            if number + len(grown) + 1 == len(layers):
                grow(*layer.keys_and_values(x_RD))
                break
            if mask not in runs:
                runs[mask] = _CachedAttention(
                    _with_own(mask.keys_of(suffix.rows), suffix),
                    suffix.row_R,
                    frame.time_T,
                    jnp.asarray(frame.next_time_T)[suffix.row_R],
                    scale,
                    implementation,
                )

            def attend(
                q: RHK,
                k: RHK,
                v: RHV,
                *,
                alpha: float,
                bias: RelativeBiasTables | None,
                run: _CachedAttention = runs[mask],
                grow: Callable[[Array, Array], KeyValues] = grow,
            ) -> RHV:
                return run(q, *grow(k, v).unpacked(q.dtype), None, alpha=alpha, bias=bias)

            x_RD = layer(x_RD, attend=attend)
        return x_RD, tuple(grown)

    below = old[0]
    suffix = suffix_of(whole, keep_B, x_RD.shape[0])
    none_B = jnp.zeros_like(keep_B)
    source = _source(below.frame, whole, keep_B, suffix, none_B, none_B)
    x_RD, grown = run(0, below, whole, suffix, source, x_RD)
    first = CachedRows(whole, grown)
    if truncation is None:
        return (first,)
    above, kept = old[1], truncation.cut(whole, extra_rows=0).sequences
    # What enters the layers above: old rows from where they are kept, new ones from below.
    before_B = offsets_to_lengths(below.frame.offsets) - offsets_to_lengths(above.frame.offsets)
    after_B = offsets_to_lengths(whole.offsets) - offsets_to_lengths(kept.offsets)
    entering = _source(above.frame, kept, keep_B, suffix, before_B, after_B)
    assert above.input_SD is not None
    input_SD = entering.merge(above.input_SD, x_RD)
    again = suffix_of(kept, keep_kept_B, kept_rows)
    source = _source(above.frame, kept, keep_kept_B, again, none_B, none_B)
    _, grown = run(truncation.after, above, kept, again, source, input_SD[again.row_R])
    return first, CachedRows(kept, grown, input_SD)


class Suffix(NamedTuple):
    """The R rows of longer histories that are computed anew."""

    offsets: Int[Array, " B1"]
    rows: Rows  # in the frame
    row_R: Int[Array, " R"]  # their numbers in the frame, 0 on padding


class _Source(NamedTuple):
    """Where each row of a new buffer comes from."""

    is_old_S: Bool[Array, " S"]
    old_S: Int[Array, " S"]
    new_S: Int[Array, " S"]

    def merge(
        self, old: Shaped[Array, "Old ..."], new: Shaped[Array, "New ..."]
    ) -> Shaped[Array, "S ..."]:
        old_rows = jnp.take(old, self.old_S, axis=0, mode="clip")
        new_rows = jnp.take(new, self.new_S, axis=0, mode="clip").astype(old.dtype)
        is_old = jnp.expand_dims(self.is_old_S, tuple(range(1, old.ndim)))
        return jnp.where(is_old, old_rows, new_rows)


class _CachedAttention:
    """Attention of given rows to a cache. It is traced and lowered once, not once a layer."""

    def __init__(
        self,
        keys: KeyIntervals,
        position_R: Int[Array, " R"],
        time_S: Int[Array | np.ndarray, " S"],
        time_R: Int[Array, " R"],
        scale: Scale,
        implementation: Implementation,
    ):
        def run(
            q: RHK,
            k: SHK,
            v: SHV,
            own: tuple[RHK, RHV] | None,
            tables: tuple[PositionTable, TimeTable | None] | None,
            *,
            alpha: float,
        ) -> RHV:
            bias = None if tables is None else RelativeBias(*tables, jnp.asarray(time_S), time_R)
            return cached_attention(
                q,
                k,
                v,
                keys,
                alpha=alpha,
                scale=scale,
                own=own,
                bias=bias,
                place_R=position_R,
                implementation=implementation,
            )

        self._run = jax.jit(run, static_argnames="alpha")

    def __call__(
        self,
        q: RHK,
        k: SHK,
        v: SHV,
        own: tuple[RHK, RHV] | None,
        *,
        alpha: float,
        bias: RelativeBiasTables | None,
    ) -> RHV:
        tables = None if bias is None else bias.values
        return self._run(q, k, v, own, tables, alpha=alpha)


def suffix_of(frame: Sequences, keep_B: Int[Array, " B"], rows: int) -> Suffix:
    """The rows from `keep_B` on of every sequence, side by side in a buffer of `rows`."""
    offsets = jnp.asarray(lengths_to_offsets(offsets_to_lengths(frame.offsets) - keep_B))
    own = Rows.of(offsets, rows)
    at = Rows.at(frame.offsets, own.segment, own.position + keep_B[own.segment])
    return Suffix(offsets, at, jnp.where(at.real, at.start + at.position, 0))


def _source(
    old: Sequences,
    new: Sequences,
    keep_B: Int[Array, " B"],
    suffix: Suffix,
    old_first_B: Int[Array, " B"],
    new_first_B: Int[Array, " B"],
) -> _Source:
    """Where the rows of `new` come from: the first `keep_B` of each sequence from `old`.

    Args:
      old_first_B, new_first_B: position of the first row that a frame holds of each sequence.
    """
    segment_S = new.rows.segment
    position_S = new.rows.position + new_first_B[segment_S]
    keep_S = keep_B[segment_S]
    old_S = jnp.asarray(old.offsets)[segment_S] + position_S - old_first_B[segment_S]
    return _Source(position_S < keep_S, old_S, suffix.offsets[segment_S] + position_S - keep_S)


def _with_own(keys: KeyIntervals, suffix: Suffix) -> KeyIntervals:
    """Intervals of history rows that hold the row itself: the near one ends just before it."""
    lo1 = jnp.where(keys.hi1 > keys.lo1, keys.lo1, suffix.row_R)
    return keys._replace(lo1=lo1, hi1=jnp.where(suffix.rows.real, suffix.row_R + 1, lo1))
