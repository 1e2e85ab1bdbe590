"""Strategy `halo`: for a window, what a shard needs of the others does not grow with T.

The mask says which rows are local (`AttentionMask.locality`). A local row sees its window, which
lies on its shard or in the few rows before it (the halo), and the oldest keys of its sequence;
every shard has copies of these. Full rows, targets and contextual tokens see far more, but they are
few: their queries visit every shard, meet the keys there, and the sums come home. Every pair of row
and key is counted in one place.

A shard does three sums. At home, its own rows meet its own keys and the copies. At the edge, its
first rows meet the halo. And the visiting rows meet its own keys. None of them copies what has the
size of a shard, and the transfers have all the time that the sum at home takes.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kernels.hstu_attention.partial import partial_plan
from kernels.hstu_attention.plan import AttentionPlan
from kernels.mask import AttentionMask, KeyIntervals, Locality, RowIntervals
from kernels.typing import STATIC, Leaf
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import CONTEXT
from ultra_hstu.parallel.strategy import AttentionCall, Output, PartialSums, Prepare, ShardMask
from ultra_hstu.parallel.visiting import visiting_plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halo(PartialSums):
    """Bytes of a shard and layer: O(window + B * (full_rows + targets + prefix + contextual)).

    Attributes:
      home: plan of [copies] and the shard's rows.
      edge: plan of [halo] and the shard's first rows; None: the window is 0.
      visit: plan of the shard's keys and the visiting rows; None: nothing visits.
      row_R: rows of the buffer that visit, ascending, T in unused entries.
      copy_P: rows of the buffer whose keys are copied, likewise.
      overflow: whether traced counts exceed their bounds.
      shards: how many there are.
      reach: rows of the halo.
    """

    home: Leaf[AttentionPlan]
    edge: Leaf[AttentionPlan] | None
    visit: Leaf[AttentionPlan] | None
    row_R: Leaf[Int[Array, " R"]]
    copy_P: Leaf[Int[Array, " P"]]
    overflow: Leaf[Bool[Array, ""]]
    shards: int = dataclasses.field(metadata=STATIC)
    reach: int = dataclasses.field(metadata=STATIC)

    @staticmethod
    def of(view: ShardMask, prepare: Prepare) -> "Halo":
        layout, sequences = view.layout, view.offsets.shape[0] - 1
        local = view.mask.locality(view.rows, view.max_targets, view.max_contextual)
        visitors, copies = (
            min(layout.num_rows, sequences * most) for most in (local.most_far, local.most_copied)
        )
        reach = min(local.reach, (layout.shards - 1) * layout.rows_per_shard)
        row_R, copy_P = _ascending(local.is_far, visitors), _ascending(local.is_copied, copies)
        return Halo(
            home=prepare(_home(view, local, copy_P)),
            edge=prepare(_edge(view, local, reach)) if reach else None,
            visit=prepare(visiting_plan(view, row_R)) if visitors else None,
            row_R=row_R,
            copy_P=copy_P,
            overflow=(local.is_far.sum() > visitors) | (local.is_copied.sum() > copies),
            shards=layout.shards,
            reach=reach,
        )

    bounded = True

    @classmethod
    def check(cls, mask: AttentionMask, layout: Layout, heads: int, biased: bool) -> None:
        super().check(mask, layout, heads, biased)
        if not mask.windowed or not layout.is_contiguous:
            raise ValueError(
                f"'halo' is for masks with a window over contiguous slices, got {mask} and blocks "
                f"of {layout.block} rows: use 'ring', 'ulysses' or 'gather' for full masks"
            )

    def attend(self, q_tHK: Array, k_tHK: Array, v_tHV: Array, call: AttentionCall) -> Output:
        # No sum that lacks a summand passes for a result.
        call = call._replace(scale=jnp.where(self.overflow, jnp.nan, call.scale))
        return super().attend(q_tHK, k_tHK, v_tHV, call)

    def sums(self, q: Array, k: Array, v: Array, call: AttentionCall) -> Array:
        home, edge, visit = self._parts(call)
        rows_q, copies = self._visiting(q), _joined(self._copied, k, v)
        halo = _joined(self._before, k, v)
        out = home(q, k, v, copies)
        if self.visit is not None:
            out = self._add_home(out, self.row_R, visit(rows_q, k, v))
        if self.edge is not None:
            out = _add_rows(out, edge(q[: self.reach], *halo), 0)
        return out

    def gradients(
        self, q: Array, k: Array, v: Array, g: Array, call: AttentionCall
    ) -> tuple[Array, ...]:
        """What is of the size of a shard is added up once.

        The rest goes where it came from and is added in place.
        """
        home, edge, visit = self._parts(call)
        size = q.shape[0]
        rows_q, rows_g = _joined(self._visiting, q, g)
        copies, halo = _joined(self._copied, k, v), _joined(self._before, k, v)
        dq, dk, dv, d_copies = jax.vjp(home, q, k, v, copies)[1](g)
        if self.visit is not None:
            rows_dq, more_dk, more_dv = jax.vjp(visit, rows_q, k, v)[1](rows_g)
            dk, dv = dk + more_dk, dv + more_dv
        if self.edge is not None:
            edge_dq, *d_halo = jax.vjp(edge, q[: self.reach], *halo)[1](g[: self.reach])
            dq = _add_rows(dq, edge_dq, 0)
            back = _joined(lambda parts: self._back(parts, size), *d_halo)
            dk, dv = (
                _add_rows(x, y, size - y.shape[0]) for x, y in zip((dk, dv), back, strict=True)
            )
        if self.visit is not None:
            dq = self._add_home(dq, self.row_R, rows_dq)
        if self.copy_P.shape[0]:
            dk, dv = (
                self._add_home(x, self.copy_P, y) for x, y in zip((dk, dv), d_copies, strict=True)
            )
        return dq, dk, dv

    def _parts(self, call: AttentionCall) -> tuple[Callable[..., Array], ...]:
        """The three sums: at home, at the edge, and of the visiting rows."""

        def home(q: Array, k: Array, v: Array, copies: tuple[Array, Array]) -> Array:
            return call.part(q, *copies, plan=self.home, own=(k, v))

        edge = functools.partial(call.of_rows(lambda x: x[: self.reach]).part, plan=self.edge)
        return home, edge, functools.partial(call.of_rows(self._visiting).part, plan=self.visit)

    def _visiting(self, x: Array) -> Array:
        return self._everywhere(x, self.row_R)

    def _copied(self, x: Array) -> Array:
        return self._everywhere(x, self.copy_P)

    def _local_rows(self, row_N: Array, size: int) -> Array:
        """Where some rows of the buffer are on this shard.

        Indices of the others are beyond the shard, and all different.
        """
        local_N = row_N - jax.lax.axis_index(CONTEXT) * size
        mine_N = (local_N >= 0) & (local_N < size)
        return jnp.where(mine_N, local_N, size + jnp.arange(row_N.shape[0], dtype=jnp.int32))

    def _everywhere(self, x: Array, row_N: Array) -> Array:
        """Some rows of the sharded buffer `x`, on every shard; zeros for row T."""
        found = x.at[self._local_rows(row_N, x.shape[0])].get(mode="fill", fill_value=0)
        return jax.lax.psum(found, CONTEXT) if row_N.shape[0] else found

    def _add_home(self, x: Array, row_N: Array, parts: Array) -> Array:
        """`x` plus, in some rows of the buffer, the sum of all shards' `parts`, in place."""
        sums = jax.lax.psum(parts.astype(jnp.float32), CONTEXT).astype(x.dtype)
        return x.at[self._local_rows(row_N, x.shape[0])].add(sums, mode="drop", unique_indices=True)

    def _hops(self, size: int) -> list[tuple[int, int]]:
        """(shards onward, rows of each) that make up the halo, the nearest first."""
        return [
            (hop, min(self.reach - (hop - 1) * size, size))
            for hop in range(1, -(-self.reach // size) + 1)
        ]

    def _before(self, x: Array) -> Array:
        """The `reach` rows in front of a shard, from its neighbours; zeros before the buffer."""
        size = x.shape[0]
        parts = [
            jax.lax.ppermute(
                x[size - taken :], CONTEXT, [(i, i + hop) for i in range(self.shards - hop)]
            )
            for hop, taken in self._hops(size)
        ]
        return jnp.concatenate([*parts[::-1], x[:0]])

    def _back(self, parts: Array, size: int) -> Array:
        """`_before` transposed: the sum of what later shards have for the last rows of this one."""
        most, end = min(self.reach, size), self.reach
        total = jnp.zeros((most, *parts.shape[1:]), parts.dtype)
        for hop, taken in self._hops(size):
            sent = jax.lax.ppermute(
                parts[end - taken : end],
                CONTEXT,
                [(i + hop, i) for i in range(self.shards - hop)],
            )
            total = _add_rows(total, sent, most - taken)
            end -= taken
        return total


def _add_rows(x: Array, y: Array, first: int) -> Array:
    """`x` with `y` added to its rows from `first` on.

    This works in place, as a sum with padding would not.
    """
    return jax.lax.dynamic_update_slice_in_dim(x, x[first : first + y.shape[0]] + y, first, axis=0)


def _joined(move: Callable[[Array], Array], x: Array, y: Array) -> tuple[Array, Array]:
    """`move` of both, with one transfer in the place of two."""
    both, width = move(jnp.concatenate([x, y], axis=2)), x.shape[2]
    return both[..., :width], both[..., width:]


def _ascending(flag_T: Array, capacity: int) -> Array:
    """Numbers of the rows that are flagged, ascending, T in unused entries."""
    return jnp.nonzero(flag_T, size=capacity, fill_value=flag_T.shape[0])[0].astype(jnp.int32)


def _home(view: ShardMask, local: Locality, copy_P: Array) -> AttentionPlan:
    """Rows: the shard's. Keys: copies, then those of the rows."""
    own, num_rows, num_copies = view.own_t, view.layout.num_rows, copy_P.shape[0]
    first_t = local.first[own]
    is_local_t = view.real_t & ~local.is_far[own]
    window_t = jnp.maximum(own - local.reach, first_t)
    far_t = [jnp.zeros_like(own)] * 2
    if num_copies:
        # What a row sees before its window. Where both are one interval, it is in slot 1.
        lo0, hi0, lo1, hi1 = (x[own] for x in view.keys)
        joined_t = (hi1 > lo1) & (lo1 < window_t)
        far_t = [
            jnp.searchsorted(copy_P, x, method="scan_unrolled").astype(jnp.int32)
            for x in (jnp.where(joined_t, lo1, lo0), jnp.where(joined_t, window_t, hi0))
        ]
    seen = (*far_t, *(num_copies + view.here(x) for x in (window_t, own)))
    keys = KeyIntervals(*(jnp.where(is_local_t, x, 0) for x in seen))

    # Transposed. Of a copy: the local rows that see it, from behind its window on, so that it is
    # seen once. Of an own key: those of its window.
    at_P = jnp.minimum(copy_P, num_rows - 1)
    first_P = local.first[at_P]
    from_P = jnp.where(at_P >= first_P, at_P + local.reach + 1, first_P)
    to_P = jnp.minimum(view.seen_by.near_hi[at_P], local.last[at_P])
    tail_P = tuple(jnp.where(copy_P < num_rows, view.here(x), 0) for x in (from_P, to_P))
    stop_t = jnp.minimum(own + local.reach + 1, local.last[own])
    seen_t = view.real_t & (own >= first_t)
    near_t = [jnp.where(seen_t, view.here(x), 0) for x in (own + 1, stop_t)]
    none = jnp.zeros(num_copies + own.shape[0], jnp.int32)
    near = (jnp.pad(x, (num_copies, 0)) for x in near_t)
    tail = (jnp.pad(x, (0, own.shape[0])) for x in tail_P)
    rows = RowIntervals(none, none, *near, *tail)
    return partial_plan(
        keys,
        rows,
        num_rows=own.shape[0],
        num_keys=num_copies,
        own=True,
        mask=AttentionMask(window=local.reach),  # beside the copies, if any
        plain=not num_copies,
    )


def _edge(view: ShardMask, local: Locality, reach: int) -> AttentionPlan:
    """Rows: the first of the shard. Keys: the `reach` rows before it."""
    row = view.own_t[:reach]
    before = row[0] - reach  # where the halo begins
    is_local = view.rows.real[row] & ~local.is_far[row]
    lo = jnp.maximum(row - local.reach, local.first[row]) - before
    none = jnp.zeros_like(row)
    keys = KeyIntervals(none, none, jnp.where(is_local, lo, 0), jnp.where(is_local, reach, 0))

    key = before + jnp.arange(reach, dtype=jnp.int32)
    at = jnp.clip(key, 0, view.layout.num_rows - 1)
    seen = (key >= 0) & view.rows.real[at] & (at >= local.first[at])
    end = jnp.minimum(at + local.reach + 1, local.last[at])
    hi = jnp.clip(end - row[0], 0, row.shape[0])
    none = jnp.zeros_like(key)
    rows = RowIntervals(none, none, none, none, none, jnp.where(seen, hi, 0))
    return partial_plan(keys, rows, num_rows=row.shape[0], num_keys=reach, own=False)
