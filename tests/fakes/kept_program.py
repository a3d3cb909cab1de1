"""What a keeper starts in place of the daemon: a process that obeys a test.

Owns its side of the control connection. Stands alone: the keeper runs this file.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

CONTROL = "KEPT_CONTROL"
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
TOLD = ("NOTIFY_SOCKET", "INTERCEPTD_KEEP", "FDSTORE", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID")


def passed() -> list[tuple[str, int]]:
    """The name of each passed descriptor, and its inode."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    names = os.environ["LISTEN_FDNAMES"].split(":")
    assert len(names) == int(os.environ["LISTEN_FDS"])
    return [(name, os.fstat(number).st_ino) for number, name in enumerate(names, start=3)]


def tell(text: str, descriptors: list[int]) -> None:
    """Send one message to the keeper."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + os.environ["NOTIFY_SOCKET"][1:])
        socket.send_fds(notify, [text.encode()], descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.connect(os.environ[CONTROL])
    facts = {name: os.environ.get(name) for name in TOLD}
    hello = {"arguments": sys.argv[1:], "group": os.getpgid(0), "environment": facts}
    control.send(json.dumps(hello).encode())
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 4096, 253)
        if not data:
            return
        answer: object = None
        match json.loads(data):
            case ["tell", text]:
                tell(text, descriptors)
            case ["passed"]:
                answer = passed()
            case ["open"]:
                answer = len(os.listdir("/proc/self/fd"))
            case ["signal"]:
                answer = signal.sigwait(SIGNALS)
            case ["leave an orphan"]:
                if not os.fork():
                    os.execv("/bin/true", ["true"])
            case ["exit", status]:
                os._exit(status)
        control.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
