"""What `restore` is asked with: the image, the listening socket, the list of pages, the trace ring.

Owns their recognition, and the errors, which name the descriptor that is wrong. Must not know who connects to
the socket, nor how the image is read.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import stat
import struct
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from intercept_protocol.addresses import PAGE_SIZE, GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import Restore
from intercept_protocol.text import sentence
from interceptd.address_space.descriptors import is_readable
from interceptd.address_space.image_file import Image
from interceptd.address_space.workers import Workers, pause_if_due
from interceptd.connections.closer import Closer
from interceptd.telemetry.trace import TraceRing

RUNS_LIMIT: Final = 1 << 20
"""In a list of pages: 8 MiB."""
RUNS_PER_PART: Final = 1024
"""That are checked before others run."""
RUN: Final = struct.Struct("<2I")
"""The first page of a run, and how many there are."""
_BLKGETSIZE64: Final = 0x80081272
"""include/uapi/linux/fs.h: the size of a block device in bytes, a u64."""


class RestoreSource:
    """Owns the descriptors, which `closer` closes."""

    def __init__(
        self,
        image: Image,
        listener: socket.socket | None,
        prefetch: PageList | None,
        ring: TraceRing | None,
        closer: Closer,
    ) -> None:
        self.image = image
        self.listener = listener
        """None once a VMM has handed its memory over."""
        self.prefetch = prefetch
        self.ring = ring
        self._closer = closer

    @property
    def memory_bytes(self) -> int:
        """What it takes of the daemon's memory, at most."""
        prefetch_bytes = 0 if self.prefetch is None else len(self.prefetch)
        return prefetch_bytes + self.image.kept_limit

    def close(self) -> None:
        """Others may still connect to the listener: what waits there may be another restore."""
        if self.listener is not None:
            self._closer.close([self.listener.detach()])
            self.listener = None
        if self.prefetch is not None:
            self.prefetch.close()
        self.image.close()
        if self.ring is not None:
            self.ring.close()

    def close_listener(self) -> None:
        """Nobody can connect any more, even if others have it too."""
        if self.listener is not None:
            self.listener.shutdown(socket.SHUT_RDWR)
            self._closer.close([self.listener.detach()])
            self.listener = None

    def runs(self) -> Iterator[GfnRange]:
        """The list of pages, in its order."""
        return iter(()) if self.prefetch is None else self.prefetch.runs()


class PageList:
    """Runs of pages in a memfd of the daemon's own, which a successor gets. Owns the descriptor."""

    def __init__(self, descriptor: int) -> None:
        """It is not empty."""
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)

    @classmethod
    def of(cls, runs: bytes) -> PageList | None:
        """None for no runs. Raises `OSError`."""
        if not runs:
            return None
        descriptor = os.memfd_create("interceptd-page-list", os.MFD_CLOEXEC)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(runs)
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def __len__(self) -> int:
        """In bytes."""
        return len(self._map)

    def runs(self) -> Iterator[GfnRange]:
        return (GfnRange(start=first, end=first + count) for first, count in RUN.iter_unpack(self._map))

    def close(self) -> None:
        with suppress(BufferError):  # somebody still reads it
            self._map.close()
        os.close(self.descriptor)


