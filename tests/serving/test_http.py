"""What stands before a service: requests are let in when they are whole, and pages say what it
takes."""

import asyncio
import json

import pytest
from fastapi.responses import PlainTextResponse

from tests.serving.http_unchecked import JSON, ask, http
from ultra_hstu.serving.schema import MAX_BODY_BYTES, FoundItems, KnownUser, Request, Response


@pytest.fixture
def echo():
    """An application that answers with the body, when `go` is set."""

    async def app(scope, receive, send):
        await app.go.wait()
        body = (await receive())["body"]
        await PlainTextResponse(body)(scope, receive, send)

    app.go = asyncio.Event()
    app.go.set()
    return app


def test_a_body_is_read_whole_before_it_counts(echo, monkeypatch):
    """Clients that never end their bodies are told so in time, and nobody waits for them."""
    monkeypatch.setattr(http, "BODY_S", 0.3)
    monkeypatch.setattr(http, "WAITING", 1)
    admission = http.Admission(echo)

    async def run():
        slow = [asyncio.create_task(ask(admission, b"x", whole=False)) for _ in range(400)]
        await asyncio.sleep(0)
        assert (admission.waiting, admission.held) == (0, 400)
        assert await ask(admission, b"ab", b"", b"c") == (200, "abc")
        assert not any(task.done() for task in slow)
        return await asyncio.gather(*slow)

    for status, body in asyncio.run(run()):
        assert status == 408 and "the body was not there after 0.3 s" in body
    assert (admission.waiting, admission.held) == (0, 0)


def test_a_dripping_client_has_no_more_time(monkeypatch):
    monkeypatch.setattr(http, "BODY_S", 0.05)

    async def receive():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    refused = asyncio.run(http.Admission(None)._read(bytearray(), receive))
    assert refused.status_code == 408


def test_more_requests_than_may_wait(echo, monkeypatch):
    monkeypatch.setattr(http, "WAITING", 2)
    admission = http.Admission(echo)

    async def run():
        echo.go.clear()
        waiting = [asyncio.create_task(ask(admission, b"x")) for _ in range(2)]
        await asyncio.sleep(0.01)
        refused = await ask(admission, b"x")
        echo.go.set()
        return refused, await asyncio.gather(*waiting), await ask(admission, b"x")

    refused, answered, after = asyncio.run(run())
    assert refused == (503, '{"detail":"2 requests are waiting: try again later"}')
    assert answered == [(200, "x")] * 2 and after == (200, "x")


@pytest.mark.parametrize(
    ("most", "parts", "status"),
    [(2**28, [b" " * MAX_BODY_BYTES, b" "], 413), (10, [b" " * 11], 503), (11, [b" " * 11], 200)],
)
def test_bodies_have_bounds(echo, monkeypatch, most, parts, status):
    monkeypatch.setattr(http, "BODIES_BYTES", most)
    admission = http.Admission(echo)
    assert asyncio.run(ask(admission, *parts))[0] == status
    assert admission.held == 0


def application():
    app = http._application("/recommend", "Recommendations of a <run>.")

    @app.post("/recommend", responses=http.PROBLEMS)
    async def recommend(request: Request) -> Response:
        """The best items."""
        return Response(items=[], source="model", warnings=[str(request.k)])

    return app


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({}, 415, "the request has no content-type: send JSON, with 'content-type: application"),
        ({"content-type": "text/plain"}, 415, "the request has the content-type 'text/plain'"),
        ({"content-type": "application/x-www-form-urlencoded"}, 415, "-urlencoded': send JSON"),
        (JSON, 200, '"7"'),
        ({"content-type": "application/json; charset=utf-8"}, 200, '"7"'),
        ({"content-type": "Application/problem+json"}, 200, '"7"'),
    ],
)
def test_a_request_without_content_type_is_told_so(headers, status, message):
    body = b'{"history": [1], "k": 7}'
    got = asyncio.run(ask(application(), body, headers=headers))
    assert got[0] == status and message in json.loads(got[1]).get("detail", got[1])


def test_the_description_needs_nothing_from_elsewhere():
    app = application()
    status, text = asyncio.run(ask(app, method="GET", path="/docs", headers={}))
    assert status == 200 and "://" not in text and "<script" not in text
    assert "Recommendations of a &lt;run&gt;." in text and "POST /recommend" in text
    for name, model in app.openapi()["components"]["schemas"].items():
        assert f"id='{name}'" in text
        assert all(f"<td>{field}</td>" in text for field in model["properties"])
    assert "GET /items" in text and "<td>limit</td>" in text and "GET /user" in text
    for status in ("200", "408", "413", "415", "422", "503"):
        assert f"<td>{status}</td>" in text
    for path in ("/redoc", "/docs/oauth2-redirect"):
        assert asyncio.run(ask(app, method="GET", path=path, headers={}))[0] == 404


class PageOf41:
    """A page of one user, and of no items."""

    html = "<p>the page"

    def items(self, search):
        return FoundItems(items=[], found=search.limit, complete=search.search == "star wars")

    def user(self, search):
        if search.user != "41":
            raise ValueError(f"unknown user {search.user!r}")
        columns = {"history": [], "titles": [], "times": None, "actions": {}, "context": {}}
        return KnownUser(user=41, events=0, **columns)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/", 200, "<p>the page"),
        ("/items", 200, '"found":20,"complete":false'),
        ("/items?search=star+wars&limit=1000", 200, '"found":1000,"complete":true'),
        ("/items?limit=0", 422, "limit: Input should be greater than or equal to 1"),
        ("/items?limit=1001", 422, "limit: Input should be less than or equal to 1000"),
        ("/items?limit=many", 422, "limit: Input should be a valid integer"),
        (f"/items?search={'x' * 257}", 422, "search: String should have at most 256 characters"),
        ("/items?colour=red", 422, "colour: there is no such field"),
        ("/user?user=41", 200, '"user":41'),
        ("/user?user=42", 422, "unknown user '42'"),
        ("/user?user=", 422, "user: String should have at least 1 character"),
        ("/user", 422, "user: Field required"),
    ],
)
def test_what_the_page_reads(path, status, message):
    app = application()
    app.dependency_overrides[http._page] = PageOf41
    got = asyncio.run(ask(app, method="GET", path=path, headers={}))
    assert got[0] == status and message in got[1].replace("\\", "")
