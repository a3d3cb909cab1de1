"""Closes what one uid's peers sent, in threads: a peer decides how long closing its files takes.

Owns the uid's queue, the few threads that drain it, and the count of what is not closed yet. Must not know
what the descriptors are. No uid waits for another's closes.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import groupby

from interceptd.quota import Quota

THREADS = 4
"""Of one uid: so many closes that take long hold up no other. The rest of the uid's waits for one of them."""
STUCK_SECONDS = 0.02
"""After this a close is one that takes long, and another thread goes on. Usually one thread closes all: more
would only compete with the event loop for the interpreter."""
IDLE_SECONDS = 1.0
"""How long a thread waits for more before it ends."""
_DISCARD_BYTES = 1 << 16


class Closer:
    """Any thread may call it, and no call blocks. `unclosed` counts the descriptors that are not closed yet;
    only this class changes it.

    If the system refuses a thread, the descriptors stay in the queue until the next call.
    """

    def __init__(self, unclosed: Quota) -> None:
        self._unclosed = unclosed
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[tuple[int, Callable[[], None]]] = deque()
        self._threads = 0
        self._closing = 0
        """Threads that are in a close."""
        self._moved_at = 0.0
        """When a thread last took something from the queue."""
        self.full = False
        """Whether the uid has as many unclosed descriptors as it may. A plain value: each receive asks."""

    def require_room(self) -> None:
        """Raises ENOSPC, with the limit's name, while `full`."""
        self._unclosed.require(1)

    def close(self, descriptors: list[int]) -> None:
        """Close them. They count as unclosed until then, even beyond the limit: they are here already."""
        if descriptors:
            self._put(len(descriptors), partial(close_each, descriptors))

    def close_connection(self, connection: int) -> None:
        """Close a non-blocking socket that may have received descriptors which were not read."""
        self._put(1, partial(_close_unread, connection))

    def hold(self, count: int) -> None:
        """Count descriptors that cannot be closed before a blocked thread is done with them, until `free`."""
        with self._changed:
            self._count(count)

    def free(self, count: int) -> None:
        with self._changed:
            self._count(-count)

    def _count(self, more: int) -> None:
        if more < 0:
            self._unclosed.release(-more)
        else:
            self._unclosed.add(more)
        self.full = not self._unclosed.has_room(1)

    def _put(self, count: int, close: Callable[[], None]) -> None:
        with self._changed:
            self._count(count)
            self._queue.append((count, close))
            self._have_it_closed()

    def _have_it_closed(self) -> None:
        """A thread that closes nothing is there for the queue, or starts; it waits while another closes."""
        if self._closing < self._threads:
            self._changed.notify()
        elif self._threads < THREADS:
            self._start_thread()

    def _start_thread(self) -> None:
        with suppress(RuntimeError):  # "can't start new thread"
            threading.Thread(target=self._run, name="close descriptors", daemon=True).start()
            self._threads += 1

    def _run(self) -> None:
        while (work := self._next()) is not None:
            count, close = work
            close()
            with self._changed:
                self._closing -= 1
                self._count(-count)

    def _next(self) -> tuple[int, Callable[[], None]] | None:
        """The next close; None, and the thread ends, if nothing comes for a while."""
        with self._changed:
            while True:
                stuck = time.monotonic() - self._moved_at >= STUCK_SECONDS
                if self._queue and (stuck or not self._closing):
                    self._moved_at = time.monotonic()
                    self._closing += 1
                    work = self._queue.popleft()
                    if self._queue:
                        self._have_it_closed()
                    return work
                if not self._changed.wait(STUCK_SECONDS if self._queue else IDLE_SECONDS) and not self._queue:
                    self._threads -= 1
                    return None


def close_each(descriptors: Iterable[int]) -> None:
    """Close all of them, also when a close reports an error (a file on NFS or FUSE, close(2)): on Linux the
    descriptor is closed all the same. Blocks for as long as their file systems take.

    One call closes a run of consecutive numbers: after each call the thread has to wait for the GIL.
    """
    for _, run in groupby(enumerate(sorted(descriptors)), lambda place: place[1] - place[0]):
        numbers = [number for _, number in run]
        os.closerange(numbers[0], numbers[-1] + 1)


def _close_unread(connection: int) -> None:
    """Read everything first: with unread data the connection would be reset, and the peer would get
    ECONNRESET instead of our last message. read(2) takes no descriptors: the kernel closes them."""
    with suppress(OSError):
        while os.read(connection, _DISCARD_BYTES):
            pass
    close_each([connection])