def examine(descriptors: list[int], received: int, call: Restore, closer: Closer) -> RestoreSource:
    """Recognise the descriptors, in their order. Takes ownership of all of them; may block.

    `received` is how many were sent. Raises EINVAL, whose `field` names the descriptor that is wrong.
    """
    names = ["image", "listener"] + ["prefetch"] * call.prefetch + ["trace"] * call.trace
    left = list(descriptors)
    with ExitStack() as undo:
        undo.callback(closer.close, left)
        if not received == len(names) == len(descriptors):
            raise WireError(
                errno.EINVAL, f"restore takes {len(names)} descriptors ({', '.join(names)}), not {received}"
            )
        found = dict(zip(names, descriptors, strict=True))
        with _about("image"):
            pages = _image_pages(found["image"])
        with _about("listener"):
            _require_listener(found["listener"])
        with _about("prefetch"):
            prefetch = PageList.of(_runs(found["prefetch"], pages)) if call.prefetch else None
        if prefetch is not None:
            undo.callback(prefetch.close)
        with _about("trace"):
            ring = TraceRing(found["trace"]) if call.trace else None
        if ring is not None:
            undo.callback(ring.close)
        with _about("image"):
            image = Image(found["image"], closer)
        left.remove(found["image"])
        undo.callback(image.close)
        listener = socket.socket(fileno=found["listener"])
        left.remove(found["listener"])
        undo.pop_all()
    closer.close(left)
    return RestoreSource(image, listener, prefetch, ring, closer)


async def open_image(descriptor: int, workers: Workers, closer: Closer) -> Image:
    """What a predecessor has examined. Takes over the descriptor; blocks for as long as its file system does.
    Raises `OSError`."""
    try:
        return await workers.ask(lambda: Image(descriptor, closer))
    except BaseException:
        closer.close([descriptor])
        raise


@contextmanager
def _about(field: str) -> Iterator[None]:
    """An error within is one of this descriptor."""
    try:
        yield
    except WireError as error:
        raise WireError(error.number, f"restore: {field}: {error.message}", field=field) from None
    except OSError as error:
        raise WireError(errno.EINVAL, f"restore: {field}: {sentence(error)}", field=field) from None


def _image_pages(descriptor: int) -> int:
    size = _size_of(descriptor, {stat.S_IFREG, stat.S_IFBLK}, "a regular file, a memfd or a block device")
    if size == 0 or size % PAGE_SIZE:
        raise _unfit(f"it has {size} bytes, and must have a multiple of {PAGE_SIZE}, and some")
    return size // PAGE_SIZE


def _require_listener(descriptor: int) -> None:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode) or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_PATH:
        raise _unfit("it is no socket")
    listener = socket.socket(fileno=os.dup(descriptor))
    with listener:
        if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise _unfit("it is no Unix stream socket")
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise _unfit("it does not listen")


def _runs(descriptor: int, pages: int) -> bytes:
    size = _size_of(descriptor, {stat.S_IFREG}, "a regular file or a memfd")
    if size % RUN.size or size > RUNS_LIMIT * RUN.size:
        raise _unfit(f"it has {size} bytes, and must have a multiple of {RUN.size}, for {RUNS_LIMIT} at most")
    runs = _read(descriptor, size)
    for start in range(0, size, RUNS_PER_PART * RUN.size):
        for first, count in RUN.iter_unpack(runs[start : start + RUNS_PER_PART * RUN.size]):
            if not count or first + count > pages:
                raise _unfit(f"{count} pages from page {first} on are not within the image of {pages} pages")
        pause_if_due()
    return runs


def _read(descriptor: int, size: int) -> bytes:
    """All of a file of that size."""
    parts, at = [], 0
    while part := os.pread(descriptor, size - at, at):
        parts.append(part)
        at += len(part)
    if at != size:
        raise _unfit(f"only {at} of its {size} bytes can be read")
    return b"".join(parts)


def _size_of(descriptor: int, types: Collection[int], nouns: str) -> int:
    """In bytes, of a file of one of these types that can be read."""
    status = os.fstat(descriptor)
    if stat.S_IFMT(status.st_mode) not in types:
        raise _unfit(f"it is not {nouns}")
    if not is_readable(descriptor):
        raise _unfit("it was not opened for reading")
    if stat.S_ISBLK(status.st_mode):
        size = bytearray(8)
        fcntl.ioctl(descriptor, _BLKGETSIZE64, size)
        return int.from_bytes(size, sys.byteorder)
    return status.st_size


def _unfit(why: str) -> WireError:
    return WireError(errno.EINVAL, why)
