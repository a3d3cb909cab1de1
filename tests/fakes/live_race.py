"""Threads that change memory at full speed against VPs that fault at full speed, and a checker.

Owns the race and what it found. Every 100 ms the changing stops, the notifier is drained, and what the guest
reaches is compared with /proc; announced changes are looked at between begin and end as well.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from fakes.live_vmm import GFN, RW, LiveVmm
from fakes.outside import truth_of
from fakes.raw_client import READ, WRITE
from intercept_client import BlockingNotifier, libc
from intercept_client.libc import Sharing
from intercept_client.memory import Watch
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access

MUTATORS, VPS = 3, 3
PAGES: Final = 8
"""A slot: the memory of one mutator, behind one region."""
FIRST_PAGE: Final = 0x10_0000_0000 >> 12
"""Where the kernel puts nothing of its own accord, so that nobody moves into a slot that is empty."""
FILE_PAGES: Final = 64
ROUND_SECONDS: Final = 0.1


class Mode(Enum):
    WATCHED = (Watch.REQUIRED, False)
    ANNOUNCED = (Watch.NONE, True)
    BOTH = (Watch.REQUIRED, True)


class Stop(Enum):
    """When the race is over before its time."""

    NEVER = 0
    AT_THE_FIRST_STALE_PAGE = 1


class Drain(Enum):
    """Whether what was reported is waited for before the comparison."""

    FIRST = 0
    NOT_AT_ALL = 1


@dataclass(slots=True)
class Findings:
    rounds: int = 0
    pages_compared: int = 0
    pages_reached: int = 0
    changes: int = 0
    faults: int = 0
    stale: list[str] = field(default_factory=list)


class Race:
    def __init__(self, vmm: LiveVmm, mode: Mode, drain: Drain) -> None:
        self._vmm = vmm
        self._drain = drain
        self._mode = mode
        self._over = threading.Event()
        self._gates = [threading.Lock() for _ in range(MUTATORS)]
        self._slots = [
            UaddrRange(start=FIRST_PAGE + 2 * n * PAGES, end=FIRST_PAGE + (2 * n + 1) * PAGES)
            for n in range(MUTATORS)
        ]
        self._files = [vmm.memfd(FILE_PAGES, f"file {n}") for n in range(3)]
        self._found = Findings()
        self._errors: list[BaseException] = []

    def run(self, seconds: float, stop: Stop) -> Findings:
        watch, promise = self._mode.value
        self._vmm.attach(watch, promise=promise)
        for number, slot in enumerate(self._slots):
            self._vmm.add_region(_gfn(number, 0), slot)
        threads = [threading.Thread(target=self._guard, args=(self._mutate, n)) for n in range(MUTATORS)]
        threads += [threading.Thread(target=self._guard, args=(self._fault, n)) for n in range(VPS)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._over.wait(ROUND_SECONDS):
            self._compare()
            if stop is Stop.AT_THE_FIRST_STALE_PAGE and self._found.stale:
                break
        self._over.set()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return self._found

    def _guard(self, act: Callable[[int, random.Random], None], number: int) -> None:
        try:
            act(number, random.Random(number))
        except BaseException as error:
            self._errors.append(error)
            self._over.set()

    # ------------------------------------------------ the guest

    def _fault(self, number: int, chance: random.Random) -> None:
        while not self._over.is_set():
            gfn = _gfn(chance.randrange(MUTATORS), chance.randrange(PAGES))
            self._vmm.fault(gfn, chance.choice((READ, WRITE)), vp_index=number)
            self._found.faults += 1

    # ------------------------------------------------ the memory

    def _mutate(self, number: int, chance: random.Random) -> None:
        with BlockingNotifier.open(self._vmm.path, self._vmm.partition) as notifier:
            while not self._over.is_set():
                with self._gates[number]:
                    self._change(number, notifier, chance)
                self._found.changes += 1

    def _change(self, number: int, notifier: BlockingNotifier, chance: random.Random) -> None:
        slot = self._slots[number]
        start = chance.randrange(PAGES)
        part = UaddrRange(start=slot.start + start, end=slot.start + chance.randrange(start, PAGES) + 1)
        act = chance.choice((self._unmap, self._replace, self._unmap_and_map, self._move_away))
        with self._announced(number, part, notifier):
            act(part, chance)

    @contextmanager
    def _announced(self, number: int, part: UaddrRange, notifier: BlockingNotifier) -> Iterator[None]:
        with notifier.invalidation(part) if self._mode.value[1] else nullcontext():
            self._require_unreached(number, part, "before an announced change")
            yield
            self._require_unreached(number, part, "after an announced change")

    def _unmap(self, part: UaddrRange, _: random.Random) -> None:
        libc.munmap(part)

    def _replace(self, part: UaddrRange, chance: random.Random) -> None:
        """Other memory, in one step."""
        file = chance.choice((-1, *self._files))
        offset = 0 if file < 0 else chance.randrange(FILE_PAGES - PAGES) * 4096
        sharing = Sharing.PRIVATE if file < 0 else Sharing.SHARED
        access = chance.choice((RW, Access.READ)) if self._mode.value[1] else RW
        libc.mmap(part, access, sharing, flags=libc.MAP_FIXED, file=file, offset=offset)

    def _unmap_and_map(self, part: UaddrRange, chance: random.Random) -> None:
        self._unmap(part, chance)
        self._replace(part, chance)

    def _move_away(self, part: UaddrRange, chance: random.Random) -> None:
        """One page: the daemon may split a VMA by watching a part of it, and mremap moves no two VMAs."""
        page = UaddrRange(start=part.start, end=part.start + 1)
        self._replace(page, chance)
        away = libc.mremap(page, page.length, libc.Remap.MAYMOVE | libc.Remap.FIXED, _away(page))
        self._unmap(away, chance)

    # ------------------------------------------------ looking

    def _require_unreached(self, number: int, part: UaddrRange, when: str) -> None:
        if not self._mode.value[1]:
            return
        for page in range(part.start, part.end):
            held = self._vmm.translate(_gfn(number, page - self._slots[number].start))
            self._found.pages_compared += 1
            if held is not None:
                self._found.stale.append(f"{when}: page {page:#x} reached {held.frame}")

    def _compare(self) -> None:
        with ExitStack() as stopped:
            for gate in self._gates:
                stopped.enter_context(gate)
            if self._drain is Drain.FIRST:
                self._vmm.drain()
            pages = [page for slot in self._slots for page in range(slot.start, slot.end)]
            truth = truth_of(os.getpid(), pages)
            for number, slot in enumerate(self._slots):
                for page in range(slot.start, slot.end):
                    held = self._vmm.translate(_gfn(number, page - slot.start))
                    self._found.pages_compared += 1
                    if held is None:
                        continue
                    self._found.pages_reached += 1
                    right = truth.get(page)
                    if right is None or tuple(held.frame) != right.frame or held.access & ~right.rights:
                        self._found.stale.append(f"page {page:#x}: {held}, and /proc has {right}")
        self._found.rounds += 1


def race(
    vmm: LiveVmm, mode: Mode, seconds: float, stop: Stop = Stop.NEVER, drain: Drain = Drain.FIRST
) -> Findings:
    return Race(vmm, mode, drain).run(seconds, stop)


def _gfn(slot: int, page: int) -> int:
    return GFN + slot * 0x100 + page


def _away(part: UaddrRange) -> int:
    return (part.start + 0x10_0000) << 12
