"""Scoring online: histories in, encoded users out, and a score of every candidate for each task.
Few compiled programs serve every call."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from ultra_hstu import tasks
from ultra_hstu.checkpoint import load_params
from ultra_hstu.config import Config, Kind
from ultra_hstu.data.codebook import Codebook
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.nn.key_values import CacheDtype
from ultra_hstu.quantization import HostKind
from ultra_hstu.ranking.form import channels
from ultra_hstu.ranking.loss import KINDS
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.retrieval.task import RetrievalTask
from ultra_hstu.serving.compiled import CompiledRanker, count_programs
from ultra_hstu.serving.inputs import (
    MAX_USERS,
    Bucket,
    Candidates,
    Query,
    UserEvents,
    UserHistory,
    bucket_sizes,
    cumulative,
)
from ultra_hstu.serving.kv_cache import Cache
from ultra_hstu.serving.schema import MAX_CANDIDATES
from ultra_hstu.serving.score import (
    Growth,
    changed_rows,
    encode_history,
    grow,
    grows,
    growths,
    score,
)
from ultra_hstu.serving.tokens import (
    bucket_rows,
    kept_in_blocks,
    key_of,
    signal_codes,
    since_first,
)
from ultra_hstu.workdir import Workdir

MICRO_BATCH = 128  # a tile of attention on a CPU
NEW_EVENTS = 32  # of each channel, by which a history is extended; with more it is encoded anew


# Dense ids of events, seconds, actions by name, and the user's context as codes by name.
UserData = tuple[
    Int[np.ndarray, " E"],
    Int[np.ndarray, " E"] | None,
    dict[str, Shaped[np.ndarray, " E"]],
    dict[str, int],
]


class RunData:
    """The data that a run was trained on, read when it is first needed."""

    def __init__(self, workdir: str, raw_dir: str | None = None):
        self.folder = Workdir(workdir)
        self.config: Config = self.folder.read_for_one_device(raw_dir)
        self.step: int | None = None  # that the parameters have been trained to; None: not read

    @functools.cached_property
    def interactions(self) -> Interactions:
        """Raises ValueError where the data is not what the run was trained on, or cannot be
        read."""
        interactions = tasks.as_known(self.config, load_interactions(self.config.data))
        self.folder.check_data(interactions)
        return interactions

    @functools.cached_property
    def count_I(self) -> Float[np.ndarray, " I1"]:
        """How often each item occurs in the training data, as scores of what has no history."""
        return RetrievalTask.of(self.config, self.interactions).popularity().astype(np.float64)

    def user(self, user: int | str) -> UserData:
        """The whole history of a user, by raw id. Raises ValueError for an unknown one."""
        data = self.interactions
        row, events = data.row(user), data.history(user)
        return (
            data.items[events],
            None if data.timestamps is None else data.timestamps[events],
            {name: values[events] for name, values in data.actions.items()},
            {name: int(codes[row]) for name, codes in data.contexts.items()},
        )


class ScoringModel:
    """A trained ranker, ready to score.

    Users of different histories and numbers of candidates share a call. Its sizes are few:
    histories fill 1, 2, 4, ... of the longest; candidates come in one size, computed
    `MICRO_BATCH` at a time.
    """

    def __init__(
        self,
        ranker: Ranker,
        config: Config,
        vocabulary: Codebook,
        kinds: Mapping[str, Kind],
        *,
        kind: CacheDtype = "same",
        max_users: int = MAX_USERS,
        host_table: HostKind | None = None,
        drop_blocks: bool = False,
    ):
        """
        Args:
          kinds: of each task, in the order of the logits: "binary" or "regression".
          kind: dtype of the cache, as in `encode_history`.
          max_users: requests in one device call.
          host_table: None leaves the item table on the device; else as in `CompiledRanker`.
          drop_blocks: a full history drops its oldest events an eighth of `max_history` at a time;
            else one for each new one.

        Raises:
          ValueError: another kind of task.
        """
        if unknown := sorted(set(kinds.values()) - set(KINDS)):
            raise ValueError(f"a task is one of {', '.join(KINDS)}, not {unknown[0]!r}")
        self.ranker = CompiledRanker(ranker, host_table=host_table)
        self.config, self.vocabulary, self.kinds, self.kind = config, vocabulary, dict(kinds), kind
        self.max_users = max_users
        self._channels = channels(config)
        self._longest = dict(self.ranker.form.max_history)
        self.buckets = [
            Bucket(max_users, {name: fill * longest for name, longest in self._longest.items()})
            for fill in bucket_sizes(1, max_users, 2)
        ]
        histories = sum(max_users * longest for longest in self._longest.values())
        self.ranker.reserve_items(max(histories, max_users * MAX_CANDIDATES))
        self.drop_blocks = drop_blocks
        encoders = self.ranker.encoders
        self._biased = any(encoder.layers[0].bias is not None for encoder in encoders.values())
        # A history is never extended where none of its rows stays.
        self.grows = grows(self.ranker)
        self._new_rows = {
            name: self.ranker.form.per_event * NEW_EVENTS + changed_rows(encoder)
            for name, encoder in encoders.items()
        }

    def query(
        self,
        items: Int[np.ndarray, " E"],
        times: Int[np.ndarray, " E"] | None,
        actions: Mapping[str, Shaped[np.ndarray, " E"]],
        context: Mapping[str, int],
        *,
        candidates: Int[np.ndarray, " C"],
        feature_CF: Int[np.ndarray, "C F"],
        now: int | None = None,
    ) -> Query:
        """Checks one request, on the host. No events are a legal history.

        Args:
          items, times: dense ids, oldest first, and seconds; None: simultaneous.
          actions: the source's columns of the events, by name; signals and features of the run
            whose column is missing are 0, none.
          context: the user's codes by name.
          candidates, feature_CF: dense ids, in any order and number of repeats, and the codes of
            the run's features.
          now: when the user would act, in the same seconds; None: at once after the last event.

        Raises:
          ValueError: times that go back or span more than 2^31 - 1 seconds, actions that a signal
            cannot be made from.
        """
        count = len(items)
        time_E = since_first(count, times, now)
        whole = UserEvents(
            items.astype(np.int32),
            time_E[:-1],
            signal_codes(self.config.rank.signals, actions, count),
            self.vocabulary.features_of(actions, count),
            np.array([0, count], np.int32),
        )
        kept = {name: self._kept(whole, name, actions) for name in self._channels}
        # From the oldest event that counts on, so that those before it change nothing.
        now_B = time_E[-1:]
        oldest = [int(events.time_E[0]) for events in kept.values() if len(events.time_E)]
        first = min(oldest, default=int(now_B[0]))
        kept = {
            name: dataclasses.replace(events, time_E=events.time_E - np.int32(first))
            for name, events in kept.items()
        }
        history = UserHistory(kept, self.vocabulary.context(context)[None], now_B - np.int32(first))
        known = Candidates(
            candidates.astype(np.int32),
            feature_CF.astype(np.int32),
            np.repeat(history.now_B, len(candidates)),
            np.array([0, len(candidates)], np.int32),
        )
        # A relative bias alone reads when the request is made.
        return Query(history, key_of(history, with_now=self._biased), candidates=known)

    def encode(self, queries: Sequence[Query], bucket: Bucket | None = None) -> Cache:
        """The users of up to `max_users` queries, encoded in one call."""
        histories = [query.history for query in queries]
        cache = encode_history(
            self.ranker,
            UserHistory.concatenate(histories),
            kind=self.kind,
            bucket=bucket or self.bucket_of(histories),
        )
        if self.grows:
            return cache
        return cache.with_parts(dataclasses.replace(part, input_SD=None) for part in cache.parts)

    def extend(self, cache: Cache, queries: Sequence[Query], bucket: Bucket) -> tuple[Cache, int]:
        """The cache of the queries' histories, which continue those of `cache` by at most
        NEW_EVENTS events in each channel; and how many of its rows stayed.

        Args:
          cache: joined at the sizes of `bucket`, which `bucket_of` gives for the queries and True.
        """
        after = UserHistory.concatenate([query.history for query in queries])
        added_B = {
            name: events.lengths - cache.history.channels[name].lengths
            for name, events in after.channels.items()
        }
        grown = growths(self.ranker, cache.history, after, added_B)
        extended = self._grow(cache, after, grown, bucket)
        return extended, sum(int(rows.keep_B.sum()) for rows in grown.values())

    def warm_up_extend(self, cache: Cache, bucket: Bucket) -> Cache:
        """Compiles what `extend` can need. The rows of the result mean nothing."""
        one_B = np.ones(cache.users, np.int32)
        grown = dict.fromkeys(self._longest, Growth(one_B, 0 * one_B, new_rows=1, kept_rows=1))
        return self._grow(cache, cache.history, grown, bucket)

    def _grow(
        self, cache: Cache, after: UserHistory, grown: dict[str, Growth], bucket: Bucket
    ) -> Cache:
        new_rows = self._new_rows_of(bucket)
        return grow(self.ranker, cache, after, grown, bucket=bucket, new_rows=new_rows)

    def score(self, cache: Cache, queries: Sequence[Query]) -> list[Float[np.ndarray, "C K"]]:
        """Scores of each query, in the order of its candidates: the probability of each binary
        task, the value of others. The users of `cache` are those of the queries, in their order."""
        parts = [query.candidates for query in queries]
        offsets = cumulative([len(candidates.item_C) for candidates in parts])
        candidates = Candidates(
            np.concatenate([candidates.item_C for candidates in parts]),
            np.concatenate([candidates.feature_CF for candidates in parts]),
            np.concatenate([candidates.time_C for candidates in parts]),
            offsets,
            np.zeros(offsets[-1], np.int32),  # a score does not depend on the candidate's position
        )
        logit_CK = score(
            self.ranker,
            cache,
            candidates,
            micro_batch=MICRO_BATCH,
            bucket=self.max_users * MAX_CANDIDATES,
        )
        return np.split(self._values(logit_CK), offsets[1:-1])

    def check_health(self) -> None:
        """Encodes one short history: does the device answer?"""
        jax.block_until_ready(self.encode([self.short_query()]).channels)

    @property
    def programs(self) -> int:
        """How many programs have been compiled."""
        programs = self.ranker.programs
        return count_programs(programs.encode, programs.extend, programs.score)

    def _kept(
        self, whole: UserEvents, name: str, actions: Mapping[str, Shaped[np.ndarray, " E"]]
    ) -> UserEvents:
        """The newest events that a channel takes."""
        channel = self._channels[name]
        if channel.signal:
            keep_E = np.zeros(len(whole.item_E), bool)
            if channel.signal in actions:
                keep_E = np.asarray(actions[channel.signal]) >= channel.at_least
            whole = whole.take(np.flatnonzero(keep_E), np.array([keep_E.sum()]))
        longest = self._longest[name]
        count = len(whole.item_E)
        return whole.newest(kept_in_blocks(count, longest) if self.drop_blocks else longest)

    def bucket_of(self, histories: Sequence[UserHistory], *, extended: bool = False) -> Bucket:
        """The smallest bucket that holds these histories, and their new rows if they are
        extended."""
        events = {
            name: sum(len(history.channels[name].item_E) for history in histories)
            for name in self._longest
        }
        if extended:  # by the rows that are new of each user, at most
            events = {
                name: max(count, len(histories) * self._longest[name])
                for name, count in events.items()
            }
        return next(
            bucket
            for bucket in self.buckets
            if all(count <= bucket.events[name] for name, count in events.items())
        )

    def _new_rows_of(self, bucket: Bucket) -> dict[str, int]:
        """Rows of each channel that are computed anew in a bucket, at most."""
        return {
            name: min(
                bucket_rows(self.ranker.form, bucket, name),
                rows * (bucket.events[name] // self._longest[name]),
            )
            for name, rows in self._new_rows.items()
        }

    def short_query(self) -> Query:
        """A request about the first item, by a user who has met it."""
        one = np.ones(1, np.int32)
        none_CF = np.zeros((1, len(self.config.rank.features)), np.int32)
        return self.query(one, None, {}, {}, candidates=one, feature_CF=none_CF)

    def _values(self, logit_CK: Float[np.ndarray, "C K"]) -> Float[np.ndarray, "C K"]:
        binary_K = np.array([kind == "binary" for kind in self.kinds.values()])
        # tanh does not overflow.
        return np.where(binary_K[None], 0.5 + 0.5 * np.tanh(0.5 * logit_CK), logit_CK)


def load_ranker(data: RunData) -> tuple[Ranker, Config, Codebook, dict[str, Kind]]:
    """The ranker of a run on its data, the run's configuration, what its values mean, and the kind
    of each task.

    Raises:
      ValueError: a retrieval run, one without a checkpoint or with one that is not finite, or data
        that is not the run's.
    """
    if not data.config.rank.tasks:
        raise ValueError(
            f"{data.folder.path} is a retrieval run: candidates are scored by ranking runs, with "
            "rank.tasks"
        )
    trained = RankingTask.of(data.config, data.interactions)
    data.step, params = load_params(data.folder, trained.recipe)
    task, params = trained.folded(params)
    assert isinstance(task, RankingTask)
    vocabulary = Codebook.of(task.config, task.interactions)
    return task.recipe.model(params), task.config, vocabulary, task.recipe.tasks
