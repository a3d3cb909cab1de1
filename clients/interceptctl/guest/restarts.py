"""A guest whose daemon is killed while its memory changes hands.

Owns that scenario: a BAR whose address again and again becomes a stranger's, and back; a counter in RAM; and
what both must not show. Must not know how a daemon is killed.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from intercept_protocol.outcomes import AnyAnswer
from interceptctl import units

from .programs import COUNT_ON, WATCH
from .vmm import Vcpu, Vmm

FLOATING: Final = 0xFFFF_FFFF
OURS: Final = 0x42
COUNTER_GPA: Final = 0x8000
"""In RAM, behind the programs."""
READS: Final = 5
LONGEST_DELAY: Final = 0.1
"""Seconds from a daemon's first answer to an intercept until it is killed."""
PATIENCE: Final = 60.0
"""Seconds within which an intercept is answered."""
LOOK_EVERY: Final = 0.001


class Wrong(Exception):
    """The message says what was seen."""


@dataclass
class Noticed:
    """What came of kills; times in seconds."""

    kills: int = 0
    longest_stall: float = 0.0
    """From a kill to the first intercept that was answered."""
    longest_standstill: float = 0.0
    """Of the counter in RAM meanwhile, as far as a thread that looks every millisecond can tell."""
    changes: int = 0
    """How often the memory became a stranger's."""
    answers: Counter[AnyAnswer] = field(default_factory=Counter)
    """What the daemon told the reader."""

    def __str__(self) -> str:
        kills, stall = units.of(self.kills, "kill"), units.latency(1e9 * self.longest_stall)
        return f"nothing stale in {kills}; RAM went on, the BAR waited {stall} at most"


class HandedOver:
    """A guest of two vCPUs: one counts in RAM, one reads a page whose memory changes hands."""

    def __init__(self, vmm: Vmm, kill: Callable[[], None], rng: random.Random) -> None:
        self._vmm = vmm
        self._kill = kill
        self._rng = rng
        self._bar = vmm.add_bar(1)
        self._bar.write(0, bytes([OURS]))
        vmm.add_vcpu(COUNT_ON, esi=COUNTER_GPA)
        self._reader: Vcpu = vmm.add_vcpu(WATCH, esi=self._bar.gpa)
        self._over = threading.Event()
        self._noticed = Noticed()

    def run(self, kills: int) -> Noticed:
        """Change the memory until the daemon was killed so often. Raises `Wrong`, or TimeoutError."""
        self._vmm.start()
        self._vmm.reports.wait_for(OURS)
        with ThreadPoolExecutor(1, thread_name_prefix="killer") as killer:
            killing = killer.submit(self._kill_often, kills)
            try:
                while not killing.done():
                    self._change_hands()
            finally:
                self._over.set()
        killing.result()
        self._compare(kills)
        return self._noticed

    # ------------------------------------------------ the memory

    def _change_hands(self) -> None:
        """The BAR's address becomes a stranger's while the guest must not reach it, and later ours again."""
        self._bar.hand_over()
        self._must_read({FLOATING})
        self._bar.take_back()
        self._must_read({OURS})
        self._noticed.changes += 1

    def _must_read(self, right: set[int]) -> None:
        """What is read from now on, after at most one value that was on its way, and what was before."""
        reports = self._vmm.reports
        reports.wait(1)
        self._require(reports.take_values() <= {OURS, FLOATING}, "the guest has read a stranger's memory")
        reports.wait(READS)
        seen = reports.take_values()
        self._require(seen == right, f"the guest reads {sorted(seen)}, and not {sorted(right)}")

    # ------------------------------------------------ the kills

    def _kill_often(self, kills: int) -> None:
        for _ in range(kills):
            self._wait_answered()
            if self._over.wait(self._rng.uniform(0, LONGEST_DELAY)):
                return
            self._kill_once()

    def _kill_once(self) -> None:
        """Kill the daemon; returns when the next one has answered."""
        before = self._counter()
        self._kill()
        self._noticed.kills += 1
        killed = time.perf_counter()
        self._wait_answered()
        self._noticed.longest_stall = max(self._noticed.longest_stall, time.perf_counter() - killed)
        self._require(self._counter() != before, "the counter in RAM stood still")

    def _wait_answered(self) -> None:
        """Until an intercept is answered that was asked from now on: the second answer is to such a one."""
        answered, since = self._answered(), time.perf_counter()
        counted, counted_at = self._counter(), since
        while self._answered() < answered + 2 and not self._over.wait(LOOK_EVERY):
            now = time.perf_counter()
            if (count := self._counter()) != counted:
                counted, counted_at = count, now
            self._noticed.longest_standstill = max(self._noticed.longest_standstill, now - counted_at)
            self._require(now - since < PATIENCE, f"no intercept was answered for {PATIENCE:g} s")

    def _answered(self) -> int:
        return self._reader.tally.intercepts.total()

    def _counter(self) -> int:
        return self._vmm.ram.word(COUNTER_GPA)

    # ------------------------------------------------ afterwards

    def _compare(self, kills: int) -> None:
        """Each kill was one restart, and nothing is left of what was begun."""
        restarts, open_invalidations = self._vmm.survived()
        self._require(restarts == kills, f"{restarts} restarts after {kills} kills")
        self._require(not open_invalidations, f"{open_invalidations} invalidations are open")
        self._noticed.answers = Counter(self._reader.tally.intercepts)

    @staticmethod
    def _require(holds: bool, found: str) -> None:
        if not holds:
            raise Wrong(found)
