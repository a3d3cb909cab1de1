"""The recorded partition as its records tell it: regions, VMAs, what the guest reaches, what is open.

Owns what each record changes there. Must not know the daemon that repeats it, nor answers. Numbers come from
a file that may say anything: ranges that cannot be raise `RangeError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import NamedTuple

from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, UaddrRange
from intercept_protocol.messages import MappingView, RegionKind, RegionView, VmaView
from intercept_protocol.outcomes import Access
from intercept_protocol.trace import IO, Kind, Traced, Words, backing_number
from interceptctl.page_map import PageMap, Span, joined

Backing = int | None
"""The number of what a frame belongs to; None for a declared host page."""


class Vma(NamedTuple):
    """Pages [start, end) of the VMM, and what backs them."""

    start: int
    end: int
    page: int
    """Of the backing, behind the first."""
    access: Access
    io: bool
    backing: Backing = None
    since: int | None = None
    """The record that told it; None if a state did."""
    since_ns: int = 0

    def slice(self, start: int, end: int) -> Vma:
        return self._replace(start=start, end=end, page=self.page + start - self.start)


class Mapping(NamedTuple):
    """Gfns [start, end) that the guest reaches."""

    start: int
    end: int
    uaddr_page: int
    page: int
    access: Access
    backing: Backing
    made: Made

    def slice(self, start: int, end: int) -> Mapping:
        ahead = start - self.start
        return self._replace(start=start, end=end, uaddr_page=self.uaddr_page + ahead, page=self.page + ahead)


@dataclass(eq=False, slots=True)
class Made:
    """How mappings came about that were made in a row."""

    answered: bool = False
    """Whether the intercept that they were made for was answered since."""
    early: bool = False
    """Whether, in the replay, they were made before: by another intercept, which was answered first in the
    recording, or because a state shows what is being mapped."""
    of_state: bool = False


@dataclass(eq=False, slots=True)
class Region:
    """`waiting` is a pinned one whose pages are not all mapped yet."""

    gfns: GfnRange
    uaddrs: UaddrRange
    kind: RegionKind
    access: Access
    dangling: bool = False
    waiting: bool = False

    @property
    def start(self) -> int:
        return self.gfns.start

    @property
    def end(self) -> int:
        return self.gfns.end

    def slice(self, start: int, end: int) -> Region:
        """A region is not cut: what is put in its place removes it whole."""
        raise AssertionError(f"{start:#x} to {end:#x} of region {self.gfns}")

    def uaddr_page(self, gfn: int) -> int:
        return gfn - self.gfns.start + self.uaddrs.start


@dataclass(eq=False, slots=True)
class Model:
    """`open` has the ranges that notifiers have begun and not ended."""

    words: Words
    mmio_granularity: str
    open: Counter[UaddrRange] = field(default_factory=Counter)
    regions: PageMap[Region] = field(default_factory=PageMap)
    vmas: PageMap[Vma] = field(default_factory=PageMap)
    table: PageMap[Mapping] = field(default_factory=PageMap)
    _run: Made | None = None

    # ------------------------------------------------ the lists of a state

    def add_regions(self, views: Iterable[RegionView]) -> None:
        for view in views:
            gfns = GfnRange.of(view.start_gfn, view.page_count)
            uaddrs = UaddrRange.of_pages(view.start_uaddr, view.page_count)
            access = _rights(readable=True, writable=view.writable, executable=view.executable)
            region = Region(
                gfns, uaddrs, RegionKind(view.kind), access,
                dangling=view.state == "dangling", waiting=view.state == "populating",
            )  # fmt: skip
            self._put_region(region)

    def add_vmas(self, views: Iterable[VmaView]) -> None:
        for view in views:
            uaddrs = UaddrRange.of_pages(view.start_uaddr, view.page_count)
            access = _rights(readable=view.readable, writable=view.writable, executable=view.executable)
            self.vmas.put(Vma(uaddrs.start, uaddrs.end, view.start_pfn, access, view.io))

    def add_mappings(self, views: Iterable[MappingView]) -> None:
        for view in views:
            gfns = GfnRange.of(view.start_gfn, view.page_count)
            name, page = view.frame
            uaddr_page, access = view.start_uaddr >> PAGE_SHIFT, Access(view.access & 7)
            made = Made(answered=True, of_state=True)
            self.table.put(
                Mapping(gfns.start, gfns.end, uaddr_page, page, access, backing_number(name), made)
            )

    # ------------------------------------------------ records

    def apply(self, record: Traced) -> None:
        """What holds after the record. An intercept changes nothing."""
        a, b, c, d = record.values[:4]
        if record.kind not in {Kind.GUEST_MAPPED, Kind.BACKED}:
            self._run = None
        match record.kind:
            case Kind.REGION_ADDED:
                kind = RegionKind(_word(self.words.region_kinds, record.detail, record))
                self._put_region(
                    Region(
                        GfnRange.of(a, b), UaddrRange.at_page(c, b), kind, Access(d & 7),
                        waiting=kind is RegionKind.PINNED,
                    )
                )  # fmt: skip
            case Kind.REGION_REMOVED:
                self._remove_regions(GfnRange.of(a, b))
            case Kind.REGION_DANGLING:
                for region in self.regions.overlapping(a, a + b):
                    region.dangling = True
            case Kind.GUEST_MAPPED:
                self._map(record)
            case Kind.GUEST_UNMAPPED:
                gfns = GfnRange.of(a, b)
                self.table.carve(gfns.start, gfns.end)
            case Kind.POLICY_SET:
                self.mmio_granularity = "page" if record.detail else "vma"
            case _:
                self._apply_to_memory(record)

    def _apply_to_memory(self, record: Traced) -> None:
        """To VMAs and invalidations."""
        access = Access(record.detail & 7)
        match record.kind:
            case Kind.VMA_MAPPED:
                self.vmas.put(vma_of(record, record.values[2], None))
            case Kind.VMA_UNMAPPED:
                self.forget(_uaddrs(record))
            case Kind.VMA_PROTECTED:
                uaddrs = _uaddrs(record)
                for vma in self.vmas.clipped(uaddrs.start, uaddrs.end):
                    self.vmas.put(vma._replace(access=access))
            case Kind.INVALIDATION_BEGUN if self.source(record) == "notifier":
                self.open[_uaddrs(record)] += 1
            case Kind.INVALIDATION_ENDED if self.source(record) == "notifier":
                self.open[_uaddrs(record)] -= 1
                self.open = +self.open

    def _map(self, record: Traced) -> None:
        a, b, uaddr_page, page, backing, _ = record.values
        gfns, access = GfnRange.of(a, b), Access(record.detail & 7)
        if not access:
            self.table.carve(gfns.start, gfns.end)
            self._run = None
            return
        if self._run is None:
            self._run = Made()
        UaddrRange.at_page(uaddr_page, b)
        before = self.table.at(gfns.start)
        self._run.early |= before is not None and before.made.of_state
        self.table.put(Mapping(gfns.start, gfns.end, uaddr_page, page, access, backing, self._run))

    def _put_region(self, region: Region) -> None:
        self._remove_regions(region.gfns)
        self.regions.put(region)

    def _remove_regions(self, gfns: GfnRange) -> None:
        for region in self.regions.overlapping(gfns.start, gfns.end):
            self.regions.carve(region.start, region.end)

    def forget(self, uaddrs: UaddrRange) -> None:
        """Nobody knows any more what is at these pages, or nothing is."""
        self.vmas.carve(uaddrs.start, uaddrs.end)

    # ------------------------------------------------ looking

    def source(self, record: Traced) -> str:
        """Of an invalidation."""
        return _word(self.words.sources, record.detail, record)

    def reached(self, region: Region) -> list[Span]:
        """The gfns of the region that the guest reaches."""
        return joined((item.start, item.end) for item in self.table.clipped(region.start, region.end))

    def gfn_of(self, page: int) -> int | None:
        """Where the guest may see a page of the VMM."""
        for region in self.regions:
            if page in region.uaddrs:
                return page - region.uaddrs.start + region.start
        return None

    def open_at(self, page: int) -> bool:
        return any(page in uaddrs for uaddrs in self.open)


def vma_of(record: Traced, page: int, backing: Backing) -> Vma:
    """What a record says of the pages that it begins with."""
    uaddrs = _uaddrs(record)
    access, io = Access(record.detail & 7), bool(record.detail & IO)
    return Vma(uaddrs.start, uaddrs.end, page, access, io, backing, record.number, record.time_ns)


def _uaddrs(record: Traced) -> UaddrRange:
    return UaddrRange.at_page(*record.values[:2])


def _word(words: Sequence[str], index: int, record: Traced) -> str:
    if index >= len(words):
        raise ValueError(f"record {record.number} has number {index} for one of {len(words)} words")
    return words[index]


def _rights(*, readable: bool, writable: bool, executable: bool) -> Access:
    rights = ((readable, Access.READ), (writable, Access.WRITE), (executable, Access.EXECUTE))
    return reduce(or_, (right for given, right in rights if given), Access.NONE)
