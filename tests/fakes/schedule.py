"""A drawn schedule: a VMM, notifier connections and VPs that run against each other on one partition.

Owns the actors and the order of their steps. Every port call may be delayed by drawn checkpoints, and the
whole state is inspected at each of them. Must not know what is right: world and inspection do.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

import trio
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock

from fakes.drawn import pauses
from interceptctl.explore.inspection import Violation, inspect, slat_reach
from fakes.model_partition import RW, TIMEOUT, ModelPartition
from fakes.pauses import DrawnPauses
from interceptctl.explore.pauses import Asked, Point
from fakes.world import CANDIDATES, PAGES, World
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access, Answer, Outcome

EXPECTED_REFUSALS = {errno.EEXIST, errno.ENOENT, errno.EINVAL, errno.EFAULT}
"""What a VMM that acts at random is told; ENOMEM or EIO would be ours to explain."""
ACCESSES = (Access.READ, Access.WRITE, Access.READ, Access.WRITE, Access.EXECUTE)
OPEN_STEPS = 6
"""Steps from a begin's acknowledgement to its end."""
HOT_GFNS = (0, 9, 15, 17, 23, 31, 33, 39)
"""Where VPs fault: in each candidate, and where they overlap."""


@dataclass(frozen=True)
class Edit:
    """A step of the VMM: `which` region, or a range of its pages."""

    verb: str
    which: int
    start: int
    page_count: int
    access: Access


@dataclass(frozen=True)
class Notice:
    """A step of a notifier connection."""

    verb: str
    start: int
    page_count: int


@dataclass(frozen=True)
class Fault:
    """A step of a VP; `patience` is how many checkpoints it waits before it is kicked."""

    gfn: int
    access: Access
    patience: int


@dataclass(frozen=True)
class Schedule:
    pauses: Sequence[int]
    refused_maps: frozenset[int]
    vmm: Sequence[Edit]
    notifiers: Sequence[Sequence[Notice]]
    vps: Sequence[Sequence[Fault]]


def schedules() -> st.SearchStrategy[Schedule]:
    """Dense on purpose: few pages, long ranges, and most VPs patient enough to get an answer."""
    start, page_count = st.integers(0, PAGES - 1), st.integers(4, 20)
    edits = st.builds(
        Edit,
        st.sampled_from(["unmap", "map", "protect", "remove", "add"]),
        st.integers(0, len(CANDIDATES) - 1),
        start,
        page_count,
        st.sampled_from([Access.READ, RW]),
    )
    notices = st.builds(Notice, st.sampled_from(["during", "invalidate"]), start, page_count)
    faults = st.builds(
        Fault, st.sampled_from(HOT_GFNS), st.sampled_from(ACCESSES), st.sampled_from([1000, 1000, 1000, 9, 3])
    )
    return st.builds(
        Schedule,
        pauses(),
        st.just(frozenset()) | st.frozensets(st.integers(1, 12), max_size=2),
        st.lists(edits, min_size=3, max_size=12),
        st.lists(st.lists(notices, min_size=1, max_size=5), min_size=1, max_size=2),
        st.lists(st.lists(faults, min_size=3, max_size=10), min_size=2, max_size=4),
    )


def violations_of(schedule: Schedule) -> list[Violation]:
    """Run it to its end; everything that was found wrong on the way."""
    run = _Run(schedule)
    with capture_logs():
        trio.run(run.main, clock=MockClock(autojump_threshold=0))
    return run.found


