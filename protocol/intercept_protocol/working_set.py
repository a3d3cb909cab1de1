"""The file of a working set, sans I/O: which pages of a memory image a guest touched, in order.

Owns the format, which protocol/RECORDING.md specifies, and which pages of the image tell whether a file
belongs to it. Must not know how the touches were learnt, nor where the bytes come from.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Final, NamedTuple

MAGIC: Final = b"ICPTOUCH"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sIIQ32s")
"""The magic, the version, how many runs there are, the pages of the image, and the digest."""
RUN: Final = struct.Struct("<II")
"""The first page and how many: as `restore` takes them in its prefetch list."""
RUNS_LIMIT: Final = 1 << 20
IMAGE_PAGES_LIMIT: Final = 1 << 32
SIZE_LIMIT: Final = HEADER.size + RUNS_LIMIT * RUN.size
"""Bytes. Nobody needs to read more of a file."""
SAMPLES: Final = 64


class WorkingSetError(Exception):
    """The file is cut off, damaged, of another format, or no working set."""


class WorkingSet(NamedTuple):
    """`stored_runs` are pages of an image, as pairs of `RUN`; `digest` is that of the image."""

    image_pages: int
    digest: bytes
    stored_runs: bytes


def encode(working_set: WorkingSet) -> bytes:
    image_pages, digest, stored_runs = working_set
    count = len(stored_runs) // RUN.size
    return HEADER.pack(MAGIC, VERSION, count, image_pages, digest) + stored_runs


def decode(data: bytes) -> WorkingSet:
    """What a whole file holds. Raises `WorkingSetError`."""
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise WorkingSetError("this is not a working set")
    if len(data) < HEADER.size:
        raise WorkingSetError("the file is cut off")
    _, version, count, image_pages, digest = HEADER.unpack_from(data)
    if version != VERSION:
        raise WorkingSetError(f"the format has version {version}; this program reads {VERSION}")
    if count > RUNS_LIMIT:
        raise WorkingSetError(f"it has {count} runs of pages, and at most {RUNS_LIMIT} are allowed")
    if not 0 < image_pages < IMAGE_PAGES_LIMIT:
        raise WorkingSetError(f"it is of an image of {image_pages} pages, which no image has")
    expected = HEADER.size + count * RUN.size
    if len(data) < expected:
        raise WorkingSetError("the file is cut off")
    if len(data) > expected:
        raise WorkingSetError("something follows the last page")
    stored_runs = data[HEADER.size :]
    _check(stored_runs, image_pages)
    return WorkingSet(image_pages, digest, stored_runs)


def _check(stored_runs: bytes, image_pages: int) -> None:
    pages = 0
    for number, (first_page, count) in enumerate(RUN.iter_unpack(stored_runs)):
        if not count or first_page + count > image_pages:
            raise WorkingSetError(f"run {number}, {count} pages from {first_page}, is not within the image")
        pages += count
    if pages > image_pages:
        raise WorkingSetError(f"it has {pages} pages, more than the image")


def page_count(stored_runs: bytes) -> int:
    return sum(count for _, count in RUN.iter_unpack(stored_runs))


def sampled_pages(stored_runs: bytes) -> Iterator[int]:
    """The pages whose content the digest covers: at most `SAMPLES`, evenly over the set, in its order."""
    total = page_count(stored_runs)
    samples = min(SAMPLES, total)
    number = before = 0
    for first_page, count in RUN.iter_unpack(stored_runs):
        while number < samples and (place := number * total // samples) < before + count:
            yield first_page + place - before
            number += 1
        before += count


def digest_of(image_pages: int, contents: Iterable[bytes]) -> bytes:
    """Of an image: its size, and what its sampled pages contain."""
    digest = blake2b(image_pages.to_bytes(8, "little"), digest_size=32)
    for content in contents:
        digest.update(content)
    return digest.digest()


class TouchedPages:
    """Collects touches of an image's pages: keeps each page once, at its first."""

    def __init__(self, image_pages: int) -> None:
        """Raises ValueError for a size that no image has."""
        if not 0 < image_pages < IMAGE_PAGES_LIMIT:
            raise ValueError(f"an image of {image_pages} pages: it has 1 to {IMAGE_PAGES_LIMIT - 1}")
        self.page_count = 0
        self.passed_over = 0
        """Pages, once for each touch, that are missing because there are `RUNS_LIMIT` runs already."""
        self._known = bytearray(image_pages)
        self._runs = array("I")

    def add(self, first_page: int, count: int) -> None:
        """Pages that were touched now; what is not of the image is left out."""
        known, page, end = self._known, first_page, min(first_page + count, len(self._known))
        while (start := known.find(0, page, end)) >= 0:
            page = known.find(1, start, end)
            if page < 0:
                page = end
            self._add_run(start, page - start)

    def _add_run(self, first_page: int, count: int) -> None:
        runs = self._runs
        if runs and sum(runs[-2:]) == first_page:
            runs[-1] += count
        elif len(runs) < 2 * RUNS_LIMIT:
            runs.extend((first_page, count))
        else:
            self.passed_over += count
            return
        self.page_count += count
        self._known[first_page : first_page + count] = b"\x01" * count

    def stored_runs(self) -> bytes:
        return struct.pack(f"<{len(self._runs)}I", *self._runs)
