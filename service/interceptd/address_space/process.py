"""The process address space: the VMM's real mappings, as the kernel shows them.

Owns the questions, the worker threads that ask them, and the rule that no change may go unnoticed: memory
that is neither watched by the userfaultfd nor under a promise to announce changes is not backed. Must not
know regions or gfns.

The VMM controls its own mmap lock, so no question runs on the trio thread: each runs in one of the
partition's few workers, and is abandoned after a deadline (the worker ends when the kernel answers). The
VMM's own calls have separate workers, so that faults of many VPs do not delay an `add_region`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import trio

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import MemoryWatch
from interceptd.address_space import Caller, KindUnknown, Undecided, Unresolved
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.comparison import Compared, Comparison, Given, compare, uaddrs_of
from interceptd.address_space.fault_causes import FaultCauses
from interceptd.address_space.handover import Handover
from interceptd.address_space.live_vma import LiveVma
from interceptd.address_space.proc_text import MmGone
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.refusals import Call, Cause, Permanence, cause_of, error_name
from interceptd.address_space.smaps import Smaps
from interceptd.address_space.unmap_watch import UnmapWatch
from interceptd.address_space.userfaultfd import Userfaultfd
from interceptd.address_space.workers import Turn, Workers, wait_for_turn
from interceptd.connections.closer import Closer
from interceptd.connections.peer import Pidfd
from interceptd.memory_budget import CacheShare
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import Extent, Frame, Mapping
from interceptd.scheduling.time_share import give_way

WORKERS = {Caller.GUEST: 4, Caller.VMM: 2}
"""Threads that may wait for one VMM's mmap lock at a time. A VMM makes one call at a time; the second thread
is for the probe."""
LOOKUP_RETRIES = 8
"""Look-ups that one `resolve` makes of a VMA that keeps changing."""
SMAPS_RETRIES = 3
"""Times that one question reads smaps for a VMA that has moved meanwhile."""
PROBE_SECONDS = 1.0
"""Interval of the check whether the mm still exists: the kernel does not report an exec."""
T = TypeVar("T")


class KeptMemory(Protocol):
    """Who has a successor get the VMM's memory."""

    @property
    def event(self) -> memoryview:
        """Where an event of the userfaultfd is read to."""

    async def keep_memory(self, attachment: Attachment) -> None: ...

    async def forget_memory(self) -> None:
        """It has no duplicates any more when this returns: the last close, which may wait, is ours."""


