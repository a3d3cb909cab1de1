"""The descriptors that a VMM handed over, and their users.

Owns their lifetime: an abandoned worker may be in the kernel with one, so the last user closes them. Must not
know what they are used for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from interceptd.address_space.proc_text import MmGone
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.smaps import Smaps
from interceptd.address_space.userfaultfd import Userfaultfd
from interceptd.connections.closer import Closer


class Attachment:
    """A process's maps, and optionally its smaps and a userfaultfd. `promised`: it announces all changes."""

    def __init__(
        self,
        maps: ProcMaps,
        smaps: Smaps | None,
        userfaultfd: Userfaultfd | None,
        *,
        promised: bool,
        closer: Closer,
    ) -> None:
        self.maps = maps
        self.smaps = smaps
        self.userfaultfd = userfaultfd
        self.promised = promised
        self._closer = closer
        self._lock = threading.Lock()
        self._users = 1  # the owner

    @property
    def descriptors(self) -> list[int]:
        """All of them, while it is open."""
        return [each.fileno() for each in (self.maps, self.smaps, self.userfaultfd) if each is not None]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the descriptors open; for worker threads. Raises `MmGone` once they are closed."""
        with self._lock:
            if not self._users:
                raise MmGone
            self._users += 1
        try:
            yield
        finally:
            self._release()

    def close(self) -> None:
        """Release the owner's reference; call it once. Does not block, though closing a userfaultfd waits for
        the VMM's mmap lock."""
        self._release()

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
        owned = (self.maps, self.smaps, self.userfaultfd)
        self._closer.close([each.detach() for each in owned if each is not None])
