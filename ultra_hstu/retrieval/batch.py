"""Batches of histories: which examples go together, and their events laid out in one flat buffer.

An *example* is a slice `[start, stop)` of the event arrays: rows `start .. stop-1` are the history, and the event after each row is
what the row should predict, so the event at `stop` is the target of the last row. Batches are packed by rows, not by users: B and T
are fixed when a run starts, and one compiled step serves every batch.

The same `gather_batch` runs on the device (`xp=jax.numpy`, in the compiled step) and on the host (`xp=numpy`, for streamed data).
`HistoryGather` is its form for a `Loader`; `data.ranking.RankGather` is the one of ranking.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kernels.jagged import Rows, lengths_to_offsets
from ultra_hstu.sequences import Sequences

ROW_MULTIPLE = (
    128  # capacities are rounded up to this many rows, a common tile height of the kernels
)
SECONDS_RANGE = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B histories in T rows. Rows from `offsets[B]` on are padding; a padded layout has offsets `0, N, 2N, ...` and item 0 inside.

    Fields are `Any` because a pytree's leaves may also be shapes, shardings or stacks of batches.
    """

    item_T: Any  # int32 [T]: item ids 1..I, 0 on padding
    time_T: Any  # int32 [T]: seconds since the first event of the data
    next_time_T: Any  # int32 [T]: time of the event after the row; for the last row of a history, the target's
    target_T: Any  # int32 [T]: the item after the row, 0 where nothing is predicted
    weight_T: Any  # float32 [T]: 1 where a row is trained on, 0 elsewhere
    offsets: Any  # int32 [B + 1]
    last_row_B: Any  # int32 [B]: row whose output stands for the user; of an empty history, row 0
    signal_TS: Any = (
        None  # int32 [T, S]: codes of what the user did with the item, 0 none; None: no signals
    )

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.offsets, self.item_T > 0, self.time_T, self.next_time_T)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Events:
    """All events of a data set, users one after another."""

    item_E: Any  # int32 [E]
    time_E: Any  # int32 [E]: seconds since the first event
    signal_ES: Any = None  # int32 [E, S]: codes of signals; None: no signals

    @staticmethod
    def from_arrays(
        items: Int[np.ndarray, " E"], timestamps: Int[np.ndarray, " E"] | None
    ) -> "Events":
        """int32 arrays from ids and absolute seconds; without timestamps every time is 0.

        Raises:
          ValueError: where the timestamps span more than 2^31 - 1 seconds (68 years), which usually means milliseconds.
        """
        if timestamps is None:
            return Events(items.astype(np.int32), np.zeros(len(items), np.int32))
        first, last = (int(timestamps.min()), int(timestamps.max())) if len(timestamps) else (0, 0)
        if last - first > SECONDS_RANGE:
            raise ValueError(
                f"timestamps run from {first} to {last}: more than 2^31 - 1 seconds. Give seconds, not milliseconds."
            )
        return Events(items.astype(np.int32), (timestamps - first).astype(np.int32))


