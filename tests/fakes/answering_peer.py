"""A peer that plays the daemon to a client in another process: connection after connection, an answer each.

Owns the socket and what was asked. Must not know what a right answer is.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgpack

from fakes.eventually import PATIENCE


class AnsweringPeer:
    """Gives each connection the next of `answers`, just these bytes, and closes it. When they are used up the
    socket's path is gone."""

    def __init__(self, path: Path, answers: Iterable[bytes]) -> None:
        self.path = path
        self.requests: list[list[object]] = []
        self._answers = list(answers)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(PATIENCE)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.join(PATIENCE)
        self._listener.close()

    def _serve(self) -> None:
        for number, answer in enumerate(self._answers, start=1):
            peer, _ = self._listener.accept()
            with peer:
                peer.settimeout(PATIENCE)
                if number == len(self._answers):
                    self.path.unlink()
                unpacker = msgpack.Unpacker()
                while data := peer.recv(4096):
                    unpacker.feed(data)
                    request = next(unpacker, None)
                    if request is not None:
                        self.requests.append(request)
                        peer.sendall(answer)
                        break
