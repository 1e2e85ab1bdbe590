"""Batches of the ranking task: requests laid out as sequences of tokens, in either form of input.

A request becomes contextual tokens, history, targets. In the `merged` form (ULTRA-HSTU, arXiv
2602.16986) a history event is one token, item and signals together. In the `interleaved` form
(HSTU, arXiv 2402.17152) it is two, the item and then the action. In both a target is the item
alone: its signals are zero, since they are to be predicted.

With a mixture of transducers a batch holds several sequences of the same requests, one a channel,
which share contextual tokens and targets and differ in the history.
"""

import dataclasses
from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32, Shaped

from kernels.jagged import Rows, lengths_to_offsets
from kernels.typing import Leaf, PerRow
from ultra_hstu.parallel.exchange import Exchange, before_this, share, together
from ultra_hstu.sequences import Columns, Sequences

# Seconds between an event and the one before it, in steps of e^0.301, as HSTU's relative bias has.
GAP_EDGES = np.unique(np.floor(np.exp(0.301 * np.arange(72))).astype(np.int64)).astype(np.int32)
GAP_SIZE = len(GAP_EDGES) + 2  # 0: no gap


AnyArray = Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankEvents:
    """All events of a data set, users one after another, with everything that a token may hold.

    Arrays of the host, and of JAX once they are placed.
    """

    item_E: Leaf[Int32[AnyArray, " E"]]  # 1..I
    time_E: Leaf[Int32[AnyArray, " E"]]  # seconds since the first event
    signal_ES: Leaf[Int32[AnyArray, "E S"]]  # codes, 0 none
    feature_EF: Leaf[Int32[AnyArray, "E F"]]
    label_EK: Leaf[Float32[AnyArray, "E K"]]
    weight_EK: Leaf[Float32[AnyArray, "E K"]]  # 0 where an event has no label
    context_UC: Leaf[Int32[AnyArray, "U C"]]  # codes over all contextual features together, 1..
    # The events that a channel keeps, for channels that leave some out.
    index: Mapping[str, Leaf[Int32[AnyArray, " n"]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The rows of one channel: B sequences in T rows, of contextual tokens, history and targets.

    Integers are int32. Rows from `offsets[B]` on are padding.
    """

    item_T: Leaf[PerRow]  # 0 on contextual, action and padding rows
    signal_TS: Leaf[Int32[Array, "T S"]]  # 0 on targets, on items of the interleaved form, ...
    feature_TF: Leaf[Int32[Array, "T F"]]  # of item rows, targets too
    context_T: Leaf[PerRow]  # 0 except on contextual rows
    # Of the event, see `RankGather.backwards`; an item and its action share it.
    position_T: Leaf[PerRow]
    gap_T: Leaf[PerRow]  # bucket of the seconds since the last event, on item rows
    time_T: Leaf[PerRow]  # seconds
    # When the row asks: the time of an item or target itself, else that of the event after.
    next_time_T: Leaf[PerRow]
    offsets: Leaf[Int32[Array, " B1"]]
    num_targets: Leaf[Int32[Array, " B"] | None]  # None: no targets
    num_contextual: Leaf[Int32[Array, " B"] | None]
    # Rows that are predicted, the same events in every channel; T in empty places.
    row_P: Leaf[Int32[Array, " P"]]

    @property
    def sequences(self) -> Sequences:
        return Sequences(
            self.offsets,
            Rows.of(self.offsets, self.item_T.shape[0]).real,
            self.time_T,
            self.next_time_T,
            self.num_targets,
            self.num_contextual,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankBatch:
    """B requests and the P events that they ask about."""

    channels: dict[str, Tokens]
    label_PK: Leaf[Float32[Array, "P K"]]
    weight_PK: Leaf[Float32[Array, "P K"]]  # 0 on what is not supervised
    user_P: Leaf[Int32[Array, " P"]]  # place of the user in the data


@dataclasses.dataclass(frozen=True)
class Form:
    """How the requests of a model are laid out as tokens.

    Attributes:
      contextual: tokens in front of every history.
      interleaved: two rows an event, item and action; else one.
      backwards: positions count back from the targets: targets 0, the newest event 1; else forwards
        from 1.
      max_history: by channel, the newest events that count.
    """

    contextual: int
    interleaved: bool
    backwards: bool
    max_history: tuple[tuple[str, int], ...]

    @property
    def per_event(self) -> int:
        """Rows of an event of a history."""
        return 2 if self.interleaved else 1


@dataclasses.dataclass(frozen=True)
class RankGather:
    """Makes the batches of a `Loader`: `xp=jax.numpy` in the compiled step, `xp=numpy` on the host.

    Columns of a request: `user`; `target` and `count`, the first event that is asked about and how
    many are; `start/NAME` and `stop/NAME` for each channel, its history as a range of events, or of
    `RankEvents.index[NAME]` where there is one, or of the batch's own `event/NAME`. With `now`, all
    targets are asked about at the time of that event; without it, each at its own.

    Attributes:
      rows: T of each channel.
      targets: most targets of a request.
      contextual: tokens in front of every history.
      backwards: positions count back from the targets: targets 0, the newest event 1; else forwards
        from 1.
      supervise_history: predicts every item of the history, not the targets; interleaved, one
        channel, forward positions.
      with_targets: False leaves the targets without rows; the first of them only says when the last
        event of the history asks.
    """

    rows: tuple[int, ...]
    channels: tuple[str, ...]
    targets: int
    contextual: int
    interleaved: bool
    backwards: bool = True
    supervise_history: bool = False
    with_targets: bool = True

    def __call__(self, data: RankEvents, columns_B: Columns, xp: ModuleType = jnp) -> RankBatch:
        column = {name: xp.asarray(values).astype(xp.int32) for name, values in columns_B.items()}
        if self.supervise_history:
            (name,) = self.channels
            start_B, index = column[f"start/{name}"], _index(data, column, name)
            length_B, places = column[f"stop/{name}"] - start_B, self.rows[0] // 2
            offsets = lengths_to_offsets(length_B, xp=xp)
        else:
            start_B, index, length_B = column["target"], None, column["count"]
            places = len(length_B) * self.targets
            offsets = xp.arange(0, places + 1, self.targets, dtype=xp.int32)
        at_P = Rows.of(offsets, places, lengths=length_B, xp=xp)
        event_P = xp.where(at_P.real, start_B[at_P.segment] + at_P.position, 0)
        event_P = event_P if index is None else xp.where(at_P.real, index[event_P], 0)
        tokens = {
            name: self._tokens(xp, data, column, name, rows, at_P)
            for name, rows in zip(self.channels, self.rows, strict=True)
        }
        return RankBatch(
            channels=tokens,
            label_PK=data.label_EK[event_P],
            weight_PK=data.weight_EK[event_P] * at_P.real.astype(xp.float32)[:, None],
            user_P=xp.where(at_P.real, column["user"][at_P.segment], 0),
        )

    def shared(self, own: RankBatch, exchange: Exchange) -> RankBatch:
        """The batch of a group, of which `own` holds what this device has read."""
        first_channel = own.channels[self.channels[0]]
        real_P = first_channel.row_P < first_channel.item_T.shape[0]

        def places(x_P: Shaped[Array, "P *K"]) -> Shaped[Array, "P2 *K"]:
            x_P = jax.vmap(jnp.where)(real_P, x_P, jnp.zeros_like(x_P))
            if self.supervise_history:  # places are packed as rows are: behind those of others
                count, before = self.rows[0] // 2, before_this(real_P.sum(dtype=jnp.int32))
                room_P = jnp.zeros((count + len(x_P), *x_P.shape[1:]), x_P.dtype)
                x_P = jax.lax.dynamic_update_slice_in_dim(room_P, x_P, before, axis=0)[:count]
            return together(x_P)

        channels, fits = {}, jnp.bool_(True)
        for number, (name, num_rows) in enumerate(zip(self.channels, self.rows, strict=True)):
            of = own.channels[name]
            rows = (
                *(of.item_T, of.signal_TS, of.feature_TF, of.context_T),
                *(of.position_T, of.gap_T, of.time_T, of.next_time_T),
            )
            found = share(rows, of.offsets, exchange, number)
            item_T, signal_TS, feature_TF, context_T, *times = found.rows
            position_T, gap_T, time_T, next_time_T = times
            channels[name] = Tokens(
                item_T,
                signal_TS,
                feature_TF,
                context_T,
                position_T,
                gap_T,
                time_T,
                next_time_T,
                found.offsets,
                together(of.num_targets),
                together(of.num_contextual),
                num_rows + places(of.row_P + found.start - num_rows),
            )
            fits &= found.fits
        weight_PK = jnp.where(fits, places(own.weight_PK), jnp.nan)
        return RankBatch(channels, places(own.label_PK), weight_PK, places(own.user_P))

    def _tokens(
        self,
        xp: ModuleType,
        data: RankEvents,
        column: Columns,
        name: str,
        rows: int,
        at_P: Rows,
    ) -> Tokens:
        """One channel; `at_P` are the predicted events by request.

        For a row's request b: c contextual tokens, h history events, place p in it.
        """
        per_event = 2 if self.interleaved else 1
        start_B, target_B, count_B = column[f"start/{name}"], column["target"], column["count"]
        history_B = column[f"stop/{name}"] - start_B
        used_B = (history_B + count_B) > 0
        contextual_B = xp.where(used_B, self.contextual, 0).astype(xp.int32)
        laid_B = count_B if self.with_targets else xp.zeros_like(count_B)
        offsets = lengths_to_offsets(contextual_B + per_event * history_B + laid_B, xp=xp)
        at_T = Rows.of(offsets, rows, xp=xp)
        b_T, p_T, real_T = at_T.segment, at_T.position, at_T.real
        c_T, h_T, start_T, target_T = contextual_B[b_T], history_B[b_T], start_B[b_T], target_B[b_T]
        into_T = p_T - c_T
        is_context_T = real_T & (into_T < 0)
        is_target_T = real_T & (into_T >= per_event * h_T)
        is_history_T = real_T & ~is_context_T & ~is_target_T
        # Of the row's event among history and targets.
        place_T = xp.where(is_target_T, into_T - (per_event - 1) * h_T, into_T // per_event)
        place_T = xp.where(is_context_T, 0, place_T)
        is_action_T = is_history_T & (into_T % per_event == 1)
        is_item_T = (is_history_T | is_target_T) & ~is_action_T
        has_signals_T = is_action_T if self.interleaved else is_history_T

        def event(place: Int[AnyArray, " T"]) -> Int[AnyArray, " T"]:
            """The event at a place, that of the first target before place 0.

            In a request that has neither history nor targets it is the first event of all.
            """
            inside = (place >= 0) & (place < h_T)
            here = xp.where(inside, start_T + place, 0)
            index = _index(data, column, name)
            if index is not None:
                here = index[here] if len(index) else here
            asked = target_T + xp.maximum(place - h_T, 0)
            return xp.where(inside, here, xp.where(count_B[b_T] > 0, asked, here))

        event_T = xp.where(real_T, event(place_T), 0)
        # Behind the history all targets stand at one place.
        seen_T = xp.minimum(place_T, h_T)
        before_T = xp.where(real_T, event(seen_T - 1), 0)
        has_before_T = is_item_T & (seen_T > 0)
        time_T = data.time_E[event_T]
        asks_now_T = is_context_T | is_target_T | (is_item_T & self.interleaved)
        after_T = xp.where(asks_now_T | ~real_T, event_T, event(place_T + 1))
        # The last row of a supervised history has nothing after it: its own time.
        next_time_T = xp.where(
            asks_now_T | ((place_T + 1 >= h_T) & (count_B[b_T] == 0)), time_T, data.time_E[after_T]
        )
        if "now" in column:
            now_T = data.time_E[column["now"][b_T]]
            before_targets_T = is_history_T & ~asks_now_T & (place_T + 1 >= h_T)
            time_T = xp.where(is_target_T, now_T, time_T)
            next_time_T = xp.where(is_target_T | before_targets_T, now_T, next_time_T)
        gap_T = xp.searchsorted(
            GAP_EDGES if xp is np else jnp.asarray(GAP_EDGES),
            time_T - data.time_E[before_T],
            side="right",
        )
        position_T = h_T - seen_T if self.backwards else seen_T + 1
        zero = xp.int32(0)
        behind_B = offsets[:-1] + contextual_B
        if self.supervise_history:
            row_P = behind_B[at_P.segment] + per_event * at_P.position
        else:
            row_P = (behind_B + per_event * history_B)[at_P.segment] + at_P.position
        context_T = (
            data.context_UC[column["user"][b_T], xp.clip(p_T, 0, self.contextual - 1)]
            if self.contextual
            else xp.zeros_like(p_T)
        )
        return Tokens(
            item_T=xp.where(is_item_T, data.item_E[event_T], zero),
            signal_TS=xp.where(has_signals_T[:, None], data.signal_ES[event_T], zero),
            feature_TF=xp.where(is_item_T[:, None], data.feature_EF[event_T], zero),
            context_T=xp.where(is_context_T, context_T, zero),
            position_T=xp.where(is_history_T | is_target_T, position_T, zero).astype(xp.int32),
            gap_T=xp.where(has_before_T, gap_T + 1, zero).astype(xp.int32),
            time_T=xp.where(real_T, time_T, zero),
            next_time_T=xp.where(real_T, next_time_T, zero),
            offsets=xp.asarray(offsets),
            num_targets=xp.asarray(laid_B),
            num_contextual=contextual_B,
            row_P=xp.where(at_P.real, row_P, rows).astype(xp.int32),
        )


def _index(data: RankEvents, column: Columns, name: str) -> Int[AnyArray, " n"] | None:
    """The events that a channel's `start` and `stop` count; None if they count all events."""
    return column.get(f"event/{name}", data.index.get(name))
