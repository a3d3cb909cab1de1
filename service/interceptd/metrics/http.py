"""The part of HTTP that scrapes and probes need: one GET per connection, bounded in size, number and time.

Owns the exchange, on top of h11, and the bounds. Must not know the contents of the pages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final
from urllib.parse import unquote

import h11
import structlog
import trio

log = structlog.get_logger()

CONNECTIONS: Final = 8
"""At a time: enough for two scrapers and some probes. Further ones are closed at once."""
REQUEST_BYTES: Final = 8192
"""For the head of a request. Prometheus sends some 500 bytes."""
DEADLINE_SECONDS: Final = 5.0
"""For the request and its answer together; less than Prometheus' default of 10 s."""
LINGER_SECONDS: Final = 1.0
"""For discarding the body of a request after the answer."""
READ_BYTES: Final = 4096
TEXT: Final = "text/plain; charset=utf-8"
METHODS: Final = (b"GET", b"HEAD")
_ABSOLUTE: Final = re.compile(r"https?://[^/]+(?P<path>/.*)?", re.IGNORECASE)
"""An http URI up to its query; its host must not be empty (RFC 9110, 4.2)."""


@dataclass(frozen=True, slots=True)
class Page:
    status: int
    body: bytes
    content_type: str = TEXT


Route = Callable[[], Awaitable[Page]]
"""Renders the page of one path."""


class Responder:
    """`requests` counts connections by result: a status, `refused`, `timeout`, `gone` or `failed`."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self._routes = routes
        self._open = 0
        self.requests: Counter[str] = Counter()

    async def serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        """Answer one request; the caller closes."""
        if self._open >= CONNECTIONS:
            self.requests["refused"] += 1
            return
        self._open += 1
        result = "timeout"
        try:
            with trio.move_on_after(DEADLINE_SECONDS):
                result = await self._exchange(stream)
        except trio.BrokenResourceError:
            result = "gone"
        except Exception:  # a bug in the metrics must not end the daemon
            log.exception("metrics_failed")
            result = "failed"
        finally:
            self._open -= 1
            self.requests[result] += 1

    async def _exchange(self, stream: trio.abc.HalfCloseableStream) -> str:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_BYTES)
        bodiless = False
        try:
            request = await _request(connection, stream)
            if request is None:
                return "gone"
            bodiless = request.method == b"HEAD"
            page = await self._page(request)
        except h11.RemoteProtocolError as error:
            page = Page(error.error_status_hint, f"{error}\n".encode())
        await stream.send_all(_response(connection, page, bodiless=bodiless))
        if _has_body(connection):
            await _let_finish(stream)
        return str(page.status)

    async def _page(self, request: h11.Request) -> Page:
        if request.method not in METHODS:
            return Page(405, b"use GET or HEAD\n")
        path = _path(request.target.decode("ascii"))
        if path is None:
            return Page(400, b"the request target is neither a path nor an http URI\n")
        route = self._routes.get(path)
        if route is None:
            return Page(404, f"available: {', '.join(self._routes)}\n".encode())
        return await route()


def _path(target: str) -> str | None:
    """The path in a request target; None if the target is invalid (RFC 9112, 3.2).

    Every server must accept an absolute URI, which proxies send; its host is ignored. Percent-encoded letters
    are decoded (RFC 3986, 6.2.2.2). The query is ignored.
    """
    hierarchy, _, _ = target.partition("?")
    if not hierarchy.startswith("/"):
        match = _ABSOLUTE.fullmatch(hierarchy)
        if match is None:
            return None
        hierarchy = match["path"] or "/"
    return unquote(hierarchy)


async def _request(connection: h11.Connection, stream: trio.abc.Stream) -> h11.Request | None:
    """The head of a request; None if the peer closes first. No page takes a body."""
    while True:
        match connection.next_event():
            case h11.Request() as request:
                return request
            case h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(READ_BYTES)))
            case _:
                return None


def _has_body(connection: h11.Connection) -> bool:
    """Whether the request has a body, part of which may still follow."""
    if connection.their_state is not h11.SEND_BODY:
        return False
    try:
        return not isinstance(connection.next_event(), h11.EndOfMessage)
    except h11.RemoteProtocolError:
        return True


async def _let_finish(stream: trio.abc.HalfCloseableStream) -> None:
    """Discard the rest of a body. Closing earlier would reset the connection, and the peer might lose our
    answer (RFC 9112, 9.6)."""
    await stream.send_eof()
    with trio.move_on_after(LINGER_SECONDS):
        while await stream.receive_some(READ_BYTES):
            pass


def _response(connection: h11.Connection, page: Page, *, bodiless: bool) -> bytes:
    headers = [
        ("Content-Type", page.content_type),
        ("Content-Length", str(len(page.body))),
        ("Connection", "close"),
    ]
    if page.status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append(("Allow", b", ".join(METHODS).decode()))  # required with 405 (RFC 9110, 15.5.6)
    reason = HTTPStatus(page.status).phrase
    events: list[h11.Event] = [h11.Response(status_code=page.status, headers=headers, reason=reason)]
    if not bodiless:
        events.append(h11.Data(data=page.body))
    events.append(h11.EndOfMessage())
    return b"".join(connection.send(event) or b"" for event in events)
