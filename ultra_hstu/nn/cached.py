"""An HSTU stack over a history that is encoded once: its keys and values, what targets add to it, and how it grows.

This is M-FALCON (HSTU, arXiv 2402.17152, algorithm 1). Nothing in a history depends on the targets behind it, and a target sees the history and
itself: with the keys and values of every layer at hand, targets are rows of their own, in any order and as many at a time as one likes. A layer does not
notice: it calls `attend`, as always.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.cached_attention import cached_attention
from kernels.hstu_attention import RelativeBias
from kernels.jagged import Rows, lengths_to_offsets, offsets_to_lengths
from kernels.mask import AttentionMask, KeyIntervals
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.key_values import KeyValues, Kind, pack
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.sequences import Sequences


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedHistory:
    """B histories, each its contextual tokens and its events, as a stack of layers keeps them. Flat and jagged; no targets.

    Attributes:
      layers: keys and values, one entry a layer: [T, H, width] below a truncation, [T', H, width] above it.
      whole: the frame of the T rows.
      kept: that of the T' rows that a truncation leaves; None without one.
      residual_SD: what enters the first layer above a truncation: how a history grows there; None without one.
    """

    layers: tuple[KeyValues, ...]
    whole: Sequences
    kept: Any
    residual_SD: Any

    def unpacked(self, dtype: Any) -> "EncodedHistory":
        """The same in a dtype to compute with."""
        return dataclasses.replace(
            self, layers=tuple(KeyValues(*layer.unpacked(dtype)) for layer in self.layers)
        )


class TargetRows(NamedTuple):
    """Where targets stand: behind the history of a user. Padding may hold anything in range."""

    user_R: Int[Array, " R"]
    slot_R: Int[
        Array, " R"
    ]  # place among the user's targets, from 0; only a relative bias reads it
    time_R: Int[Array, " R"]  # seconds; only a relative bias reads it


def encode(
    encoder: HSTU,
    x_TD: Float[Array, "T D"],
    sequences: Sequences,
    *,
    contextual: int,
    kind: Kind = "same",
) -> EncodedHistory:
    """Runs the stack over histories and keeps what targets will need; the last layer only makes its keys and values.

    Args:
      sequences: without targets; `num_contextual` None if there are none.
      contextual: most contextual tokens of a sequence.
      kind: how keys and values are kept. They are rounded after use: each layer works on what the model computed.
    """
    x_TD = jnp.where(sequences.rows.real[:, None], x_TD, jnp.zeros((), x_TD.dtype))
    truncation = encoder.truncation
    frames, residual = [sequences], None
    attends: dict[AttentionMask, Any] = {}
    layers = []
    for number, (layer, mask) in enumerate(zip(encoder.layers, encoder.layer_masks, strict=True)):
        if truncation is not None and number == truncation.after:
            cut = truncation.cut(sequences, extra_rows=contextual)
            x_TD, sequences, attends = cut.take(x_TD), cut.sequences, {}
            frames.append(sequences)
            residual = x_TD
        if number + 1 == len(encoder.layers):
            layers.append(pack(*layer.keys_and_values(x_TD), kind))
            break
        if mask not in attends:
            attends[mask] = encoder.attend(sequences, mask, x_TD.dtype)

        def attend(
            q: Array, k: Array, v: Array, *, alpha: float, bias: Any, inner: Any = attends[mask]
        ) -> Array:
            layers.append(pack(k, v, kind))
            return inner(q, k, v, alpha=alpha, bias=bias)

        x_TD = layer(x_TD, attend=attend)
    return EncodedHistory(
        tuple(layers), frames[0], frames[1] if residual is not None else None, residual
    )


def targets(
    encoder: HSTU,
    encoded: EncodedHistory,
    x_RD: Float[Array, "R D"],
    rows: TargetRows,
    *,
    implementation: Any = None,
) -> Float[Array, "R D"]:
    """Targets after all layers: the same rows that a full pass over histories with these targets behind them gives, to rounding.

    Args:
      encoded: unpacked in the dtype of x.
      implementation: of `cached_attention`.
    """
    attends: dict[tuple[bool, AttentionMask], Any] = {}
    for number, (layer, mask, kv) in enumerate(
        zip(encoder.layers, encoder.layer_masks, encoded.layers, strict=True)
    ):
        above = encoder.truncation is not None and number >= encoder.truncation.after
        frame: Sequences = encoded.kept if above else encoded.whole
        if (above, mask) not in attends:
            behind_R = offsets_to_lengths(frame.offsets)[rows.user_R]
            at = Rows.at(frame.offsets, rows.user_R, behind_R, None, frame.num_contextual)
            keys = mask.keys_of(at._replace(real=jnp.ones_like(at.real)))
            place_R = at.start + behind_R + rows.slot_R
            attends[above, mask] = _attend_to(
                keys, place_R, frame.time_T, rows.time_R, 1 / encoder.length, implementation
            )
        run = attends[above, mask]

        def attend(
            q: Array,
            k: Array,
            v: Array,
            *,
            alpha: float,
            bias: Any,
            run: Any = run,
            kv: KeyValues = kv,
        ) -> Array:
            return run(q, kv.k_SHK, kv.v_SHV, (k, v), _tables(bias), alpha=alpha)

        x_RD = layer(x_RD, attend=attend)
    return x_RD


def extend(
    encoder: HSTU,
    old: EncodedHistory,
    whole: Sequences,
    x_RD: Float[Array, "R D"],
    keep_B: Int[Array, " B"],
    keep_kept_B: Int[Array, " B"],
    *,
    kept_rows: int,
    kind: Kind = "same",
    implementation: Any = None,
) -> EncodedHistory:
    """Longer histories: the first `keep_B` rows of each stay as they were, what follows is computed anew. No contextual tokens.

    Exact if nothing that the rows before `keep_B` saw has changed: see `serving.cache.growth`. Cost: the new rows of a layer, and a copy of what is kept.

    Args:
      old: the histories before.
      whole: the frame of the longer histories.
      x_RD: input of the stack for the rows of `suffix_of(whole, keep_B, R)`.
      keep_kept_B: the same above a truncation, counted among the rows that it keeps; 0 where the kept rows begin later than before.
      kept_rows: room for the rows that are computed anew above a truncation.
    """
    truncation = encoder.truncation
    edge = len(encoder.layers) if truncation is None else truncation.after
    masks = encoder.layer_masks

    def run(
        part: slice, old_frame: Sequences, frame: Sequences, keep: Array, x: Array
    ) -> tuple[Array, list[KeyValues], "Suffix"]:
        suffix = suffix_of(frame, keep, x.shape[0])
        source = _source(old_frame, frame, keep, suffix)
        layers, ends = [], len(encoder.layers)
        attends: dict[AttentionMask, Any] = {}
        for number in range(*part.indices(ends)):
            layer, mask = encoder.layers[number], masks[number]

            def grown(k: Array, v: Array, before: KeyValues = old.layers[number]) -> KeyValues:
                return jax.tree.map(source.merge, before, pack(k, v, kind))

            if number + 1 == ends:
                layers.append(grown(*layer.keys_and_values(x)))
                break
            if mask not in attends:
                keys = _with_own(
                    mask.keys_at(
                        suffix.start_R,
                        suffix.position_R,
                        jnp.zeros_like(suffix.start_R),
                        suffix.length_R,
                    ),
                    suffix,
                )
                place_R = suffix.start_R + suffix.position_R
                time_R = jnp.asarray(frame.next_time_T)[suffix.row_R]
                attends[mask] = _attend_to(
                    keys, place_R, frame.time_T, time_R, 1 / encoder.length, implementation
                )

            def attend(
                q: Array,
                k: Array,
                v: Array,
                *,
                alpha: float,
                bias: Any,
                attend: Any = attends[mask],
                grown: Any = grown,
            ) -> Array:
                layers.append(grown(k, v))
                return attend(q, *layers[-1].unpacked(q.dtype), None, _tables(bias), alpha=alpha)

            x = layer(x, attend=attend)
        return x, layers, suffix

    x_RD, layers, suffix = run(slice(0, edge), old.whole, whole, keep_B, x_RD)
    if truncation is None:
        return EncodedHistory(tuple(layers), whole, None, None)
    cut = truncation.cut(whole, extra_rows=0)
    kept: Sequences = cut.sequences
    # What enters the layers above: old rows from where they are kept, new ones from the layers below.
    before_B = offsets_to_lengths(old.whole.offsets) - offsets_to_lengths(old.kept.offsets)
    after_B = offsets_to_lengths(whole.offsets) - offsets_to_lengths(kept.offsets)
    segment_S = kept.rows.segment
    position_S = kept.rows.position + after_B[segment_S]
    source = _Source(
        is_old_S=position_S < keep_B[segment_S],
        old_S=jnp.asarray(old.kept.offsets)[segment_S] + position_S - before_B[segment_S],
        new_S=suffix.offsets[segment_S] + position_S - keep_B[segment_S],
    )
    residual_SD = source.merge(old.residual_SD, x_RD)
    again = suffix_of(kept, keep_kept_B, kept_rows)
    _, above, _ = run(slice(edge, None), old.kept, kept, keep_kept_B, residual_SD[again.row_R])
    return EncodedHistory((*layers, *above), whole, kept, residual_SD)


class Suffix(NamedTuple):
    """The R rows of longer histories that are computed anew."""

    offsets: Int[Array, " B1"]
    start_R: Int[Array, " R"]  # of the row's sequence in the frame
    position_R: Int[Array, " R"]
    length_R: Int[Array, " R"]  # of the row's sequence; 0 on padding
    row_R: Int[Array, " R"]  # in the frame


class _Source(NamedTuple):
    """Where each row of a new buffer comes from."""

    is_old_S: Array
    old_S: Int[Array, " S"]
    new_S: Int[Array, " S"]

    def merge(self, old: Array, new: Array) -> Array:
        lead = (slice(None),) + (None,) * (old.ndim - 1)
        take = lambda x, place: jnp.take(x, place, axis=0, mode="clip")  # noqa: E731
        return jnp.where(
            self.is_old_S[lead], take(old, self.old_S), take(new, self.new_S).astype(old.dtype)
        )


def suffix_of(frame: Sequences, keep_B: Int[Array, " B"], rows: int) -> Suffix:
    """The rows from `keep_B` on of every sequence, side by side in a buffer of `rows`."""
    offsets = jnp.asarray(lengths_to_offsets(offsets_to_lengths(frame.offsets) - keep_B))
    at = Rows.of(offsets, rows)
    start_R = jnp.where(at.real, jnp.asarray(frame.offsets)[at.segment], 0)
    position_R = jnp.where(at.real, at.position + keep_B[at.segment], 0)
    length_R = jnp.where(at.real, offsets_to_lengths(frame.offsets)[at.segment], 0)
    return Suffix(offsets, start_R, position_R, length_R, start_R + position_R)


def _source(old: Sequences, new: Sequences, keep_B: Array, suffix: Suffix) -> _Source:
    segment_S, position_S = new.rows.segment, new.rows.position
    keep_S = keep_B[segment_S]
    old_S = jnp.asarray(old.offsets)[segment_S] + position_S
    return _Source(position_S < keep_S, old_S, suffix.offsets[segment_S] + position_S - keep_S)


def _with_own(keys: KeyIntervals, suffix: Suffix) -> KeyIntervals:
    """Intervals of history rows that hold the row itself: the near one ends just before it."""
    lo1 = jnp.where(keys.hi1 > keys.lo1, keys.lo1, suffix.row_R)
    return keys._replace(lo1=lo1, hi1=jnp.where(suffix.length_R > 0, suffix.row_R + 1, lo1))


def _attend_to(
    keys: KeyIntervals,
    place_R: Array,
    time_S: Any,
    time_R: Array,
    scale: float,
    implementation: Any,
) -> Callable[..., Array]:
    """Attention of given rows; traced and lowered once, not once a layer."""

    def run(
        q: Array, k: Array, v: Array, own: Any, tables: tuple[Array, Array] | None, *, alpha: float
    ) -> Array:
        bias = None if tables is None else RelativeBias(*tables, jnp.asarray(time_S), time_R)
        options: dict[str, Any] = dict(
            own=own, bias=bias, place_R=place_R, implementation=implementation
        )
        return cached_attention(q, k, v, keys, alpha=alpha, scale=scale, **options)

    return jax.jit(run, static_argnames="alpha")


def _tables(bias: RelativeBiasTables | None) -> tuple[Array, Array] | None:
    return None if bias is None else (bias.position_table[...], bias.time_table[...])
