"""A listen address: a Unix path, or an IP address and a port.

Owns its notation and binding it. Must not know what is served there.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import PurePosixPath
from typing import Final

from interceptd.connections.unix_listener import BACKLOG, ListenError, listen_unix

UNIX: Final = "unix:"
EXPECTED: Final = "expected unix:/PATH, or an IP address and a port like 127.0.0.1:9477 or [::1]:9477"


class ListenAddress:
    """Immutable; `str` gives its notation. Port 0 means any free port."""

    __slots__ = ("_host", "_port", "path")

    def __init__(self, text: str) -> None:
        """Raises ValueError that says what was expected. Host names are refused: there is no name lookup."""
        self.path: str | None = None
        if text.startswith(UNIX):
            self.path = text.removeprefix(UNIX)
            if not PurePosixPath(self.path).is_absolute() or "\0" in self.path:
                raise ValueError(f"{EXPECTED}, got {text!r}")
            return
        host, _, port = text.rpartition(":")
        try:
            self._host = ip_address(host.removeprefix("[").removesuffix("]"))
        except ValueError:
            raise ValueError(f"{EXPECTED}, got {text!r}") from None
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed != (self._host.version == 6) or not port.isascii() or not port.isdecimal():
            raise ValueError(f"{EXPECTED}, got {text!r}")
        self._port = int(port)
        if self._port > 0xFFFF:
            raise ValueError(f"{EXPECTED}, got {text!r}")

    def __str__(self) -> str:
        if self.path is not None:
            return f"{UNIX}{self.path}"
        host = f"[{self._host}]" if self._host.version == 6 else str(self._host)
        return f"{host}:{self._port}"

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.path is not None or self._host.is_loopback

    def bound(self, listener: socket.socket) -> ListenAddress:
        """The address of `listener`, which was bound here, with the actual port instead of 0."""
        if self.path is not None:
            return self
        port = listener.getsockname()[1]
        return ListenAddress(f"[{self._host}]:{port}" if self._host.version == 6 else f"{self._host}:{port}")

    @contextmanager
    def listen(self, mode: int) -> Iterator[socket.socket]:
        """A socket listening at this address, a Unix one with file mode `mode`. Raises `ListenError`."""
        if self.path is not None:
            with listen_unix(self.path, mode) as listener:
                yield listener
            return
        family = socket.AF_INET6 if self._host.version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((str(self._host), self._port))
                listener.listen(BACKLOG)
            except OSError as error:
                raise ListenError(f"{self}: {error.strerror or error}") from error
            yield listener
