"""The I/O of one connection in trio.

Owns the socket and the lock that makes tasks take turns; must not know roles or methods.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from socket import MSG_NOSIGNAL
from typing import Self, TypeVar

import trio

from intercept_protocol.events import Event
from intercept_protocol.rpc import Notification

from ._connecting import RESTART_PAUSE, RETRY_DELAY, RestartWindow, StrPath, connect_now, rights
from ._exchange import Exchange, Reply
from ._session import ClientSession

_RECEIVE_BYTES = 4096
_Opened = TypeVar("_Opened")


async def connect(path: StrPath) -> trio.socket.SocketType:
    """Connect, waiting while the daemon's backlog is full. Raises an `OSError` that names the path."""
    await trio.lowlevel.checkpoint_if_cancelled()
    while True:
        try:
            return trio.socket.from_stdlib_socket(connect_now(path))
        except BlockingIOError:
            await trio.sleep(RETRY_DELAY)


async def open_despite_restart(attempt: Callable[[], Awaitable[_Opened]], open_timeout: float) -> _Opened:
    """What `attempt` returns, which connects and says hello; it is called again as `RestartWindow` says.

    May be cancelled. Raises what the last attempt raises, and `TimeoutError` after `open_timeout` seconds.
    """
    window = RestartWindow()
    with trio.move_on_after(open_timeout):
        while True:
            try:
                return await attempt()
            except OSError as failure:
                if not window.covers(failure, trio.current_time()):
                    raise
            await trio.sleep(RESTART_PAUSE)
    raise TimeoutError("the daemon did not answer in time")


class TrioConnection:
    """A connected socket and its conversation. Tasks may share it: their requests take turns, in order."""

    def __init__(self, socket: trio.socket.SocketType) -> None:
        self._socket = socket
        self._session = ClientSession()
        self._turn = trio.Lock()

    @classmethod
    async def open(
        cls, path: StrPath, hello: Callable[[], Exchange[Reply]], open_timeout: float
    ) -> tuple[Self, Reply]:
        """Connect and say hello, also while the daemon is restarted; the connection, and the daemon's answer.

        Raises as `connect` and `run` do, and `TimeoutError` after `open_timeout` seconds.
        """

        async def attempt() -> tuple[Self, Reply]:
            connection = cls(await connect(path))
            try:
                return connection, await connection.run(hello())
            except BaseException:
                connection.close()
                raise

        return await open_despite_restart(attempt, open_timeout)

    async def run(self, exchange: Exchange[Reply]) -> Reply:
        """Send the request and wait for its answer.

        If it is cancelled before its first byte was sent, the request was never made. If it is cancelled
        later, the request may still be carried out; only `exchange` gets its answer, and the connection stays
        usable: the next turn begins by waiting for that answer.
        """
        async with self._turn:
            await self._pump()
            self._session.start(exchange)
            try:
                await self._pump()
            finally:
                self._session.withdraw_unsent()
        return exchange.reply()

    async def wait_idle(self) -> None:
        """Wait until no answer is owed, not even to a caller that was cancelled."""
        async with self._turn:
            await self._pump()

    def close(self) -> None:
        """Close at once; a request in flight, in whatever task, ends as `ConnectionLost`."""
        self._session.lose("closed by this client")
        self._socket.close()

    def take_notifications(self) -> list[Notification]:
        """The notifications that came with answers so far, oldest first."""
        return self._session.take_notifications()

    async def wait_events(self) -> list[Event]:
        """Wait for events, and take them, oldest first. May be cancelled.

        Other tasks' requests wait meanwhile. Once all were taken, raises the error that ended the
        conversation.
        """
        async with self._turn:
            await self._pump()
            while not (events := self._session.take_events()):
                self._session.require_going_on()
                await self._step()
            return events

    async def _pump(self) -> None:
        """Send and receive until nothing is in flight. A cancelled send or recv has done nothing."""
        while self._session.is_busy:
            await self._step()
        if self._session.is_lost:
            self._socket.close()

    @trio.lowlevel.enable_ki_protection  # or Ctrl-C comes between a system call and its bookkeeping
    async def _step(self) -> None:
        """Send once, if anything remains to be sent; otherwise receive once."""
        session, socket = self._session, self._socket
        try:
            if data := session.data_to_send():
                if descriptors := session.descriptors_to_send():
                    sent = await socket.sendmsg([data], rights(descriptors), MSG_NOSIGNAL)
                else:
                    sent = await socket.send(data, MSG_NOSIGNAL)
                session.sent(sent)
            else:
                session.receive_data(await socket.recv(_RECEIVE_BYTES))
        except OSError as error:
            session.stream_failed(error)
        except trio.ClosedResourceError:
            session.lose("closed by this client")
