"""VPs, sources of invalidations and a VMM that run against each other on the real parts, drawn by hypothesis.

Owns the actors, and the comparison of what they did with the table. Must not know the table's rows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock

from explorer.model_partition import touch
from explorer.pauses import Point
from fakes.drawn import pauses, ranges
from fakes.pauses import DrawnPauses
from intercept_protocol.addresses import GfnRange, PageRange, UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.address_space.declared import Vma
from interceptd.memory.fault_handler import FaultHandler
from interceptd.memory.region import KindOrigin, Region
from model.recorder import GFN, WHO, Edit, RecordedMemory, Recorder, Trace, mask
from model.shadow import Shadow, Step
from model.transitions import terms as t
from model.transitions.table import OPENED, TABLE
from model.transitions.terms import Actor

PAGES = 5
RW = Access.READ | Access.WRITE
WHOLE = "w" * PAGES
"""The layout of one region, which may be written."""
TIMEOUT = 5.0


@dataclass(frozen=True)
class Change:
    """A source's step: how it tells, the pages, and which have memory again afterwards."""

    verb: str
    pages: PageRange
    again: PageRange


@dataclass(frozen=True)
class Fault:
    page: int
    patience: int
    """Checkpoints until it is cancelled."""


@dataclass(frozen=True)
class Schedule:
    pauses: Sequence[int]
    sources: Sequence[Sequence[Change]]
    vps: Sequence[Sequence[Fault]]
    layouts: Sequence[str]
    """One letter per page: the changes of the regions after they were added."""
    removals: int
    pieces_per_call: int
    """How many ranges the hypervisor takes at once."""


def schedules() -> st.SearchStrategy[Schedule]:
    changes = st.builds(
        Change,
        st.sampled_from(["begin", "begin", "abandon", "vanish", "serve"]),
        ranges(PAGES),
        ranges(PAGES),
    )
    faults = st.builds(Fault, st.integers(0, PAGES - 1), st.sampled_from([1000, 1000, 1000, 5, 2]))
    return st.builds(
        Schedule,
        pauses(),
        st.lists(st.lists(changes, min_size=1, max_size=5), min_size=1, max_size=2),
        st.lists(st.lists(faults, min_size=2, max_size=8), min_size=1, max_size=3),
        st.lists(st.text("-rw", min_size=PAGES, max_size=PAGES), max_size=3),
        st.integers(0, 3),
        st.sampled_from([1, 2, 64]),
    )


def problems(trace: Trace, table: t.Table = TABLE) -> list[str]:
    """Where the code and the table part: a step that is not allowed, or a state that is another."""
    shadow = Shadow(everything=(1 << PAGES) - 1, vps=3, sources=2, table=table)
    found: list[str] = []
    latest = "at first"
    for entry in trace:
        if found:
            break  # what follows the first follows from it
        if isinstance(entry, Step):
            found += shadow.take(entry)
            latest = str(entry)
            continue
        for key, value in entry.items():
            expected = shadow.of_all(OPENED) if key[0] == "every opened" else shadow[key]
            if value != expected:
                found.append(f"after {latest}: {key[0]} {key[1]} is {value}, and {expected} in the table")
    return found


def trace_of(schedule: Schedule) -> Trace:
    """Run it to its end on the real parts."""
    run = _Run(schedule)
    with capture_logs():
        trio.run(run.main, clock=MockClock(autojump_threshold=0), instruments=[run.recorder])
    return run.recorder.trace


def traces(count: int) -> list[Trace]:
    """The same ones each time."""
    collected: list[Trace] = []

    @given(schedules())
    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def collect(schedule: Schedule) -> None:
        collected.append(trace_of(schedule))

    collect()
    return collected


def _regions(layout: str) -> list[Region]:
    regions = []
    page = 0
    for letter, run in groupby(layout):
        start, page = page, page + len(list(run))
        if letter != "-":
            gfns, uaddrs = GfnRange(start=GFN + start, end=GFN + page), UaddrRange(start=start, end=page)
            access = RW if letter == "w" else Access.READ
            regions.append(Region(gfns, uaddrs, RegionKind.MMIO, KindOrigin.STATED, access))
    return regions


