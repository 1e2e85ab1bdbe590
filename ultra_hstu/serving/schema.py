"""Requests and answers as JSON: the schema of the HTTP endpoint and of `experiments.recommend --requests`.

    {"user": 42}                                                   a user of the run's data: the whole history is used
    {"history": [1193, 914], "times": [978300760, 978301968], "k": 5, "block": [2858]}

An answer: {"items": [{"item": 608, "title": "Fargo (1996)", "score": 0.71}, ...], "source": "model", "warnings": []}

Those of a ranking run are in `score_schema`; both tell of a user in the same way.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_BODY_BYTES = 2**20
MAX_EVENTS, MAX_BLOCK = 8192, 8192  # of a request: hidden items together are one capacity class
MAX_K = 1000
_WIDEST = 2**63 - 1

RawId = (
    Annotated[int, Field(ge=-_WIDEST, le=_WIDEST)]
    | Annotated[str, Field(min_length=1, max_length=256)]
)
Seconds = Annotated[int, Field(ge=-(2**53), le=2**53)]
Action = Annotated[float, Field(ge=-1e9, le=1e9)]


def only(given: str, *absent: str) -> dict[str, Any]:
    """A schema: this field, and none of those."""
    null = {"type": "null"}
    return {
        "required": [given],
        "properties": {given: {"not": null}, **dict.fromkeys(absent, null)},
    }


class AboutUser(BaseModel):
    """Who asks: exactly one of `user` and `history`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    user: RawId | None = Field(None, description="a user of the run's data")
    history: Annotated[list[RawId], Field(max_length=MAX_EVENTS)] | None = Field(
        None,
        description="item ids of the source, oldest first; repeats are allowed, ids that the catalogue lacks are ignored with a warning",
    )
    times: Annotated[list[Seconds], Field(max_length=MAX_EVENTS)] | None = Field(
        None, description="seconds, one an event, not decreasing"
    )
    actions: dict[str, Annotated[list[Action], Field(max_length=MAX_EVENTS)]] | None = Field(
        None,
        description="what the user did with each item, by the names of the source, such as rating: one value an event",
    )
    now: Seconds | None = Field(
        None, description="time of the request; without it the next event follows the last at once"
    )

    @model_validator(mode="after")
    def _one_way_of_asking(self) -> "AboutUser":
        if (self.user is None) == (self.history is None):
            raise ValueError("give either user or history")
        if self.history is None:
            if self.times is not None or self.actions is not None:
                raise ValueError(
                    "times and actions go with a history; those of a user are in the data"
                )
            return self
        columns = {"times": self.times} if self.times is not None else {}
        for name, values in (columns | (self.actions or {})).items():
            if len(values) != len(self.history):
                raise ValueError(
                    f"{len(self.history)} items but {len(values)} values of {name!r}: give one an item"
                )
        return self


class Request(AboutUser):
    """What to recommend, and to whom. Exactly one of `user` and `history`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [only("user", "history", "times", "actions"), only("history", "user")],
            "examples": [
                {"user": 42, "k": 3},
                {"history": [1193, 914], "times": [978300760, 978301968], "k": 5, "block": [2858]},
            ],
        },
    )

    k: int = Field(10, ge=1, le=MAX_K, description="how many items")
    block: list[RawId] = Field(
        [], max_length=MAX_BLOCK, description="items that this answer must not hold"
    )


class Item(BaseModel):
    item: int | str = Field(description="id of the source")
    title: str | None
    score: float


class Answer(BaseModel):
    items: list[Item] = Field(description="best first; fewer than k where fewer are left")
    source: Literal["model", "popularity"] = Field(
        description="popularity: the history was empty, and scores are counts of the training data"
    )
    warnings: list[str] = Field(description="what of the request was ignored")


class Problem(BaseModel):
    detail: str


def problem(errors: Sequence[Any]) -> str:
    """What is wrong with a request, in one line, from Pydantic's `errors()`; of what was sent it names fields, nothing else."""
    first, *others = errors
    # A request over HTTP has "body" in front, and members of a union bear names that mean nothing to a caller.
    place = ".".join(
        ascii(part).strip("'")[:80]
        for part in first["loc"]
        if part != "body" and not str(part).startswith("constrained-")
    )
    more = f" (and {len(others)} more)" if others else ""
    return f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}{more}"
