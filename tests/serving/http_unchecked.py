"""`ultra_hstu.serving.front.http` for tests in this process, and requests to its applications."""

import asyncio
import importlib.util
import sys
import warnings
from pathlib import Path

from ultra_hstu.serving import schema

# Without checks of annotations, as outside of tests: Ray pickles functions that they would wrap.
_PATH = Path(schema.__file__).parent / "front" / "http.py"
_SPEC = importlib.util.spec_from_file_location("ultra_hstu.serving.front.http", _PATH)
http = sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's, of Pydantic
    _SPEC.loader.exec_module(http)

JSON = {"content-type": "application/json"}


async def ask(app, *parts, whole=True, method="POST", path="/recommend", headers=JSON):
    """(status, body) of the answer to a request whose body comes in these parts."""
    arriving, answer = list(parts) or [b""], []

    async def receive():
        if not arriving:  # the client says no more
            await asyncio.Event().wait()
        part = arriving.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(arriving) or not whole}

    async def send(message):
        answer.append(message)

    path, _, query = path.partition("?")
    names = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode()}
    scope |= {"query_string": query.encode(), "headers": names, "root_path": "", "scheme": "http"}
    scope |= {"http_version": "1.1", "server": ("test", 80), "client": ("test", 1)}
    await app(scope, receive, send)
    return answer[0]["status"], b"".join(part.get("body", b"") for part in answer).decode()
