"""A file in FUSE whose reads wait or fail when a test says so: `python -m fakes.fuse_image IMAGE`, as root.

Owns its mount, in a namespace of its own, with one file, which has the content of IMAGE and is sent to the
standard input, a socket. From there come the orders, a byte each.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Final

from fakes.eventually import PATIENCE
from fakes.puppet import ENVIRONMENT, TESTS
from fakes.silent_fuse import (
    FILE_NODE,
    FOLDER_NODE,
    GETATTR,
    HEADER,
    INIT,
    LOOKUP,
    MNT_DETACH,
    OPEN,
    REQUEST_BYTES,
    _libc,
    mount,
)

READ, STATFS, RELEASE, FORGET, INTERRUPT, BATCH_FORGET = 15, 17, 18, 2, 36, 42
"""Operations, include/uapi/linux/fuse.h."""
READ_BYTES: Final = 128 << 10
PAGE_SIZE: Final = 4096
WITHOUT_ANSWER: Final = (FORGET, INTERRUPT, BATCH_FORGET)


class Order(Enum):
    """What becomes of reads, those that wait too."""

    SERVE = b"s"
    HOLD = b"h"
    FAIL = b"f"


class FuseImage:
    """`file` is open for reading, of the size of the image. No process may be started that inherits it."""

    def __init__(self, file: int, control: socket.socket) -> None:
        self.file = file
        self._control = control

    def reads(self, order: Order) -> None:
        """Returns once the order is in force."""
        self._control.sendall(order.value)
        assert self._control.recv(1) == order.value


def needs() -> str | None:
    """What is missing here; None if there can be one."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        return "only root can mount FUSE, with /dev/fuse"
    return None


@contextmanager
def fuse_image(image: Path) -> Iterator[FuseImage]:
    control, theirs = socket.socketpair()
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-m", "fakes.fuse_image", image],
            stdin=theirs.fileno(),
            env=os.environ | ENVIRONMENT,
            cwd=TESTS,
        )
    with control:
        control.settimeout(PATIENCE)
        _, [file], *_ = socket.recv_fds(control, 16, 1)
        try:
            yield FuseImage(file, control)
        finally:
            control.close()
            server.wait(PATIENCE)
            with suppress(OSError):  # its server is gone
                os.close(file)


class Server:
    """Answers the kernel's requests in one thread; those that an order holds back wait in `_held`."""

    def __init__(self, device: int, image: int) -> None:
        self._device = device
        self._image = image
        self._size = os.fstat(image).st_size
        self._order = Order.SERVE
        self._held: list[tuple[int, int, int]] = []

    def serve(self, control: socket.socket) -> None:
        """Until the other end of `control` is closed."""
        while True:
            readable, _, _ = select.select([self._device, control.fileno()], [], [])
            if self._device in readable:
                self._answer(os.read(self._device, REQUEST_BYTES))
            elif not (word := control.recv(1)):
                return
            else:
                self._order = Order(word)
                held, self._held = self._held, []
                for read in held:
                    self._read(*read)
                control.sendall(word)

    def _answer(self, request: bytes) -> None:
        _, operation, unique = HEADER.unpack_from(request)
        [node] = struct.unpack_from("<Q", request, 16)
        if operation == READ:
            offset, size = struct.unpack_from("<QI", request, 48)
            self._read(unique, offset, size)
        elif operation not in WITHOUT_ANSWER:
            body = self._body(operation, node)
            self._reply(unique, 0 if body is not None else errno.ENOSYS, body or b"")

    def _read(self, unique: int, offset: int, size: int) -> None:
        match self._order:
            case Order.SERVE:
                self._reply(unique, 0, os.pread(self._image, size, offset))
            case Order.HOLD:
                self._held.append((unique, offset, size))
            case Order.FAIL:
                self._reply(unique, errno.EIO, b"")

    def _reply(self, unique: int, error: int, body: bytes) -> None:
        with suppress(FileNotFoundError):  # who asked was killed
            os.write(self._device, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)

    def _body(self, operation: int, node: int) -> bytes | None:
        if operation == INIT:
            return struct.pack("<4I2H2I2H8I", 7, 31, READ_BYTES, 0, 16, 12, READ_BYTES, 1, 32, 0, *[0] * 8)
        if operation == LOOKUP:
            return struct.pack("<4Q2I", FILE_NODE, 0, 0, 0, 0, 0) + self._attributes(FILE_NODE)
        if operation == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if operation == STATFS:
            return struct.pack("<5Q10I", *[0] * 5, PAGE_SIZE, 255, PAGE_SIZE, *[0] * 7)
        return bytes(16) if operation in (OPEN, RELEASE) else None

    def _attributes(self, node: int) -> bytes:
        mode, size = stat.S_IFREG | 0o644, self._size
        if node == FOLDER_NODE:
            mode, size = stat.S_IFDIR | 0o755, 0
        return struct.pack(
            "<6Q3I7I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, PAGE_SIZE, 0
        )


def _send_file(path: str, control: socket.socket) -> None:
    file = os.open(path, os.O_RDONLY)
    socket.send_fds(control, [b"here"], [file])
    os.close(file)


if __name__ == "__main__":
    image = os.open(sys.argv[1], os.O_RDONLY)
    device = os.open("/dev/fuse", os.O_RDWR)
    with tempfile.TemporaryDirectory() as folder, socket.socket(fileno=0) as control:
        mount(device, folder)
        threading.Thread(target=_send_file, args=(f"{folder}/file", control), daemon=True).start()
        Server(device, image).serve(control)
        _libc.umount2(folder.encode(), MNT_DETACH)
        os.close(device)
