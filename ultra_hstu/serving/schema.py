"""Requests and responses as JSON: the schema of HTTP and of `experiments.recommend --requests`.

A retrieval run recommends:

    {"user": 42}                                       a user of the run's data: the whole history
    {"history": [1193, 914], "times": [978300760, 978301968], "k": 5, "block": [2858]}
    -> {"items": [{"item": 608, "title": "Fargo (1996)", "score": 0.71}, ...],
        "source": "model", "warnings": []}

A ranking run scores:

    {"user": 42, "candidates": [608, 2858]}
    {"history": [1193, 914], "times": [978300760, 978301968], "actions": {"rating": [5, 3]},
     "context": {"gender": "F"}, "candidates": [608, 2858]}
    -> {"candidates": [{"item": 608, "title": "Fargo (1996)",
                        "scores": {"rating_at_least_4": 0.71}}, ...],
        "events": 2, "warnings": []}
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import ErrorDetails

from ultra_hstu.data.times import FIRST_SECOND, LAST_SECOND
from ultra_hstu.data.titles import SEARCH_S

MAX_BODY_BYTES = 2**20
MAX_EVENTS, MAX_BLOCK = 8192, 8192  # of a request: hidden items together are one bucket
MAX_K = 1000
MAX_CANDIDATES = 4096
MAX_FOUND = 1000  # items of a search
_WIDEST = 2**63 - 1

RawId = (
    Annotated[int, Field(ge=-_WIDEST, le=_WIDEST)]
    | Annotated[str, Field(min_length=1, max_length=256)]
)
Seconds = Annotated[int, Field(ge=FIRST_SECOND, le=LAST_SECOND)]
Action = Annotated[float, Field(ge=-1e9, le=1e9)]
Text = Annotated[str, Field(max_length=256)]


def only(given: str, *absent: str) -> dict[str, JsonValue]:
    """A schema: this field, and none of those."""
    null: JsonValue = {"type": "null"}
    return {
        "required": [given],
        "properties": {given: {"not": null}, **dict.fromkeys(absent, null)},
    }


class AboutUser(BaseModel):
    """Whose request it is: exactly one of `user` and `history`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    user: RawId | None = Field(None, description="a user of the run's data")
    history: Annotated[list[RawId], Field(max_length=MAX_EVENTS)] | None = Field(
        None,
        description="item ids of the source, oldest first; repeats are allowed, "
        "ids that the catalogue lacks are ignored with a warning",
    )
    times: Annotated[list[Seconds], Field(max_length=MAX_EVENTS)] | None = Field(
        None, description="seconds since 1970, one an event, not decreasing"
    )
    actions: dict[str, Annotated[list[Action], Field(max_length=MAX_EVENTS)]] | None = Field(
        None,
        description="what the user did with each item, by the names of the source, such as rating: "
        "one value an event",
    )
    context: dict[str, Text] | None = Field(
        None,
        description="what is known of the user, by the names of the source, such as gender, "
        "in its words",
    )
    now: Seconds | None = Field(
        None, description="time of the request; without it the next event follows the last at once"
    )

    @model_validator(mode="after")
    def _user_or_history(self) -> "AboutUser":
        if (self.user is None) == (self.history is None):
            raise ValueError("give either user or history")
        if self.history is None:
            if self.times is not None or self.actions is not None:
                raise ValueError(
                    "times and actions go with a history; those of a user are in the data"
                )
            if self.context is not None:
                raise ValueError("context goes with a history; that of a user is in the data")
            return self
        times: dict[str, list[Seconds]] = {} if self.times is None else {"times": self.times}
        _require_lengths(times, len(self.history), "items", "an item")
        _require_lengths(self.actions or {}, len(self.history), "items", "an item")
        return self


