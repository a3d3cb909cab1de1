"""A service manager that listens first and starts the daemon with the sockets: `NAME=PATH... -- COMMAND...`.

Owns binding and the environment of sd_listen_fds(3); runs as a process of its own that becomes the daemon.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

FIRST = 3


def launch(**sockets: Path) -> list[str]:
    """What to start a daemon with, so that it is passed these sockets."""
    return [
        *(sys.executable, __file__),
        *(f"{name}={path}" for name, path in sockets.items()),
        *("--", sys.executable, "-m", "interceptd"),
    ]


def main(arguments: list[str]) -> None:
    end = arguments.index("--")
    names, paths = zip(*(argument.split("=", 1) for argument in arguments[:end]), strict=True)
    listeners = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in paths]
    for listener, path in zip(listeners, paths, strict=True):
        listener.bind(path)
        listener.listen()
    out_of_the_way = [os.dup(listener.fileno()) for listener in listeners]
    for number, descriptor in enumerate(out_of_the_way, start=FIRST):
        os.dup2(descriptor, number)
    os.environ |= {
        "LISTEN_FDS": str(len(names)),
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDNAMES": ":".join(names),
    }
    os.execv(arguments[end + 1], arguments[end + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])
