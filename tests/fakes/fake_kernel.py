"""A kernel that has a userfaultfd and the memory behind it, as plain values: what is in, who waits, what is
unread. And an image whose pages come and go from the page cache, with workers that wait to be released.

Owns the semantics that a real one was seen to have: page faults are read before older removals; nothing can
be brought in between a removal's begin and the moment in which its thread, whose message was read, runs on;
only after that is the memory taken away; a thread that waits is woken by what is brought in, and by a wake.
Must not know what is right.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeVar

import trio

from intercept_protocol.addresses import PAGE_SHIFT, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space.image_file import Image, Run
from interceptd.address_space.missing_faults import MissingFaults
from interceptd.address_space.workers import Workers

T = TypeVar("T")
ZERO: Final = 0
"""What a page of zeroes holds. A page of the image holds its number, counted from 1."""


class Held:
    """Calls that stop until they are released, one by one or all that there are and will be."""

    def __init__(self) -> None:
        self._events: list[trio.Event] = []
        self._is_open = False

    def __len__(self) -> int:
        return len(self._events)

    async def stop(self) -> None:
        if not self._is_open:
            self._events.append(trio.Event())
            await self._events[-1].wait()

    def release(self, number: int) -> None:
        self._events.pop(number).set()

    def release_all(self) -> None:
        self._is_open = True
        while self._events:
            self.release(0)


@dataclass(eq=False)
class Removal:
    """A madvise that is under way."""

    uaddrs: UaddrRange
    is_read: bool = False
    runs_on: bool = False
    """Its thread has gone on, and is about to take the memory away."""


class FakeKernel(MissingFaults):
    """`cut_short` tells whether something comes between two pages of one call."""

    def __init__(self, cut_short: Callable[[], bool] = lambda: False) -> None:
        self.present: dict[int, int] = {}
        """By page: what it holds."""
        self.waiting: Counter[int] = Counter()
        """Threads that sleep until they are woken, by page."""
        self.removals: list[Removal] = []
        self.registered = True
        self.held = Held()
        """Ioctls of workers."""
        self.installed: Callable[[int, int], None] = lambda _page, _value: None
        """Told of each page that comes in, and what it holds."""
        self.access = Access.READ
        self._cut_short = cut_short
        self._faults: deque[int] = deque()
        self._events: deque[Removal] = deque()
        self._readable = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def close(self) -> None:
        os.close(self._readable)

    # ------------------------------------------------ the guest and the VMM

    def touch(self, page: int) -> int | None:
        """What a thread finds there; None if it must wait. Where nothing is reported, there are zeroes."""
        if page not in self.present:
            if self.registered:
                self.waiting[page] += 1
                self._report(self._faults, page)
                return None
            self._install(page, ZERO)
        return self.present[page]

    def write(self, page: int, value: int) -> bool:
        """Whether the page is there to be written to."""
        if page not in self.present:
            return False
        self.present[page] = value
        return True

    def begin_removal(self, uaddrs: UaddrRange) -> Removal:
        """A thread calls madvise(MADV_DONTNEED), and waits until that is read."""
        removal = Removal(uaddrs)
        self.removals.append(removal)
        if self.registered:
            self._report(self._events, removal)
        else:
            removal.is_read = True
        return removal

    def run_on(self, removal: Removal) -> None:
        """Its thread goes on, once it was read: from here on pages can be brought in again."""
        assert removal.is_read
        removal.runs_on = True

    def take_away(self, removal: Removal) -> None:
        assert removal.runs_on
        self.removals.remove(removal)
        for page in range(removal.uaddrs.start, removal.uaddrs.end):
            self.present.pop(page, None)

    # ------------------------------------------------ the userfaultfd

    def fileno(self) -> int:
        return self._readable

    def read(self) -> int | UaddrRange | None:
        if self._faults:
            return self._faults.popleft()
        if self._events:
            removal = self._events.popleft()
            removal.is_read = True
            return removal.uaddrs
        with suppress(BlockingIOError):
            os.eventfd_read(self._readable)
        return None

    def forget_message(self) -> None:
        """There is no ledger."""

    def restore_nonblocking(self) -> bool:
        return False

    def copy(self, page: int, source: int, count: int) -> int:
        return self._bring_in(page, [(source >> PAGE_SHIFT) + i for i in range(count)])

    def zero(self, page: int, count: int) -> int:
        return self._bring_in(page, [ZERO] * count)

    def wake(self, uaddrs: UaddrRange) -> None:
        for page in sorted(self.waiting):
            if page in uaddrs:
                for _ in range(self.waiting.pop(page)):
                    self.touch(page)

    def unregister(self, uaddrs: UaddrRange) -> None:
        self.registered = False
        self.wake(uaddrs)

    async def in_worker(self, call: Callable[[], None]) -> None:
        await self.held.stop()
        call()
        await self.held.stop()

    def _bring_in(self, page: int, values: list[int]) -> int:
        if any(not removal.runs_on for removal in self.removals):
            return -errno.EAGAIN
        done = 0
        for value in values:
            if page + done in self.present:
                if not done:
                    return -errno.EEXIST
                break
            if done and self._cut_short():
                break
            self._install(page + done, value)
            done += 1
        self.wake(UaddrRange(start=page, end=page + done))
        return done

    def _install(self, page: int, value: int) -> None:
        self.present[page] = value
        self.installed(page, value)

    def _report(self, queue: deque[T], message: T) -> None:
        queue.append(message)
        os.eventfd_write(self._readable, 1)


class _Bytes:
    def __init__(self, address: int) -> None:
        self.address = address


class FakeImage(Image):
    """The address of page n is that of page number n + 1, which is what the page holds."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.cached: set[int] = set()
        """The pages that are in the page cache."""
        self.fails = False

    def resident(self, page: int, count: int) -> int:
        for done in range(count):
            if page + done not in self.cached:
                return done
        return count

    def read_nowait(self, page: int, count: int) -> int | None:
        return page + 1 << PAGE_SHIFT if self.resident(page, count) == count else None

    def read_apart(self, page: int, count: int) -> _Bytes | None:  # type: ignore[override] # an address alone
        address = self.read_nowait(page, count)
        return None if address is None else _Bytes(address)

    def read(self, page: int, count: int) -> Run:
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.cached.update(range(page, page + count))
        return Run(page, page + count, memoryview(b""))

    def keep(self, run: Run) -> None:
        """The page cache does."""

    def close(self) -> None:
        """There is no descriptor."""


class FakeWorkers(Workers):
    """Each question stops before it is asked and before it is answered, until it is released."""

    def __init__(self) -> None:
        self.held = Held()

    async def ask(self, question: Callable[[], T]) -> T:
        await self.held.stop()
        answer = question()
        await self.held.stop()
        return answer

    def close(self) -> None:
        """There are no threads."""