class Request(AboutUser):
    """What to recommend, and to whom. Exactly one of `user` and `history`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                only("user", "history", "times", "actions", "context"),
                only("history", "user"),
            ],
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


class Recommendation(BaseModel):
    item: int | str = Field(description="id of the source")
    title: str | None
    score: float


class Response(BaseModel):
    items: list[Recommendation] = Field(
        description="best first, none of the history's or of block; fewer than k where fewer are "
        "left"
    )
    source: Literal["model", "popularity"] = Field(
        description="popularity: the history was empty, and scores are counts of the training data"
    )
    warnings: list[str] = Field(description="what of the request was ignored")


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
        description="item ids of the source, in any order; one that comes twice is scored twice, "
        "one that the catalogue lacks has no scores",
    )
    features: dict[str, Annotated[list[Action], Field(max_length=MAX_CANDIDATES)]] = Field(
        {},
        description="what is known of each candidate before the user acts, by the names of the "
        "source, such as skill: one value a candidate",
    )

    @model_validator(mode="after")
    def _one_value_a_candidate(self) -> "ScoreRequest":
        _require_lengths(self.features, len(self.candidates), "candidates", "a candidate")
        return self


class ScoredItem(BaseModel):
    item: int | str = Field(description="id of the source")
    title: str | None
    scores: dict[str, float] | None = Field(
        description="by task: a probability, or the value that is expected where the task is one; "
        "null for an item that the catalogue lacks"
    )


class ScoreResponse(BaseModel):
    candidates: list[ScoredItem] = Field(
        description="one for each that was asked about, in the same order"
    )
    events: int = Field(
        description="how many events of the history the scores were made from; "
        "0: the history was empty"
    )
    warnings: list[str] = Field(description="what of the request was ignored or missing")


class ItemSearch(BaseModel):
    """Which items to list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    search: Text = Field(
        "",
        description="words of a title, in any order and case, or a raw id; nothing lists the items "
        "with the most events",
    )
    limit: int = Field(20, ge=1, le=MAX_FOUND, description="how many items")


class FoundItem(BaseModel):
    item: int | str = Field(description="id of the source")
    title: str | None
    events: int | None = Field(
        description="how many events of the data have this item; null where there is no data"
    )
    features: dict[str, list[str]] = Field(
        {}, description="what else is known of it, by the names of the source"
    )


class FoundItems(BaseModel):
    items: list[FoundItem] = Field(
        description="the item with this id, then titles where each word begins a word, then "
        "others; among these, those with more events first"
    )
    found: int = Field(description="how many items fit in all")
    complete: bool = Field(
        description=f"false: the search ended after {SEARCH_S} s, and more items may fit"
    )


