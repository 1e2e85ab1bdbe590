"""Strategy `halo`: for a window, what a shard needs of the others does not grow with T.

Rows are of two kinds. A plain history row sees its window, which lies on its shard or the few rows before it (the halo), and the oldest keys of its
sequence (prefix and contextual tokens), of which every shard gets a copy. Full rows, targets and contextual tokens see far more, but they are
few: their queries visit every shard, meet the keys there, and the sums come home. Every pair of row and key is counted in one place.

A shard does two sums. At home, its own rows and the visiting ones meet its own keys and the copies. At the edge, its first rows meet the halo:
the transfer of the halo has all the time that the sum at home takes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.hstu_attention.partial import partial_plan
from kernels.hstu_attention.plan import AttentionPlan
from kernels.mask import KeyIntervals, RowIntervals
from ultra_hstu.parallel.frame import Attend, Frame, Prepare, keeping_inputs, places

TILE = 128  # a shard's own keys begin at a multiple of this behind the copies, so that kernel tiles are whole


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["home", "edge", "row_R", "copy_P", "place_t", "visits_t", "overflow"],
    meta_fields=["axis", "shards", "reach"],
)
@dataclasses.dataclass(frozen=True)
class Halo:
    """Bytes of a shard and layer: O(window + B * (full_rows + targets + prefix + contextual))."""

    home: Any  # AttentionPlan of [copies] and [own rows, visiting rows]
    edge: Any  # AttentionPlan of [halo] and the shard's first rows; None: the window is 0
    row_R: Any  # rows of the buffer that visit, ascending, T in unused places
    copy_P: Any  # rows of the buffer whose keys are copied, likewise
    place_t: Any  # of a visiting row of this shard among row_R
    visits_t: Any  # which those are
    overflow: Any  # traced counts above their bounds
    axis: str
    shards: int
    reach: int  # rows of the halo

    @staticmethod
    def of(frame: Frame, prepare: Prepare) -> "Halo":
        whole = _Whole.of(frame)
        layout, size = frame.layout, frame.layout.rows_per_shard
        reach = min(frame.mask.window or 0, (layout.shards - 1) * size)
        padded = -(-whole.copies // TILE) * TILE
        copy_P = jnp.pad(_ascending(whole.copied_T, whole.copies), (0, padded - whole.copies), constant_values=layout.num_rows)
        row_R, own = _ascending(whole.visits_T, whole.visitors), layout.rows(frame.shard)
        return Halo(
            home=prepare(_home(frame, whole, copy_P, row_R)),
            edge=prepare(_edge(frame, whole, reach)) if reach else None,
            row_R=row_R,
            copy_P=copy_P,
            place_t=jnp.searchsorted(row_R, own, method="scan_unrolled").astype(jnp.int32),
            visits_t=whole.visits_T[own],
            overflow=(whole.visits_T.sum() > whole.visitors) | (whole.copied_T.sum() > whole.copies),
            axis=frame.axis,
            shards=layout.shards,
            reach=reach,
        )

    def __call__(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        def run(q: Array, k: Array, v: Array, scale: Array, this: "Halo") -> Array:
            return this._sums(q, k, v, scale, attend)

        return keeping_inputs(run, q, k, v, scale, self)

    def _sums(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        size, visitors = q.shape[0], self.row_R.shape[0]
        copies_k, copies_v = self._everywhere(k, self.copy_P), self._everywhere(v, self.copy_P)
        rows_q = jnp.concatenate([q, self._everywhere(q, self.row_R)])
        rows_scale = jnp.concatenate([scale, self._everywhere(scale, self.row_R)]) if scale.ndim else scale
        own = tuple(jnp.pad(x, ((0, visitors), (0, 0), (0, 0))) for x in (k, v))
        sums = attend(rows_q, copies_k, copies_v, plan=self.home, scale=rows_scale, own=own)
        out = sums[:size]
        if self.edge is not None:
            first = min(self.reach, size)
            halo_k, halo_v = jnp.split(self._before(jnp.concatenate([k, v], axis=2)), [k.shape[2]], axis=2)
            edge = attend(q[:first], halo_k, halo_v, plan=self.edge, scale=scale[:first] if scale.ndim else scale)
            out = out + jnp.pad(edge, ((0, size - first), (0, 0), (0, 0)))
        if visitors:
            home_RHV = jax.lax.psum(sums[size:].astype(jnp.float32), self.axis)
            mine_tHV = home_RHV[jnp.minimum(self.place_t, visitors - 1)].astype(out.dtype)
            out = out + jnp.where(self.visits_t[:, None, None], mine_tHV, jnp.zeros((), out.dtype))
        return jnp.where(self.overflow, jnp.nan, out)  # no sum that lacks a summand passes for a result

    def _everywhere(self, x: Array, row_N: Array) -> Array:
        """Some rows of the sharded buffer `x`, on every shard, each from the shard that holds it; zeros for row T."""
        local_N = row_N - jax.lax.axis_index(self.axis) * x.shape[0]
        mine_N = (local_N >= 0) & (local_N < x.shape[0])
        found = jnp.where(mine_N.reshape(-1, *(1,) * (x.ndim - 1)), x[jnp.clip(local_N, 0, x.shape[0] - 1)], jnp.zeros((), x.dtype))
        return jax.lax.psum(found, self.axis) if row_N.shape[0] else found

    def _before(self, x: Array) -> Array:
        """The `reach` rows in front of a shard, from its neighbours; zeros before the first row of the buffer."""
        size, parts = x.shape[0], []
        for hop in range(1, -(-self.reach // size) + 1):
            taken = min(self.reach - (hop - 1) * size, size)
            parts.append(jax.lax.ppermute(x[size - taken :], self.axis, [(i, i + hop) for i in range(self.shards - hop)]))
        return jnp.concatenate(parts[::-1])


class _Whole(NamedTuple):
    """The rows of the whole buffer, sorted into kinds."""

    start_T: Array  # of the row's sequence
    history_T: Array  # where its history begins
    first_T: Array  # the first visiting row behind the plain ones
    visits_T: Array
    copied_T: Array
    visitors: int  # room
    copies: int

    @staticmethod
    def of(frame: Frame) -> "_Whole":
        mask, sequences, num_rows = frame.mask, frame.sequences, frame.layout.num_rows
        start_T, history_T, end_T, _ = places(sequences, num_rows)
        row_T = jnp.arange(num_rows, dtype=jnp.int32)
        real_T = row_T < sequences.offsets[-1]
        first_T = jnp.maximum(end_T - mask.full_rows, history_T)
        oldest_T = jnp.minimum(jnp.maximum(history_T, start_T + mask.prefix), first_T)
        return _Whole(
            start_T,
            history_T,
            first_T,
            visits_T=real_T & ((row_T < history_T) | (row_T >= first_T)),
            copied_T=real_T & (row_T < oldest_T),
            visitors=min(num_rows, sequences.num_sequences * (mask.full_rows + sequences.max_targets + sequences.max_contextual)),
            copies=min(num_rows, sequences.num_sequences * max(mask.prefix, sequences.max_contextual)),
        )


def _ascending(flag_T: Array, capacity: int) -> Array:
    """Numbers of the rows that are flagged, ascending, T in unused places."""
    return jnp.nonzero(flag_T, size=capacity, fill_value=flag_T.shape[0])[0].astype(jnp.int32)


def _home(frame: Frame, whole: _Whole, copy_P: Array, row_R: Array) -> AttentionPlan:
    """Rows: the shard's own, then the visiting ones. Keys: copies, then those of the rows."""
    mask, layout, size = frame.mask, frame.layout, frame.layout.rows_per_shard
    window, own, num_copies = mask.window or 0, layout.rows(frame.shard), copy_P.shape[0]
    real_t = own < frame.sequences.offsets[-1]

    def place_of_copy(x: Array) -> Array:
        return jnp.searchsorted(copy_P, x, method="scan_unrolled").astype(jnp.int32)

    start_t, history_t, plain_t = whole.start_T[own], whole.history_T[own], real_t & ~whole.visits_T[own]
    near_t = jnp.maximum(own - window, history_t)
    sees_context_t = mask.context_sink | (own - history_t + 1 <= window)
    sink_t = jnp.minimum(jnp.maximum(jnp.where(sees_context_t, history_t, 0), start_t + mask.prefix), near_t)
    plain = (place_of_copy(start_t), place_of_copy(sink_t), *(num_copies + layout.rank(x, frame.shard) for x in (near_t, own)))
    at_R = jnp.minimum(row_R, layout.num_rows - 1)
    used_R = row_R < layout.num_rows
    visiting = (num_copies + layout.rank(x[at_R], frame.shard) for x in frame.keys)
    keys = KeyIntervals(
        *(jnp.concatenate([jnp.where(plain_t, a, 0), jnp.where(used_R, b, 0)]) for a, b in zip(plain, visiting, strict=True))
    )

    # Transposed. Of a copy: the plain rows that see it, from behind its window on, so that it is seen once.
    at_P = jnp.minimum(copy_P, layout.num_rows - 1)
    last_P, history_P = whole.first_T[at_P], whole.history_T[at_P]
    in_prefix_P = at_P < whole.start_T[at_P] + mask.prefix
    from_P = jnp.where(at_P >= history_P, at_P + window + 1, history_P)
    to_P = jnp.where(in_prefix_P | mask.context_sink, last_P, jnp.minimum(last_P, history_P + window))
    tail_P = tuple(jnp.where(copy_P < layout.num_rows, layout.rank(x, frame.shard), 0) for x in (from_P, to_P))
    # Of an own key: the plain rows of its window, and the visiting rows, which are one interval, or two around a contextual key.
    stop_t = jnp.minimum(own + window + 1, whole.first_T[own])
    near_t2 = [jnp.where(real_t & (own >= history_t), layout.rank(x, frame.shard), 0) for x in (own + 1, stop_t)]
    ctx_lo, ctx_hi, near_lo, near_hi, tail_lo, tail_hi = (
        jnp.searchsorted(row_R, x[own], method="scan_unrolled").astype(jnp.int32) for x in frame.rows
    )
    some_near, some_tail = near_hi > near_lo, tail_hi > tail_lo
    tail = (jnp.where(some_near, near_lo, tail_lo), jnp.where(some_tail, tail_hi, near_hi))
    none_P, none_R = jnp.zeros_like(copy_P), jnp.zeros_like(row_R)
    rows = RowIntervals(
        *(jnp.concatenate([none_P, size + x, none_R]) for x in (ctx_lo, ctx_hi)),
        *(jnp.concatenate([none_P, x, none_R]) for x in near_t2),
        *(jnp.concatenate([p, size + x, none_R]) for p, x in zip(tail_P, tail, strict=True)),
    )
    return partial_plan(keys, rows, num_rows=size + row_R.shape[0], num_keys=num_copies)


def _edge(frame: Frame, whole: _Whole, reach: int) -> AttentionPlan:
    """Rows: the first of the shard. Keys: the `reach` rows before it."""
    window, size = frame.mask.window or 0, frame.layout.rows_per_shard
    row = frame.layout.rows(frame.shard)[: min(reach, size)]
    first, real = row[0], frame.sequences.offsets[-1]
    plain = (row < real) & ~whole.visits_T[row]
    lo = jnp.maximum(row - window, whole.history_T[row]) - (first - reach)
    none = jnp.zeros_like(row)
    keys = KeyIntervals(none, none, jnp.where(plain, lo, 0), jnp.where(plain, reach, 0))

    key = first - reach + jnp.arange(reach, dtype=jnp.int32)
    at = jnp.clip(key, 0, frame.layout.num_rows - 1)
    seen = (key >= 0) & (key < real) & (at >= whole.history_T[at])
    hi = jnp.clip(jnp.minimum(at + window + 1, whole.first_T[at]) - first, 0, row.shape[0])
    none = jnp.zeros_like(key)
    rows = RowIntervals(none, none, none, none, none, jnp.where(seen, hi, 0))
    return partial_plan(keys, rows, num_rows=row.shape[0], num_keys=reach)
