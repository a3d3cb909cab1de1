"""A VMM whose daemons are killed, made of the client library, and what it may rely on.

Owns the VMM's own books: its regions, its memory, what its hypervisor has mapped. It looks whether the daemon
agrees with them, and whether the guest reaches all that it may and nothing else. Its memory is that of this
process.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fakes.doing import Doing
from fakes.eventually import PATIENCE
from fakes.live_vmm import ELSEWHERE, QUIET_PAGE, LiveVmm
from fakes.raw_client import WRITE, intercept_message
from intercept_client import (
    BlockingHypervisor,
    BlockingNotifier,
    BlockingVmm,
    BlockingVp,
    DeclaredVma,
    NewRegion,
    libc,
    refused_after,
)
from intercept_client.memory import Watch, own_memory
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import AddressSpaceKind, HypervisorKind, RequestedKind
from intercept_protocol.outcomes import Access, Outcome

RW: Final = Access.READ | Access.WRITE
TRIES: Final = 8
"""Times that a vCPU asks again before that counts as no progress."""
DECLARED_PAGE, FIRST_PFN, FIRST_GFN, HOLE = 0x7F00_0000_0, 0x5000, 0x100, 1


class Mode(Enum):
    """Whose memory, whose hypervisor, and who says what changes."""

    DECLARED = "declared, software"
    DECLARED_VMM = "declared, vmm"
    ANNOUNCED = "process, software, announced"
    WATCHED = "process, software, watched"
    ANNOUNCED_VMM = "process, vmm, announced"
    WATCHED_VMM = "process, vmm, watched"

    @property
    def is_live(self) -> bool:
        return self.value.startswith("process")

    @property
    def is_watched(self) -> bool:
        return self.value.endswith("watched")

    @property
    def has_own_hypervisor(self) -> bool:
        return "vmm" in self.value


DECLARED: Final = [mode for mode in Mode if not mode.is_live]
OWN_HYPERVISOR: Final = [mode for mode in Mode if mode.has_own_hypervisor]


class Table:
    """The page tables of the VMM's own hypervisor, and a way to act while the daemon waits."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, Access]] = {}
        """Uaddr page and rights by gfn."""
        self.meanwhile: Callable[[], None] = lambda: None
        """Called before each request is carried out."""
        self._refused: int | None = None

    def refuse(self, uaddr_page: int | None) -> None:
        """Refuse each map of that page."""
        self._refused = uaddr_page

    def map(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None) -> None:
        del start_pfn
        self.meanwhile()
        if self._refused is not None and self._refused in uaddrs:
            raise refused_after(0, WireError(errno.ENOMEM, "no slot is free"))
        for offset in range(gfns.page_count):
            self.pages[gfns.start + offset] = (uaddrs.start + offset, access)

    def unmap(self, gfns: GfnRange) -> None:
        self.meanwhile()
        for gfn in range(gfns.start, gfns.end):
            self.pages.pop(gfn, None)

    @property
    def reached(self) -> dict[int, int]:
        """Uaddr page by gfn, of what has rights."""
        return {gfn: page for gfn, (page, access) in self.pages.items() if access}


@dataclass
class Region:
    gfns: GfnRange
    uaddrs: UaddrRange
    kind: RequestedKind

    def new(self) -> NewRegion:
        return NewRegion(gfns=self.gfns, uaddrs=self.uaddrs, kind=self.kind, writable=True, executable=False)


OWN_PAGE: Final = 2 * QUIET_PAGE
"""Where a process that runs tests maps, and leaves mapped, what its guests may reach."""


@cache
def own_process() -> LiveVmm:
    """Hands out the addresses of this process, which are one for all VMMs here."""
    return LiveVmm(OWN_PAGE)


