"""Batches of histories: their events laid out in one flat buffer.

An *example* is a slice `[start, stop)` of the event arrays: rows `start .. stop-1` are the history,
and each row should predict the event after it, so the event at `stop` is the target of the last
row. The same `gather_batch` runs on the device (`xp=jax.numpy`, in the compiled step) and on the
host (`xp=numpy`, for streamed data).
"""

import dataclasses
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from kernels.jagged import Rows, lengths_to_offsets
from kernels.typing import Leaf
from ultra_hstu.sequences import Columns, Sequences


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B histories in T rows. Rows from `offsets[B]` on are padding.

    A padded layout has offsets `0, N, 2N, ...` and item 0 behind every history.
    """

    item_T: Leaf[Int32[Array, " T"]]  # item ids 1..I, 0 on padding
    time_T: Leaf[Int32[Array, " T"]]  # seconds since the first event of the data
    next_time_T: Leaf[Int32[Array, " T"]]  # time of the event after the row, a target's too
    target_T: Leaf[Int32[Array, " T"]]  # the item after the row, 0 where nothing is predicted
    weight_T: Leaf[Float32[Array, " T"]]  # 1 where a row is trained on, 0 elsewhere
    offsets: Leaf[Int32[Array | np.ndarray, " B1"]]
    last_row_B: Leaf[Int32[Array, " B"]]  # the user's row; of an empty history, row 0
    signal_TS: Leaf[Int32[Array, "T S"] | None] = None  # codes, 0 none; None: no signals

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.offsets, self.item_T > 0, self.time_T, self.next_time_T)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Events:
    """All events of a data set, users one after another: arrays of the host, or of JAX."""

    item_E: Leaf[Int32[Array | np.ndarray, " E"]]
    time_E: Leaf[Int32[Array | np.ndarray, " E"]]  # seconds since the first event
    signal_ES: Leaf[Int32[Array | np.ndarray, "E S"] | None] = None  # codes; None: no signals


def gather_batch(
    events: Events,
    start_B: Int[Array | np.ndarray, " B"],
    stop_B: Int[Array | np.ndarray, " B"],
    *,
    rows: int,
    padded_length: int | None = None,
    index: Int[Array | np.ndarray, " n"] | None = None,
    xp: ModuleType = jnp,
) -> Batch:
    """The flat batch of B examples; `start == stop` makes an empty history.

    Args:
      rows: T.
      padded_length: None packs the histories without gaps; a number N puts each at a multiple of N
        (the padded layout of the published research code), and T must be B * N.
      index: events that `start` and `stop` count, where histories are not all events from one to
        another; None: the events themselves.
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
    """`gather_batch` for a `Loader`.

    Equal settings are equal objects, which share compiled steps.
    """

    rows: int
    padded_length: int | None = None

    def __call__(self, data: Events, columns_B: Columns, xp: ModuleType = jnp) -> Batch:
        return gather_batch(
            data,
            columns_B["start"],
            columns_B["stop"],
            rows=self.rows,
            padded_length=self.padded_length,
            index=columns_B.get("event"),
            xp=xp,
        )