class UserSearch(BaseModel):
    """Whose history to show."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: Annotated[str, Field(min_length=1, max_length=256)] = Field(
        description="a user of the run's data"
    )


class KnownUser(BaseModel):
    """A user of the data. The columns are those of a request with a history."""

    user: int | str
    events: int = Field(description=f"in all; the columns hold the newest {MAX_EVENTS}")
    history: list[int | str] = Field(description="item ids of the source, oldest first")
    titles: list[str | None]
    times: list[int] | None
    actions: dict[str, list[float | None]] = Field(description="null where there is no value")
    context: dict[str, str]


class Health(BaseModel):
    version: str = Field(
        description="the folder (or file) of the model that answers, and the step that it was "
        "trained to; the header x-model-version of every answer names the one that made it"
    )
    problem: str | None = Field(
        description="why a newer model could not take its place; null: nothing is amiss"
    )


class Problem(BaseModel):
    detail: str


def problem(errors: Sequence[ErrorDetails]) -> str:
    """What is wrong with a request, in one line, from Pydantic's `errors()`. It names fields, and a
    time, but nothing else of what was sent."""
    first, *others = [error for error in errors if not _of_other_member(error)] or errors
    # A request over HTTP has "body" or "query" in front. Members of a union bear names that mean
    # nothing to a caller.
    loc = first["loc"]
    parts = [
        ascii(part).strip("'")[:80]
        for part in (loc[1:] if len(loc) > 1 and loc[0] == "query" else loc)
        if part != "body" and not str(part).startswith("constrained-")
    ]
    message = first["msg"].removeprefix("Value error, ")
    if parts[:1] in (["times"], ["now"]) and not isinstance(first["input"], list):
        message += f", not {first['input']!r:.40}: give whole seconds since 1970"
    if first["type"] == "extra_forbidden":
        message = "there is no such field; docs/http_service.md lists them, as does GET /docs"
    more = f" (and {len(others)} more)" if others else ""
    return f"{'.'.join(parts) + ': ' if parts else ''}{message}{more}"


def _of_other_member(error: ErrorDetails) -> bool:
    """Whether the integer of a union speaks about a string."""
    integer = error["type"] == "int_type" and str(error["loc"][-1]).startswith("constrained-")
    return integer and isinstance(error["input"], str)


def _require_lengths[T](columns: dict[str, list[T]], count: int, what: str, each: str) -> None:
    """Raises ValueError where a column has not one value for each of `count`."""
    for name, values in columns.items():
        if len(values) != count:
            raise ValueError(
                f"{count} {what} but {len(values)} values of {name!r}: give one {each}"
            )


def page(openapi: Mapping[str, Any]) -> str:
    """An OpenAPI document as one page of HTML: no scripts, and nothing from elsewhere."""
    title, about = openapi["info"]["title"], openapi["info"]["description"]
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(about)}</p>"]
    for path, methods in openapi["paths"].items():
        for method, call in methods.items():
            answers = {
                status: f"{escape(answer['description'])}: {_kind(_content(answer))}"
                for status, answer in call["responses"].items()
            }
            bodies = [call["requestBody"]] if "requestBody" in call else []
            parts += [
                f"<h2>{method.upper()} {escape(path)}</h2>",
                f"<p>{escape(call['description'])}</p>",
                *(f"<p>body: {_kind(_content(body))}</p>" for body in bodies),
                _table(_fields({one["name"]: one["schema"] for one in call.get("parameters", [])})),
                _table(answers),
            ]
    for name, model in openapi["components"]["schemas"].items():
        parts += [
            f"<h2 id='{escape(name)}'>{escape(name)}</h2>",
            f"<p>{escape(model.get('description', ''))}</p>",
            _table(_fields(model.get("properties", {}))),
            *(f"<pre>{escape(json.dumps(example))}</pre>" for example in model.get("examples", [])),
        ]
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
        "<style>body {font-family: sans-serif; max-width: 60em; margin: 2em auto} td "
        "{vertical-align: top; padding: .2em 1em .2em 0}</style>" + "\n".join(parts) + "</html>"
    )


def _fields(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Names, and JSON schemas in words."""
    return {
        name: f"{_kind(kind)}. {escape(kind.get('description', ''))}"
        for name, kind in kinds.items()
    }


def _content(body: Mapping[str, Any]) -> Mapping[str, Any]:
    return body["content"]["application/json"]["schema"]


def _kind(kind: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in kind:
        name = kind["$ref"].rsplit("/")[-1]
        return f"<a href='#{escape(name)}'>{escape(name)}</a>"
    if "anyOf" in kind:
        return " or ".join(_kind(one) for one in kind["anyOf"])
    if "enum" in kind:
        return " or ".join(escape(json.dumps(value)) for value in kind["enum"])
    words = str(kind.get("type", "anything"))
    if "items" in kind:
        words += f" of ({_kind(kind['items'])})"
    if isinstance(kind.get("additionalProperties"), Mapping):
        words += f" of names and ({_kind(kind['additionalProperties'])})"
    limits = ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "default")
    given = (limit for limit in limits if limit in kind)
    return words + "".join(f", {limit} {escape(json.dumps(kind[limit]))}" for limit in given)


def _table(rows: Mapping[str, str]) -> str:
    """Names, and what they are in HTML."""
    cells = (f"<tr><td>{escape(name)}</td><td>{text}</td></tr>" for name, text in rows.items())
    return f"<table>{''.join(cells)}</table>"
