"""The hypervisor connection: a thread that does to the memslots what the daemon asks.

Owns the socket and the thread; must not know who else uses the memory. Nothing here takes a lock but the
memory's own, so it answers whatever the VMM's other threads hold or wait for (K-1).
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

from intercept_client._connecting import RETRY_DELAY, StrPath, connect_now
from intercept_client._errors import ConnectionLost
from intercept_protocol.addresses import GfnRange, RangeError, UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import HypervisorCall, MapGpa, PartitionCredentials, UnmapGpa
from intercept_protocol.outcomes import Access

from ._guest_memory import GuestMemory
from ._hypervisor_session import HypervisorSession

_RECEIVE_BYTES: Final = 65536
HELLO_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 10.0

OnEnd = Callable[[str], None]
"""Told once, in the connection's thread, that no request will come any more, and why."""


class HypervisorConnection:
    def __init__(self, sock: socket.socket, session: HypervisorSession, on_end: OnEnd) -> None:
        self._socket = sock
        self._session = session
        self._on_end = on_end
        self._thread = threading.Thread(target=self._serve, name="hypervisor connection", daemon=True)

    @classmethod
    def open(cls, path: StrPath, partition: PartitionCredentials, memory: GuestMemory, on_end: OnEnd) -> Self:
        """Connect, say hello, and serve from then on. Raises `OSError`, `ConnectionLost`,
        or what `HypervisorSession.receive_data` raises."""
        session = HypervisorSession(partition, lambda call: carry_out(memory, call))
        sock = _connect(path)
        try:
            sock.settimeout(HELLO_SECONDS)
            sock.sendall(session.hello())
            while not session.welcomed:
                _turn(sock, session)
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        connection = cls(sock, session, on_end)
        connection.start()
        return connection

    def start(self) -> None:
        """Serve from now on, in a thread of its own."""
        self._thread.start()

    def fileno(self) -> int:
        return self._socket.fileno()

    def wait_ended(self, seconds: float = CLOSE_SECONDS) -> None:
        """Block until the daemon has closed it, which it does when the partition has ended, or `seconds`."""
        self._thread.join(seconds)

    def close(self) -> None:
        """Hang up; while the partition lives, this is its loss. May be repeated, also from the thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)

    def _serve(self) -> None:
        why = "the hypervisor connection failed"
        try:
            while True:
                _turn(self._socket, self._session)
        except (ConnectionLost, ProtocolViolation, OSError) as error:
            why = str(error)
        finally:
            self._socket.close()
            self._on_end(why)


def _connect(path: StrPath) -> socket.socket:
    """Connect, waiting while the daemon's backlog is full."""
    deadline = time.monotonic() + HELLO_SECONDS
    while True:
        try:
            return connect_now(path)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_DELAY)


def _turn(sock: socket.socket, session: HypervisorSession) -> None:
    """Receive once, and answer what is whole."""
    data = sock.recv(_RECEIVE_BYTES)
    if not data:
        raise ConnectionLost("the daemon closed the hypervisor connection")
    if answers := session.receive_data(data):
        sock.sendall(answers)


def carry_out(memory: GuestMemory, call: HypervisorCall) -> None:
    """Do as the daemon asks. Raises `WireError`: refused, and nothing changed."""
    try:
        gfns = GfnRange.of(call.start_gfn, call.page_count)
        match call:
            case MapGpa():
                uaddrs = UaddrRange.of_pages(call.start_uaddr, call.page_count)
                memory.map(gfns, uaddrs, Access(call.access))
            case UnmapGpa():
                memory.unmap(gfns)
    except RangeError as error:
        raise WireError(errno.EINVAL, f"{call.METHOD}: {error}", field=error.field) from error
