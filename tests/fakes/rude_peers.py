"""Peers that wear a daemon down without breaking a rule of the protocol.

Owns how it is done; what must come of it is the tests' to say.
"""

from __future__ import annotations

import array
import fcntl
import os
import signal
import socket
import struct
import termios
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.raw_client import READ, RawConnection, intercept_message, request

ANSWERS_THAT_FIT: int = 32
"""More than the daemon lets lie unread of a VP: they take its memory, in the kernel."""


def unread_bytes(connection: RawConnection) -> int:
    """What has arrived and was not read (FIONREAD)."""
    count = array.array("i", [0])
    fcntl.ioctl(connection.fileno(), termios.FIONREAD, count)
    return count[0]


def stop_reading(daemon: DaemonProcess, vp: RawConnection, gfn: int) -> None:
    """Ask for `gfn` again and again, one request at a time, until an answer does not fit the buffers.

    An intercept counts in the step that sends its answer: once it counted without more bytes having
    arrived, the daemon waits for this peer to read.
    """
    counted = daemon.intercepts()
    for sent in range(1, ANSWERS_THAT_FIT):
        before = unread_bytes(vp)
        vp.send(request("intercept", intercept_message(gfn, READ)))
        eventually(lambda: unread_bytes(vp) > before or daemon.intercepts() == counted + sent, True)  # noqa: B023 - called here and now
        if unread_bytes(vp) == before:
            return
    raise AssertionError("the daemon never waited for its peer to read")


def send_with_descriptors(connection: RawConnection, data: bytes, count: int, path: str = os.devnull) -> None:
    """Send `data` and `count` descriptors of the file `path` along with it (SCM_RIGHTS)."""
    with ExitStack() as opened:
        files = [opened.enter_context(Path(path).open("rb")) for _ in range(count)]
        with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            socket.send_fds(duplicate, [data], [file.fileno() for file in files])


LINGER_SECONDS = 60
"""Longer than any test waits."""


def slow_to_close(peers: ExitStack) -> socket.socket:
    """A TCP socket that takes a minute to close, or until `peers` close: what it sent is not read."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        slow = socket.create_connection(server.getsockname())
        peers.enter_context(server.accept()[0])
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_SECONDS))
    slow.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            slow.send(bytes(1 << 16))
    slow.setblocking(True)
    return slow


def send_slow_to_close(connection: RawConnection, data: bytes, peers: ExitStack) -> None:
    """Send `data` and such a socket, whose last copy it is: the daemon stands still until ours is closed.
    That ends earlier closes, because a signal ends the lingering."""
    with (
        socket.socket(fileno=os.dup(connection.fileno())) as duplicate,
        stopped(_pid_of_peer(duplicate)),
        slow_to_close(peers) as slow,
    ):
        socket.send_fds(duplicate, [data], [slow.fileno()])


def leave_slow_to_close(vmm: RawConnection, peers: ExitStack, count: int) -> None:
    """Send so many of them with one request for statistics. The VMM of a process has them kept until the
    request is whole, and by then ours are closed."""
    asked = request("statistics")
    with ExitStack() as ours, socket.socket(fileno=os.dup(vmm.fileno())) as duplicate:
        sent = [ours.enter_context(slow_to_close(peers)) for _ in range(count)]
        socket.send_fds(duplicate, [asked[:1]], [slow.fileno() for slow in sent])
    vmm.send(asked[1:])


def _pid_of_peer(connected: socket.socket) -> int:
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        eventually(lambda: {state_of(task) for task in tasks} <= {"T", "D", ""}, True)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def state_of(task: Path) -> str:
    """The state of a thread, as in ps(1); empty for one that has ended."""
    try:
        return (task / "stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
