"""The recording of a working set: the ring that the daemon writes, and the file at the end.

Owns both, and what is said of them. Must not know what a record means (`touches`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from intercept_client import TraceRing
from intercept_protocol.text import sentence, visible
from interceptctl import units
from interceptctl.operator_client import Failure

from .image import Image, WorkingSetFile
from .touches import Touches

RING_RECORDS: Final = 1 << 18
"""16 MiB: each fault writes two records, and a guest makes some 60,000 faults a second."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """What a recording came to."""

    file: str
    pages: int
    """In the file. It is not written without any."""
    lost_records: int
    passed_over: int
    """Touches for which the file has no room."""
    restarted: bool
    """Whether the daemon was restarted: what was touched after that is not in it."""

    def sentences(self) -> Iterator[str]:
        file = visible(self.file)
        if self.pages:
            yield f"{file}: {units.of(self.pages, 'page')} ({units.pages(self.pages)})"
        else:
            yield f"{file}: not written, as nothing was touched"
        if self.restarted:
            yield "the daemon was restarted: pages touched after that are missing"
        if self.lost_records:
            lost = units.of(self.lost_records, "record")
            yield f"{lost} were overwritten before they were read: pages are missing"
        if self.passed_over:
            yield f"{units.of(self.passed_over, 'page')} are missing: the file has as many runs as it may"


class Recording:
    """Into `path`, which is replaced at the end."""

    def __init__(self, path: Path, image: Image, prefetched: bytes) -> None:
        """`prefetched` are the runs that are brought in beforehand. Raises `Failure`."""
        self._path = path
        self._image = image
        try:
            self.ring = TraceRing(RING_RECORDS)
        except OSError as error:
            raise Failure(f"memory for {RING_RECORDS} records: {sentence(error)}") from error
        try:
            self._touches = Touches(self.ring, image.pages, prefetched)
            self._file = WorkingSetFile(path)
        except BaseException:
            self.ring.close()
            raise

    def drain(self) -> None:
        """Take what the daemon has written by now."""
        self._touches.drain()

    def finish(self, *, restarted: bool) -> Recorded:
        """Write the file. Raises `Failure`."""
        self._touches.drain()
        pages = self._touches.pages
        if pages.page_count:
            self._file.write(self._image, pages.stored_runs())
        return Recorded(
            file=os.fsdecode(self._path),
            pages=pages.page_count,
            lost_records=self._touches.lost,
            passed_over=pages.passed_over,
            restarted=restarted,
        )

    def close(self) -> None:
        """What was not written is gone."""
        self._file.close()
        self.ring.close()
