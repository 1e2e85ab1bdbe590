"""Scoring online: histories in, encoded users out, and a score of every candidate for each task. Few
compiled programs serve every call."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from ultra_hstu.checkpoint import load_params
from ultra_hstu.config import Config
from ultra_hstu.data.signals import Kind
from ultra_hstu.nn.key_values import CacheDtype
from ultra_hstu.quantization import HostKind
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.ranking.source import channels
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
from ultra_hstu.serving.kv_cache import Cache, join, split
from ultra_hstu.serving.schema import MAX_CANDIDATES
from ultra_hstu.serving.score import encode_history, score
from ultra_hstu.serving.tokens import Vocabulary, signal_codes, since_first
from ultra_hstu.serving.users import RunData, key_of
from ultra_hstu.task import RankTask, Task

MICRO_BATCH = 128  # a tile of attention on a CPU


class ScoringModel:
    """A trained ranker, ready to score.

    Users of different histories and numbers of candidates share a call. Its sizes are few: histories
    fill 1, 2, 4, ... of the longest; candidates come in one size, worked off `MICRO_BATCH` at a time.
    `warm_up` compiles all that there are.
    """

    def __init__(
        self,
        ranker: Ranker,
        config: Config,
        vocabulary: Vocabulary,
        kinds: Mapping[str, Kind],
        *,
        kind: CacheDtype = "same",
        max_users: int = MAX_USERS,
        host_table: HostKind | None = None,
    ):
        """
        Args:
          kinds: of each task, in the order of the logits: "binary" or "regression".
          kind: dtype of the cache, as in `encode_history`.
          max_users: requests in one device call.
          host_table: None leaves the item table on the device; else as in `CompiledRanker`.
        """
        self.ranker = CompiledRanker(ranker, host_table=host_table)
        self.config, self.vocabulary, self.kinds, self.kind = config, vocabulary, dict(kinds), kind
        self.max_users = max_users
        self._channels = channels(config)
        self._longest = dict(self.ranker.form.max_history)
        self.buckets = [
            Bucket(max_users, {name: fill * longest for name, longest in self._longest.items()})
            for fill in bucket_sizes(1, max_users, 2)
        ]
        self._biased = any(
            encoder.layers[0].bias is not None for encoder in self.ranker.encoders.values()
        )

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
          actions: the source's columns of the events, by name; signals and features of the run whose
            column is missing are 0, none.
          context: the user's codes by name.
          candidates, feature_CF: dense ids, in any order and number of repeats, and the codes of the
            run's features.
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
        asked = Candidates(
            candidates.astype(np.int32),
            feature_CF.astype(np.int32),
            np.repeat(history.now_B, len(candidates)),
            np.array([0, len(candidates)], np.int32),
        )
        # A relative bias alone reads when the request is made.
        return Query(history, key_of(history, with_now=self._biased), candidates=asked)

    def encode(self, queries: Sequence[Query]) -> list[Cache]:
        """Their users, each a cache with B = 1, encoded in one call for `max_users` of them."""
        users: list[Cache] = []
        for i in range(0, len(queries), self.max_users):
            users += self._encode(queries[i : i + self.max_users])
        return users

    def score(
        self, users: Sequence[Cache], queries: Sequence[Query]
    ) -> list[Float[np.ndarray, "C K"]]:
        """Scores of each query, in the order of its candidates: the probability of each binary task,
        the value of others. One call for `max_users` queries."""
        scores: list[Float[np.ndarray, "C K"]] = []
        for i in range(0, len(queries), self.max_users):
            some = users[i : i + self.max_users]
            scores += self._score(some, queries[i : i + self.max_users])
        return scores

    def check_health(self) -> None:
        """Encodes one short history: does the device answer?"""
        self._encode([self._short()])

    def warm_up(self) -> int:
        """Compiles all that calls can need. Returns the number of programs."""
        for bucket in self.buckets:
            users = self._encode([self._short()], bucket)
            self._score(users, [self._short()], bucket)
        return self.programs

    @property
    def programs(self) -> int:
        """How many programs have been compiled."""
        return count_programs(self.ranker.programs.encode, self.ranker.programs.score)

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
        return whole.newest(self._longest[name])

    def bucket_of(self, histories: Sequence[UserHistory]) -> Bucket:
        """The smallest bucket that holds these histories."""
        events = {
            name: sum(len(history.channels[name].item_E) for history in histories)
            for name in self._longest
        }
        return next(
            bucket
            for bucket in self.buckets
            if all(count <= bucket.events[name] for name, count in events.items())
        )

    def _short(self) -> Query:
        """A request about the first item, by a user who has met it."""
        one = np.ones(1, np.int32)
        none_CF = np.zeros((1, len(self.config.rank.features)), np.int32)
        return self.query(one, None, {}, {}, candidates=one, feature_CF=none_CF)

    def _encode(self, queries: Sequence[Query], bucket: Bucket | None = None) -> list[Cache]:
        histories = [query.history for query in queries]
        cache = encode_history(
            self.ranker,
            UserHistory.concatenate(histories),
            kind=self.kind,
            bucket=bucket or self.bucket_of(histories),
        )
        return split(cache)

    def _score(
        self, users: Sequence[Cache], queries: Sequence[Query], bucket: Bucket | None = None
    ) -> list[Float[np.ndarray, "C K"]]:
        asked = [query.candidates for query in queries]
        offsets = cumulative([len(candidates.item_C) for candidates in asked])
        candidates = Candidates(
            np.concatenate([candidates.item_C for candidates in asked]),
            np.concatenate([candidates.feature_CF for candidates in asked]),
            np.concatenate([candidates.time_C for candidates in asked]),
            offsets,
            np.zeros(offsets[-1], np.int32),  # a score does not depend on the candidate's position
        )
        bucket = bucket or self.bucket_of([user.history for user in users])
        logit_CK = score(
            self.ranker,
            join(self.ranker, users, bucket),
            candidates,
            micro_batch=MICRO_BATCH,
            bucket=self.max_users * MAX_CANDIDATES,
        )
        return np.split(self._values(logit_CK), offsets[1:-1])

    def _values(self, logit_CK: Float[np.ndarray, "C K"]) -> Float[np.ndarray, "C K"]:
        binary_K = np.array([kind == "binary" for kind in self.kinds.values()])
        # tanh does not overflow.
        return np.where(binary_K[None], 0.5 + 0.5 * np.tanh(0.5 * logit_CK), logit_CK)


def load_ranker(data: RunData) -> tuple[Ranker, Config, Vocabulary, dict[str, Kind]]:
    """The ranker of a run on its data, the run's configuration, what its values mean, and the kind of
    each task.

    Raises:
      ValueError: a retrieval run, one without a checkpoint or with one that is not finite, or data that
        is not the run's.
    """
    task = Task.of(data.config, data.interactions)
    if not isinstance(task, RankTask):
        raise ValueError(
            f"{data.folder.path} is a retrieval run: candidates are scored by ranking runs, with "
            "rank.tasks"
        )
    _, params = load_params(data.folder, task.recipe)
    vocabulary = Vocabulary.of(task.config, task.interactions)
    return task.recipe.model(params), task.config, vocabulary, task.recipe.tasks