class _Run:
    """One schedule under way. It is its model's `Pauses`, too."""

    def __init__(self, schedule: Schedule) -> None:
        self.found: list[Violation] = []
        self._schedule = schedule
        self._pauses = DrawnPauses(schedule.pauses)
        self._world = World()
        self._model = ModelPartition(pauses=self)
        self._model.hypervisor.refused_maps = schedule.refused_maps

    async def at(self, point: Point, asked: Asked) -> None:
        if point in {Point.RESOLVE, Point.RESOLVED} and self._holds_lock():
            self.found.append(Violation("I5", "resolve was asked under the lock"))
        self._look()
        await self._pauses.at(point, asked)
        self._look()

    async def main(self) -> None:
        async with self._model.running():
            await self._begin()
            async with trio.open_nursery() as actors:
                actors.start_soon(self._vmm)
                for notices in self._schedule.notifiers:
                    actors.start_soon(self._notifier, notices)
                for faults in self._schedule.vps:
                    actors.start_soon(self._vp, faults)
            self._look()
            await self._end()

    async def _begin(self) -> None:
        for start, page_count in ((0, 12), (12, 10), (24, 12)):
            await self._edit(Edit("map", 0, start, page_count, RW))
        for which in (0, 1, 2):
            await self._edit(Edit("add", which, 0, 0, RW))

    async def _end(self) -> None:
        await self._model.regions.close()
        left = self._model.hypervisor.counters().slat_extents
        if left or self._model.notifier._windows or self._model.notifier.open_invalidations:
            self.found.append(Violation("I6", f"{left} extents, or attempts or open ranges, were left"))

    # ------------------------------------------------ actors

    async def _vmm(self) -> None:
        for edit in self._schedule.vmm:
            await self._step()
            await self._edit(edit)

    async def _edit(self, edit: Edit) -> None:
        try:
            await self._carry_out(edit)
        except WireError as error:
            if error.number not in EXPECTED_REFUSALS:
                raise
        self._look()

    async def _carry_out(self, edit: Edit) -> None:
        world, model, region = self._world, self._model, CANDIDATES[edit.which]
        pages = range(edit.start, min(edit.start + edit.page_count, PAGES))
        match edit.verb:
            case "add":
                with world.doubt(region):
                    await model.add_region(
                        region.gfn, region.page_count, region.page, region.kind, region.access
                    )
                    world.dangling.discard(region)
                    world.present.add(region)
            case "remove":
                with world.doubt(region):
                    await model.remove_region(region.gfn, region.page_count, region.page)
                    world.present.discard(region)
            case "map":
                pfn = world.fresh_pfn()
                await model.map_vma(pages.start, len(pages), pfn, edit.access)
                world.pages |= {page: (pfn + page - pages.start, edit.access) for page in pages}
                world.changed()
            case "unmap":
                with world.motion(pages):
                    await model.unmap_vma(pages.start, len(pages))
                    world.pages = {page: held for page, held in world.pages.items() if page not in pages}
            case _:
                with world.motion(pages):
                    await model.protect_vma(pages.start, len(pages), edit.access)
                    for page in world.pages.keys() & set(pages):
                        world.pages[page] = (world.pages[page][0], edit.access)

    async def _notifier(self, notices: Sequence[Notice]) -> None:
        world, model = self._world, self._model
        for notice in notices:
            await self._step()
            pages = range(notice.start, min(notice.start + notice.page_count, PAGES))
            if notice.verb == "invalidate":
                world.shake(pages)
                await model.invalidate(pages.start, len(pages))
                continue
            with world.motion(pages):
                await model.begin(pages.start, len(pages))
                world.closed.update(pages)
            for _ in range(OPEN_STEPS):
                self._look()
                await self._step()
            world.closed.subtract(pages)
            model.end(pages.start, len(pages))
            world.changed()

    async def _vp(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            await self._step()
            with self._world.watching(fault.gfn, fault.access) as watch:
                started = trio.current_time()
                answer = await self._kicked(fault)
                self._judge(fault, answer, watch.forwards, trio.current_time() - started)

    async def _kicked(self, fault: Fault) -> Answer:
        """Settle, or be cancelled at a drawn checkpoint."""
        answer = Answer.KICKED

        async def lose_patience(scope: trio.CancelScope) -> None:
            for _ in range(fault.patience):
                await trio.lowlevel.checkpoint()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lose_patience, nursery.cancel_scope)
            answer = await self._model.fault(fault.gfn, fault.access)
            self._look_at_resume(fault, answer)
            nursery.cancel_scope.cancel()
        return answer

    # ------------------------------------------------ judging

    async def _step(self) -> None:
        await self._pauses.at(Point.RESOLVE, None)

    def _look(self) -> None:
        self.found += inspect(self._model)
        self.found += self._world.violations(self._model)

    def _look_at_resume(self, fault: Fault, answer: Answer) -> None:
        """At the very instant of the answer, before anyone else runs."""
        _, reached = slat_reach(self._model).get(fault.gfn, (None, Access.NONE))
        if answer.outcome is Outcome.RESUME and fault.access not in reached:
            self.found.append(Violation("I10", f"{fault} was told {answer} and reaches {reached!r}"))

    def _judge(self, fault: Fault, answer: Answer, forwards: set[Answer], seconds: float) -> None:
        if answer.outcome is Outcome.FORWARD and answer not in forwards:
            self.found.append(Violation("I4", f"{fault} was told {answer}, which was never true"))
        if answer is Answer.HYPERVISOR_ERROR and not self._schedule.refused_maps:
            self.found.append(Violation("I9", f"{fault} was told {answer} and nothing had been refused"))
        if seconds > TIMEOUT + 0.001:
            self.found.append(Violation("I4", f"{fault} took {seconds} s"))

    def _holds_lock(self) -> bool:
        return self._model.regions._lock.statistics().owner is trio.lowlevel.current_task()
