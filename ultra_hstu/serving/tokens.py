"""From requests to the tokens of a model: the same rows that training lays out, histories and targets apart."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ultra_hstu.ranking.batch import GAP_EDGES, Form, RankEvents, RankGather, Tokens
from ultra_hstu.serving.capacity import LEAST_ROWS, Room, capacity, padded, padded_offsets
from ultra_hstu.serving.inputs import COLUMNS, Candidates, Events, History


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PaddedHistory:
    """A `History` at the sizes of its capacity class; the users behind the real ones have no rows at all."""

    history: Any
    used_B: Any  # int32 [B]: 1 for a real user


def pad_history(
    history: History, form: Form, room: Room | None = None
) -> tuple[PaddedHistory, dict[str, int]]:
    """The history at the sizes of its class, or of `room`, and the rows of every channel there. Raises ValueError for a room that is too small."""
    users = capacity(history.users) if room is None else room.users
    channels, rows = {}, {}
    for name, events in history.channels.items():
        count = len(events.item_E)
        if room is not None and (history.users > users or count > room.events[name]):
            raise ValueError(
                f"{history.users} users with {count} events of {name!r} are more than {room} holds: encode fewer at a time"
            )
        size = capacity(count, LEAST_ROWS) if room is None else room.events[name]
        columns = {column: padded(getattr(events, column), size) for column in COLUMNS}
        channels[name] = Events(**columns, offsets=padded_offsets(events.offsets, users))
        needed = int(row_counts(form, np.diff(events.offsets)).sum())
        rows[name] = (
            capacity(needed, LEAST_ROWS)
            if room is None
            else users * form.contextual + form.per_event * size
        )
    wide = History(channels, padded(history.context_BC, users), padded(history.now_B, users))
    return PaddedHistory(wide, padded(np.ones(history.users, np.int32), users)), rows


def row_counts(form: Form, events_B: Any) -> Any:
    """Rows of histories with so many events."""
    return form.contextual + form.per_event * events_B


def pad_candidates(
    candidates: Candidates, users: int, micro_batch: int, room: int | None = None
) -> tuple[Candidates, int]:
    """Candidates at the sizes of their class, or in a room for so many, and the candidates of a step: `micro_batch` of them, fewer if there are no more.

    Raises ValueError for a room that is too small.
    """
    count = len(candidates.item_C)
    if room is not None and count > room:
        raise ValueError(
            f"{count} candidates are more than the {room} that there is room for: score fewer at a time"
        )
    step = min(micro_batch, capacity(count, LEAST_ROWS) if room is None else room)
    size = step * (capacity(-(-count // step)) if room is None else -(-room // step))
    arrays = {
        name: padded(getattr(candidates, name), size)
        for name in ("item_C", "feature_CF", "time_C", "slot_C")
    }
    return Candidates(**arrays, offsets=padded_offsets(candidates.offsets, users)), step


def history_tokens(form: Form, request: PaddedHistory, name: str, rows: int) -> Tokens:
    """The rows of one channel, without targets: contextual tokens and history. The request itself stands in for the first target, for its time."""
    history: History = request.history
    events: Events = history.channels[name]
    users, count = history.now_B.shape[0], events.item_E.shape[0]

    def with_request(column: Any, values: Any) -> Array:
        return jnp.concatenate([jnp.asarray(column), jnp.asarray(values)])

    nothing = [
        jnp.zeros((users, x.shape[1]), jnp.int32) for x in (events.signal_ES, events.feature_EF)
    ]
    data = RankEvents(
        item_E=with_request(events.item_E, jnp.zeros(users, jnp.int32)),
        time_E=with_request(events.time_E, history.now_B),
        signal_ES=with_request(events.signal_ES, nothing[0]),
        feature_EF=with_request(events.feature_EF, nothing[1]),
        label_EK=jnp.zeros((count + users, 0)),
        weight_EK=jnp.zeros((count + users, 0)),
        context_UC=history.context_BC,
        index={},
    )
    gather = RankGather(
        rows=(rows,),
        channels=(name,),
        targets=1,
        contextual=form.contextual,
        interleaved=form.interleaved,
        backwards=form.backwards,
        with_targets=False,
    )
    user_B = jnp.arange(users, dtype=jnp.int32)
    span = {f"start/{name}": events.offsets[:-1], f"stop/{name}": events.offsets[1:]}
    columns = {"user": user_B, "target": count + user_B, "count": request.used_B} | span
    tokens = gather(data, columns, jnp).channels[name]
    return dataclasses.replace(
        tokens, num_targets=None, num_contextual=tokens.num_contextual if form.contextual else None
    )


def last_event(request: PaddedHistory, name: str) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many events a channel has of each user, and the time of the newest, 0 without any."""
    events: Events = request.history.channels[name]
    offsets = jnp.asarray(events.offsets)
    count_B = offsets[1:] - offsets[:-1]
    newest_B = jnp.asarray(events.time_E)[jnp.maximum(offsets[1:] - 1, 0)]
    return count_B, jnp.where(count_B > 0, newest_B, 0)


def target_tokens(
    form: Form,
    item_R: Int[Array, " R"],
    feature_RF: Int[Array, "R F"],
    time_R: Int[Array, " R"],
    signals: int,
    events_R: Int[Array, " R"],
    last_R: Int[Array, " R"],
) -> Tokens:
    """Rows of targets behind histories of `events_R` events, of which the newest was at `last_R`. All rows count as real."""
    rows = item_R.shape[0]
    zero_R = jnp.zeros(rows, jnp.int32)
    gap_R = (
        jnp.searchsorted(
            jnp.asarray(GAP_EDGES), time_R - last_R, side="right", method="compare_all"
        ).astype(jnp.int32)
        + 1
    )
    return Tokens(
        item_T=item_R,
        signal_TS=jnp.zeros((rows, signals), jnp.int32),
        feature_TF=feature_RF,
        context_T=zero_R,
        position_T=zero_R if form.backwards else events_R + 1,
        gap_T=jnp.where(events_R > 0, gap_R, 0),
        time_T=time_R,
        next_time_T=time_R,
        offsets=jnp.array([0, rows], jnp.int32),
        num_targets=None,
        num_contextual=None,
        row_P=zero_R,
    )


def token_rows(tokens: Tokens, row_R: Int[Array, " R"], count: Int[Array, ""]) -> Tokens:
    """Some rows of tokens, the first `count` of them real, as one sequence: for the embedding."""
    fields = (
        "item_T",
        "signal_TS",
        "feature_TF",
        "context_T",
        "position_T",
        "gap_T",
        "time_T",
        "next_time_T",
    )
    taken = {name: jnp.take(getattr(tokens, name), row_R, axis=0, mode="clip") for name in fields}
    offsets = jnp.stack([jnp.zeros_like(count), count])
    return dataclasses.replace(
        tokens, **taken, offsets=offsets, num_targets=None, num_contextual=None
    )
