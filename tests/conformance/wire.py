"""A client that shares no code with any server: a blocking socket, msgpack, and the wire's words.

Owns bytes out, bytes in and the intercept message as `protocol/README.md` lays it out. It can be as rude as a
test wants: nothing here keeps the protocol's rules for the caller. No wait is longer than `patience`.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import msgpack

from conformance.exchange import ENOSYS, PROFILES, ROLES, RUNNING, NotImplementedYet, missing_method

PATIENCE = 20.0
"""Seconds to wait for an answer: generous, for busy machines."""
READ, WRITE, EXECUTE = 0, 1, 2
"""Access types of an intercept message."""
UNMAPPED_GPA, GPA_INTERCEPT, UNACCEPTED_GPA = 0x80000000, 0x80000001, 0x80000003
"""Message types."""

_HEADER = struct.Struct("<IBB2xQ")
_PAYLOAD = struct.Struct("<IBBH16xQQIBBBBQQ176x")


class ConnectionClosed(Exception):
    """The daemon closed the connection where an answer was expected."""


class Refused(Exception):
    """The daemon answered a request with an error."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"{refusal.name}: {refusal.message}")
        self.refusal = refusal


class Refusal(NamedTuple):
    """An error on the wire."""

    number: int
    name: str
    message: str
    details: dict[str, Any]


def request(method: object, fields: object = None, msgid: object = 1) -> bytes:
    """The bytes of a request, right or wrong; no fields: an empty array."""
    return pack([0, msgid, method, [] if fields is None else [fields]])


def pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def intercept_message(gfn: int, access: int, message_type: int = UNMAPPED_GPA) -> bytes:
    """The 256 bytes that the hypervisor sends for an access to a page of an x86-64 guest."""
    header = _HEADER.pack(message_type, 80, 0, 0)
    return header + _PAYLOAD.pack(0, 3, access, 0, 0, 0, 6, 0, 0, 0, 0, 0, gfn << 12)


def arm64_message(gfn: int, access: int) -> bytes:
    """The same for an arm64 guest, which has the gpa elsewhere."""
    return struct.pack("<IBB2xQ5xB42xQ184x", UNMAPPED_GPA, 64, 0, 0, access, gfn << 12)


class RawConnection:
    """One connection. `say_hello` is the caller's business, as is everything else."""

    patience: ClassVar[float] = PATIENCE
    """Seconds, of every connection."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(self.patience)
        self._unpacker = msgpack.Unpacker()
        self._role = ""
        self._sent = b""
        """The request that is not answered yet."""
        try:
            self._socket.connect(os.fspath(path))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def half_close(self) -> None:
        """Shut down the sending side, and go on reading."""
        self._socket.shutdown(socket.SHUT_WR)

    def leave(self) -> None:
        """Close, and wait until the daemon has closed too: it no longer counts this connection."""
        self.half_close()
        self.receive_all()
        self.close()

    # ------------------------------------------------ bytes

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send all of `data`; if the daemon closes meanwhile, its last messages can still be read.
        `descriptors` go along with the first byte."""
        self._sent = data
        RUNNING.role, RUNNING.sent, RUNNING.came = self._role, data, "nothing yet"
        try:
            if descriptors:
                sent = socket.send_fds(self._socket, [data], descriptors)
                assert sent == len(data), "it fits into the socket's buffer"
            else:
                self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive(self) -> Any:
        """The next message. Raises `ConnectionClosed`, TimeoutError when the daemon says nothing, and
        `NotImplementedYet` when it does not have a method that this role has."""
        while True:
            for message in self._unpacker:
                RUNNING.came = message
                method = missing_method(self._role, self._sent, message)
                if isinstance(message, list) and message[:1] == [1]:
                    self._sent = b""
                if method is not None:
                    raise NotImplementedYet(method)
                return message
            try:
                data = self._socket.recv(65536)
            except ConnectionResetError:
                data = b""
            except TimeoutError:
                RUNNING.came = f"nothing in {self.patience:g} s"
                raise
            if not data:
                RUNNING.came = "the end of the connection"
                raise ConnectionClosed
            self._unpacker.feed(data)

    def receive_all(self) -> list[Any]:
        """Every message until the daemon closes; TimeoutError if it does not."""
        messages = []
        while True:
            try:
                messages.append(self.receive())
            except ConnectionClosed:
                return messages

    def is_readable(self) -> bool:
        """Whether an answer, or the end, has arrived."""
        return bool(select.select([self._socket], [], [], 0)[0])

    # ------------------------------------------------ requests

    def ask(self, method: str, fields: object = None, msgid: int = 1) -> Any:
        """Send a request and return its result. Raises `Refused`."""
        self.send(request(method, fields, msgid))
        return self.answer(msgid)

    def answer(self, msgid: int = 1) -> Any:
        """The result of the request `msgid`, which was sent before. Raises `Refused`."""
        kind, answered, error, result = self.receive()
        assert (kind, answered) == (1, msgid), f"expected the answer to {msgid}, got {kind}, {answered}"
        if error is not None:
            raise Refused(Refusal(*error))
        return result

    def refusal(self, method: str, fields: object = None) -> Refusal:
        """The error that a request is answered with."""
        try:
            result = self.ask(method, fields)
        except Refused as refused:
            return refused.refusal
        raise AssertionError(f"{method} was not refused but answered {result!r}")

    def farewell(self, msgid: int = 0) -> Refusal:
        """The error that the daemon sends last, before it closes."""
        messages = self.receive_all()
        assert len(messages) == 1, f"expected one error, then the end, got {messages!r}"
        kind, answered, error, result = messages[0]
        assert (kind, answered, result) == (1, msgid, None)
        return Refusal(*error)

    def say_hello(self, role: str, **fields: object) -> Any:
        """Open the connection in this role. Raises `NotImplementedYet` when the daemon does not know it."""
        if RUNNING.needs is not None and role in PROFILES:
            assert role in RUNNING.needs, f"say @needs({role!r})"
        self._role = role
        try:
            return self.ask("hello", {"protocol": 1, "role": role, **fields})
        except Refused as refused:
            unknown = refused.refusal.number == ENOSYS or refused.refusal.details.get("field") == "role"
            if unknown and role in ROLES:
                raise NotImplementedYet(f"role {role}") from refused
            raise

    def intercept(self, gfn: int, access: int = READ) -> Any:
        """Hand over an intercept and wait for its answer."""
        return self.ask("intercept", intercept_message(gfn, access))


Connect = Callable[[], RawConnection]
"""Opens one more connection, which the fixture closes."""


def next_event(operator: RawConnection) -> dict[str, Any]:
    kind, method, (fields,) = operator.receive()
    assert (kind, method, type(fields["time_ms"])) == (2, "event", int)
    return dict(fields)


def events_until(operator: RawConnection, last: str) -> list[dict[str, Any]]:
    """The events up to the first of that name."""
    heard = [next_event(operator)]
    while heard[-1]["event"] != last:
        heard.append(next_event(operator))
    return heard
