"""Responses as lines are UTF-8, whatever standard output would encode; messages of bad ids."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pydantic
import pytest

from ultra_hstu.data.catalog import Catalog
from ultra_hstu.serving.front.lines import answer_lines
from ultra_hstu.serving.inputs import Query, UserHistory
from ultra_hstu.serving.schema import Recommendation, Request, Response, problem
from ultra_hstu.serving.service import Service

TITLE = "Am\u00e9lie \u5343\u3068\u5343\u5c0b \U0001f3ac"


class OneTitle(Service):
    """Recommends the same item to everybody, without a model."""

    request_type, model = Request, SimpleNamespace(max_users=4)
    warm_up = check_health = None

    def __init__(self):
        super().__init__(Catalog.from_ids(np.array([1])), None)

    def prepare(self, request):
        none = np.zeros((1, 0), np.int32)
        return Query(UserHistory({}, none, np.zeros(1, np.int32)), b"")

    def answer(self, queries):
        item = Recommendation(item=1, title=TITLE, score=1.0)
        return [Response(items=[item], source="model", warnings=[])] * len(queries)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_titles_are_utf8(monkeypatch, encoding):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", narrow)
    answer_lines(OneTitle(), io.BytesIO(b'{"user": 1}\nnonsense\n'))
    good, bad = map(json.loads, narrow.buffer.getvalue().decode("utf-8").splitlines())
    assert good["items"][0]["title"] == TITLE and "Invalid JSON" in bad["error"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"user": "u" * 257}, "user: String should have at most 256 characters"),
        ({"user": 2**63}, "user: Input should be less than or equal to 9223372036854775807"),
        ({"history": [1, "x" * 300]}, "history.1: String should have at most 256 characters"),
        ({"history": [1.5]}, "history.0: Input should be a valid integer"),
        ({"user": 1, "k": "3"}, "k: Input should be a valid integer"),
    ],
)
def test_messages_of_bad_ids(request_, message):
    with pytest.raises(pydantic.ValidationError) as error:
        Request.model_validate_json(json.dumps(request_))
    assert problem(error.value.errors()).startswith(message)
