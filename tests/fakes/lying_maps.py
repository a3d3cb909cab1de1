"""Maps that no daemon may ask of a VMM, and those that it may.

Owns the fields of the requests; must not know how they are sent. The VMM has two neighbouring regions, the
second with fewer rights, and has more memory behind both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from intercept_protocol.addresses import PAGE_SIZE, GfnRange, UaddrRange
from intercept_protocol.outcomes import Access

RAM: Final = GfnRange.of(0x100, 4)
"""May be written."""
ROM: Final = GfnRange.of(0x104, 4)
"""May be executed; behind `RAM` for the guest and in the VMM."""
MEMORY_PAGES: Final = 16
"""Pages of the VMM, of which the first 8 are in the regions."""
RW, RX = Access.READ | Access.WRITE, Access.READ | Access.EXECUTE


def uaddrs_of(gfns: GfnRange, memory: UaddrRange) -> UaddrRange:
    start = memory.start + gfns.start - RAM.start
    return UaddrRange(start=start, end=start + gfns.page_count)


def request(start_gfn: int, page_count: int, page: int, access: Access) -> dict[str, int]:
    """`page` is that of the VMM's memory."""
    return {
        "start_gfn": start_gfn, "page_count": page_count, "start_uaddr": page * PAGE_SIZE, "access": access,
    }  # fmt: skip


def at(memory: UaddrRange, fields: dict[str, int]) -> dict[str, int]:
    """The request, for memory that begins where `memory` does."""
    return fields | {"start_uaddr": fields["start_uaddr"] + memory.start_uaddr}


LIES: Final[Mapping[str, tuple[dict[str, int], str]]] = {
    "the heap, in no region": (request(0x200, 1, 12, RW), "no region of this VMM has gfn 0x200"),
    "the heap, just behind": (request(0x108, 1, 8, Access.READ), "no region of this VMM has gfn 0x108"),
    "the heap, before the first": (request(0xFF, 1, 0, Access.READ), "no region of this VMM has gfn 0xff"),
    "the heap, in a region": (request(0x101, 1, 12, RW), "the region has uaddr"),
    "other memory of the region": (request(0x101, 1, 2, RW), "the region has uaddr"),
    "beyond the end": (request(0x106, 4, 6, Access.READ), "ends at gfn 0x108"),
    "two neighbours at once": (request(0x102, 4, 2, Access.READ), "ends at gfn 0x104"),
    "written, where it may not be": (request(0x104, 1, 4, RW), "the region has r-x"),
    "executed, where it may not be": (request(0x100, 1, 0, RX), "the region has rw-"),
    "a right that nobody knows": (request(0x100, 1, 0, Access(8 | 1)), "the region has rw-"),
    "inaccessible, in no region": (request(0x200, 1, 0, Access.NONE), "no region of this VMM has gfn 0x200"),
    "a host page, though none was declared": (
        request(0x100, 1, 0, RW) | {"start_pfn": 0x1000},
        "pfn 0x1000 is not declared for uaddr",
    ),
    "everything": (request(0, 1 << 30, 0, Access.READ), "no region of this VMM has gfn 0x0"),
}
"""Each with a part of what the refusal says."""

TRUTHS: Final[Mapping[str, dict[str, int]]] = {
    "a whole region": request(0x100, 4, 0, RW),
    "its last page": request(0x103, 1, 3, RW),
    "fewer rights": request(0x100, 4, 0, Access.READ),
    "executed": request(0x104, 4, 4, RX),
    "inaccessible": request(0x104, 4, 4, Access.NONE),
}
