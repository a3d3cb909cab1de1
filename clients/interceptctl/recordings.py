"""A recording on disk, read as often as needed, a piece at a time; and files that are written.

Owns the file, and that every way in which it cannot be read or written becomes one sentence. Must not know
what records mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from intercept_protocol.recording import Chunk, Header, RecordingError, RecordingReader
from intercept_protocol.text import sentence
from interceptctl import operator_client

PIECE: Final = 1 << 16


class RecordingFile:
    """An open recording. What reads it raises `Failure` for a file that is damaged or no recording."""

    def __init__(self, path: Path, file: BinaryIO, *, partial: bool) -> None:
        """Use `opened`."""
        self.damage: str | None = None
        """Why the last `chunks` ended early; only of a recording that is opened as `partial`."""
        self._path = path
        self._file = file
        self._partial = partial
        self.header = self._read_header()

    def chunks(self) -> Iterator[Chunk]:
        """All of them, from the first; one reader at a time."""
        reader = RecordingReader()
        self.damage = None
        self._file.seek(0)
        try:
            while piece := self._file.read(PIECE):
                yield from reader.feed(piece)
            reader.close()
        except RecordingError as error:
            if not self._partial:
                raise self._failure(str(error)) from error
            self.damage = str(error)
        except OSError as error:
            raise self._failure(sentence(error)) from error

    def _read_header(self) -> Header:
        reader = RecordingReader()
        try:
            while reader.header is None and (piece := self._file.read(PIECE)):
                next(reader.feed(piece), None)
            if reader.header is None:
                reader.close()
        except RecordingError as error:
            raise self._failure(str(error)) from error
        assert reader.header is not None, "close raises without one"
        return reader.header

    def _failure(self, why: str) -> operator_client.Failure:
        return operator_client.Failure(f"{self._path}: {why}")


@contextmanager
def opened(path: Path, *, partial: bool = False) -> Iterator[RecordingFile]:
    """The recording at `path`. Raises `Failure` if it cannot be read. If it is damaged behind its header,
    `partial` has the chunks before that read."""
    try:
        with path.open("rb") as file:
            if not file.seekable():
                raise operator_client.Failure(f"{path}: this is not a file on disk, which can be read twice")
            yield RecordingFile(path, file, partial=partial)
    except OSError as error:
        if error.filename != str(path):
            raise
        raise operator_client.Failure(sentence(error)) from error


@contextmanager
def created(path: Path) -> Iterator[BinaryIO]:
    """The file for writing. An error of it, here or in the block, becomes `Failure`."""
    try:
        with path.open("wb") as out:
            yield out
    except OSError as error:
        if error.filename not in {None, str(path)}:
            raise
        raise operator_client.Failure(f"{path}: {sentence(error)}") from error