class ProcessAddressSpace:
    """See `AddressSpace`. Nothing is backed before `attach`.

    `given` returns the guest's mappings of this memory. `timeout`, in seconds, bounds each question of the
    VMM's own calls; the intercept's deadline bounds those of a fault. `name` names the threads, for people;
    `closer` counts those that were abandoned. A long question goes on in `turn`. `kept` is how a
    successor gets what is attached; `cache` bounds what is remembered of VMAs.
    """

    def __init__(
        self,
        notifier: MmuNotifier,
        given: Given,
        timeout: float,
        vmm: Pidfd | None,
        name: str,
        *,
        closer: Closer,
        turn: Turn = nullcontext,
        kept: KeptMemory | None = None,
        cache: CacheShare | None = None,
    ) -> None:
        self._notifier = notifier
        self._cache = cache
        self._kept = kept
        self._given = given
        self._timeout = timeout
        self._vmm = vmm
        self._workers = {
            caller: Workers(most, f"{caller.value} of {name}", closer, turn)
            for caller, most in WORKERS.items()
        }
        self._attachment: Attachment | None = None
        self._watch: UnmapWatch | None = None
        self._comparison: Comparison | None = None
        self._attached = trio.Event()
        self._gone = trio.Event()
        self._causes = FaultCauses()
        self.userfaultfd_errno: int | None = None
        """With which the VMM was refused a userfaultfd, if it told this daemon so (P-40)."""

    @property
    def vma_count(self) -> int:
        """0: the kernel keeps the VMAs."""
        return 0

    may_block = True

    def drain_nowait(self) -> bool:
        """See `AddressSpace.drain_nowait`. Without a userfaultfd the VMM announces its changes itself."""
        return self._watch is None or self._watch.drain_nowait()

    async def take(self, handover: Handover[Attachment]) -> None:
        """`attach` what a VMM handed over. Raises like `Handover.made` and `attach`."""
        workers = self._workers[Caller.VMM]
        try:
            attachment = await handover.made(self._timeout, workers)
            if self._kept is None:
                await self.attach(attachment)
            else:
                await self._attach_kept(attachment, self._kept)
        except BaseException:
            workers.end_idle()  # without memory nothing is asked, and `_probe` does not run to trim them
            raise

    async def attach(self, attachment: Attachment) -> None:
        """Take over the descriptors and start watching. Raises `Undecided`, and closes them, if the process
        does not answer or is gone."""
        assert self._attachment is None, "attach once"
        try:
            await self._ask(attachment, partial(attachment.maps.vma_at, 0))
        except BaseException:
            attachment.close()
            raise
        self.adopt(attachment)

    def adopt(self, attachment: Attachment) -> None:
        """`attach` what a predecessor had attached: the process is asked nothing."""
        self._attachment = attachment
        if attachment.smaps is not None:
            if self._cache is not None:
                attachment.smaps.bound_cache(self._cache)
            self._notifier.listen(attachment.smaps.forget)
        if attachment.userfaultfd is not None:
            if self._kept is not None:
                attachment.userfaultfd.read_into(self._kept.event)
            self._watch = UnmapWatch(attachment.userfaultfd, self._notifier)
            self._comparison = Comparison(
                self._notifier, self._given, partial(self._compare, attachment), self._watch.drain
            )
        self._attached.set()

    async def _attach_kept(self, attachment: Attachment, kept: KeptMemory) -> None:
        """Kept first: a successor that did not get it could not know what of it is mapped."""
        with attachment.in_use():
            try:
                await kept.keep_memory(attachment)
            except BaseException:
                attachment.close()
                raise
            try:
                await self.attach(attachment)
            except BaseException:
                await kept.forget_memory()
                raise

    async def resolve(
        self, page: int, window: UaddrRange, region: UaddrRange, caller: Caller = Caller.GUEST
    ) -> Extent | None:
        """See `AddressSpace.resolve`. `io` is known of watched memory, and of VMAs that smaps showed since
        their last invalidation."""
        attachment = self._attachment
        if attachment is None:
            if caller is Caller.GUEST:
                self._causes.unbacked(Cause.UNATTACHED)
            return None
        found = await self._ask(attachment, partial(_lookup, attachment, page, window, region), caller)
        if self._watch is not None:
            await self._watch.drain()  # an unmap before the last look-up must be known before the commit
        if found is None:
            return None
        frame = Frame(found.vma.backing, found.vma.backing_page(found.uaddrs.start))
        io = False if found.watched else _known_io(attachment.smaps, found.vma, page)
        whole = UaddrRange(start=found.vma.start, end=found.vma.end)
        return Extent(found.uaddrs, frame, found.vma.access, io, whole)

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:
        """See `AddressSpace.is_io`."""
        attachment = self._attachment
        if attachment is None:
            raise KindUnknown("call attach_memory first")
        if attachment.smaps is None:
            raise KindUnknown("hand over /proc/self/smaps in attach_memory, or state the kind")
        question = partial(_read_io, attachment.maps, attachment.smaps, page)
        return await self._ask(attachment, question, caller)

    async def catch_up(self) -> None:
        """In watched memory, find the changes that the kernel did not report. Raises `Undecided` if the
        process does not answer; if it is gone, its partition ends anyway."""
        if self._comparison is None:
            return
        try:
            with trio.fail_after(self._timeout):
                await self._comparison.catch_up()
        except trio.TooSlowError:
            raise Undecided.because(Cause.NO_ANSWER) from None
        except Undecided:
            if not self._gone.is_set():
                raise

    @property
    def busy_workers(self) -> int:
        """Threads with a question; an abandoned one stays busy until the kernel answers."""
        return sum(workers.busy for workers in self._workers.values())

    @property
    def watch(self) -> MemoryWatch:
        attachment = self._attachment
        if attachment is None:
            return MemoryWatch.UNATTACHED
        if attachment.userfaultfd is not None:
            return MemoryWatch.USERFAULTFD
        return MemoryWatch.PROMISED if attachment.promised else MemoryWatch.NONE

    @property
    def unresolved(self) -> Counter[Cause]:
        return self._causes.counts

    @property
    def attached(self) -> bool:
        return self._attachment is not None

    async def run(self) -> None:
        """Watch the process; returns when its mm is gone, or when it exits before `attach`."""
        async with trio.open_nursery() as nursery:
            if self._vmm is not None:
                nursery.start_soon(self._watch_exit, self._vmm)
            nursery.start_soon(self._watch_attached)
            await self._gone.wait()
            nursery.cancel_scope.cancel()

    async def discard(self) -> None:
        """Does nothing: the kernel keeps the VMAs."""

    def close(self) -> None:
        """Release the descriptors and the threads; no question may follow."""
        for workers in self._workers.values():
            workers.close()
        if self._attachment is not None:
            self._attachment.close()
            self._attachment = None
        if self._vmm is not None:
            self._vmm.close()

    async def _watch_attached(self) -> None:
        await self._attached.wait()
        async with trio.open_nursery() as nursery:
            if self._watch is not None:
                nursery.start_soon(self._watch_unmaps, self._watch)
            nursery.start_soon(self._probe)

    async def _watch_unmaps(self, watch: UnmapWatch) -> None:
        """Without events no mapping that relies on them may stay: end like a process that is gone."""
        await watch.run()
        self._gone.set()

    async def _probe(self) -> None:
        """Check the mm periodically: nothing reports an exec, and a child may keep the socket open. Compare
        the mappings too, some changes of which nothing reports."""
        attachment = self._attachment
        assert attachment is not None, "attached before it is run"
        while True:
            await trio.sleep(PROBE_SECONDS)
            await give_way()  # the probes of many partitions are due at once
            for workers in self._workers.values():
                workers.trim()
            with suppress(Undecided):  # a busy process is alive; `_ask` handles one that is gone
                await self._ask(attachment, partial(attachment.maps.vma_at, 0))
                if self._comparison is not None:
                    await self._comparison.round()

    async def _compare(self, attachment: Attachment, given: list[Mapping], most: int) -> Compared:
        compared = await self._ask(attachment, partial(_compare, attachment.maps, given, most))
        assert compared is not None, "a comparison always has a result"
        return compared

    async def _watch_exit(self, vmm: Pidfd) -> None:
        """Once the process that connected has exited, check the mm at once, which may be another process's.
        If it exits before `attach`, it can hand nothing over, even if its connection stays open."""
        await trio.lowlevel.wait_readable(vmm)
        if self._attachment is None:
            self._gone.set()
            return
        with suppress(Undecided):
            await self._ask(self._attachment, partial(self._attachment.maps.vma_at, 0))

    async def _ask(
        self, attachment: Attachment, question: Callable[[], T | Unresolved], caller: Caller = Caller.VMM
    ) -> T | None:
        """Ask the kernel a question in a worker thread; None if the answer is decided to be nothing.

        Raises `Undecided` for passing reasons, when the mm is gone, and for
        the VMM's own calls at the deadline."""

        def ask() -> T | Unresolved:
            with attachment.in_use():
                return question()

        workers = self._workers[caller]
        try:
            if caller is Caller.GUEST:  # the intercept's deadline suffices
                answer = await workers.ask(ask)
            else:
                with trio.fail_after(self._timeout):
                    answer = await workers.ask(ask)
        except trio.TooSlowError:
            raise Undecided.because(Cause.NO_ANSWER) from None
        except MmGone:
            if attachment is self._attachment:  # and not one that is being refused
                self._gone.set()
            raise Undecided.because(Cause.MM_GONE) from None
        except OSError as error:  # one that the questions do not classify
            reason = Undecided.because(Cause.OTHER, error_name(error))
        except Undecided as error:
            reason = error
        else:
            if not isinstance(answer, Unresolved):
                return answer
            if answer.cause.permanence is Permanence.PERMANENT:
                if caller is Caller.GUEST:
                    self._causes.unbacked(answer.cause, answer.detail)
                return None
            reason = Undecided.because(answer.cause, answer.detail)
        if caller is Caller.GUEST:
            self._causes.undecided(reason)
        raise reason


