"""A restored guest under drawn schedules: the daemon's own core over a userfaultfd and an image.

Owns one schedule: who does what next, and the verdict. Threads of the guest touch and write pages, threads of
the VMM give memory back, workers read the image and make ioctls, pages leave the page cache, and time passes,
all in the order that is drawn. Must not know how the core decides.

What is judged: a page never comes in with anything but what belongs there, and every thread that waits goes
on in the end. What belongs behind a page is the image's content until a madvise that gives it back is under
way; then that or zeroes, until the memory was taken away; then zeroes.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import trio
from trio.testing import MockClock

from fakes.fake_kernel import ZERO, FakeImage, FakeKernel, FakeWorkers, Removal
from fakes.restored_guest import RestoredGuest
from intercept_protocol.addresses import GfnRange, UaddrRange
from interceptd.address_space.image import ImageAddressSpace, ImagePart
from interceptd.hypervisor.userfaultfd import UserfaultfdHypervisor
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import IMAGE_BACKING
from interceptd.partition.fault_reader import FaultReader

from .scheduler import deterministic, youngest_first

PAGES = 24
"""Of the image: in two parts, the second one below the first."""
AROUND = (1, 4, 8)
WRITTEN = 1000
"""What the guest writes is greater."""
MOST_ROUNDS = 2000
"""After which a thread that still waits does so for ever."""


class Broken(Enum):
    OLD_CONTENT = "a page came in with what does not belong there"
    STUCK = "a thread waits for ever for its page"
    RECORDED = "a page counts as in and is missing"


@dataclass(frozen=True)
class Parts:
    """The classes that the guest's side is made of: the daemon's own, or with something left out."""

    notifier: type[MmuNotifier] = MmuNotifier
    memory: type[ImageAddressSpace] = ImageAddressSpace
    hypervisor: type[UserfaultfdHypervisor] = UserfaultfdHypervisor
    reader: type[FaultReader] = FaultReader


@dataclass
class Verdict:
    """Of one schedule."""

    seed: int
    steps: int = 0
    found: dict[Broken, str] = field(default_factory=dict)
    completed: bool = False
    """Whether the pages were left to the kernel in the end."""
    seen: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """How often what was drawn could be done."""


class Schedule:
    def __init__(self, seed: int, steps: int, parts: Parts) -> None:
        self._rng = rng = random.Random(seed)
        self.verdict = Verdict(seed, steps)
        self._kernel = FakeKernel(lambda: rng.random() < 0.05 and self._interrupt())
        self._kernel.installed = self._judge
        self._image = FakeImage(PAGES)
        self._workers = FakeWorkers()
        layout = [ImagePart(0x2000, 0x2000 + 16, 0), ImagePart(0x1000, 0x1000 + 8, 16)]
        self._pages = [page for part in layout for page in range(part.start, part.end)]
        self._allowed = {
            page: {part.image_page + page - part.start + 1}
            for part in layout
            for page in range(part.start, part.end)
        }
        self._layout = layout
        self._written = WRITTEN
        self._parts = parts
        self._guest = self._new_guest()
        if rng.random() < 0.4:
            self._guest.hypervisor.be_patient(for_ns=1 << 62)
        if rng.random() < 0.5:
            self._image.cached.update(range(PAGES))
        self._verbs: list[Callable[[], bool]] = [
            *[self._touch] * 8,
            *[self._write] * 2,
            *[self._begin_removal] * rng.choice((1, 3)),
            *[self._run_on] * 3,
            *[self._take_away] * 2,
            *[self._release] * 6,
            self._fill,
            self._evict,
            self._fail,
        ]

    def _new_guest(self) -> RestoredGuest:
        parts = self._parts
        return RestoredGuest(
            self._kernel,
            self._image,
            self._layout,
            around=self._rng.choice(AROUND),
            workers=self._workers,
            notifier=parts.notifier,
            memory=parts.memory,
            hypervisor=parts.hypervisor,
            reader=parts.reader,
        )

    async def run(self, clock: MockClock) -> Verdict:
        verdict = self.verdict
        async with self._guest.running(), trio.open_nursery() as nursery:
            if self._rng.random() < 0.5:
                nursery.start_soon(self._guest.prefetch, [GfnRange(start=0, end=PAGES)])
            for _ in range(verdict.steps):
                await self._step(clock)
            await self._calm_down(clock)
            nursery.cancel_scope.cancel()
        verdict.completed = self._guest.completion.reached
        self._kernel.close()
        return verdict

    async def _step(self, clock: MockClock) -> None:
        verb = self._rng.choice(self._verbs)
        self.verdict.seen[verb.__name__] += verb()
        for _ in range(self._rng.choice((0, 0, 1, 1, 2, 5))):
            await trio.lowlevel.checkpoint()
        if self._rng.random() < 0.05:
            clock.jump(self._rng.choice((0.0005, 0.002, 0.02, 1.0)))

    # ------------------------------------------------ what is drawn; whether it could be done

    def _touch(self) -> bool:
        self._kernel.touch(self._rng.choice(self._pages))
        return True

    def _write(self) -> bool:
        page = self._rng.choice(self._pages)
        self._written += 1
        if not self._kernel.write(page, self._written):
            return False
        self._allowed[page] = {self._written} | ({ZERO} if self._is_going(page) else set())
        return True

    def _begin_removal(self) -> bool:
        part = self._rng.choice(self._layout)
        start = self._rng.randrange(part.start, part.end)
        end = min(part.end, start + self._rng.choice((1, 1, 3, 16)))
        self._kernel.begin_removal(UaddrRange(start=start, end=end))
        for page in range(start, end):
            self._allowed[page].add(ZERO)
        return True

    def _interrupt(self) -> bool:
        """A removal begins in the middle of an ioctl."""
        return self._begin_removal()

    def _run_on(self) -> bool:
        removal = self._drawn(lambda removal: removal.is_read and not removal.runs_on)
        if removal is not None:
            self._kernel.run_on(removal)
        return removal is not None

    def _take_away(self) -> bool:
        removal = self._drawn(lambda removal: removal.runs_on)
        if removal is not None:
            self._kernel.take_away(removal)
            for page in range(removal.uaddrs.start, removal.uaddrs.end):
                self._allowed[page] = {ZERO}
        return removal is not None

    def _fill(self) -> bool:
        """Somebody else brings a page in, as the VMM itself may, and wakes nobody."""
        page = self._rng.choice(self._pages)
        if page in self._kernel.present or self._is_going(page):
            return False
        (self._kernel.present[page],) = self._allowed[page]
        return True

    def _release(self) -> bool:
        held = self._rng.choice((self._workers.held, self._kernel.held))
        if held:
            held.release(self._rng.randrange(len(held)))
            return True
        return False

    def _evict(self) -> bool:
        self._image.cached.discard(self._rng.randrange(PAGES))
        return True

    def _fail(self) -> bool:
        self._image.fails = self._rng.random() < 0.3
        return True

    def _drawn(self, fits: Callable[[Removal], bool]) -> Removal | None:
        fitting = [removal for removal in self._kernel.removals if fits(removal)]
        return self._rng.choice(fitting) if fitting else None

    def _is_going(self, page: int) -> bool:
        return any(page in removal.uaddrs for removal in self._kernel.removals)

    # ------------------------------------------------ the verdict

    def _judge(self, page: int, value: int) -> None:
        if value not in self._allowed[page]:
            belongs = sorted(self._allowed[page])
            self.verdict.found.setdefault(
                Broken.OLD_CONTENT, f"page {page:#x} came in with {value}, and {belongs} belongs there"
            )

    async def _calm_down(self, clock: MockClock) -> None:
        """Nothing new happens, and all that is under way comes to its end."""
        kernel, self._image.fails = self._kernel, False
        kernel.held.release_all()
        self._workers.held.release_all()
        for _ in range(MOST_ROUNDS):
            while self._run_on() or self._take_away():
                pass
            for _ in range(4):
                await trio.lowlevel.checkpoint()
            if self._guest.notifier.quiet and not (kernel.waiting or kernel.removals):
                break
            clock.jump(0.1)
        if kernel.waiting:
            pages = ", ".join(f"{page:#x}" for page in kernel.waiting)
            self.verdict.found.setdefault(Broken.STUCK, f"pages {pages}")
        for entry in self._guest.hypervisor.table if kernel.registered else ():
            for gfn in range(entry.start, entry.end) if entry.access else ():
                frame = entry.frame
                page = gfn - entry.start + entry.start_uaddr_page
                if frame is not None and frame.backing == IMAGE_BACKING and page not in kernel.present:
                    self.verdict.found.setdefault(Broken.RECORDED, f"page {page:#x}")


def explore(
    seeds: range, steps: int, parts: Parts = Parts(), schedules: type[Schedule] = Schedule
) -> list[Verdict]:
    """The verdicts of one schedule of so many steps per seed, up to the first that found something."""
    verdicts = []
    with deterministic():
        for seed in seeds:
            youngest_first(backwards=bool(seed % 2))
            clock = MockClock()
            schedule = schedules(seed, steps, parts)
            verdicts.append(trio.run(schedule.run, clock, clock=clock))
            if verdicts[-1].found:
                break
    return verdicts