class _Run:
    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._pauses = DrawnPauses(schedule.pauses)
        self.recorder = Recorder(PAGES, vps=3, pauses=self._pauses, pieces_per_call=schedule.pieces_per_call)
        self._faults = FaultHandler(
            self.recorder.regions, RecordedMemory(self.recorder, self._pauses), TIMEOUT, self.recorder.known
        )
        self._pfn = 0
        self._fill(PageRange(start=0, end=PAGES))

    async def main(self) -> None:
        recorder = self.recorder
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._as, Actor.MANAGER, 0, recorder.regions.run)
            async with trio.open_nursery() as actors:
                actors.start_soon(self._as, Actor.VMM, Edit.ADD, self._vmm)
                for number, faults in enumerate(self._schedule.vps):
                    actors.start_soon(self._as, Actor.VP, number, self._vp, faults)
                for number, changes in enumerate(self._schedule.sources):
                    actors.start_soon(self._as, Actor.SOURCE, number, self._source, changes)
            nursery.cancel_scope.cancel()

    async def _as(
        self, actor: Actor, number: int, act: Callable[..., Awaitable[None]], *args: object
    ) -> None:
        WHO.set((actor, number))
        await act(*args)

    async def _step(self) -> None:
        await self._pauses.at(Point.RESOLVE, None)

    async def _vmm(self) -> None:
        regions = self.recorder.regions
        for _ in range(self._schedule.removals + 1):
            await self._step()
            [there] = whole = _regions(WHOLE)
            await regions.add(there)
            for _ in range(6):
                await self._step()
            if layouts := self._schedule.layouts:
                await self._change(whole, [*layouts, WHOLE])
            WHO.set((Actor.VMM, Edit.REMOVE))
            if self._schedule.removals:
                await regions.remove_exactly(there.gfns, there.uaddrs)
            else:
                return
            WHO.set((Actor.VMM, Edit.ADD))

    async def _change(self, old: Sequence[Region], layouts: Sequence[str]) -> None:
        """Lay the regions out anew, one way after the other."""
        WHO.set((Actor.VMM, Edit.CHANGE))
        for layout in layouts:
            new = _regions(layout)
            await self.recorder.regions.change([(each.gfns, each.uaddrs) for each in old], new)
            old = new
            for _ in range(3):
                await self._step()

    async def _vp(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            await self._step()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._lose_patience, fault.patience, nursery.cancel_scope)
                answer = await touch(self._faults, GFN + fault.page, Access.READ)
                if answer is Answer.UNBACKED:
                    self.recorder.forwarded()
                nursery.cancel_scope.cancel()

    async def _lose_patience(self, patience: int, scope: trio.CancelScope) -> None:
        for _ in range(patience):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async def _source(self, changes: Sequence[Change]) -> None:
        recorder = self.recorder
        for change in changes:
            await self._step()
            uaddrs = UaddrRange(start=change.pages.start, end=change.pages.end)
            if change.verb in ("vanish", "serve"):
                await self._empty(change.pages)
                recorder.took("vanish", pages=mask(change.pages))
                await self._step()
                batch = recorder.notifier.invalidate(uaddrs)
                if change.verb == "serve":
                    await self._serve()
                await batch.done.wait()
                recorder.took("telling_is_acknowledged")
                continue
            batch = recorder.notifier.begin(uaddrs)
            await self._step()
            if change.verb == "begin":
                await batch.done.wait()
                recorder.took("begin_is_acknowledged")
                await self._step()
                await self._empty(change.pages)
                again = change.again.clip(change.pages)
                if again is not None:
                    self._fill(again)
                recorder.took("change", found=0 if again is None else mask(again))
                await self._step()
            recorder.notifier.end(uaddrs)

    async def _serve(self) -> None:
        """A pass of the region manager, made by who announces something."""
        source = WHO.get()
        WHO.set((Actor.MANAGER, 0))
        await self.recorder.regions.serve_pending()
        WHO.set(source)

    async def _empty(self, pages: PageRange) -> None:
        await self.recorder.declared.unmap_vma(UaddrRange(start=pages.start, end=pages.end))
        for page in range(pages.start, pages.end):
            self.recorder.truth.pop(page, None)

    def _fill(self, pages: PageRange) -> None:
        """New memory: a frame is never used twice."""
        self._pfn += 1000
        self.recorder.declared.map_vma(Vma(pages.start, pages.end, self._pfn, RW, io=True))
        for page in range(pages.start, pages.end):
            self.recorder.truth[page] = self._pfn + page - pages.start