def _known_io(smaps: Smaps | None, vma: LiveVma, page: int) -> bool | None:
    return None if smaps is None else smaps.known(vma, page)


# ------------------------------------------------ in worker threads: no trio here


class Found(NamedTuple):
    """A VMA and the part of it that may be mapped.

    Memory watched by a userfaultfd is anonymous, shmem or hugetlb (vma_can_userfault(), without WP_ASYNC),
    and so never VM_IO or VM_PFNMAP.
    """

    vma: LiveVma
    uaddrs: UaddrRange
    watched: bool


def _lookup(attachment: Attachment, page: int, window: UaddrRange, region: UaddrRange) -> Found | Unresolved:
    """The VMA at `page` and the part of `window` that it backs, watched or promised.

    Query, register, query again. If another VMA replaced the first one before the registration, the second
    query sees it; if after, the kernel reports an unmap of what was registered. A refusal counts only if the
    second query finds everything that was to be registered; else it may be about something else.
    """
    for _ in range(LOOKUP_RETRIES):
        vma = attachment.maps.vma_at(page)
        if vma is None:
            return Unresolved(Cause.NO_VMA)
        if attachment.userfaultfd is None:
            if not attachment.promised:
                return Unresolved(Cause.UNANNOUNCED)
            return Found(vma, _overlap(vma, window), watched=False)
        part = vma.whole_units(
            _overlap(vma, region)
        )  # the kernel registers only whole pages of hugetlb memory
        refusal = _register(attachment.userfaultfd, part)
        again = attachment.maps.vma_at(page)
        if again is None or not again.continues(vma):
            continue
        if refusal is None or attachment.promised:
            # registering a part splits the VMA, and only what was registered is watched
            backed = _overlap(again, window).clip(part)
            assert backed is not None, "the page lies in all three"
            return Found(again, backed, watched=refusal is None)
        if again.covers(part):
            return refusal
    return Unresolved(Cause.CHANGING)


