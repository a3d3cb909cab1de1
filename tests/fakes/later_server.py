"""A daemon of a later version: the real one behind a relay that adds what no client of today knows.

Owns the relay, two threads a connection. Descriptors go along with requests. Must not know what is added, nor
which client is tried.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgpack

from fakes.eventually import PATIENCE
from fakes.later_words import LATER, UNKNOWN_EVENT, later_error, later_event, later_reply
from intercept_protocol import rpc

_ASKED_FIRST: Final = rpc.MSGID_LIMIT - 1
"""The msgid of the unknown request that comes before each of the daemon's to a VMM's own hypervisor."""


class LaterServer:
    """Listens at `path` and relays to `upstream`, until the end of the block; then waits for all to close.

    With `last_event`, a connection ends once so many of the daemon's events have gone over it.
    """

    def __init__(self, path: Path, upstream: Path, *, last_event: int | None = None) -> None:
        self.path = path
        self.last_event = last_event
        self.answered: list[str] = []
        """The methods whose answers have been sent."""
        self.unknown_refused: list[object] = []
        """The errors with which hypervisor connections answered what they do not know."""
        self._upstream = upstream
        self._listener = socket.socket(socket.AF_UNIX)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:  # the first may still add others
            thread.join(PATIENCE)
        self._listener.close()

    def _start(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # shut down
            while True:
                client, _ = self._listener.accept()
                daemon = socket.socket(socket.AF_UNIX)
                daemon.connect(str(self._upstream))
                self._start(_Relay(client, daemon, self).run)


class _Relay:
    def __init__(self, client: socket.socket, daemon: socket.socket, server: LaterServer) -> None:
        self._client = client
        self._daemon = daemon
        self._server = server
        self._events = 0
        self._asked: dict[int, str] = {}
        self._unknown_answered: queue.Queue[object] = queue.Queue()

    def run(self) -> None:
        up = threading.Thread(target=self._to_the_daemon)
        up.start()
        with self._client, self._daemon:
            with suppress(OSError):  # the client does not want to know
                self._to_the_client()
            for end in (self._client, self._daemon):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            up.join(PATIENCE)

    def _to_the_daemon(self) -> None:
        receiver = rpc.Receiver({rpc.REQUEST, rpc.RESPONSE})
        with suppress(OSError):
            while True:
                data, descriptors, _, _ = socket.recv_fds(self._client, 65536, 8)
                receiver.receive_data(data)
                while (message := receiver.next_message()) is not None:
                    self._asks_or_answers(message, descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
                if not data:
                    self._daemon.shutdown(socket.SHUT_WR)
                    return

    def _asks_or_answers(self, message: rpc.Message, descriptors: list[int]) -> None:
        match message:
            case rpc.Request():
                self._asked[message.msgid] = message.method
                socket.send_fds(self._daemon, [rpc.encode_request(*message)], descriptors)
            case rpc.Response(msgid=msgid, error=error) if msgid == _ASKED_FIRST:
                self._unknown_answered.put(error)
            case rpc.Response():
                self._daemon.sendall(_response(*message))

    def _to_the_client(self) -> None:
        receiver = rpc.Receiver({rpc.REQUEST, rpc.RESPONSE, rpc.NOTIFICATION})
        while self._events != self._server.last_event:
            if not (data := self._daemon.recv(65536)):
                return
            receiver.receive_data(data)
            while (message := receiver.next_message()) is not None:
                self._says(message)

    def _says(self, message: rpc.Message) -> None:
        match message:
            case rpc.Request():
                self._client.sendall(rpc.encode_request(_ASKED_FIRST, LATER, [{LATER: 1}]))
                self._server.unknown_refused.append(self._unknown_answered.get(timeout=PATIENCE))
                self._client.sendall(rpc.encode_request(*message))
            case rpc.Response(msgid, error, result):
                method = self._asked.get(msgid, "")
                error, result = later_error(method, error), later_reply(method, result)
                self._client.sendall(_response(msgid, error, result))
                self._server.answered.append(method)
            case rpc.Notification(method, [dict(fields)]):
                self._events += 1
                for told in ((LATER, LATER), (method, UNKNOWN_EVENT), (method, later_event(fields))):
                    self._client.sendall(rpc.encode_notification(told[0], [told[1]]))


def _response(msgid: int, error: object, result: object) -> bytes:
    packed: bytes = msgpack.packb([rpc.RESPONSE, msgid, error, result])
    return packed
