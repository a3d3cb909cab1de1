"""What happens in a directory, in the order in which it happened, with nothing missed (inotify(7)).

Owns the watch. Polling would miss what lasts for a moment only, which is just what is asked for here.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from fakes.eventually import PATIENCE

_ATTRIB, _MOVED_TO, _CREATE = 0x004, 0x080, 0x100
_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class Happening(NamedTuple):
    """An entry of the directory appeared, or else its mode or owner changed."""

    appeared: bool
    name: str


class WatchedDirectory:
    """Reports what happens to a directory's entries from construction on."""

    def __init__(self, directory: Path) -> None:
        self._descriptor = _libc.inotify_init1(os.O_CLOEXEC)
        watch = _libc.inotify_add_watch(self._descriptor, bytes(directory), _ATTRIB | _MOVED_TO | _CREATE)
        if self._descriptor < 0 or watch < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        self._unread: list[Happening] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def wait_for(self, name: str) -> list[Happening]:
        """Block until an entry `name` appears; returns all that happened up to then."""
        happened: list[Happening] = []
        while Happening(True, name) not in happened:
            happened.append(self._next())
        return happened

    def _next(self) -> Happening:
        if not self._unread:
            readable, _, _ = select.select([self._descriptor], [], [], PATIENCE)
            assert readable, "nothing happened in time"
            data = os.read(self._descriptor, 65536)
            while data:
                _, what, _, length = _EVENT.unpack_from(data)
                name, data = data[_EVENT.size : _EVENT.size + length], data[_EVENT.size + length :]
                self._unread.append(Happening(what != _ATTRIB, os.fsdecode(name.rstrip(b"\0"))))
        return self._unread.pop(0)
