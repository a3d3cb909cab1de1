"""The I/O of one connection for threads.

Owns the socket, the lock that makes threads take turns, and waiting until a deadline; must not
know roles or methods, nor import trio. Deadlines are readings of `time.monotonic`; None is never.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from socket import MSG_NOSIGNAL
from typing import Self, TypeVar

from intercept_protocol.events import Event
from intercept_protocol.rpc import Notification

from ._connecting import OPEN_SECONDS, RESTART_PAUSE, RETRY_DELAY, RestartWindow, StrPath, connect_now, rights
from ._exchange import Exchange, Reply
from ._session import ClientSession

_RECEIVE_BYTES = 4096
_Opened = TypeVar("_Opened")


def deadline_in(seconds: float | None) -> float | None:
    """The deadline that lies `seconds` ahead."""
    return None if seconds is None else time.monotonic() + seconds


def opening_deadline(timeout: float | None, open_timeout: float | None) -> float | None:
    """The deadline of an `open` that begins now, given the time-out of the calls and its own, if any."""
    seconds = next(given for given in (open_timeout, timeout, OPEN_SECONDS) if given is not None)
    return None if math.isinf(seconds) else deadline_in(seconds)


def connect(path: StrPath, deadline: float | None) -> socket.socket:
    """Connect, waiting while the daemon's backlog is full. Raises an `OSError` that names the path."""
    while True:
        try:
            return connect_now(path)
        except BlockingIOError:
            _sleep(RETRY_DELAY, deadline)


def open_despite_restart(attempt: Callable[[], _Opened], deadline: float | None) -> _Opened:
    """What `attempt` returns, which connects and says hello; it is called again as `RestartWindow` says.

    Raises what the last attempt raises, and `TimeoutError` at the deadline.
    """
    window = RestartWindow()
    while True:
        try:
            return attempt()
        except OSError as failure:
            if not window.covers(failure, time.monotonic()):
                raise
            _sleep(RESTART_PAUSE, deadline)


class BlockingConnection:
    """A connected socket and its conversation. Threads may share it: their requests take turns."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        self._socket = sock
        self._session = ClientSession()
        self._turn = threading.Lock()

    @classmethod
    def open(
        cls, path: StrPath, hello: Callable[[], Exchange[Reply]], deadline: float | None
    ) -> tuple[Self, Reply]:
        """Connect and say hello, also while the daemon is restarted; the connection, and the daemon's answer.

        Raises as `connect` and `run` do.
        """

        def attempt() -> tuple[Self, Reply]:
            connection = cls(connect(path, deadline))
            try:
                return connection, connection.run(hello(), deadline)
            except BaseException:
                connection.close()
                raise

        return open_despite_restart(attempt, deadline)

    def run(self, exchange: Exchange[Reply], deadline: float | None) -> Reply:
        """Send the request and wait for its answer; `TimeoutError` at the deadline.

        If it times out before its first byte was sent, the request was never made. If it times out later, the
        request may still be carried out; only `exchange` gets its answer, and the connection stays usable:
        the next turn begins by waiting for that answer. Any other exception that interrupts the wait, such as
        KeyboardInterrupt, ends the connection.
        """
        self._take_turn(deadline)
        try:
            self._pump(deadline)
            self._session.start(exchange)
            try:
                self._pump(deadline)
            finally:
                self._session.withdraw_unsent()
        finally:
            self._turn.release()
        return exchange.reply()

    def wait_idle(self, deadline: float | None) -> None:
        """Wait until no answer is owed, not even to a caller that gave up. Raises `TimeoutError`."""
        self._take_turn(deadline)
        try:
            self._pump(deadline)
        finally:
            self._turn.release()

    def close(self) -> None:
        """Close at once; a request in flight, in whatever thread, ends as `ConnectionLost`."""
        self._hang_up()  # wakes the thread that holds the turn
        with self._turn:
            self._session.lose("closed by this client")
            self._socket.close()

    def take_notifications(self) -> list[Notification]:
        """The notifications that came with answers so far, oldest first."""
        with self._turn:
            return self._session.take_notifications()

    def wait_events(self, deadline: float | None) -> list[Event]:
        """Wait for events, and take them, oldest first. Raises `TimeoutError` at the deadline.

        Other threads' requests wait meanwhile. Once all were taken, raises the error that ended the
        conversation.
        """
        self._take_turn(deadline)
        try:
            self._pump(deadline)
            while not (events := self._session.take_events()):
                self._session.require_going_on()
                self._step(deadline)
            return events
        finally:
            self._turn.release()

    def _take_turn(self, deadline: float | None) -> None:
        """Acquire the lock; not a context manager, since a generator would cost an intercept 2 us."""
        remaining = remaining_until(deadline)
        if not self._turn.acquire(timeout=-1 if remaining is None else remaining):
            raise TimeoutError("other threads' requests took until the deadline")

    def _pump(self, deadline: float | None) -> None:
        """Send and receive until nothing is in flight."""
        while self._session.is_busy:
            self._step(deadline)
        if self._session.is_lost:
            self._hang_up()  # `close` closes: another thread may be about to use the descriptor

    def _step(self, deadline: float | None) -> None:
        """Send once, if anything remains to be sent; otherwise receive once."""
        session, sock = self._session, self._socket
        if deadline is not None or sock.gettimeout() is not None:  # settimeout is a system call
            sock.settimeout(remaining_until(deadline))
        try:
            if data := session.data_to_send():
                if descriptors := session.descriptors_to_send():
                    sent = sock.sendmsg([data], rights(descriptors), MSG_NOSIGNAL)
                else:
                    sent = sock.send(data, MSG_NOSIGNAL)
                session.sent(sent)
            else:
                session.receive_data(sock.recv(_RECEIVE_BYTES))
        except TimeoutError:
            raise TimeoutError("the daemon did not answer in time") from None
        except OSError as error:
            session.stream_failed(error)
        except BaseException:  # a signal handler's, perhaps between a system call and its bookkeeping
            session.lose("interrupted")
            raise

    def _hang_up(self) -> None:
        with suppress(OSError):  # closed already, here or there
            self._socket.shutdown(socket.SHUT_RDWR)


def _sleep(seconds: float, deadline: float | None) -> None:
    """Sleep, but not beyond the deadline. Raises `TimeoutError` if there is no time left."""
    remaining = remaining_until(deadline)
    time.sleep(seconds if remaining is None else min(seconds, remaining))


def remaining_until(deadline: float | None) -> float | None:
    """Seconds left, never 0, which a socket takes for "do not block"; raises `TimeoutError` at the end."""
    if deadline is None:
        return None
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("the daemon did not answer in time")
    return remaining
