"""A client made with a third-party MessagePack-RPC library: pynvim's, which both asks and answers.

Owns putting its layers together, because its `socket_session` would greet an editor first. Must not know the
daemon's methods, nor share code with any client of ours.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from pynvim.msgpack_rpc import ErrorResponse
from pynvim.msgpack_rpc.async_session import AsyncSession
from pynvim.msgpack_rpc.event_loop import EventLoop
from pynvim.msgpack_rpc.msgpack_stream import MsgpackStream
from pynvim.msgpack_rpc.session import Session

from fakes.eventually import PATIENCE

__all__ = ["ErrorResponse", "ForeignClient", "ForeignError"]


class ForeignError(Exception):
    """What the library hands on of a response's error."""

    def __init__(self, error: list[Any]) -> None:
        super().__init__(error)
        self.error = error


class ForeignClient:
    """A connection. `request` blocks; once it serves, a thread answers the daemon's requests."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._session = Session(AsyncSession(MsgpackStream(EventLoop("socket", os.fspath(path)))))
        self._session.error_wrapper = ForeignError
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._session.threadsafe_call(self._session.stop)
            self._thread.join(PATIENCE)
        self._close_transport()
        self._session.close()

    def request(self, method: str, *params: object) -> Any:
        """The result, or raises `ForeignError`; OSError where the daemon closes instead."""
        return self._session.request(method, *params)

    def serve(self, answer: Callable[[str, list[Any]], object]) -> None:
        """`answer` gives a result, or raises `ErrorResponse`; any other exception is sent as text."""

        def run() -> None:
            with suppress(EOFError):  # how the library says that the daemon has closed
                self._session.run(answer, lambda *_: None)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def _close_transport(self) -> None:
        """asyncio closes a socket in its loop's next round; the library's own `close` leaves before."""
        loop = self._session.loop
        loop._transport.close()
        with suppress(EOFError):
            loop.run(lambda _: None)
