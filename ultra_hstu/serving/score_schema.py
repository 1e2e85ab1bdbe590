"""Requests and answers of a ranking run as JSON.

    {"user": 42, "candidates": [608, 2858]}
    {"history": [1193, 914], "times": [978300760, 978301968], "actions": {"rating": [5, 3]}, "context": {"gender": "F"}, "candidates": [608, 2858]}

An answer: {"candidates": [{"item": 608, "title": "Fargo (1996)", "scores": {"rating_at_least_4": 0.71}}, ...], "events": 2, "warnings": []}
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ultra_hstu.serving.schema import AboutUser, Action, RawId, only
from ultra_hstu.serving.scoring import MAX_CANDIDATES

Text = Annotated[str, Field(max_length=256)]


class ScoreRequest(AboutUser):
    """What to score, and for whom. Exactly one of `user` and `history`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                only("user", "history", "times", "actions", "context"),
                only("history", "user"),
            ],
            "examples": [
                {"user": 42, "candidates": [608, 2858]},
                {
                    "history": [1193, 914],
                    "times": [978300760, 978301968],
                    "actions": {"rating": [5, 3]},
                    "candidates": [608, 2858],
                },
            ],
        },
    )

    candidates: list[RawId] = Field(
        min_length=1,
        max_length=MAX_CANDIDATES,
        description="item ids of the source, in any order; one that comes twice is scored twice, one that the catalogue lacks has no scores",
    )
    features: dict[str, Annotated[list[Action], Field(max_length=MAX_CANDIDATES)]] = Field(
        {},
        description="what is known of each candidate before the user acts, by the names of the source, such as skill: one value a candidate",
    )
    context: dict[str, Text] | None = Field(
        None,
        description="what is known of the user, by the names of the source, such as gender, in its words",
    )

    @model_validator(mode="after")
    def _one_value_a_candidate(self) -> "ScoreRequest":
        for name, values in self.features.items():
            if len(values) != len(self.candidates):
                raise ValueError(
                    f"{len(self.candidates)} candidates but {len(values)} values of {name!r}: give one a candidate"
                )
        if self.user is not None and self.context is not None:
            raise ValueError("context goes with a history; that of a user is in the data")
        return self


class Scored(BaseModel):
    item: int | str = Field(description="id of the source")
    title: str | None
    scores: dict[str, float] | None = Field(
        description="by task: a probability, or the value that is expected where the task is one; null for an item that the catalogue lacks"
    )


class ScoreAnswer(BaseModel):
    candidates: list[Scored] = Field(
        description="one for each that was asked about, in the same order"
    )
    events: int = Field(
        description="how many events of the history the scores were made from; 0: the history was empty"
    )
    warnings: list[str] = Field(description="what of the request was ignored or missing")
