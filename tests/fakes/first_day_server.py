"""A server on its first day: says hello, makes partitions, has a few methods, and answers ENOSYS to the rest.

Owns just enough of the wire for that, with plain sockets and msgpack, as somebody would begin. It checks
nothing, knows the roles `vmm` and `vp`, and its `kick` finds every VP: one statement is broken.
"""

from __future__ import annotations

import os
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgpack

LIMITS: Final = {"message_bytes": 65536, "vps_per_partition": 256, "hello_timeout_ms": 5000}
FEATURES: Final = {
    "address_spaces": ["declared"],
    "hypervisors": ["software"],
    "architectures": ["x86_64"],
    "kept": False,
}
HELLO: Final = {"protocol": 1, "server": "first-day", "version": "0", "limits": LIMITS, "features": FEATURES}


class Refused(Exception):
    """An errno, its name, a message and details: what E-1 wants of an error."""


class Connection(socketserver.BaseRequestHandler):
    """One client; a thread each."""

    def handle(self) -> None:
        unpacker = msgpack.Unpacker(strict_map_key=False)
        while data := self.request.recv(65536):
            unpacker.feed(data)
            for _, msgid, method, params in unpacker:
                try:
                    response = [1, msgid, None, self.answer(method, *params)]
                except Refused as refused:
                    response = [1, msgid, list(refused.args), None]
                self.request.sendall(msgpack.packb(response))

    def answer(self, method: str, fields: Any = None) -> object:
        match method:
            case "hello" if fields["role"] in ("vmm", "vp"):
                return HELLO
            case "hello":
                raise Refused(22, "EINVAL", "hello: no such role", {"field": "role"})
            case "create_partition":
                return {"partition_id": int.from_bytes(os.urandom(4)), "token": os.urandom(16)}
            case "set_policy" | "kick":
                return None
            case _:
                raise Refused(38, "ENOSYS", f"no method {method}", {})


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Closes a connection whose request it does not understand, without an answer."""


@contextmanager
def first_day_server(directory: Path) -> Iterator[Path]:
    """Serve until the end of the context; yields the VMMs' socket."""
    path = directory / "first-day.sock"
    with _Server(str(path), Connection) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield path
        finally:
            server.shutdown()
