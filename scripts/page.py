"""Walks through the page of a served run in headless Chromium, by keyboard, and draws it.

python -m scripts.page --workdir=runs/ml100k_hstu [--user=316] [--picture=docs/figures/page.png]
python -m scripts.page --url=http://localhost:8000     a server that runs

Chromium must be there (Debian: apt install chromium). The page must find a title, take it into a
history, show a user and an answer, say what is wrong with another user, and raise no error.
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import portpicker
from absl import flags

from experiments import command
from scripts.load.loop import deployment

FLAGS = flags.FLAGS
NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 20  # for Chromium to start, and for whatever a step shows
SIZE = {"width": 1360, "height": 920, "deviceScaleFactor": 1, "mobile": False}
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowDown": 40}
MOST_TABS = 40


class Chromium:
    """A tab of Chromium, over the DevTools protocol.

    Attributes:
      errors: what the page's script raised, and what the page was refused.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket = socket
        self._calls = 0
        self.errors: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=WAIT_S)
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(message["params"]))
            if message.get("id") == self._calls:
                return message["result"]

    async def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Waits until an expression is true. Raises ValueError with what the page says."""
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while not await self.value(expression):
            if asyncio.get_running_loop().time() > deadline:
                text = await self.value("document.body.innerText")
                raise ValueError(f"{expression} is not so after {WAIT_S} s; the page says:\n{text}")
            await asyncio.sleep(0.05)

    async def press(self, key: str) -> None:
        """Presses a key of KEYS."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=KEYS[key],
                **(text if kind == "keyDown" else {}),
            )

    async def tab_to(self, element: str) -> None:
        """Reaches an element by Tab alone."""
        for _ in range(MOST_TABS):
            if await self.value(f"document.activeElement.id === {json.dumps(element)}"):
                return
            await self.press("Tab")
        raise ValueError(f"#{element} cannot be reached by {MOST_TABS} times Tab")

    async def write(self, text: str) -> None:
        """Types a text."""
        await self.call("Input.insertText", text=text)

    async def draw(self, path: str) -> None:
        """Writes a picture of what is seen."""
        png = (await self.call("Page.captureScreenshot"))["data"]
        Path(path).write_bytes(base64.b64decode(png))


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Chromium]:
    """A Chromium without a window and without a past. Raises ValueError where there is none."""
    binary = next((path for name in NAMES if (path := shutil.which(name))), None)
    if binary is None:
        raise ValueError(f"there is none of {', '.join(NAMES)}: install one (apt install chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        options += ["--no-first-run", "--disable-background-networking", "--disable-gpu"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
        quiet = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            binary, *options, "about:blank", stdout=quiet, stderr=quiet
        )
        try:
            async with aiohttp.ClientSession() as session:
                port = await _port(Path(profile, "DevToolsActivePort"))
                async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                    tabs = [tab for tab in await response.json() if tab["type"] == "page"]
                url = tabs[0]["webSocketDebuggerUrl"]
                async with session.ws_connect(url, max_msg_size=2**26) as socket:
                    tab = Chromium(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        await tab.call(f"{domain}.enable")
                    await tab.call("Emulation.setDeviceMetricsOverride", **SIZE)
                    await tab.call("Emulation.setScrollbarsHidden", hidden=True)
                    yield tab
        finally:
            process.terminate()
            await process.wait()


async def _port(file: Path) -> str:
    """The port that Chromium listens on, which it writes down when it is ready."""
    async with asyncio.timeout(WAIT_S):
        while not (file.exists() and (lines := file.read_text().splitlines())):
            await asyncio.sleep(0.05)
    return lines[0]


async def walk(url: str, user: str | None, picture: str | None, dark: bool) -> None:
    """Goes through the page. Raises ValueError where it does not do what it must."""
    async with chromium() as tab:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await tab.call("Emulation.setEmulatedMedia", features=[scheme])
        await tab.call("Page.navigate", url=url)
        await tab.until("document.querySelectorAll('#found li').length > 0")
        run = json.loads(await tab.value("document.getElementById('run').textContent"))
        ranking = run["path"] == "/score"

        word = await tab.value("document.querySelector('#found li span').firstChild.data")
        await tab.tab_to("search")
        for row, keys in {"#history": ["Enter"], "#answer": ["Tab", "Enter"]}.items():
            await tab.write(word)
            await tab.until("/found/.test(document.getElementById('found-count').textContent)")
            for key in ["ArrowDown", *(keys if ranking else ["Enter"])]:
                await tab.press(key)
            await tab.until(f"document.querySelectorAll('{row} tbody tr').length > 0")
            await tab.until("document.activeElement.id === 'search'")

        await tab.call("Page.navigate", url="about:blank")
        await tab.call("Page.navigate", url=url)
        await tab.until("document.querySelectorAll('#found li').length > 0")
        if run["users"] is not None:
            await tab.tab_to("user")
            await tab.write("nobody at all")
            await tab.press("Enter")
            await tab.until("/nknown user/.test(document.getElementById('user-error').textContent)")
            await tab.value("document.getElementById('user').select()")
            await tab.write(user or str(run["examples"][len(run["examples"]) // 2]))
            await tab.press("Enter")
            await tab.until("document.querySelectorAll('#history .badge').length > 0")
            await tab.tab_to("hide")
            await tab.value("document.getElementById('hide').select()")
            await tab.write("2")
            await tab.press("Tab")
            await tab.until("document.querySelectorAll('#history .badge').length === 2")
            await tab.until("document.querySelectorAll('#answer tbody tr').length > 0")
            await tab.until("!document.getElementById('user-error').textContent")
        said = await tab.value("document.getElementById('error').textContent")
        # An unknown user is refused with 422, which Chromium writes down.
        errors = [error for error in tab.errors if "422" not in error]
        if said or errors:
            raise ValueError("\n".join(["the page has errors", said, *errors]))
        if picture is not None:
            await tab.draw(picture)


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of the server."""
    if FLAGS.url is not None:
        yield FLAGS.url
        return
    port = portpicker.pick_unused_port()
    with deployment(
        FLAGS.workdir, "--batch=2", "--cache_mib=16", port=port, errors=sys.stderr
    ) as server:
        yield server.url


def main(_: list[str]) -> None:
    if (FLAGS.workdir is None) == (FLAGS.url is None):
        raise ValueError("give either --workdir=RUN or --url=http://HOST:PORT")
    with served() as url:
        asyncio.run(walk(f"{url}/", FLAGS.user, FLAGS.picture, FLAGS.dark))
    print(f"the page stands{'' if FLAGS.picture is None else f'; drawn in {FLAGS.picture}'}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a trained run, which is served")
    flags.DEFINE_string("url", None, "address of a server that runs, in place of --workdir")
    flags.DEFINE_string("user", None, "raw id of the user to show; else an example of the page")
    flags.DEFINE_string("picture", None, "file that the picture goes to")
    flags.DEFINE_bool("dark", False, "draws the page as in the dark")
    command.run(main)
