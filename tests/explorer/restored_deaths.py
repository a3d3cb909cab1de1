"""A restored guest whose daemons die at any moment: each has a successor, which knows what the log says.

Owns when a daemon dies, and what its successor gets: the log, and the last message of the userfaultfd. Tasks
of a dead daemon may still run for a while, but nothing that they do has an effect. `restored` judges.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import trio
from trio.testing import MockClock

from fakes.fake_kernel import FakeKernel
from fakes.restored_guest import RestoredGuest
from intercept_protocol.addresses import GfnRange, UaddrRange
from interceptd.address_space.missing_faults import (
    EVENT_PAGEFAULT,
    EVENT_REMOVE,
    MESSAGE_BYTES,
    MissingFaults,
)
from interceptd.ledger.journal import Journal
from interceptd.ledger.ledger import Ledger
from interceptd.ledger.records import Restoring, encode
from interceptd.partition.partition import Partition
from interceptd.recovery.fold import Fold
from interceptd.recovery.returning_restore import bring_back

from .restored import AROUND, PAGES, Schedule, Verdict

DEATHS_PER_STEP = 0.01
DEATHS_PER_DEED = 0.002
"""Before or behind a call of the kernel, or a store to the ledger."""


class Life:
    """Of one daemon."""

    def __init__(self, dies: Callable[[], bool]) -> None:
        self._dies = dies
        self.is_over = False

    def goes_on(self) -> bool:
        self.is_over = self.is_over or self._dies()
        return not self.is_over


class MortalPort(MissingFaults):
    """The userfaultfd as one daemon uses it. `event` outlives it."""

    def __init__(self, kernel: FakeKernel, life: Life, event: bytearray) -> None:
        self._kernel = kernel
        self._life = life
        self._event = event
        self.access = kernel.access

    def fileno(self) -> int:
        return self._kernel.fileno()

    def read(self) -> int | UaddrRange | None:
        if not self._life.goes_on():
            return None
        message = self._kernel.read()
        self.access = self._kernel.access
        if isinstance(message, UaddrRange):
            where = message.start_uaddr, message.start_uaddr + message.length
            struct.pack_into("<B7x2Q", self._event, 0, EVENT_REMOVE, *where)
        elif message is not None:
            struct.pack_into("<B7x2Q", self._event, 0, EVENT_PAGEFAULT, 0, message)
        self._life.goes_on()
        return message

    def forget_message(self) -> None:
        if self._life.goes_on():
            self._event[:] = bytes(MESSAGE_BYTES)

    def restore_nonblocking(self) -> bool:
        return False

    def copy(self, page: int, source: int, count: int) -> int:
        return self._call(lambda: self._kernel.copy(page, source, count))

    def zero(self, page: int, count: int) -> int:
        return self._call(lambda: self._kernel.zero(page, count))

    def wake(self, uaddrs: UaddrRange) -> None:
        if self._life.goes_on():
            self._kernel.wake(uaddrs)

    def unregister(self, uaddrs: UaddrRange) -> None:
        if self._life.goes_on():
            self._kernel.unregister(uaddrs)

    async def in_worker(self, call: Callable[[], None]) -> None:
        for each in (call, None):
            if not self._life.is_over:  # nobody waits for a dead one, not even shielded
                await self._kernel.held.stop()
            if each is not None:
                each()

    def _call(self, call: Callable[[], int]) -> int:
        if not self._life.goes_on():
            return -errno.EAGAIN
        done = call()
        self._life.goes_on()
        return done


class Frames:
    """A ledger, as far as a journal needs one."""

    def __init__(self, frames: list[bytes], life: Life) -> None:
        self._frames = frames
        self._life = life

    def append(self, frame: bytes) -> int:
        if self._life.goes_on():
            self._frames.append(frame)
            self._life.goes_on()
        return 0


class ReturningGuest(RestoredGuest):
    """With what a predecessor's log says instead of new regions."""

    fold: Fold
    event: memoryview

    async def add_regions(self) -> None:
        parts = SimpleNamespace(
            regions=self.manager, memory=self.memory, table=self.hypervisor.table, notifier=self.notifier
        )
        await bring_back(cast(Partition, parts), self.regions, self.fold, self.event)
        self.reader.wake_all()


class MortalSchedule(Schedule):
    def __init__(self, seed: int, steps: int, parts: Any) -> None:
        self._frames = [encode(Restoring(0, 1, "a starter", PAGES, {}, None))]
        self._event = bytearray(MESSAGE_BYTES)
        self._may_die = True
        self._fold: Fold | None = None
        super().__init__(seed, steps, parts)

    def _new_guest(self) -> RestoredGuest:
        parts, rng, fold = self._parts, self._rng, self._fold
        self._life = life = Life(lambda: self._may_die and rng.random() < DEATHS_PER_DEED)
        ledger = cast(Ledger, Frames(self._frames, life))
        guest = (RestoredGuest if fold is None else ReturningGuest)(
            MortalPort(self._kernel, life, self._event),
            self._image,
            self._layout,
            around=rng.choice(AROUND),
            workers=self._workers,
            journal=Journal(ledger, lambda _: None, gone_count=0 if fold is None else fold.gone_count),
            notifier=parts.notifier,
            memory=parts.memory,
            hypervisor=parts.hypervisor,
            reader=parts.reader,
        )
        if isinstance(guest, ReturningGuest) and fold is not None:
            guest.fold, guest.event = fold, memoryview(bytearray(self._event))
        return guest

    async def run(self, clock: MockClock) -> Verdict:
        verdict, left = self.verdict, self.verdict.steps
        while True:
            async with self._guest.running(), trio.open_nursery() as nursery:
                if isinstance(self._guest, ReturningGuest) and self._life.goes_on():
                    self._event[:] = self._guest.event
                nursery.start_soon(self._guest.prefetch, [GfnRange(start=0, end=PAGES // 2)])
                while left and not self._life.is_over:
                    left -= 1
                    await self._step(clock)
                    self._life.is_over |= self._rng.random() < DEATHS_PER_STEP
                if not self._life.is_over:
                    self._may_die = False
                    await self._calm_down(clock)
                for held in (self._kernel.held, self._workers.held):
                    while len(held) and self._life.is_over:
                        held.release(0)
                nursery.cancel_scope.cancel()
            if not self._life.is_over:
                break
            verdict.seen["deaths"] += 1
            self._succeed()
        verdict.completed = self._guest.completion.reached
        self._kernel.close()
        return verdict

    def _succeed(self) -> None:
        self._fold = fold = Fold()
        for frame in self._frames:
            fold.read(frame)
        if self._rng.random() < 0.3:  # the predecessor has compacted its log
            self._frames[:] = [encode(record) for record in fold.shortest_log()]
            self._fold = fold = Fold()
            for frame in self._frames:
                fold.read(frame)
        self._guest = self._new_guest()
