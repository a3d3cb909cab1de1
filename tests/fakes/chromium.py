"""A browser that tests drive: Debian's chromium, headless, by the DevTools protocol on a pair of pipes.

Owns the process and the pipes; what a page should show is the test's. Nothing is downloaded.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fakes.eventually import PATIENCE

Json = dict[str, Any]
FLAGS = (
    "--headless", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--disable-sync", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
    "--window-size=1000,700", "--force-device-scale-factor=0.5",
)  # fmt: skip
"""WebGL is computed by the CPU: there need not be a GPU, but fewer pixels cost less."""


def found() -> bool:
    return shutil.which("chromium") is not None


class Page:
    """One tab. `complaints` has the errors and warnings of its console, `loads` what it asked for."""

    def __init__(self, send_to: int, read_from: int) -> None:
        self.complaints: list[str] = []
        self.loads: list[str] = []
        self._send_to = send_to
        self._read_from = read_from
        self._unread = b""
        self._number = 0
        self._answers: dict[int, Json] = {}
        self._loaded = False
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session: str | None = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path) -> None:
        """Return once it is loaded."""
        self._loaded = False
        self.call("Page.navigate", {"url": path.as_uri()})
        self._await(lambda: self._loaded)

    def value_of(self, expression: str) -> Any:
        """Of JavaScript; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True}
        )
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def await_value(self, expression: str) -> Any:
        """The first value that is true."""
        give_up = time.monotonic() + PATIENCE
        while not (value := self.value_of(expression)):
            assert time.monotonic() < give_up, f"never true: {expression}"
        return value

    def point_at(self, x: float, y: float) -> None:
        for offset in (-3, 0):
            self.call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x + offset, "y": y})

    def prefer(self, colours: str) -> None:
        """ "light" or "dark"."""
        self.call(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": colours}]}
        )

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", {"format": "png"})["data"])

    def printed(self) -> bytes:
        """As PDF."""
        return base64.b64decode(self.call("Page.printToPDF", {"printBackground": True})["data"])

    def call(self, method: str, params: Json | None = None) -> Json:
        return self._call(method, params or {}, self._session)

    def _call(self, method: str, params: Json, session: str | None = None) -> Json:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._send_to, json.dumps(message).encode() + b"\0")
        self._await(lambda: number in self._answers)
        answer = self._answers.pop(number)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _await(self, done: Callable[[], bool]) -> None:
        give_up = time.monotonic() + PATIENCE
        while not done():
            ready, _, _ = select.select([self._read_from], [], [], max(0, give_up - time.monotonic()))
            assert ready, "chromium does not answer"
            received = os.read(self._read_from, 1 << 20)
            assert received, "chromium ended"
            *messages, self._unread = (self._unread + received).split(b"\0")
            for message in messages:
                self._take(json.loads(message))

    def _take(self, message: Json) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case None:
                self._answers[message["id"]] = message
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.loads.append(params["request"]["url"][:100])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"])[:2000])
            case "Runtime.consoleAPICalled" if params["type"] in {"error", "warning", "assert"}:
                self.complaints.append(json.dumps(params["args"])[:2000])
            case "Log.entryAdded":
                self.complaints.append(f"{params['entry']['level']}: {params['entry']['text']}")


@contextmanager
def page(profile: Path) -> Iterator[Page]:
    """Of a browser of its own, which keeps its files in `profile`."""
    to_read, send_to = _high_pipe()
    read_from, to_write = _high_pipe()
    command = ["chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", *command],
        pass_fds=(to_read, to_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    try:
        yield Page(send_to, read_from)
    finally:
        os.close(send_to)  # it ends when nobody drives it
        os.close(read_from)
        try:
            browser.wait(PATIENCE)
        finally:
            browser.kill()


def _high_pipe() -> tuple[int, int]:
    """Numbers that are not among those that the command gets."""
    low = os.pipe()
    high = fcntl.fcntl(low[0], fcntl.F_DUPFD_CLOEXEC, 10), fcntl.fcntl(low[1], fcntl.F_DUPFD_CLOEXEC, 10)
    for end in low:
        os.close(end)
    return high
