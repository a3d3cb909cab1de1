"""The memory image, and the working sets that belong to it.

Owns opening both, the checks before the daemon is asked, and writing a working set. Must not know how the
touches were learnt.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from intercept_protocol import working_set
from intercept_protocol.addresses import PAGE_SIZE
from intercept_protocol.text import sentence
from intercept_protocol.working_set import WorkingSet, WorkingSetError
from interceptctl import units
from interceptctl.operator_client import Failure


class Image:
    """An open memory image of `pages` pages."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use `opened`."""
        self.path = path
        self._descriptor = descriptor
        self.pages = _pages(path, descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def digest(self, stored_runs: bytes) -> bytes:
        """Over the pages that `stored_runs` has sampled. Raises `Failure` if they cannot be read."""
        return working_set.digest_of(self.pages, map(self._page, working_set.sampled_pages(stored_runs)))

    def _page(self, number: int) -> bytes:
        try:
            content = os.pread(self._descriptor, PAGE_SIZE, number * PAGE_SIZE)
        except OSError as error:
            raise Failure(f"{self.path}: page {number}: {sentence(error)}") from error
        if len(content) < PAGE_SIZE:
            raise Failure(f"{self.path}: it was truncated: page {number} is missing")
        return content


@contextmanager
def opened(path: Path) -> Iterator[Image]:
    """The memory image at `path`. Raises `Failure` if it is none."""
    try:
        # Without O_NONBLOCK a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Failure(sentence(error)) from error
    try:
        yield Image(path, descriptor)
    finally:
        os.close(descriptor)


def _pages(path: Path, descriptor: int) -> int:
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise Failure(f"{path}: a memory image is a regular file or a block device")
    size = os.lseek(descriptor, 0, os.SEEK_END)
    pages, rest = divmod(size, PAGE_SIZE)
    if not size:
        raise Failure(f"{path}: the file is empty")
    if rest:
        raise Failure(
            f"{path}: {size} bytes are no whole number of pages of {PAGE_SIZE} bytes, so this is no memory "
            "image; of a snapshot it is the larger file (mem_file_path), not the state (snapshot_path)"
        )
    return pages


def read_working_set(path: Path, image: Image) -> bytes:
    """The runs of pages that the file at `path` has. Raises `Failure` if it is not of this image."""
    try:
        with path.open("rb") as file:
            found = working_set.decode(file.read(working_set.SIZE_LIMIT + 1))
    except OSError as error:
        raise Failure(sentence(error)) from error
    except WorkingSetError as error:
        raise Failure(f"{path}: {error}") from error
    if found.image_pages != image.pages:
        raise Failure(
            f"{path}: it is the working set of an image of {units.pages(found.image_pages)}, "
            f"and {image.path} has {units.pages(image.pages)}"
        )
    if found.digest != image.digest(found.stored_runs):
        raise Failure(f"{path}: it is the working set of another image than {image.path}")
    return found.stored_runs


@contextmanager
def prefetch_list(stored_runs: bytes) -> Iterator[BinaryIO]:
    """Memory that holds the runs, for the daemon to read."""
    with open(os.memfd_create("interceptd-prefetch", os.MFD_CLOEXEC), "wb") as file:
        file.write(stored_runs)
        file.flush()
        yield file


class WorkingSetFile:
    """A working set that will be written to `path`, which keeps what it has until then."""

    def __init__(self, path: Path) -> None:
        """Raises `Failure` if it could not be written."""
        self.path = path
        self._part = path.with_name(f"{path.name}.part")
        try:
            self._file = self._part.open("wb")
        except OSError as error:
            raise Failure(sentence(error)) from error

    def write(self, image: Image, stored_runs: bytes) -> None:
        """Raises `Failure`."""
        data = working_set.encode(WorkingSet(image.pages, image.digest(stored_runs), stored_runs))
        try:
            self._file.write(data)
            self._file.close()
            self._part.replace(self.path)
        except OSError as error:
            raise Failure(f"{self.path}: {sentence(error)}") from error

    def close(self) -> None:
        """What was not written is gone."""
        self._file.close()
        self._part.unlink(missing_ok=True)