def choose_rows(lengths: Int[np.ndarray, " n"], batch_users: int, longest: int = 0) -> int:
    """T such that `batch_users` random histories nearly always fit: mean + 4 standard deviations of their sum, at least the longest.

    A batch that does not fit is closed early by `plan_epoch`; no event is lost. `longest` is what a history may reach in another epoch.
    """
    users, longest = min(batch_users, len(lengths)), max(longest, int(lengths.max()))
    expected = users * lengths.mean() + 4 * np.sqrt(users) * lengths.std()
    rows = max(longest, min(int(np.ceil(expected)), users * longest), 1)
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def plan_epoch(
    lengths: Int[np.ndarray, "n *buffers"],
    *,
    batch_users: int,
    rows: int | tuple[int, ...],
    seed: int,
    epoch: int,
    shuffle: bool = True,
) -> Int[np.ndarray, "S B"]:
    """Which examples each batch holds: int32 [S, B] of example numbers, -1 in empty places.

    The order is a function of (seed, epoch) alone. A batch closes at `batch_users` examples or when the next one would exceed `rows`.

    Args:
      lengths: rows of every example; [n, R] where an example takes rows of R buffers at once.
      rows: capacity, or one of each buffer.

    Raises:
      ValueError: if a history is longer than `rows`.
    """
    if len(lengths) == 0:
        return np.zeros((0, batch_users), np.int32)
    n = len(lengths)
    lengths_nR, rows_R = lengths.reshape(n, -1), np.atleast_1d(rows)
    for longest, room in zip(lengths_nR.max(axis=0), rows_R, strict=True):
        if longest > room:
            raise ValueError(
                f"a history has {longest} events but a batch only {room} rows: raise data.batch_tokens to at least {longest}"
            )
    order = np.random.default_rng((seed, epoch)).permutation(n) if shuffle else np.arange(n)
    ends_nR = np.cumsum(lengths_nR[order], axis=0)
    batches, first = [], 0
    while first < n:
        full_R = (ends_nR[first - 1] if first else 0) + rows_R
        fits = min(
            int(np.searchsorted(ends, full, side="right"))
            for ends, full in zip(ends_nR.T, full_R, strict=True)
        )
        last = min(first + batch_users, fits)
        batches.append(
            np.pad(order[first:last], (0, batch_users - (last - first)), constant_values=-1)
        )
        first = last
    return np.stack(batches).astype(np.int32)


def gather_batch(
    events: Events,
    start_B: Int[Any, " B"],
    stop_B: Int[Any, " B"],
    *,
    rows: int,
    padded_length: int | None = None,
    index: Int[Any, " n"] | None = None,
    xp: Any = jnp,
) -> Batch:
    """The flat batch of B examples; `start == stop` makes an empty history.

    Args:
      rows: T.
      padded_length: None packs the histories without gaps; a number N puts each at a multiple of N (the padded layout of the published
        research code), and T must be B * N.
      index: events that `start` and `stop` count, where histories are not all events from one to another; None: the events themselves.
      xp: `jax.numpy` or `numpy`.
    """
    lengths_B = (stop_B - start_B).astype(xp.int32)
    if padded_length is None:
        offsets = lengths_to_offsets(lengths_B, xp=xp)
    else:
        offsets = xp.arange(lengths_B.shape[0] + 1, dtype=xp.int32) * padded_length
    place = Rows.of(offsets, rows, lengths=lengths_B, xp=xp)
    real_T = place.real
    event_T = xp.where(real_T, start_B[place.segment] + place.position, 0)
    event_T = event_T if index is None else xp.where(real_T, index[event_T], 0)
    next_T = xp.where(real_T, event_T + 1, 0)
    zero = xp.int32(0)
    return Batch(
        item_T=xp.where(real_T, events.item_E[event_T], zero),
        time_T=xp.where(real_T, events.time_E[event_T], zero),
        next_time_T=xp.where(real_T, events.time_E[next_T], zero),
        target_T=xp.where(real_T, events.item_E[next_T], zero),
        weight_T=real_T.astype(xp.float32),
        offsets=offsets,
        last_row_B=xp.where(lengths_B > 0, offsets[:-1] + lengths_B - 1, zero),
        signal_TS=None
        if events.signal_ES is None
        else xp.where(real_T[:, None], events.signal_ES[event_T], zero),
    )


@dataclasses.dataclass(frozen=True)
class HistoryGather:
    """`gather_batch` for a `Loader`: equal settings are equal objects, so that a compiled step serves every loader that has them."""

    rows: int
    padded_length: int | None = None

    def __call__(self, data: Events, columns_B: dict[str, Any], xp: Any = jnp) -> Batch:
        start_B, stop_B, index = columns_B["start"], columns_B["stop"], columns_B.get("event")
        return gather_batch(
            data,
            start_B,
            stop_B,
            rows=self.rows,
            padded_length=self.padded_length,
            index=index,
            xp=xp,
        )
