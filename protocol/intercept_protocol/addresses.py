"""Page numbers, and ranges of pages that cannot wrap.

Owns the arithmetic on guest-physical and VMM addresses; must not know what is mapped where. Every range is
half-open and held in 4 KiB pages, whatever unit it was given in.
"""

from __future__ import annotations

from typing import ClassVar, NewType, Self

import msgspec

Gpa = NewType("Gpa", int)
"""A guest-physical address in bytes."""
Gfn = NewType("Gfn", int)
"""A guest-physical page number."""
Uaddr = NewType("Uaddr", int)
"""An address in the VMM's address space, in bytes."""
Pfn = NewType("Pfn", int)
"""A host page number; only the declared address space uses them."""

PAGE_SHIFT = 12
"""HV_HYP_PAGE_SHIFT: the hypervisor's page is 4 KiB on every architecture."""
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_LIMIT = 1 << (64 - PAGE_SHIFT)
"""Page numbers lie below this: 2^64 bytes hold 2^52 pages."""


class RangeError(ValueError):
    """A range is empty, misaligned, or ends beyond the address space; `field` names the wrong field."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class PageRange(msgspec.Struct, frozen=True, order=True, gc=False, kw_only=True):
    """The pages from page number `start` up to, but excluding, page number `end`.

    Both are page numbers, never addresses or lengths, so the constructor takes keyword arguments only. It
    checks nothing: the daemon makes 14 ranges for a first touch, and a check in each makes the touch 5 % and
    an invalidation 3 % slower (tests/benchmarks/inside.py). For numbers from outside use a classmethod: its
    name says what it takes, and it raises `RangeError` for a range that is empty, misaligned or beyond the
    address space.

    gc=False: integers form no cycles, and a daemon keeps very many ranges.
    """

    start: int
    end: int

    start_field: ClassVar[str] = "start"

    @classmethod
    def at_page(cls, start_page: int, page_count: int) -> Self:
        """From the first page number and the number of pages."""
        if page_count <= 0:
            raise RangeError("page_count", f"must be at least 1 page, got {page_count}")
        return cls._checked(start_page, page_count, count_field="page_count")

    @classmethod
    def _checked(cls, start: int, page_count: int, *, count_field: str) -> Self:
        if not 0 <= start < PAGE_LIMIT:
            raise RangeError(cls.start_field, f"page {start:#x} lies outside [0x0, {PAGE_LIMIT:#x})")
        if start + page_count > PAGE_LIMIT:
            raise RangeError(
                count_field, f"{page_count:#x} pages from page {start:#x} end beyond page {PAGE_LIMIT:#x}"
            )
        return cls(start=start, end=start + page_count)

    @property
    def page_count(self) -> int:
        """How many pages the range has; at least one."""
        return self.end - self.start

    def __contains__(self, page: int) -> bool:
        return self.start <= page < self.end

    def covers(self, other: PageRange) -> bool:
        """Whether all of `other` lies in this range."""
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: PageRange) -> bool:
        """Whether the two ranges have a page in common."""
        return self.start < other.end and other.start < self.end

    def clip(self, other: PageRange) -> Self | None:
        """The part of this range that lies in `other`; None if there is none."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return type(self)(start=start, end=end) if start < end else None

    def slice(self, start: int, end: int) -> Self:
        """The pages [start, end), which must lie in this range."""
        return type(self)(start=start, end=end)

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


class GfnRange(PageRange, frozen=True):
    """Guest-physical pages, printed as page numbers."""

    start_field: ClassVar[str] = "start_gfn"

    @classmethod
    def of(cls, start_gfn: int, page_count: int) -> Self:
        """From the first gfn and the number of pages."""
        return cls.at_page(start_gfn, page_count)


class PfnRange(PageRange, frozen=True):
    """Host pages, printed as page numbers."""

    start_field: ClassVar[str] = "start_pfn"

    @classmethod
    def of(cls, start_pfn: int, page_count: int) -> Self:
        """From the first pfn and the number of pages."""
        return cls.at_page(start_pfn, page_count)


class UaddrRange(PageRange, frozen=True):
    """Pages of the VMM's address space, held as page numbers, printed as byte addresses."""

    start_field: ClassVar[str] = "start_uaddr"

    @classmethod
    def of_bytes(cls, start_uaddr: int, length: int) -> Self:
        """From a byte address and a length in bytes; both must be multiples of the page size."""
        if length <= 0 or length % PAGE_SIZE:
            raise RangeError(
                "length", f"must be one or more whole pages of {PAGE_SIZE} bytes, got {length:#x}"
            )
        return cls._checked(uaddr_page(start_uaddr), length >> PAGE_SHIFT, count_field="length")

    @classmethod
    def of_pages(cls, start_uaddr: int, page_count: int) -> Self:
        """From a byte address and the number of pages."""
        return cls.at_page(uaddr_page(start_uaddr), page_count)

    @property
    def start_uaddr(self) -> Uaddr:
        """The byte address of the first page."""
        return Uaddr(self.start << PAGE_SHIFT)

    @property
    def length(self) -> int:
        """In bytes."""
        return self.page_count << PAGE_SHIFT

    def __str__(self) -> str:
        return f"[{self.start << PAGE_SHIFT:#x}, {self.end << PAGE_SHIFT:#x})"


def uaddr_page(uaddr: int) -> int:
    """The page number of a uaddr; raises `RangeError` if it is not page-aligned."""
    if uaddr % PAGE_SIZE:
        raise RangeError("start_uaddr", f"must be a multiple of {PAGE_SIZE}, got {uaddr:#x}")
    return uaddr >> PAGE_SHIFT
