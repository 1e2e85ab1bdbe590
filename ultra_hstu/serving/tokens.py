"""From the values of a request to the tokens of a model: the rows that training lays out, histories
and targets apart."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, Shaped

from ultra_hstu.data import signals
from ultra_hstu.data.times import check_times
from ultra_hstu.ranking.batch import GAP_EDGES, RankEvents, RankGather, Tokens
from ultra_hstu.ranking.form import Form
from ultra_hstu.sequences import SECONDS_RANGE
from ultra_hstu.serving.artefact import Numbers, padded, padded_offsets
from ultra_hstu.serving.inputs import (
    COLUMNS,
    LADDER,
    ROW_SIZES,
    AnyArray,
    Bucket,
    Candidates,
    UserEvents,
    UserHistory,
    bucket_size,
    cumulative,
)


def signal_codes(
    names: Sequence[str], actions: Mapping[str, Shaped[np.ndarray, " E"]], count: int
) -> Int32[np.ndarray, "E S"]:
    """The codes of signals of `count` events, 0 for signals whose actions were not given.

    Raises:
      ValueError: values that a signal cannot be made from.
    """
    codes = [
        signals.signal(dict(actions), name).code
        if set(signals.needs((name,))) <= set(actions)
        else np.zeros(count, np.int32)
        for name in names
    ]
    return np.stack(codes, axis=1).astype(np.int32) if codes else np.zeros((count, 0), np.int32)


def since_first(
    count: int, times: Numbers | None, now: int | None, *, first: int = 0
) -> Int32[np.ndarray, " n"]:
    """Seconds of the events from `first` on and of the request behind them, counted from the first
    of these, so that what is encoded does not depend on when the world began.

    Args:
      count: how many events there are.
      times: seconds since 1970, one an event, oldest first; None: all events are simultaneous.
      now: time of the request; None: the time of the last event.

    Raises:
      ValueError: another number of times, times outside 1901 to 2106, which are no seconds, or that
        go back or span more than 2^31 - 1 seconds.
    """
    time_E = np.zeros(count, np.int64) if times is None else np.asarray(times, np.int64)
    if len(time_E) != count:
        raise ValueError(f"{count} items but {len(time_E)} times: give one time an item")
    if now is None:
        now = int(time_E[-1]) if count else 0
    time_E = np.append(time_E, np.int64(now))
    check_times(time_E, "s", lambda i: "times" if i < count else "now")
    if len(back := np.flatnonzero(time_E[1:] < time_E[:-1])):
        raise ValueError(
            f"times go back from {time_E[back[0]]} to {time_E[back[0] + 1]}: "
            "give the history oldest first, and now not before its last event"
        )
    time_E = time_E[first:]
    if int(time_E[-1]) - int(time_E[0]) > SECONDS_RANGE:
        raise ValueError(
            f"times run from {time_E[0]} to {time_E[-1]}: more than 2^31 - 1 seconds. "
            "Give seconds, not milliseconds."
        )
    return (time_E - time_E[0]).astype(np.int32)


def key_of(history: UserHistory, *, with_now: bool) -> bytes:
    """A hash of a history, `now_B` in it or not. Shapes are hashed too: where one array ends and
    the next begins."""
    read = (history.channels, history.context_BC, history.now_B if with_now else None)
    digest = hashlib.blake2b(digest_size=16)
    for array in jax.tree.leaves(read):
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()


def from_source(
    events: RankEvents, columns_B: Mapping[str, Numbers], form: Form
) -> tuple[UserHistory, Candidates]:
    """Requests of a data set, as columns of `RankingTask.table`: their histories, and their targets
    as candidates, at the times that the columns say."""
    column = {name: np.asarray(values, np.int64) for name, values in columns_B.items()}

    def spans(
        start_B: Int[np.ndarray, " B"], length_B: Int[np.ndarray, " B"]
    ) -> tuple[Int[np.ndarray, " n"], Int32[np.ndarray, " B1"]]:
        offsets = cumulative(length_B)
        user_E = np.repeat(np.arange(len(length_B)), length_B)
        return start_B[user_E] + np.arange(offsets[-1]) - offsets[user_E], offsets

    channels = {}
    for name, _ in form.max_history:
        start_B = column[f"start/{name}"]
        event_E, offsets = spans(start_B, column[f"stop/{name}"] - start_B)
        if name in events.index:
            event_E = np.asarray(events.index[name])[event_E]
        columns = (getattr(events, field)[event_E] for field in COLUMNS)
        channels[name] = UserEvents.of_columns(columns, offsets)
    target_C, offsets = spans(column["target"], column["count"])
    now_B = events.time_E[column.get("now", column["target"])]
    time_C = np.repeat(now_B, column["count"]) if "now" in column else events.time_E[target_C]
    candidates = Candidates(events.item_E[target_C], events.feature_EF[target_C], time_C, offsets)
    return UserHistory(channels, events.context_UC[column["user"]], now_B), candidates


def kept_in_blocks(count: int, longest: int) -> int:
    """How many of the newest of `count` events are kept if the oldest are dropped in blocks.

    A block is an eighth of `longest`. Between two drops a full history grows like another one.
    """
    block = max(1, longest // 8)
    return count - block * -(-max(0, count - longest) // block)


def pad_history(
    history: UserHistory, bucket: Bucket | None = None
) -> tuple[UserHistory, Int32[np.ndarray, " B"]]:
    """The history at the sizes of `bucket` (None: the smallest that holds it), and 1 for each real
    user and 0 behind them.

    Raises:
      ValueError: a bucket that is too small.
    """
    if bucket is None:
        counts = {name: len(events.item_E) for name, events in history.channels.items()}
        sizes = {name: bucket_size(count, ROW_SIZES) for name, count in counts.items()}
        bucket = Bucket(bucket_size(history.users), sizes)
    channels = {}
    for name, events in history.channels.items():
        count, size = len(events.item_E), bucket.events[name]
        if history.users > bucket.users or count > size:
            raise ValueError(
                f"{history.users} users with {count} events of {name!r} are more than {bucket} "
                "holds: encode fewer at a time"
            )
        columns = (padded(getattr(events, column), size) for column in COLUMNS)
        channels[name] = UserEvents.of_columns(
            columns, padded_offsets(events.offsets, bucket.users)
        )
    wide = UserHistory(
        channels, padded(history.context_BC, bucket.users), padded(history.now_B, bucket.users)
    )
    return wide, padded(np.ones(history.users, np.int32), bucket.users)


def bucket_rows(form: Form, bucket: Bucket, name: str) -> int:
    """Rows of a channel in a bucket."""
    return bucket.users * form.contextual + form.per_event * bucket.events[name]


def pad_candidates(
    candidates: Candidates, users: int, micro_batch: int, bucket: int | None = None
) -> tuple[Candidates, int]:
    """Candidates at the size of a bucket for so many (None: the smallest), and the candidates of a
    step: `micro_batch` of them, fewer if there are no more.

    Raises:
      ValueError: a bucket that is too small.
    """
    count = len(candidates.item_C)
    if bucket is not None and count > bucket:
        raise ValueError(
            f"{count} candidates are more than the {bucket} of the bucket: score fewer at a time"
        )
    step = min(micro_batch, bucket_size(count, ROW_SIZES) if bucket is None else bucket)
    steps = bucket_size(-(-count // step), LADDER) if bucket is None else -(-bucket // step)
    item_C, feature_CF, time_C, slot_C = (
        padded(getattr(candidates, name), step * steps)
        for name in ("item_C", "feature_CF", "time_C", "slot_C")
    )
    offsets = padded_offsets(candidates.offsets, users)
    return Candidates(item_C, feature_CF, time_C, offsets, slot_C), step


def history_tokens(form: Form, history: UserHistory, used_B: Int[Array, " B"], name: str) -> Tokens:
    """The rows of one channel, without targets: contextual tokens and history, as many as a bucket
    of this size has. The request itself stands in for the first target, for its time.

    Args:
      used_B: 1 for a real user; others have no rows at all.
    """
    events = history.channels[name]
    users, count = history.now_B.shape[0], events.item_E.shape[0]

    def with_request(column: Shaped[AnyArray, "E ..."]) -> Shaped[Array, "EB ..."]:
        return jnp.pad(column, [(0, users)] + [(0, 0)] * (jnp.ndim(column) - 1))

    data = RankEvents(
        item_E=with_request(events.item_E),
        time_E=jnp.concatenate([events.time_E, history.now_B]),
        signal_ES=with_request(events.signal_ES),
        feature_EF=with_request(events.feature_EF),
        label_EK=jnp.zeros((count + users, 0), jnp.float32),
        weight_EK=jnp.zeros((count + users, 0), jnp.float32),
        context_UC=history.context_BC,
        index={},
    )
    gather = RankGather(
        rows=(bucket_rows(form, Bucket(users, {name: count}), name),),
        channels=(name,),
        targets=1,
        contextual=form.contextual,
        interleaved=form.interleaved,
        backwards=form.backwards,
        with_targets=False,
    )
    user_B = jnp.arange(users, dtype=jnp.int32)
    columns = {
        "user": user_B,
        "target": count + user_B,
        "count": used_B,
        f"start/{name}": events.offsets[:-1],
        f"stop/{name}": events.offsets[1:],
    }
    tokens = gather(data, columns, jnp).channels[name]
    return dataclasses.replace(
        tokens, num_targets=None, num_contextual=tokens.num_contextual if form.contextual else None
    )


def target_tokens(
    form: Form,
    item_R: Int[Array, " R"],
    feature_RF: Int[Array, "R F"],
    time_R: Int[Array, " R"],
    signals: int,
    events_R: Int[Array, " R"],
    last_R: Int[Array, " R"],
) -> Tokens:
    """Rows of targets behind histories of `events_R` events, the newest one at `last_R`.
    All rows count as real."""
    rows = item_R.shape[0]
    zero_R = jnp.zeros(rows, jnp.int32)
    edges, gap_R = jnp.asarray(GAP_EDGES), time_R - last_R
    bucket_R = 1 + jnp.searchsorted(edges, gap_R, side="right", method="compare_all")
    return Tokens(
        item_T=item_R,
        signal_TS=jnp.zeros((rows, signals), jnp.int32),
        feature_TF=feature_RF,
        context_T=zero_R,
        position_T=zero_R if form.backwards else events_R + 1,
        gap_T=jnp.where(events_R > 0, bucket_R.astype(jnp.int32), 0),
        time_T=time_R,
        next_time_T=time_R,
        offsets=jnp.array([0, rows], jnp.int32),
        num_targets=None,
        num_contextual=None,
        row_P=zero_R,
    )


def token_rows(tokens: Tokens, row_R: Int[Array, " R"], count: Int[Array, ""]) -> Tokens:
    """Some rows of tokens, the first `count` of them real, as one sequence: for the embedding."""

    def take(column: Shaped[Array, "T ..."]) -> Shaped[Array, "R ..."]:
        return jnp.take(column, row_R, axis=0, mode="clip")

    return Tokens(
        item_T=take(tokens.item_T),
        signal_TS=take(tokens.signal_TS),
        feature_TF=take(tokens.feature_TF),
        context_T=take(tokens.context_T),
        position_T=take(tokens.position_T),
        gap_T=take(tokens.gap_T),
        time_T=take(tokens.time_T),
        next_time_T=take(tokens.next_time_T),
        offsets=jnp.stack([jnp.zeros_like(count), count]),
        num_targets=None,
        num_contextual=None,
        row_P=tokens.row_P,
    )
