"""Batches of histories: their events laid out in one flat buffer.

An *example* is a slice `[start, stop)` of the event arrays: rows `start .. stop-1` are the history,
and each row should predict the event after it, so the event at `stop` is the target of the last
row. The same `HistoryGather` runs on the device (`xp=jax.numpy`, in the compiled step) and on the
host (`xp=numpy`, for streamed data).
"""

import dataclasses
import functools
import operator
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from kernels.jagged import Rows, lengths_to_offsets, offsets_to_lengths
from kernels.typing import Leaf, PerRow
from ultra_hstu.parallel.exchange import Exchange, share, together
from ultra_hstu.retrieval.series import Merged, SeriesRows
from ultra_hstu.sequences import Columns, Sequences, seconds_since_first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B histories in T rows; integers are int32. Rows from `offsets[B]` on are padding.

    A padded layout has offsets `0, N, 2N, ...` and item 0 behind every history.
    """

    item_T: Leaf[PerRow]  # item ids 1..I, 0 on padding
    time_T: Leaf[PerRow]  # seconds since the first event of the data
    next_time_T: Leaf[PerRow]  # time of the event after the row, a target's too
    target_T: Leaf[PerRow]  # the item after the row, 0 where nothing is predicted
    weight_T: Leaf[Float32[Array, " T"]]  # 1 where a row is trained on, 0 elsewhere
    offsets: Leaf[Int32[Array | np.ndarray, " B1"]]
    last_row_B: Leaf[Int32[Array, " B"]]  # the user's row; of an empty history, row 0
    signal_TS: Leaf[Int32[Array, "T S"] | None] = None  # codes, 0 none; None: no signals
    # What an evaluation leaves out, 0 behind it; None: the items of the history, or nothing.
    hidden_BN: Leaf[Int32[Array, "B N"] | None] = None
    series: Leaf[SeriesRows | None] = None  # None: every row is an event
    items_1: Leaf[Int32[Array, " groups"] | None] = None  # as `Events.items_1`
    # Codes of the users' ids, 0 none; None: not read.
    user_B: Leaf[Int32[Array | np.ndarray, " B"] | None] = None

    @property
    def sequences(self) -> Sequences:
        held = (self.item_T,) if self.series is None else (self.item_T, self.series.column_T)
        some = jax.tree.map(lambda x: x > 0, held)  # in a mesh perhaps of this device's rows alone
        real_T = functools.reduce(functools.partial(jax.tree.map, operator.or_), some)
        return Sequences(self.offsets, real_T, self.time_T, self.next_time_T)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Events:
    """All events of a data set, users one after another: arrays of the host, or of JAX."""

    item_E: Leaf[Int32[Array | np.ndarray, " E"]]
    time_E: Leaf[Int32[Array | np.ndarray, " E"]]  # seconds since the first event
    signal_ES: Leaf[Int32[Array | np.ndarray, "E S"] | None] = None  # codes; None: no signals
    merged: Leaf[Merged | None] = None  # with series of features; None: every token is an event
    # Items that there are, where the model's table has more entries; None: as many as those.
    items_1: Leaf[Int32[Array | np.ndarray, "1"] | None] = None

    @staticmethod
    def from_arrays(
        items: Int[np.ndarray, " E"],
        timestamps: Int[np.ndarray, " E"] | None,
        signal_ES: Int32[np.ndarray, "E S"] | None = None,
        merged: Merged | None = None,
    ) -> "Events":
        """From ids, absolute seconds and codes.

        Raises ValueError as `seconds_since_first`.
        """
        return Events(
            items.astype(np.int32), seconds_since_first(timestamps, len(items)), signal_ES, merged
        )


@dataclasses.dataclass(frozen=True)
class HistoryGather:
    """Makes flat batches of B examples, columns `start` and `stop`.

    Where they are equal the history is empty. With a column `event`, `start` and `stop` are places
    in it. With a column `learn_from`, events before it are no targets of training; a column `user`
    is `Batch.user_B`. Where `hidden` is not 0, the items of events `hide_from` to `stop - 1` are
    those that an evaluation leaves out.

    Equal settings are equal objects, which share compiled steps.

    Attributes:
      rows: T.
      padded_length: None packs the histories without gaps; a number N puts each at a multiple of N
        (the padded layout of the published research code), and T must be B * N.
      hidden: N of `Batch.hidden_BN`, at least the most events from `hide_from` to `stop`.
      target_time: the last row of a history asks at the time of its target, as every row asks at
        that of the event after it; else at its own time.
      series: how many are merged into the histories.
    """

    rows: int
    padded_length: int | None = None
    hidden: int = 0
    target_time: bool = True
    series: int = 0

    @staticmethod
    def of(
        rows: tuple[int, ...],
        examples: int,
        *,
        padded_length: int | None = None,
        hidden: int = 0,
        target_time: bool = True,
        series: int = 0,
    ) -> "HistoryGather":
        """For a `Loader`; padded histories need the same rows whatever their lengths."""
        (packed,) = rows
        wanted = packed if padded_length is None else examples * padded_length
        return HistoryGather(wanted, padded_length, hidden, target_time, series)

    def __call__(self, data: Events, columns_B: Columns, xp: ModuleType = jnp) -> Batch:
        start_B, index = columns_B["start"], columns_B.get("event")
        lengths_B = (columns_B["stop"] - start_B).astype(xp.int32)
        if data.merged is not None:
            lengths_B = data.merged.rows(start_B, columns_B["stop"], self.series).astype(xp.int32)
        if self.padded_length is None:
            offsets = lengths_to_offsets(lengths_B, xp=xp)
        else:
            offsets = xp.arange(len(lengths_B) + 1, dtype=xp.int32) * self.padded_length
        place = Rows.of(offsets, self.rows, lengths=lengths_B, xp=xp)
        real_T, zero = place.real, xp.int32(0)
        start_T, column_T, own_T = start_B[place.segment], None, real_T
        event_T = xp.where(real_T, start_T + place.position, 0)
        event_T = event_T if index is None else xp.where(real_T, index[event_T], 0)
        if data.merged is not None:
            first_T = xp.where(real_T, start_T, 0)
            event_T, column_T = data.merged.places(first_T, place.position, self.series)
            event_T, column_T = (xp.where(real_T, x, 0) for x in (event_T, column_T))
            own_T = real_T & (column_T == 0)
        next_T = xp.where(real_T, event_T + 1, 0)
        asks_T = next_T if column_T is None else xp.where(own_T, next_T, event_T)
        if not self.target_time:
            last_T = place.position + 1 == lengths_B[place.segment]
            asks_T = xp.where(real_T & last_T, event_T, asks_T)
        weight_T = own_T
        if "learn_from" in columns_B:
            weight_T = own_T & (next_T >= columns_B["learn_from"][place.segment])
        signal_TS, hidden_BN, series = None, None, None
        if data.signal_ES is not None:
            signal_TS = xp.where(own_T[:, None], data.signal_ES[event_T], zero)
        if column_T is not None:
            of_item_T = xp.where(real_T, data.item_E[event_T], zero)
            position_T = xp.where(real_T, event_T - start_T, 0)
            series = SeriesRows(xp.asarray(column_T), of_item_T, position_T)
        if self.hidden:
            hide_BN = columns_B["hide_from"][:, None] + xp.arange(self.hidden, dtype=xp.int32)[None]
            inside_BN = hide_BN < columns_B["stop"][:, None]
            hidden_BN = xp.where(inside_BN, data.item_E[xp.where(inside_BN, hide_BN, 0)], zero)
        return Batch(
            item_T=xp.where(own_T, data.item_E[event_T], zero),
            time_T=xp.where(real_T, data.time_E[event_T], zero),
            next_time_T=xp.where(real_T, data.time_E[asks_T], zero),
            target_T=xp.where(own_T, data.item_E[next_T], zero),
            weight_T=weight_T.astype(xp.float32),
            offsets=offsets,
            last_row_B=xp.where(lengths_B > 0, offsets[:-1] + lengths_B - 1, zero),
            signal_TS=signal_TS,
            hidden_BN=hidden_BN,
            series=series,
            items_1=None if data.items_1 is None else xp.asarray(data.items_1),
            user_B=columns_B.get("user"),
        )

    def shared(self, own: Batch, exchange: Exchange) -> Batch:
        """The batch of a group, of which `own` holds what this device has read."""
        signals = () if own.signal_TS is None else (own.signal_TS,)
        series = () if own.series is None else jax.tree.leaves(own.series)
        single = (own.item_T, own.time_T, own.next_time_T, own.target_T, own.weight_T)
        found = share((*single, *signals, *series), own.offsets, exchange)
        item_T, time_T, next_time_T, target_T, weight_T, *more = found.rows
        length_B = offsets_to_lengths(found.offsets)
        return Batch(
            item_T,
            time_T,
            next_time_T,
            target_T,
            weight_T,
            found.offsets,
            jnp.where(length_B > 0, found.offsets[1:] - 1, 0),
            signal_TS=more[0] if signals else None,
            hidden_BN=together(own.hidden_BN),
            series=SeriesRows(*more[-3:]) if series else None,
            items_1=own.items_1,
            user_B=together(own.user_B),
        )