def _register(userfaultfd: Userfaultfd, uaddrs: UaddrRange) -> Unresolved | None:
    """Watch `uaddrs`; returns why that failed, None on success."""
    try:
        userfaultfd.register(uaddrs)
    except OSError as error:
        return Unresolved(cause_of(Call.UFFDIO_REGISTER, error), f"UFFDIO_REGISTER: {error_name(error)}")
    return None


def _read_io(maps: ProcMaps, smaps: Smaps, page: int) -> bool | Unresolved:
    """Whether the VMA at `page` is device memory. A VMA without a record exists all the same: it changed, or
    the text was torn."""
    for _ in range(SMAPS_RETRIES):
        vma = maps.vma_at(page)
        if vma is None:
            return Unresolved(Cause.NO_VMA)
        try:
            io = smaps.read(vma, page)
        except MmGone:
            maps.vma_at(page)  # raises MmGone too, unless only the thread that opened smaps is gone
            return Unresolved(Cause.SMAPS_ENDED)
        if io is not None:
            return io
    return Unresolved(Cause.NO_RECORD)


def _compare(maps: ProcMaps, given: list[Mapping], most: int) -> Compared:
    wait_for_turn()  # every partition compares, and all at once would keep the interpreter
    return compare(given, maps.view([uaddrs_of(mapping) for mapping in given], most), most)


def _overlap(vma: LiveVma, uaddrs: UaddrRange) -> UaddrRange:
    overlap = UaddrRange(start=vma.start, end=vma.end).clip(uaddrs)
    assert overlap is not None, "the page lies in both"
    return overlap
