"""A FUSE file system that stops answering: `python -m fakes.silent_fuse`, as root.

Owns its mount, in a namespace of its own, with one file, which it sends to its standard input, a socket. Then
it answers nothing: whatever examines the file waits, and so does each close of it (FLUSH), until the other
end of the socket is closed.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from fakes.eventually import PATIENCE
from fakes.puppet import ENVIRONMENT, TESTS

INIT, LOOKUP, GETATTR, OPEN = 26, 1, 3, 14
"""Operations, include/uapi/linux/fuse.h."""
HEADER: Final = struct.Struct("<IIQ24x")
CLONE_NEWNS: Final = 0x20000
MS_REC_PRIVATE: Final = 0x44000
MNT_DETACH: Final = 2
FOLDER_NODE, FILE_NODE = 1, 2
REQUEST_BYTES: Final = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def silent_file() -> Iterator[int]:
    """Its file, whose closes end with the context. No process may be started within: it would close it."""
    control, theirs = socket.socketpair()
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-m", "fakes.silent_fuse"],
            stdin=theirs.fileno(),
            env=os.environ | ENVIRONMENT,
            cwd=TESTS,
        )
    with control:
        control.settimeout(PATIENCE)
        _, [file], *_ = socket.recv_fds(control, 16, 1)
        try:
            yield file
        finally:
            control.close()
            server.wait(PATIENCE)
            with suppress(OSError):  # its server is gone
                os.close(file)


def attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == FOLDER_NODE else stat.S_IFREG | 0o644
    return struct.pack("<6Q3I7I", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def reply(operation: int, node: int) -> bytes:
    """What these four are answered; nothing is remembered by the kernel."""
    if operation == INIT:
        return struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 1, 1, 4096, 1, 1, 0, *[0] * 8)
    if operation == LOOKUP:
        return struct.pack("<4Q2I", FILE_NODE, 0, 0, 0, 0, 0) + attributes(FILE_NODE)
    if operation == GETATTR:
        return struct.pack("<QII", 0, 0, 0) + attributes(node)
    return bytes(16)


def serve_until_opened(device: int) -> None:
    operation = 0
    while operation != OPEN:
        data = os.read(device, REQUEST_BYTES)
        _, operation, unique = HEADER.unpack_from(data)
        [node] = struct.unpack_from("<Q", data, 16)
        assert operation in (INIT, LOOKUP, GETATTR, OPEN), operation
        body = reply(operation, node)
        os.write(device, struct.pack("<IiQ", 16 + len(body), 0, unique) + body)


def mount(device: int, folder: str) -> None:
    """In a new mount namespace, with which it goes."""
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    for failed in (
        _libc.unshare(CLONE_NEWNS),
        _libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None),
        _libc.mount(b"silent", folder.encode(), b"fuse", ctypes.c_ulong(0), options),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    device = os.open("/dev/fuse", os.O_RDWR)
    with tempfile.TemporaryDirectory() as folder:
        mount(device, folder)
        serving = threading.Thread(target=serve_until_opened, args=(device,))
        serving.start()
        file = os.open(f"{folder}/file", os.O_RDONLY)
        serving.join()
        with socket.socket(fileno=0) as control:
            socket.send_fds(control, [b"here"], [file])
            control.recv(1)
        _libc.umount2(folder.encode(), MNT_DETACH)
        os.close(device)  # before the file, whose close would wait for us
