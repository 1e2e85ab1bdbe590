"""Strategy `halo`: for a window, what a shard needs of the others does not grow with T.

Rows are of two kinds. A plain history row sees its window, which lies on its shard or the few rows before it (the halo), and the oldest keys of its
sequence (prefix and contextual tokens), of which every shard gets a copy. Full rows, targets and contextual tokens see far more, but they are
few: their queries visit every shard, meet the keys there, and the sums come home. Every pair of row and key is counted in one place.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.mask import KeyIntervals, RowIntervals
from ultra_hstu.parallel.frame import Frame, places
from ultra_hstu.parallel.ring import Attend

TILE = 128  # a shard's own keys begin at a multiple of this behind those from elsewhere, so that kernel tiles are whole


def halo(q: Array, k: Array, v: Array, scale: Array, frame: Frame, attend: Attend) -> Array:
    """Bytes of a shard and layer: O(window + B * (full_rows + targets + prefix + contextual))."""
    visiting = _Visiting(frame)
    plain, overflow = _plain_rows(q, k, v, scale, frame, visiting, attend)
    out = plain + visiting.attention(q, k, v, scale, attend)
    return jnp.where(visiting.overflow | overflow, jnp.nan, out)  # no sum that lacks a summand passes for a result


def _ascending(flag_T: Array, capacity: int) -> Array:
    """Numbers of the rows that are flagged, ascending, T in unused places."""
    return jnp.nonzero(flag_T, size=capacity, fill_value=flag_T.shape[0])[0].astype(jnp.int32)


def _copies(x: Array, row_N: Array, frame: Frame) -> Array:
    """Some rows of the sharded buffer `x`, on every shard, each from the shard that holds it."""
    local_N = row_N - frame.shard * frame.layout.rows_per_shard
    mine_N = (local_N >= 0) & (local_N < frame.layout.rows_per_shard)
    found = x[jnp.clip(local_N, 0, frame.layout.rows_per_shard - 1)]
    return jax.lax.psum(jnp.where(mine_N.reshape(-1, *(1,) * (x.ndim - 1)), found, jnp.zeros((), x.dtype)), frame.axis)


class _Visiting:
    """Full rows, targets and contextual tokens of the whole batch."""

    def __init__(self, frame: Frame):
        self.frame = frame
        mask, sequences, num_rows = frame.mask, frame.sequences, frame.layout.num_rows
        start_T, history_T, end_T, _ = places(sequences, num_rows)
        row_T = jnp.arange(num_rows, dtype=jnp.int32)
        self.first_T = jnp.maximum(end_T - mask.full_rows, history_T)  # the first visiting row behind the plain ones
        real_T = row_T < sequences.offsets[-1]
        self.flag_T = real_T & ((row_T < history_T) | (row_T >= self.first_T))
        self.capacity = min(num_rows, sequences.num_sequences * (mask.full_rows + sequences.max_targets + sequences.max_contextual))
        self.row_R = _ascending(self.flag_T, self.capacity)
        self.overflow = self.flag_T.sum() > self.capacity  # traced counts above their bounds

    def attention(self, q: Array, k: Array, v: Array, scale: Array, attend: Attend) -> Array:
        """What they see, their own keys aside: partial sums on every shard, added up at home."""
        frame, row_R = self.frame, self.row_R
        if self.capacity == 0:
            return jnp.zeros((*q.shape[:2], v.shape[2]), v.dtype)
        used_R = row_R < frame.layout.num_rows
        row_R = jnp.minimum(row_R, frame.layout.num_rows - 1)
        scale_R = _copies(scale, row_R, frame) if scale.ndim else scale
        keys = KeyIntervals(*(jnp.where(used_R, frame.layout.rank(x[row_R], frame.shard), 0) for x in frame.keys))
        own = frame.layout.rows(frame.shard)
        rows = RowIntervals(*(jnp.searchsorted(self.row_R, x[own]).astype(jnp.int32) for x in frame.rows))
        q_RHK = _copies(q, self.row_R, frame)
        out_RHV = jax.lax.psum(attend(q_RHK, k, v, keys, rows, scale=scale_R).astype(jnp.float32), frame.axis)
        place_t = jnp.searchsorted(self.row_R, own).astype(jnp.int32)
        mine_t11 = self.flag_T[own][:, None, None]
        return jnp.where(mine_t11, out_RHV[jnp.minimum(place_t, self.capacity - 1)], 0.0).astype(v.dtype)


def _plain_rows(q: Array, k: Array, v: Array, scale: Array, frame: Frame, visiting: _Visiting, attend: Attend) -> tuple[Array, Array]:
    """History rows below the full ones, and of the visiting rows their own keys; and whether the copies lack room."""
    mask, sequences, layout = frame.mask, frame.sequences, frame.layout
    window = mask.window or 0
    start_T, history_T, _, _ = places(sequences, layout.num_rows)
    row_T = jnp.arange(layout.num_rows, dtype=jnp.int32)
    first, size = frame.shard * layout.rows_per_shard, layout.rows_per_shard

    # Which keys are copied to every shard: the oldest of each sequence.
    oldest_T = jnp.maximum(history_T, start_T + mask.prefix)
    copied_T = (row_T < sequences.offsets[-1]) & (row_T < jnp.minimum(oldest_T, jnp.maximum(visiting.first_T, history_T)))
    copies = min(layout.num_rows, sequences.num_sequences * max(mask.prefix, sequences.max_contextual))
    reach = min(window, (layout.shards - 1) * size)
    padded = -(-(copies + reach) // TILE) * TILE - reach  # places for copies
    copy_P = jnp.pad(_ascending(copied_T, copies), (0, padded - copies), constant_values=layout.num_rows)

    def place_of_copy(x: Array) -> Array:
        return jnp.searchsorted(copy_P, x).astype(jnp.int32)

    # Rows of this shard.
    row_t = layout.rows(frame.shard)
    start_t, history_t, plain_t = start_T[row_t], history_T[row_t], ~visiting.flag_T[row_t] & (row_t < sequences.offsets[-1])
    near_t = jnp.maximum(row_t - window, history_t)
    sees_context_t = mask.context_sink | (row_t - history_t + 1 <= window)
    sink_t = jnp.maximum(jnp.where(sees_context_t, history_t, 0), start_t + mask.prefix)
    sink_t = jnp.minimum(sink_t, near_t)
    own_place = padded + reach - first  # of a row of the buffer, in the joined keys
    keys = (place_of_copy(start_t), place_of_copy(sink_t), near_t + own_place, row_t + own_place)
    keys = KeyIntervals(*(jnp.where(plain_t, x, 0) for x in keys))

    # The same transposed. Copies and the halo stand in front of the rows, so their rows go to the slot of what lies far behind.
    used_P = copy_P < layout.num_rows
    at_P = jnp.minimum(copy_P, layout.num_rows - 1)
    in_prefix_P = at_P < start_T[at_P] + mask.prefix
    is_history_P = at_P >= history_T[at_P]
    last_P = visiting.first_T[at_P]
    from_P = jnp.where(is_history_P, at_P + window + 1, history_T[at_P])
    to_P = jnp.where(in_prefix_P | mask.context_sink, last_P, jnp.minimum(last_P, history_T[at_P] + window))
    from_P, to_P = jnp.where(used_P, from_P, 0), jnp.where(used_P, to_P, 0)
    region = first - reach + jnp.arange(reach + size, dtype=jnp.int32)
    at = jnp.clip(region, 0, layout.num_rows - 1)
    seen = (region >= 0) & (region < sequences.offsets[-1]) & (at >= history_T[at])
    from_region, to_region = jnp.where(seen, at + 1, 0), jnp.where(seen, jnp.minimum(at + window + 1, visiting.first_T[at]), 0)
    lo, hi = (layout.rank(jnp.concatenate(x), frame.shard) for x in ((from_P, from_region), (to_P, to_region)))
    own = jnp.arange(padded + reach + size) >= padded + reach
    none = jnp.zeros_like(lo)
    rows = RowIntervals(none, none, jnp.where(own, lo, 0), jnp.where(own, hi, 0), jnp.where(own, 0, lo), jnp.where(own, 0, hi))

    def elsewhere(x: Array) -> Array:
        parts = [_copies(x, copy_P, frame)] if copies else [jnp.zeros((padded, *x.shape[1:]), x.dtype)]
        return jnp.concatenate([*parts, _halo(x, reach, frame)])

    return attend(q, elsewhere(k), elsewhere(v), keys, rows, scale=scale, own=(k, v)), copied_T.sum() > copies


def _halo(x: Array, reach: int, frame: Frame) -> Array:
    """The `reach` rows in front of a shard, from its neighbours; zeros before the first row of the buffer."""
    size, parts = frame.layout.rows_per_shard, []
    for hop in range(1, -(-reach // size) + 1):
        taken = min(reach - (hop - 1) * size, size)
        links = [(i, i + hop) for i in range(frame.layout.shards - hop)]
        parts.append(jax.lax.ppermute(x[size - taken :], frame.axis, links))
    return jnp.concatenate(parts[::-1]) if parts else x[:0]
