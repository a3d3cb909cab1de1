"""What the real region manager, notifier and fault handler do, as steps of the transition table.

Owns the places where a step is seen: the parts' public methods and ports, wrapped; and the whole state, read
after each step of each task. It looks into private state on purpose. Must not know what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from enum import IntEnum
from types import TracebackType

import trio

from explorer.inspection import being_changed
from explorer.pauses import Pauses, Point
from intercept_protocol.addresses import PAGE_LIMIT, GfnRange, PageRange, UaddrRange
from intercept_protocol.messages import MmioGranularity, Remap
from intercept_protocol.outcomes import Access, Answer
from interceptd.address_space import Caller
from interceptd.address_space.declared import DeclaredAddressSpace
from interceptd.eager_lock import EagerLock
from interceptd.hypervisor import HypervisorCounters
from interceptd.hypervisor.software import SoftwareHypervisor
from interceptd.memory.attempt import Attempt, Busy, Whole
from interceptd.memory.guest_mappings import GuestMappings
from interceptd.memory.known_vmas import KnownVmas
from interceptd.memory.region import Region
from interceptd.memory.region_change import RegionChange
from interceptd.memory.region_manager import RegionManager
from interceptd.mmu_notifier import Batch, MmuNotifier
from interceptd.pages.mapping import Extent
from interceptd.pages.mapping import Mapping as Mapped
from interceptd.quota import Quota
from interceptd.telemetry.counters import Source
from interceptd.telemetry.event_bus import EventBus
from model.shadow import Key, Step, Value
from model.transitions.table import Lock, Reliance
from model.transitions.terms import Actor

GFN = 0x100
"""The gfn of page 0 of the region, whose uaddrs begin at page 0."""
WHO: ContextVar[tuple[Actor, int]] = ContextVar("WHO")
"""Whose task this is, and its number."""


class Edit(IntEnum):
    """What the VMM is about to ask for, as the number of its task."""

    REMOVE = 0
    ADD = 1
    CHANGE = 2


_LOCKS = {Actor.VP: Lock.VP, Actor.MANAGER: Lock.MANAGER, Actor.VMM: Lock.REMOVER}

Seen = Mapping[Key, Value]
Trace = list[Step | Seen]
"""Steps, and after each step of a task what the state was then."""


def mask(pages: PageRange, start: int = 0) -> int:
    return (1 << pages.end - start) - (1 << pages.start - start)


def joined(masks: Iterable[int]) -> int:
    result = 0
    for each in masks:
        result |= each
    return result


class Recorder(trio.abc.Instrument):
    """Collects the trace of one partition. Give it to `trio.run`."""

    def __init__(self, pages: int, vps: int, pauses: Pauses, *, pieces_per_call: int = 1) -> None:
        self.trace: Trace = []
        self.truth: dict[int, int] = {}
        """The pfn behind each page that has memory: the driver says so."""
        self.declared = DeclaredAddressSpace(
            lambda: 1 << 10, Quota(0, "VMAs", "vmas_per_uid", lambda: 1 << 20)
        )
        self.software = SoftwareHypervisor(remap=Remap.REPLACE, pool_pages=256, pool_limit=lambda: 1 << 20)
        self.notifier = _Notifier(self)
        self.mappings = GuestMappings(
            _Hypervisor(self, pauses, pieces_per_call),
            lambda: 1 << 10,
            Quota(0, "mappings", "mappings_per_uid", lambda: 1 << 20),
        )
        self.lock = _Lock(self)
        self.mappings.lock = self.lock
        self.regions = _RegionManager(self)
        self.known = _Known(self)
        self.attempts: dict[int, Attempt] = {}
        self.covered = 0
        """What is asked for in the change of regions under way covers before and after it."""
        self.mapping: set[int] = set()
        """VPs that are in the middle of a commit."""
        self._leaving: list[int] = []
        self._vps = vps
        self._gfns = GfnRange(start=GFN, end=GFN + pages)
        self._last: Seen = {}

    def took(self, row: str, **pages: int) -> None:
        """The acting task has taken this step."""
        self._flush()
        self.trace.append(Step(row, WHO.get()[1], pages))

    def left(self, attempt: Attempt) -> None:
        """An attempt is finished. Whether a "no" was told is known later in the same step: `forwarded`."""
        _, vp = WHO.get()
        assert self.attempts.pop(vp) is attempt, "each VP has one attempt at a time"
        if vp in self.mapping:
            self.mapping.discard(vp)
            self.took("finish")
        else:
            self._leaving.append(vp)

    def forwarded(self) -> None:
        """What was just finished ended in a "no"."""
        self._leaving.remove(WHO.get()[1])
        self.took("forward")

    def _flush(self) -> None:
        self.trace += [Step("give_up", vp) for vp in self._leaving]
        self._leaving.clear()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - as trio calls it
        self._flush()
        seen = self._see()
        if seen != self._last or (self.trace and isinstance(self.trace[-1], Step)):
            self.trace.append(seen)
            self._last = seen

    def _see(self) -> Seen:
        serving = self.notifier._serving
        blocks = being_changed(self.mappings)
        turning = blocks.pop() if self.lock.held_by is Lock.CHANGER else []
        reached = {
            gfn - GFN: None if (frame := entry.frame_at(gfn)) is None else frame.page
            for entry in self.software.table.entries(GfnRange(start=0, end=PAGE_LIMIT))
            for gfn in range(entry.start, entry.end)
        }
        seen: dict[Key, Value] = {
            ("lock", 0): self.lock.held_by,
            ("region", 0): joined(mask(region.uaddrs) for region in self.regions._regions),
            ("record", 0): joined(mask(each.gfns, GFN) for each in self.mappings._record),
            ("covered", 0): self.covered,
            ("turning", 0): joined(mask(gfns, GFN) for gfns in turning),
            ("changing", 0): joined(mask(gfns, GFN) for block in blocks for gfns in block),
            ("reached", 0): joined(1 << page for page in reached),
            ("old", 0): joined(1 << page for page, pfn in reached.items() if self.truth.get(page) != pfn),
            ("going", 0): joined(map(mask, self.notifier._pending.pieces)),
            ("serving", 0): 0 if serving is None else joined(map(mask, serving.pieces)),
            ("known", 0): joined(mask(extent.uaddrs) for extent in self.known._extents),
            ("backed", 0): joined(1 << page for page in self.truth),
            ("every opened", 0): joined(map(mask, self.notifier._open)),
        }
        for vp in range(self._vps):
            attempt = self.attempts.get(vp)
            seen["window", vp] = 0 if attempt is None else mask(attempt.window.uaddrs)
            if attempt is not None:
                seen["reliance", vp] = Reliance.STALE if attempt.window.stale else Reliance.FRESH
        return seen


class _Lock(EagerLock):
    """`held_by` is the actor that runs under the lock; one that was handed it and has not run yet is not."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self.held_by = Lock.FREE

    async def __aenter__(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        was_free = not self.locked()
        await super().__aenter__()
        if was_free:  # always a checkpoint: one more place where others may come between
            await trio.lowlevel.cancel_shielded_checkpoint()
        actor, number = WHO.get()
        self.held_by = _LOCKS[actor]
        if (actor, number) == (Actor.VMM, Edit.CHANGE):
            self.held_by = Lock.CHANGER
        elif actor is Actor.VMM:
            self._recorder.took("remove" if number == Edit.REMOVE else "add")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if WHO.get() == (Actor.VMM, Edit.REMOVE):
            self._recorder.took("removed")
        elif self.held_by is Lock.CHANGER:
            self._recorder.took("changed")
            self._recorder.covered = 0
        self.held_by = Lock.FREE
        await super().__aexit__(kind, error, trace)


class _Notifier(MmuNotifier):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__(open_limit=lambda: 64, event_bus=EventBus())
        self._recorder = recorder

    def begin(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER, *, ring: bool = True) -> Batch:
        self._recorder.took("begin_invalidation", pages=mask(uaddrs))
        return super().begin(uaddrs, source, ring=ring)

    def invalidate(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER, *, ring: bool = True) -> Batch:
        self._recorder.took("tell")
        return super().invalidate(uaddrs, source, ring=ring)

    def end(self, uaddrs: UaddrRange, source: Source = Source.NOTIFIER) -> None:
        self._recorder.took("end_invalidation")
        super().end(uaddrs, source)

    def take(self) -> Batch:
        self._recorder.took("take")
        return super().take()

    def served(self, batch: Batch) -> None:
        self._recorder.took("served")
        super().served(batch)


class _RegionManager(RegionManager):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__(
            mappings=recorder.mappings,
            notifier=recorder.notifier,
            region_limit=lambda: 16,
            quota=Quota(0, "regions", "regions_per_uid", lambda: 1 << 20),
            mmio_granularity=MmioGranularity.VMA,
            event_bus=EventBus(),
        )
        self._recorder = recorder

    def lookup(self, gfn: int, access: Access) -> Mapped | Answer | Busy | Region:
        found = super().lookup(gfn, access)
        if isinstance(found, Mapped):
            self._recorder.took("resume", page=1 << gfn - GFN)
        elif found is Answer.NO_REGION:
            self._recorder.took("no_region", page=1 << gfn - GFN)
        return found

    def begin(self, region: Region, gfn: int, access: Access) -> Busy | Attempt:
        step = super().begin(region, gfn, access)
        if isinstance(step, Attempt):
            self._recorder.took("begin", page=1 << gfn - GFN, pages=mask(step.window.uaddrs))
            self._recorder.attempts[WHO.get()[1]] = step
        return step

    async def commit(
        self, attempt: Attempt, extents: Iterable[Extent], deadline: float = math.inf
    ) -> Answer | None:
        answer = await super().commit(attempt, extents, deadline)
        if answer is Answer.ALREADY_MAPPED:
            self._recorder.took("commit")
            self._recorder.mapping.add(WHO.get()[1])
        return answer

    def finish(self, attempt: Attempt) -> None:
        super().finish(attempt)
        self._recorder.left(attempt)

    def _checked(
        self, remove: Sequence[tuple[GfnRange, UaddrRange]], add: Sequence[Region], wholes: Sequence[Whole]
    ) -> RegionChange:
        change = super()._checked(remove, add, wholes)
        covered = joined(mask(uaddrs) for _, uaddrs in remove) & joined(mask(each.uaddrs) for each in add)
        turning = joined(mask(gfns, GFN) for gfns in change.changing)
        self._recorder.took("change_regions", pages=turning, kept=covered)
        self._recorder.covered = covered
        return change

    def _exchange(self, old: Iterable[Region], new: Iterable[Region]) -> None:
        super()._exchange(old, new)
        self._recorder.took("exchange", found=joined(mask(each.uaddrs) for each in self._regions))


class _Known(KnownVmas):
    """All of it may be accessed, so what is found is used."""

    __slots__ = ("_recorder",)

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def find(self, page: int, window: UaddrRange) -> Extent | None:
        extent = super().find(page, window)
        if extent is not None:
            self._recorder.took("recall", found=mask(extent.uaddrs))
        return extent

    def learn(self, extent: Extent) -> None:
        self._recorder.took("learn", found=mask(extent.uaddrs))
        super().learn(extent)


class RecordedMemory:
    """The address space as the intercept path asks it."""

    may_block = True

    def __init__(self, recorder: Recorder, pauses: Pauses) -> None:
        self._recorder = recorder
        self._pauses = pauses

    def drain_nowait(self) -> bool:
        return self._recorder.declared.drain_nowait()

    @property
    def vma_count(self) -> int:
        return self._recorder.declared.vma_count

    async def resolve(
        self, page: int, window: UaddrRange, region: UaddrRange, caller: Caller = Caller.GUEST
    ) -> Extent | None:
        await self._pauses.at(Point.RESOLVE, page)
        extent = await self._recorder.declared.resolve(page, window, region, caller)
        self._recorder.took("resolve", found=0 if extent is None else mask(extent.uaddrs))
        await self._pauses.at(Point.RESOLVED, extent)
        return extent

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:
        return await self._recorder.declared.is_io(page, caller)


class _Hypervisor:
    """Each call is three steps: out, done, and back."""

    may_block = True

    def __init__(self, recorder: Recorder, pauses: Pauses, pieces_per_call: int) -> None:
        self.pieces_per_call = pieces_per_call
        self._recorder = recorder
        self._pauses = pauses

    async def map_gpas(self, mappings: Sequence[Mapped]) -> None:
        recorder, (_, vp) = self._recorder, WHO.get()
        if vp not in recorder.mapping:
            recorder.took("commit")
            recorder.mapping.add(vp)
        recorder.took("map", pages=joined(mask(mapping.gfns, GFN) for mapping in mappings))
        with trio.CancelScope(shield=True):
            await self._pauses.at(Point.MAP, mappings[0])
            for mapping in mappings:
                await recorder.software.map_gpas([mapping])
            recorder.took("mapped")
            await self._pauses.at(Point.MAPPED, mappings[0])
        recorder.took("map_is_back")

    async def unmap_gpas(self, ranges: Sequence[GfnRange]) -> None:
        recorder, (actor, _) = self._recorder, WHO.get()
        out, done = ("take_away", "taken_away") if actor is Actor.MANAGER else ("unmap", "unmapped")
        recorder.took(out, pages=joined(mask(gfns, GFN) for gfns in ranges))
        with trio.CancelScope(shield=True):
            await self._pauses.at(Point.UNMAP, ranges[0])
            for gfns in ranges:
                await recorder.software.unmap_gpas([gfns])
            recorder.took(done)
            await self._pauses.at(Point.UNMAPPED, ranges[0])
        recorder.took(f"{out}_is_back")

    def translate(self, gfn: int) -> Mapped | None:
        return self._recorder.software.translate(gfn)

    async def discard(self) -> None:
        await self._recorder.software.discard()

    def counters(self) -> HypervisorCounters:
        return self._recorder.software.counters()
