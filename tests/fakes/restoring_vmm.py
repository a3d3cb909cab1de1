"""A VMM that restores a snapshot as Firecracker does, without a guest: it hands its memory over and uses it.

Owns the child process and the conversation with it. Must not know who serves the memory.

The child's arguments: the socket, the pages of each region in the order of their offsets, and the page size.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

PAGE: Final = 4096
UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
USERFAULTFD_IOC_NEW: Final = 0xAA00
EVENT_REMOVE: Final = 1 << 3
MISSING: Final = 1
TESTS: Final = Path(__file__).parents[1]


class RestoringVmm:
    """Killed at the end of the block. `say` and `hear` are its conversation; `ask` is both."""

    def __init__(
        self, path: Path, regions: Sequence[int], page_size: int = PAGE, launch: Sequence[str] = ()
    ) -> None:
        sizes = ",".join(map(str, regions))
        self._process = subprocess.Popen(
            [*(launch or (sys.executable, "-m")), "fakes.restoring_vmm", str(path), sizes, str(page_size)],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> Self:
        if (heard := self.hear()) != "handed over":
            self.__exit__(None, None, None)
            raise AssertionError(f"it did not hand over: {heard!r}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def say(self, *words: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")

    def hear(self) -> str:
        """Blocks until the child has done what it was told; empty once it is gone."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip()

    def ask(self, *words: object) -> str:
        self.say(*words)
        return self.hear()

    def kill(self) -> int:
        """Returns its exit status."""
        self._process.kill()
        return self._process.wait()

    def wait(self) -> int:
        """Blocks until it has ended; returns its exit status."""
        return self._process.wait()


def image_bytes(pages: int, salt: int = 0) -> bytes:
    """A page begins with its number plus the salt, and no page is all zeroes."""
    return b"".join(struct.pack("<QQ", page + salt, 1).ljust(PAGE, b"\xab") for page in range(pages))


def new_userfaultfd(features: int | None = EVENT_REMOVE) -> int:
    """With these features; None: not initialised."""
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    try:
        uffd: int = fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(device)
    if features is not None:
        fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("<3Q", 0xAA, features, 0)))
    return uffd


class _Memory:
    """All regions, by pages of the image."""

    def __init__(self, sizes: Sequence[int], page_size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0x40000 if page_size > PAGE else 0)  # MAP_HUGETLB
        self.maps = [mmap.mmap(-1, size * PAGE, flags=flags) for size in sizes]
        self.places = [(index, page) for index, size in enumerate(sizes) for page in range(size)]
        self.page_size = page_size

    def hand_over(self, path: str) -> socket.socket:
        uffd = new_userfaultfd()
        regions, offset = [], 0
        for each in self.maps:
            address = ctypes.addressof(ctypes.c_char.from_buffer(each))
            fcntl.ioctl(uffd, UFFDIO_REGISTER, bytearray(struct.pack("<4Q", address, len(each), MISSING, 0)))
            regions.append({
                "base_host_virt_addr": address, "size": len(each), "offset": offset,
                "page_size": self.page_size, "page_size_kib": self.page_size,
            })  # fmt: skip
            offset += len(each)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(regions).encode()], [uffd])
        return connection

    def read(self, first: int, count: int) -> str:
        """The first 8 bytes of each page, as numbers."""
        found = []
        for index, page in self.places[first : first + count]:
            found.append(struct.unpack_from("<Q", self.maps[index], page * PAGE)[0])
        return " ".join(map(str, found))

    def give_back(self, first: int, count: int) -> str:
        index, page = self.places[first]
        self.maps[index].madvise(mmap.MADV_DONTNEED, page * PAGE, count * PAGE)
        return "given back"


def main() -> None:
    path, sizes, page_size = sys.argv[1:]
    memory = _Memory([int(size) for size in sizes.split(",")], int(page_size))
    connection = memory.hand_over(path)
    print("handed over", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["read", first, count]:
                print(memory.read(int(first), int(count)), flush=True)
            case ["give_back", first, count]:
                print(memory.give_back(int(first), int(count)), flush=True)
            case ["close"]:
                connection.close()
                print("closed", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)  # without a tidy end, which would touch nothing but takes long


if __name__ == "__main__":
    main()
