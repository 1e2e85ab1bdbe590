"""Scoring online: histories in, encoded users out, and a score of every candidate for each task. Few compiled programs serve every call."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from ultra_hstu.config import Config
from ultra_hstu.ranking.form import channels
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.serving.capacity import MAX_USERS, Room
from ultra_hstu.serving.encoded_user import EncodedUser, join, split
from ultra_hstu.serving.encoded_users import key_of
from ultra_hstu.serving.frozen import FrozenRanker
from ultra_hstu.serving.inputs import COLUMNS, Candidates, Events, History, newest
from ultra_hstu.serving.ranking import encode_history, score
from ultra_hstu.serving.seconds import since_first
from ultra_hstu.serving.trained import RunData, load_params
from ultra_hstu.serving.vocabulary import Vocabulary, signal_codes

MAX_CANDIDATES = 4096  # of a request
MICRO_BATCH = 128  # a tile of attention on a CPU


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreQuery:
    """A checked question: what the encoder sees of one user, and the candidates. `ScoringModel.query` makes it."""

    history: History
    item_C: Int[np.ndarray, " C"]  # dense ids
    feature_CF: Int[np.ndarray, "C F"]
    now: int  # when the user would act, on the clock of the history
    key: bytes  # of all that the encoder reads

    @property
    def events(self) -> int:
        """How many events the scores are made from; of a mixture, those of its longest channel."""
        return max(len(events.item_E) for events in self.history.channels.values())


class ScoringModel:
    """A trained ranker, ready to score.

    Users of different histories and numbers of candidates share a call. Its sizes are few: histories fill 1, 2, 4, ... of the longest; candidates
    come in one size, worked off `MICRO_BATCH` at a time. `warm_up` compiles all that there are.
    """

    def __init__(
        self,
        ranker: Ranker,
        config: Config,
        vocabulary: Vocabulary,
        kinds: Mapping[str, str],
        *,
        kind: Any = "same",
        max_users: int = MAX_USERS,
    ):
        """
        Args:
          kinds: of each task, in the order of the logits: "binary" or "regression".
          kind: how keys and values are kept, as in `encode_history`.
          max_users: requests in one device call.
        """
        self.ranker = FrozenRanker(ranker)
        self.config, self.vocabulary, self.kinds, self.kind = config, vocabulary, dict(kinds), kind
        self.max_users = max_users
        self._channels = channels(config)
        self._longest = dict(self.ranker.form.max_history)
        fills = sorted({*(2**i for i in range(max_users.bit_length())), max_users})
        self.rooms = [
            Room(max_users, {name: fill * longest for name, longest in self._longest.items()})
            for fill in fills
        ]
        self._biased = any(
            encoder.layers[0].bias is not None for encoder in self.ranker.encoders.values()
        )

    @staticmethod
    def of_run(data: RunData, *, kind: Any = "same", max_users: int = MAX_USERS) -> "ScoringModel":
        """Raises ValueError for a retrieval run, one without a checkpoint or with one that is not finite, or data that is not the run's."""
        if not data.config.rank.tasks:
            raise ValueError(
                f"{data.folder.path} is a retrieval run: candidates are scored by ranking runs, with rank.tasks"
            )
        task = RankingTask.of(data.config, data.interactions)
        _, params = load_params(data.folder, task.recipe)
        vocabulary = Vocabulary.of(task.config, task.interactions)
        return ScoringModel(
            task.recipe.model(params),
            task.config,
            vocabulary,
            task.recipe.tasks,
            kind=kind,
            max_users=max_users,
        )

    def query(
        self,
        items: Int[np.ndarray, " E"],
        times: ArrayLike | None,
        *,
        candidates: Int[np.ndarray, " C"],
        feature_CF: Int[np.ndarray, "C F"],
        actions: dict[str, np.ndarray],
        context: dict[str, int],
        now: int | None = None,
    ) -> ScoreQuery:
        """Checks one question, on the host. No events are a legal history.

        Args:
          items, times: dense ids, oldest first, and seconds; None: simultaneous.
          candidates, feature_CF: dense ids, in any order and number of repeats, and the codes of the run's features.
          actions: the source's columns of the events, by name; of the run's signals and features those are 0, none, for which there is no column.
          context: the user's codes by name.
          now: when the user would act, in the same seconds; None: at once after the last event.

        Raises:
          ValueError: times that go back or span more than 2^31 - 1 seconds, actions that a signal cannot be made from.
        """
        count, rank = len(items), self.config.rank
        time_E = since_first(count, times, now)
        features = [
            self.vocabulary.feature(name, actions[name])
            if name in actions
            else np.zeros(count, np.int32)
            for name in rank.features
        ]
        feature_EF = np.stack(features, axis=1) if features else np.zeros((count, 0), np.int32)
        whole = Events(
            items,
            time_E[:-1],
            signal_codes(rank.signals, actions, count),
            feature_EF,
            np.array([0, count], np.int32),
        )
        kept = {name: self._kept(whole, name, actions) for name in self._channels}
        # From the oldest event that counts on, so that those before it change nothing.
        first = min(
            (int(events.time_E[0]) for events in kept.values() if len(events.time_E)),
            default=int(time_E[-1]),
        )
        kept = {
            name: dataclasses.replace(events, time_E=events.time_E - np.int32(first))
            for name, events in kept.items()
        }
        moment = np.array([time_E[-1] - first], np.int32)
        history = History(kept, self.vocabulary.context(context)[None], moment)
        # When the request is made means something to a relative bias alone.
        key = key_of((kept, history.context_BC, moment if self._biased else None))
        return ScoreQuery(
            history, candidates.astype(np.int32), feature_CF.astype(np.int32), int(moment[0]), key
        )

    def encode(self, queries: Sequence[ScoreQuery]) -> list[EncodedUser]:
        """Their users, encoded in one call for `max_users` of them."""
        users: list[EncodedUser] = []
        for i in range(0, len(queries), self.max_users):
            group = queries[i : i + self.max_users]
            events = {
                name: sum(len(query.history.channels[name].item_E) for query in group)
                for name in self._longest
            }
            users += self._encode(group, self._room(events))
        return users

    def score(
        self, users: Sequence[EncodedUser], queries: Sequence[ScoreQuery]
    ) -> list[Float[np.ndarray, "C K"]]:
        """Of each query, in the order of its candidates: the probability of each binary task, the value of others. One call for `max_users` queries."""
        scores: list[np.ndarray] = []
        for i in range(0, len(queries), self.max_users):
            some = users[i : i + self.max_users]
            events = {
                name: sum(int(user.channels[name].events) for user in some)
                for name in self._longest
            }
            scores += self._score(some, queries[i : i + self.max_users], self._room(events))
        return scores

    def pulse(self) -> None:
        """Encodes one short history: does the device answer?"""
        self._encode([self._short()], self.rooms[0])

    def warm_up(self) -> int:
        """Compiles all that calls can need. Returns the number of programs."""
        for room in self.rooms:
            self._score(self._encode([self._short()], room), [self._short()], room)
        return self.programs

    @property
    def programs(self) -> int:
        """How many programs have been compiled."""
        compiled: list[Any] = [self.ranker.programs.encode, self.ranker.programs.score]
        return sum(function._cache_size() for function in compiled)

    def _kept(self, whole: Events, name: str, actions: Mapping[str, np.ndarray]) -> Events:
        """The newest events that a channel takes."""
        channel = self._channels[name]
        if channel.signal:
            keep_E = (
                actions[channel.signal] >= channel.at_least
                if channel.signal in actions
                else np.zeros(len(whole.item_E), bool)
            )
            parts = {column: getattr(whole, column)[keep_E] for column in COLUMNS}
            whole = Events(**parts, offsets=np.array([0, keep_E.sum()], np.int32))
        return newest(whole, self._longest[name])

    def _room(self, events: Mapping[str, int]) -> Room:
        """The smallest one for so many events."""
        return next(
            room
            for room in self.rooms
            if all(count <= room.events[name] for name, count in events.items())
        )

    def _short(self) -> ScoreQuery:
        """A question about the first item, by a user who has met it."""
        one = np.ones(1, np.int32)
        return self.query(
            one,
            None,
            candidates=one,
            feature_CF=np.zeros((1, len(self.config.rank.features)), np.int32),
            actions={},
            context={},
        )

    def _encode(self, queries: Sequence[ScoreQuery], room: Room) -> list[EncodedUser]:
        histories = [query.history for query in queries]
        events = {}
        for name in self._longest:
            parts = [history.channels[name] for history in histories]
            merged = {
                column: np.concatenate([getattr(part, column) for part in parts])
                for column in COLUMNS
            }
            events[name] = Events(
                **merged,
                offsets=np.cumsum([0, *(len(part.item_E) for part in parts)]).astype(np.int32),
            )
        context_BC, now_B = (
            np.concatenate([getattr(history, field) for history in histories])
            for field in ("context_BC", "now_B")
        )
        return split(
            self.ranker,
            encode_history(
                self.ranker, History(events, context_BC, now_B), kind=self.kind, room=room
            ),
        )

    def _score(
        self, users: Sequence[EncodedUser], queries: Sequence[ScoreQuery], room: Room
    ) -> list[Float[np.ndarray, "C K"]]:
        counts = [len(query.item_C) for query in queries]
        candidates = Candidates(
            np.concatenate([query.item_C for query in queries]),
            np.concatenate([query.feature_CF for query in queries]),
            np.repeat(np.array([query.now for query in queries], np.int32), counts),
            np.cumsum([0, *counts]).astype(np.int32),
            slot_C=np.zeros(
                sum(counts), np.int32
            ),  # a score does not depend on the candidate's place
        )
        cache = join(self.ranker, users, room)
        logit_CK = score(
            self.ranker,
            cache,
            candidates,
            micro_batch=MICRO_BATCH,
            room=self.max_users * MAX_CANDIDATES,
        )
        return np.split(self._values(logit_CK), candidates.offsets[1:-1])

    def _values(self, logit_CK: Float[np.ndarray, "C K"]) -> Float[np.ndarray, "C K"]:
        binary_K = np.array([kind == "binary" for kind in self.kinds.values()])
        return np.where(
            binary_K[None], 0.5 + 0.5 * np.tanh(0.5 * logit_CK), logit_CK
        )  # tanh does not overflow
