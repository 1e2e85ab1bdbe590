"""Requests of every shape, and a slow definition in plain Python of which may be answered."""

import json
import math
import re

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

BOUNDED = settings(
    max_examples=200,
    suppress_health_check=list(HealthCheck),
)
WIDEST = 2**63 - 1

# Ids that a catalogue of 1, 2, ... has, and all kinds of others.
good_ids = st.integers(1, 30) | st.integers(1, 30).map(str)
strange = st.sampled_from(
    [0, -1, 777, WIDEST, WIDEST + 1, -WIDEST - 1, 10**30, 1.0, 1.5, True, None, "", "x", " 5 ",
     "+5", "5.0", "1e1", "\u0663", "\ud800", "9" * 18, "9" * 19, "a" * 256, "a" * 257, [], [1], {},
     math.nan, math.inf]
)  # fmt: skip
moments = st.integers(10**9, 10**9 + 50)
strange_moments = strange | st.sampled_from(
    [-(2**31), -(2**31) - 1, 2**31, 2**32 - 1, 2**32, 1112486027000, 10**18, "2005-04-02", 5e8]
)
numbers = st.integers(1, 5) | st.floats(1, 5)
strange_numbers = st.sampled_from([9, -1, 0, 1e9, 1e10, 2.5, math.nan, -math.inf, "5", None, True])


def mostly(usual, others):
    """Mostly the usual: one of the others in about forty."""
    return st.integers(0, 39).flatmap(lambda n: others if n == 39 else usual)


def columns(names, values, length):
    """A dict of columns, mostly of the right length."""
    lists = mostly(st.just(length), st.integers(0, 12)).flatmap(
        lambda size: st.lists(values, min_size=size, max_size=size)
    )
    return st.dictionaries(st.sampled_from(names), lists, max_size=len(names))


@st.composite
def requests(draw, users, actions, candidates=(), contexts=None):
    """A request, as an object that JSON can hold. With `candidates`, names of features, it is one
    for scores."""
    ids = mostly(good_ids, strange)
    request = {}
    if draw(mostly(st.just(True), st.just(False))):
        request["history"] = draw(st.lists(ids, max_size=12))
    else:
        request["user"] = draw(mostly(st.sampled_from(users), strange))
    length = len(request.get("history", ()))
    some = draw(st.sets(st.sampled_from("times actions now k block context odd user".split())))
    if "times" in some:
        size = draw(mostly(st.just(length), st.integers(0, 12)))
        times = draw(st.lists(mostly(moments, moments), min_size=size, max_size=size))
        request["times"] = sorted(times)
        if size and draw(st.integers(0, 3)) == 0:
            request["times"][draw(st.integers(0, size - 1))] = draw(strange_moments)
    if "actions" in some:
        values = mostly(numbers, strange_numbers)
        request["actions"] = draw(columns(actions, values, length))
    if "now" in some:
        request["now"] = draw(mostly(st.integers(10**9 + 40, 10**9 + 10**6), strange_moments))
    if candidates:
        request["candidates"] = draw(st.lists(ids, min_size=1, max_size=12))
        count = len(request["candidates"])
        if draw(st.booleans()):
            values = mostly(st.integers(4, 9), strange_numbers)
            request["features"] = draw(columns(candidates, values, count))
        if "context" in some:
            words = st.sampled_from(["north", "south", "1", "", "x", 1, None, "a" * 257])
            request["context"] = draw(st.dictionaries(st.sampled_from(contexts), words, max_size=3))
    else:
        if "k" in some:
            request["k"] = draw(mostly(st.integers(1, 40), strange))
        if "block" in some:
            request["block"] = draw(st.lists(ids, max_size=6))
    if "odd" in some and draw(st.integers(0, 4)) == 0:
        request[draw(st.sampled_from(["colour", "", "\ud800"]))] = draw(strange)
    if "user" in some and draw(st.integers(0, 4)) == 0:
        request["user"] = draw(strange)
    return request


def bodies(requests):
    """Lines of JSON, some of them cut or with a byte changed."""

    def damaged(body):
        changed = st.tuples(st.integers(0, len(body) - 1), st.binary(max_size=2)).map(
            lambda change: body[: change[0]] + change[1] + body[change[0] + 1 :]
        )
        return mostly(st.just(body), changed | st.binary(max_size=60))

    return requests.map(lambda request: json.dumps(request).encode()).flatmap(damaged)


class NotAnswered(Exception):
    """The definition: this request is refused."""


def require(condition):
    if not condition:
        raise NotAnswered


def is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value, most):
    """Whether it is a number that JSON has."""
    right = isinstance(value, int | float) and not isinstance(value, bool)
    return right and -most <= value <= most


def dense_ids(given, items, most=8192):
    """Ids of a request as numbers of items, 0 for unknown ones. Ids of items are 1, 2, ..."""
    require(isinstance(given, list) and len(given) <= most)
    for raw in given:
        require(
            (is_integer(raw) and abs(raw) <= WIDEST)
            or (isinstance(raw, str) and 1 <= len(raw) <= 256 and is_text(raw))
        )
    if any(isinstance(raw, str) for raw in given):
        require(all(re.fullmatch("-?[0-9]{1,18}", str(raw).strip(), re.ASCII) for raw in given))
    return [int(raw) if 1 <= int(raw) <= items else 0 for raw in given]


def is_text(text):
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in text)


def is_time(value):
    return is_integer(value) and -(2**31) <= value < 2**32


def require_columns(given, length, most):
    """Columns of numbers, one of them for each of `length`."""
    require(isinstance(given, dict))
    for values in given.values():
        require(isinstance(values, list) and all(is_number(one, most) for one in values))
        require(len(values) == length)


def history_of(request, items, fields):
    """(dense ids, times, places) of the known events of a request that brings its history; None
    for one of a user. Times are those of the request, or all the same."""
    require(isinstance(request, dict) and set(request) <= set(fields))
    user, history, times = (request.get(name) for name in ("user", "history", "times"))
    actions, now = request.get("actions"), request.get("now")
    require((user is None) != (history is None))
    require(now is None or is_time(now))
    if history is None:
        require(times is None and actions is None)
        return None
    dense = dense_ids(history, items)
    if times is not None:
        require(isinstance(times, list) and all(is_time(time) for time in times))
        require(len(times) == len(history))
    if actions is not None:
        require_columns(actions, len(history), 1e9)
    known = [place for place, item in enumerate(dense) if item]
    seconds = [0 if times is None else times[place] for place in known]
    return [dense[place] for place in known], seconds, known


def require_order(seconds, now, longest):
    """Times that do not go back, and span less than 68 years where they count."""
    end = now if now is not None else seconds[-1] if seconds else 0
    whole = [*seconds, end]
    require(whole == sorted(whole))
    kept = whole[max(0, len(seconds) - longest) :]
    require(kept[-1] - kept[0] <= 2**31 - 1)


def read(body):
    """The object of a body."""
    try:
        return json.loads(body)
    except ValueError:
        raise NotAnswered from None


def user_of(user, users):
    """The raw id of a known user, who is a number."""
    require((is_integer(user) and abs(user) <= WIDEST) or isinstance(user, str))
    if isinstance(user, str):
        require(len(user) <= 256 and re.fullmatch("-?[0-9]+", user.strip(), re.ASCII))
    require(int(user) in users)
    return int(user)
