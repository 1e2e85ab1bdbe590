"""Strategy `halo`: for a window, what a shard needs of the others does not grow with T.

Rows are of two kinds. A plain history row sees its window, which lies on its shard or the few rows before it (the halo), and the oldest keys of its
sequence (prefix and contextual tokens), of which every shard gets a copy. Full rows, targets and contextual tokens see far more, but they are
few: their queries visit every shard, meet the keys there, and the sums come home. Every pair of row and key is counted in one place.

A shard does three sums. At home, its own rows meet its own keys and the copies. At the edge, its first rows meet the halo. And the visiting rows meet
its own keys. None of them copies what is of the size of a shard, and the transfers have all the time that the sum at home takes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.hstu_attention.partial import partial_plan
from kernels.hstu_attention.plan import AttentionPlan
from kernels.mask import AttentionMask, KeyIntervals, RowIntervals
from ultra_hstu.parallel.frame import Attend, Frame, Prepare, keeping_inputs, places


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["home", "edge", "visit", "row_R", "copy_P", "overflow"],
    meta_fields=["axis", "shards", "reach"],
)
@dataclasses.dataclass(frozen=True)
class Halo:
    """Bytes of a shard and layer: O(window + B * (full_rows + targets + prefix + contextual))."""

    home: Any  # AttentionPlan of [copies] and the shard's rows
    edge: Any  # AttentionPlan of [halo] and the shard's first rows; None: the window is 0
    visit: Any  # AttentionPlan of the shard's keys and the visiting rows; None: nothing visits
    row_R: Any  # rows of the buffer that visit, ascending, T in unused places
    copy_P: Any  # rows of the buffer whose keys are copied, likewise
    overflow: Any  # traced counts above their bounds
    axis: str
    shards: int
    reach: int  # rows of the halo

    @staticmethod
    def of(frame: Frame, prepare: Prepare) -> "Halo":
        whole = _Whole.of(frame)
        layout, size = frame.layout, frame.layout.rows_per_shard
        reach = min(frame.mask.window or 0, (layout.shards - 1) * size)
        copy_P, row_R = (
            _ascending(whole.copied_T, whole.copies),
            _ascending(whole.visits_T, whole.visitors),
        )
        return Halo(
            home=prepare(_home(frame, whole, copy_P)),
            edge=prepare(_edge(frame, whole, reach)) if reach else None,
            visit=prepare(_visit(frame, row_R)) if whole.visitors else None,
            row_R=row_R,
            copy_P=copy_P,
            overflow=(whole.visits_T.sum() > whole.visitors)
            | (whole.copied_T.sum() > whole.copies),
            axis=frame.axis,
            shards=layout.shards,
            reach=reach,
        )

    def __call__(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        scale = jnp.where(
            self.overflow, jnp.nan, scale
        )  # no sum that lacks a summand passes for a result
        return keeping_inputs(self, q, k, v, scale, attend)

    def sums(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        rows_q, copies = self._everywhere(q, self.row_R), self._copies(k, v)
        halo = self._before(jnp.concatenate([k, v], axis=2))
        out = attend(q, *copies, plan=self.home, scale=scale, own=(k, v))
        if self.visit is not None:
            visiting = attend(rows_q, k, v, plan=self.visit, scale=self._scale_of_visitors(scale))
            out = self._add_home(out, self.row_R, visiting)
        if self.edge is not None:
            first = min(self.reach, q.shape[0])
            edge = attend(
                q[:first],
                *_split(halo, k.shape[2]),
                plan=self.edge,
                scale=scale[:first] if scale.ndim else scale,
            )
            out = _add_rows(out, edge, 0)
        return out

    def gradients(
        self, q: Array, k: Array, v: Array, g: Array, scale: Array, attend: Attend
    ) -> tuple[Array, Array, Array]:
        """Of q, k and v: what is of the size of a shard is added up once, the rest goes where it came from and is added in place."""
        size, width = q.shape[0], k.shape[2]
        rows_q, rows_g = _split(
            self._everywhere(jnp.concatenate([q, g], axis=2), self.row_R), q.shape[2]
        )
        copies = self._copies(k, v)
        halo = self._before(jnp.concatenate([k, v], axis=2))

        def home(q: Array, k: Array, v: Array, copies: Any) -> Array:
            return attend(q, *copies, plan=self.home, scale=scale, own=(k, v))

        dq, dk, dv, d_copies = jax.vjp(home, q, k, v, copies)[1](g)
        if self.visit is not None:
            visit = functools.partial(attend, plan=self.visit, scale=self._scale_of_visitors(scale))
            rows_dq, more_dk, more_dv = jax.vjp(visit, rows_q, k, v)[1](rows_g)
            dk, dv = dk + more_dk, dv + more_dv
        if self.edge is not None:
            first = min(self.reach, size)
            edge = functools.partial(
                attend, plan=self.edge, scale=scale[:first] if scale.ndim else scale
            )
            edge_dq, *d_halo = jax.vjp(edge, q[:first], *_split(halo, width))[1](g[:first])
            dq = _add_rows(dq, edge_dq, 0)
            back_dk, back_dv = _split(self._back(jnp.concatenate(d_halo, axis=2), size), width)
            dk, dv = (_add_rows(x, y, size - y.shape[0]) for x, y in ((dk, back_dk), (dv, back_dv)))
        if self.visit is not None:
            dq = self._add_home(dq, self.row_R, rows_dq)
        if self.copy_P.shape[0]:
            dk, dv = (
                self._add_home(x, self.copy_P, y) for x, y in zip((dk, dv), d_copies, strict=True)
            )
        return dq, dk, dv

    def _copies(self, k: Array, v: Array) -> tuple[Array, Array]:
        return _split(self._everywhere(jnp.concatenate([k, v], axis=2), self.copy_P), k.shape[2])

    def _scale_of_visitors(self, scale: Array) -> Array:
        return self._everywhere(scale, self.row_R) if scale.ndim else scale

    def _places(self, row_N: Array, size: int) -> tuple[Array, Array]:
        """(which of some rows of the buffer are on this shard, their places here; of the others places that there are not)."""
        local_N = row_N - jax.lax.axis_index(self.axis) * size
        mine_N = (local_N >= 0) & (local_N < size)
        return mine_N, jnp.where(mine_N, local_N, size + jnp.arange(row_N.shape[0]))

    def _everywhere(self, x: Array, row_N: Array) -> Array:
        """Some rows of the sharded buffer `x`, on every shard, each from the shard that holds it; zeros for row T."""
        mine_N, local_N = self._places(row_N, x.shape[0])
        found = jnp.where(
            mine_N.reshape(-1, *(1,) * (x.ndim - 1)),
            x[jnp.minimum(local_N, x.shape[0] - 1)],
            jnp.zeros((), x.dtype),
        )
        return jax.lax.psum(found, self.axis) if row_N.shape[0] else found

    def _add_home(self, x: Array, row_N: Array, parts: Array) -> Array:
        """`x` and, in some rows of the buffer, the sum of all shards' `parts`, each added where its row is."""
        sums = jax.lax.psum(parts.astype(jnp.float32), self.axis).astype(x.dtype)
        return x.at[self._places(row_N, x.shape[0])[1]].add(sums, mode="drop", unique_indices=True)

    def _hops(self, size: int) -> list[tuple[int, int]]:
        """(shards onward, rows of each) that make up the halo, the nearest first."""
        return [
            (hop, min(self.reach - (hop - 1) * size, size))
            for hop in range(1, -(-self.reach // size) + 1)
        ]

    def _before(self, x: Array) -> Array:
        """The `reach` rows in front of a shard, from its neighbours; zeros before the first row of the buffer."""
        size, parts = x.shape[0], [x[:0]]
        for hop, taken in self._hops(size):
            parts.append(
                jax.lax.ppermute(
                    x[size - taken :], self.axis, [(i, i + hop) for i in range(self.shards - hop)]
                )
            )
        return jnp.concatenate(parts[::-1])

    def _back(self, parts: Array, size: int) -> Array:
        """`_before` transposed: what the shards that follow have for the last rows of this one, added up."""
        most, end = min(self.reach, size), self.reach
        total = jnp.zeros((most, *parts.shape[1:]), parts.dtype)
        for hop, taken in self._hops(size):
            sent = jax.lax.ppermute(
                parts[end - taken : end],
                self.axis,
                [(i + hop, i) for i in range(self.shards - hop)],
            )
            total = total + jnp.pad(sent, ((most - taken, 0), (0, 0), (0, 0)))
            end -= taken
        return total


def _add_rows(x: Array, y: Array, first: int) -> Array:
    """`x` with `y` added to its rows from `first` on: in place, which a sum with padding would not be."""
    return jax.lax.dynamic_update_slice_in_dim(x, x[first : first + y.shape[0]] + y, first, axis=0)


def _split(x: Array, width: int) -> tuple[Array, Array]:
    return x[..., :width], x[..., width:]


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
            visitors=min(
                num_rows,
                sequences.num_sequences
                * (mask.full_rows + sequences.max_targets + sequences.max_contextual),
            ),
            copies=min(
                num_rows, sequences.num_sequences * max(mask.prefix, sequences.max_contextual)
            ),
        )


def _ascending(flag_T: Array, capacity: int) -> Array:
    """Numbers of the rows that are flagged, ascending, T in unused places."""
    return jnp.nonzero(flag_T, size=capacity, fill_value=flag_T.shape[0])[0].astype(jnp.int32)


def _home(frame: Frame, whole: _Whole, copy_P: Array) -> AttentionPlan:
    """Rows: the shard's. Keys: copies, then those of the rows."""
    mask, layout = frame.mask, frame.layout
    window, own, num_copies = mask.window or 0, layout.rows(frame.shard), copy_P.shape[0]
    real_t = own < frame.sequences.offsets[-1]
    start_t, history_t, plain_t = (
        whole.start_T[own],
        whole.history_T[own],
        real_t & ~whole.visits_T[own],
    )
    near_t = jnp.maximum(own - window, history_t)
    none_t = jnp.zeros_like(own)
    far_t = [none_t, none_t]
    if num_copies:
        sees_context_t = mask.context_sink | (own - history_t + 1 <= window)
        sink_t = jnp.minimum(
            jnp.maximum(jnp.where(sees_context_t, history_t, 0), start_t + mask.prefix), near_t
        )
        far_t = [
            jnp.searchsorted(copy_P, x, method="scan_unrolled").astype(jnp.int32)
            for x in (start_t, sink_t)
        ]
    seen = (*far_t, *(num_copies + layout.rank(x, frame.shard) for x in (near_t, own)))
    keys = KeyIntervals(*(jnp.where(plain_t, x, 0) for x in seen))

    # Transposed. Of a copy: the plain rows that see it, from behind its window on, so that it is seen once. Of an own key: those of its window.
    at_P = jnp.minimum(copy_P, layout.num_rows - 1)
    last_P, history_P = whole.first_T[at_P], whole.history_T[at_P]
    in_prefix_P = at_P < whole.start_T[at_P] + mask.prefix
    from_P = jnp.where(at_P >= history_P, at_P + window + 1, history_P)
    to_P = jnp.where(
        in_prefix_P | mask.context_sink, last_P, jnp.minimum(last_P, history_P + window)
    )
    tail_P = tuple(
        jnp.where(copy_P < layout.num_rows, layout.rank(x, frame.shard), 0) for x in (from_P, to_P)
    )
    stop_t = jnp.minimum(own + window + 1, whole.first_T[own])
    near_t2 = [
        jnp.where(real_t & (own >= history_t), layout.rank(x, frame.shard), 0)
        for x in (own + 1, stop_t)
    ]
    none_P = jnp.zeros_like(copy_P)
    none = jnp.concatenate([none_P, none_t])
    rows = RowIntervals(
        none,
        none,
        *(jnp.concatenate([none_P, x]) for x in near_t2),
        *(jnp.concatenate([x, none_t]) for x in tail_P),
    )
    window_alone = AttentionMask(window=window)  # beside the copies, if any
    return partial_plan(
        keys,
        rows,
        num_rows=own.shape[0],
        num_keys=num_copies,
        own=True,
        mask=window_alone,
        plain=not num_copies,
    )


def _visit(frame: Frame, row_R: Array) -> AttentionPlan:
    """Rows: those that visit. Keys: the shard's."""
    layout, own = frame.layout, frame.layout.rows(frame.shard)
    at_R, used_R = jnp.minimum(row_R, layout.num_rows - 1), row_R < layout.num_rows
    keys = KeyIntervals(
        *(jnp.where(used_R, layout.rank(x[at_R], frame.shard), 0) for x in frame.keys)
    )
    # The rows that see a key are one interval, or two around a contextual key.
    ctx_lo, ctx_hi, near_lo, near_hi, tail_lo, tail_hi = (
        jnp.searchsorted(row_R, x[own], method="scan_unrolled").astype(jnp.int32)
        for x in frame.rows
    )
    some_near, some_tail = near_hi > near_lo, tail_hi > tail_lo
    none_t = jnp.zeros_like(own)
    rows = RowIntervals(
        ctx_lo,
        ctx_hi,
        none_t,
        none_t,
        jnp.where(some_near, near_lo, tail_lo),
        jnp.where(some_tail, tail_hi, near_hi),
    )
    return partial_plan(keys, rows, num_rows=row_R.shape[0], num_keys=own.shape[0], own=False)


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
    return partial_plan(keys, rows, num_rows=row.shape[0], num_keys=reach, own=False)