@dataclass(eq=False)
class SurvivingVmm:
    """Open it by `with`: its partition has a VP, a notifier, and all that its mode needs."""

    path: Path
    mode: Mode
    table: Table = field(default_factory=Table)
    regions: dict[int, Region] = field(default_factory=dict)
    begun: int = 0
    """Invalidations that it has begun and not ended."""

    def __post_init__(self) -> None:
        self._opened = ExitStack()
        self._pages = DECLARED_PAGE
        self._pfn = FIRST_PFN
        self._gfn = FIRST_GFN
        self.frames: dict[int, int] = {}
        """Pfn by uaddr page, of declared memory."""
        self.vps: dict[int, BlockingVp] = {}
        self.link_ended = ""

    def __enter__(self) -> Self:
        try:
            self.open()
        except BaseException:
            self._opened.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    # ------------------------------------------------ opening

    def open(self) -> None:
        self.connect()
        self.create()
        self.link()
        self.attach()
        self.notifier = self.open_notifier()
        self.open_vp()

    def connect(self) -> None:
        self.vmm = self._opened.enter_context(BlockingVmm.open(self.path, name="survivor", timeout=PATIENCE))

    def create(self) -> None:
        self.partition = self.vmm.create_partition(
            AddressSpaceKind.PROCESS if self.mode.is_live else AddressSpaceKind.DECLARED,
            HypervisorKind.VMM if self.mode.has_own_hypervisor else HypervisorKind.SOFTWARE,
            invalidate_timeout_ms=int(PATIENCE * 1000),
        )

    def link(self) -> None:
        """Serve the hypervisor connection in a thread, if there is one."""
        if not self.mode.has_own_hypervisor:
            return
        link = BlockingHypervisor.open(
            self.path, self.partition, self.table, regions=self.vmm.regions, open_timeout=PATIENCE
        )

        def serve() -> None:
            self.link_ended = link.serve()

        thread = threading.Thread(target=serve)
        thread.start()
        self._opened.callback(thread.join, PATIENCE)
        self._opened.callback(self.vmm.close)  # which ends the partition, and so `serve`

    def attach(self) -> None:
        """Hand over this process's memory. What was not kept in time is handed over anew (P-19)."""
        if not self.mode.is_live:
            return
        for _ in range(TRIES):
            try:
                with own_memory(Watch.REQUIRED if self.mode.is_watched else Watch.NONE) as memory:
                    self.vmm.attach_memory(memory, promise_begin_end=not self.mode.is_watched)
            except WireError as error:
                if error.number != errno.EAGAIN:
                    raise
            else:
                return
        raise AssertionError("its memory is never attached")

    def open_notifier(self) -> BlockingNotifier:
        return self._opened.enter_context(BlockingNotifier.open(self.path, self.partition, timeout=PATIENCE))

    def open_vp(self) -> BlockingVp:
        index = len(self.vps)
        self.vps[index] = self._opened.enter_context(
            BlockingVp.open(self.path, self.partition, vp_index=index, timeout=PATIENCE)
        )
        return self.vps[index]

    # ------------------------------------------------ memory

    def memory(self, page_count: int) -> UaddrRange:
        """New memory."""
        if self.mode.is_live:
            return own_process().map(page_count)
        uaddrs = UaddrRange(start=self._pages, end=self._pages + page_count)
        self.vmm.map_vma(uaddrs, self._pfn, RW)
        self.frames |= {uaddrs.start + n: self._pfn + n for n in range(page_count)}
        self._pages, self._pfn = uaddrs.end + HOLE, self._pfn + page_count + HOLE
        return uaddrs

    def declare(self, count: int) -> None:
        """New memory in so many VMAs, by one request."""
        vmas = []
        for _ in range(count):
            uaddrs = UaddrRange(start=self._pages, end=self._pages + 1)
            vmas.append(DeclaredVma(uaddrs=uaddrs, start_pfn=self._pfn, access=RW))
            self._pages, self._pfn = uaddrs.end + HOLE, self._pfn + 1 + HOLE
        self.vmm.map_vmas(vmas)
        self.frames |= {vma.uaddrs.start: vma.start_pfn for vma in vmas}

    def unmap(self, uaddrs: UaddrRange) -> None:
        """Give memory back, as the mode has it: when this returns, the guest must not reach it."""
        if not self.mode.is_live:
            self.vmm.unmap_vma(uaddrs)
            for page in range(uaddrs.start, uaddrs.end):
                self.frames.pop(page, None)
        elif self.mode.is_watched:
            Doing(partial(libc.munmap, uaddrs)).wait()
            self.notifier.invalidate(ELSEWHERE)  # what was read by now is served
        else:
            with self.invalidation(uaddrs):
                libc.munmap(uaddrs)

    @contextmanager
    def invalidation(self, uaddrs: UaddrRange) -> Iterator[None]:
        with self.notifier.invalidation(uaddrs):
            self.begun += 1
            yield
            self.begun -= 1

    # ------------------------------------------------ regions

    def new_region(
        self, page_count: int, kind: RequestedKind = RequestedKind.MOVABLE, uaddrs: UaddrRange | None = None
    ) -> Region:
        """One that is not added yet, over new memory."""
        gfns = GfnRange.of(self._gfn, page_count)
        self._gfn = gfns.end + HOLE
        return Region(gfns, self.memory(page_count) if uaddrs is None else uaddrs, kind)

    def add(self, region: Region) -> Region:
        self.vmm.add_region(region.gfns, region.uaddrs, region.kind, writable=True, executable=False)
        self.regions[region.gfns.start] = region
        return region

    def remove(self, region: Region) -> None:
        self.vmm.remove_region(region.gfns, region.uaddrs)
        del self.regions[region.gfns.start]

    def change(self, remove: Sequence[Region], add: Sequence[Region]) -> None:
        self.vmm.change_regions(
            remove=[(region.gfns, region.uaddrs) for region in remove], add=[region.new() for region in add]
        )
        for region in remove:
            del self.regions[region.gfns.start]
        self.regions |= {region.gfns.start: region for region in add}

    def ask(self, gfn: int, vp_index: int = 0) -> tuple[str, str]:
        """The answer that decides an access: a retry is asked again."""
        for _ in range(TRIES):
            answer = self.vps[vp_index].intercept(intercept_message(gfn, WRITE))
            if answer.outcome is not Outcome.RETRY:
                return answer.outcome.value, answer.reason
        raise AssertionError(f"no progress: {answer}")

    def touch(self, region: Region, vp_index: int = 0) -> None:
        """The guest reaches all of it."""
        for gfn in range(region.gfns.start, region.gfns.end):
            outcome, reason = self.ask(gfn, vp_index)
            assert outcome == "resume", (hex(gfn), reason)

    # ------------------------------------------------ what must be true

    def check(self) -> None:
        """The daemon agrees with our books, and all connections are served."""
        seen = self.vmm.statistics()
        assert seen.open_invalidations == self.begun
        regions = {each.start_gfn: each for each in self.vmm.list_regions()}
        assert {gfn: (each.page_count, each.start_uaddr, each.kind) for gfn, each in regions.items()} == {
            gfn: (each.gfns.page_count, each.uaddrs.start_uaddr, each.kind.value)
            for gfn, each in self.regions.items()
        }
        self._check_vmas()
        self._check_reached(seen.no_access_gfns)
        assert not self.link_ended
        for index in self.vps:
            assert self.ask(FIRST_GFN - 1, index) == ("forward", "no_region")
        self.notifier.invalidate(ELSEWHERE)

    def _check_vmas(self) -> None:
        if self.mode.is_live:
            return
        frames = {
            (vma.start_uaddr >> PAGE_SHIFT) + n: vma.start_pfn + n
            for vma in self.vmm.list_vmas()
            for n in range(vma.page_count)
        }
        assert frames == self.frames

    def _check_reached(self, no_access_gfns: int) -> None:
        reached: dict[int, int] = {}
        for mapping in self.vmm.list_mappings():
            for n in range(mapping.page_count):
                gfn, page = mapping.start_gfn + n, (mapping.start_uaddr >> PAGE_SHIFT) + n
                region = next(each for each in self.regions.values() if gfn in each.gfns)
                assert page - region.uaddrs.start == gfn - region.gfns.start
                if not self.mode.is_live:
                    assert mapping.frame == ("host", self.frames[page] - n)
                found = self.vmm.translate(gfn)
                assert found is not None
                if not self.mode.is_live:
                    assert found.frame == ("host", self.frames[page])
                reached[gfn] = page
        movable = [each.gfns for each in self.regions.values() if each.kind is RequestedKind.MOVABLE]
        closed = {gfn for gfns in movable for gfn in range(gfns.start, gfns.end)} - reached.keys()
        assert no_access_gfns == len(closed)
        for gfn in closed:
            assert self.vmm.translate(gfn) is None
        if self.mode.has_own_hypervisor:
            assert self.table.reached == reached
            assert {gfn for gfn, (_, access) in self.table.pages.items() if not access} == closed

    def check_reaches_nothing_of(self, uaddrs: UaddrRange) -> None:
        """What was given back is nowhere, by the daemon's word and by the hypervisor's."""
        for mapping in self.vmm.list_mappings():
            start = mapping.start_uaddr >> PAGE_SHIFT
            assert not uaddrs.overlaps(UaddrRange(start=start, end=start + mapping.page_count))
        assert not [page for page in self.table.reached.values() if page in uaddrs]
