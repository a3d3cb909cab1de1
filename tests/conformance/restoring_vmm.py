"""A VMM that restores a snapshot and does not know the wire, as a process: `restoring_vmm.py SOCKET PAGES`.

Owns a guest's memory, whose missing pages a userfaultfd reports, and the connection over which it is handed
over. Prints the memory's address, or why there is no userfaultfd; then does what each line of stdin says, and
prints a line. Runs alone: the memory's pages may never come in.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import socket
import struct
import sys

PAGE = 4096
USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
USER_MODE_ONLY = 1
API, REGISTER = 0xC018AA3F, 0xC020AA00
EVENT_REMOVE = 1 << 3
MISSING = 1


def userfaultfd(features: int) -> int:
    number = USERFAULTFD.get(platform.machine())
    if number is None:
        raise OSError(f"the number of userfaultfd is not known on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    flags = os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY
    descriptor: int = libc.syscall(ctypes.c_long(number), ctypes.c_long(flags))
    if descriptor < 0:
        raise OSError(f"no userfaultfd here: {os.strerror(ctypes.get_errno())}")
    fcntl.ioctl(descriptor, API, struct.pack("<QQQ", 0xAA, features, 0))
    return descriptor


class Vmm:
    def __init__(self, path: str, pages: int) -> None:
        self._path = path
        self._memory = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._descriptors = {
            "userfaultfd": userfaultfd(EVENT_REMOVE),
            "silent": userfaultfd(0),
            "null": os.open("/dev/null", os.O_RDONLY),
        }
        register = struct.pack("<QQQQ", self.start, pages * PAGE, MISSING, 0)
        fcntl.ioctl(self._descriptors["userfaultfd"], REGISTER, register)
        self._connection = socket.socket(socket.AF_UNIX)

    def connect(self) -> str:
        """Anew; the connection before is closed."""
        self._connection.close()
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(self._path)
        return "connected"

    def send(self, encoded: str, *descriptors: str) -> str:
        """Bytes in hexadecimal, with descriptors by their names."""
        brought = [self._descriptors[name] for name in descriptors]
        socket.send_fds(self._connection, [bytes.fromhex(encoded)], brought)
        return "sent"

    def closed(self) -> str:
        """Blocks until the other side closes."""
        try:
            return self._connection.recv(1).hex() or "closed"
        except ConnectionResetError:
            return "closed"

    def leave(self) -> str:
        """Close the connection, as early Firecrackers do."""
        self._connection.close()
        return "left"

    def read(self, page: str) -> str:
        """The first bytes of a page. Blocks until it is in."""
        at = int(page) * PAGE
        return self._memory[at : at + 8].hex()

    def give_back(self, page: str, count: str) -> str:
        self._memory.madvise(mmap.MADV_DONTNEED, int(page) * PAGE, int(count) * PAGE)
        return "given back"


def main() -> None:
    try:
        vmm = Vmm(sys.argv[1], int(sys.argv[2]))
    except OSError as error:
        print(error, flush=True)
        return
    print(vmm.start, flush=True)
    for line in sys.stdin:
        verb, *words = line.split()
        print(getattr(vmm, verb)(*words), flush=True)


if __name__ == "__main__":
    main()
