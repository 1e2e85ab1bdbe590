"""From requests to scores: raw ids, users and values to queries, encoded users kept."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int32

from ultra_hstu.data import signals
from ultra_hstu.serving.encoded_users import EncodedUsers
from ultra_hstu.serving.score_schema import ScoreAnswer, Scored, ScoreRequest
from ultra_hstu.serving.scoring import ScoringModel
from ultra_hstu.serving.service import Prepared, known_ids, unread_actions
from ultra_hstu.serving.trained import RunData

EMPTY = "the history is empty: these are the scores for somebody of whom no event is known"


class ScoreService:
    """Answers requests with a ranking run. `prepare` may run anywhere; `answer` in one thread at a time."""

    request_type = ScoreRequest

    def __init__(self, model: ScoringModel, data: RunData | None, *, cache_bytes: int = 2**26):
        """
        Args:
          data: of the run; None: users of the data are not known, and requests bring their histories.
        """
        self.model = model
        self.data = data
        self.users = EncodedUsers(cache_bytes)

    def prepare(self, request: ScoreRequest) -> Prepared:
        """Looks up ids, users and values. Raises ValueError for what cannot be answered, with the reason."""
        known_C, warnings = known_ids(
            self.model.vocabulary.catalog, request.candidates, "candidates"
        )
        feature_CF, more = self._features(request.features, len(request.candidates))
        asked: dict[str, Any] = {
            "candidates": known_C[known_C > 0],
            "feature_CF": feature_CF[known_C > 0],
            "now": request.now,
        }
        told, about = (
            self._of_user(request.user) if request.user is not None else self._of_history(request)
        )
        query = self.model.query(**told, **asked)
        empty = [] if query.events else [EMPTY]
        return Prepared(query, (*about, *warnings, *more, *empty), (request.candidates, known_C))

    def answer(self, prepared: Sequence[Prepared]) -> list[ScoreAnswer]:
        """One device call for new histories and one for all candidates, for up to `model.max_users` requests."""
        asked = [p.query for p in prepared if len(p.query.item_C)]
        scores = iter(self.model.score(self.users.of(asked, self.model.encode), asked))
        nothing = np.zeros((0, len(self.model.kinds)))
        return [
            self.as_answer(p, next(scores) if len(p.query.item_C) else nothing) for p in prepared
        ]

    def warm_up(self) -> int:
        """Compiles all that requests can need. Returns the number of programs."""
        return self.model.warm_up()

    def pulse(self) -> None:
        """Asks the device for something short."""
        self.model.pulse()

    def as_answer(self, prepared: Prepared, score_CK: Float[np.ndarray, "C K"]) -> ScoreAnswer:
        """An answer from what the model scored: the candidates that it knows."""
        raw, known_C = prepared.asked
        catalog, tasks = self.model.vocabulary.catalog, list(self.model.kinds)
        found = iter(
            zip(catalog.decode(known_C[known_C > 0]).tolist(), score_CK.tolist(), strict=True)
        )
        candidates = []
        for given, dense in zip(raw, known_C.tolist(), strict=True):
            item, scores = next(found) if dense else (given, None)
            title = catalog.titles[dense] if dense and catalog.titles is not None else None
            of_task = None if scores is None else dict(zip(tasks, scores, strict=True))
            candidates.append(Scored.model_construct(item=item, title=title, scores=of_task))
        return ScoreAnswer.model_construct(
            candidates=candidates, events=prepared.query.events, warnings=list(prepared.warnings)
        )

    def _of_user(self, user: int | str) -> tuple[dict[str, Any], list[str]]:
        """The whole history of a user of the data, and what is known of the user."""
        if self.data is None:
            raise ValueError(
                "users of the data are not known here, since this is an exported model: give a history"
            )
        interactions = self.data.interactions
        row, events = interactions.row(user), interactions.history(user)
        told = {
            "items": interactions.items[events],
            "times": None if interactions.timestamps is None else interactions.timestamps[events],
            "actions": {name: values[events] for name, values in interactions.actions.items()},
            "context": {name: int(codes[row]) for name, codes in interactions.contexts.items()},
        }
        return told, []

    def _of_history(self, request: ScoreRequest) -> tuple[dict[str, Any], list[str]]:
        """The history and context of a request, and what of them was ignored or missing."""
        model, given = self.model, request.actions or {}
        found_E, warnings = known_ids(model.vocabulary.catalog, request.history or [], "history")
        kept = found_E > 0
        read = self._read
        warnings += unread_actions(given, read)
        if kept.any():
            warnings += _missing("actions", read, given)
        context, unknown = {}, []
        for name, text in (request.context or {}).items():
            if text in model.vocabulary.contexts.get(name, ())[1:]:
                context[name] = model.vocabulary.contexts[name].index(text)
            else:
                unknown.append(f"{name!r:.40}: {text!r:.40}")
        if unknown:
            warnings.append(
                f"context: {', '.join(unknown[:5])} is not known to this run and was ignored"
            )
        warnings += _missing("context", model.vocabulary.contexts, request.context or {})
        told = {
            "items": found_E[kept],
            "times": None if request.times is None else np.asarray(request.times, np.int64)[kept],
            "actions": {
                name: np.asarray(values)[kept] for name, values in given.items() if name in read
            },
            "context": context,
        }
        return told, warnings

    @property
    def _read(self) -> list[str]:
        """The source's columns of events that the run reads."""
        config = self.model.config
        channels = [channel.signal for channel in config.model.channels.values() if channel.signal]
        return list(
            dict.fromkeys([*signals.needs(config.rank.signals), *config.rank.features, *channels])
        )

    def _features(
        self, given: Mapping[str, Sequence[float]], count: int
    ) -> tuple[Int32[np.ndarray, "C F"], list[str]]:
        names, columns, warnings = self.model.config.rank.features, [], []
        for name in names:
            code_C = (
                self.model.vocabulary.feature(name, given[name])
                if name in given
                else np.zeros(count, np.int32)
            )
            if name in given and (unknown := int((code_C == 0).sum())):
                warnings.append(
                    f"features: {unknown} of {count} values of {name!r} are not in the data and were ignored"
                )
            columns.append(code_C)
        if unread := sorted(set(given) - set(names)):
            warnings.append(
                f"features {', '.join(repr(name)[:40] for name in unread[:5])} are not read by this run and were ignored"
            )
        return np.stack(columns, axis=1) if columns else np.zeros((count, 0), np.int32), [
            *warnings,
            *_missing("features", names, given),
        ]


def _missing(field: str, read: Any, given: Any) -> list[str]:
    """A warning of what a run reads and was not given."""
    missing = [name for name in read if name not in given]
    return (
        [
            f"{field}: this run reads {', '.join(map(repr, missing))}, which was not given and counts as unknown"
        ]
        if missing
        else []
    )
