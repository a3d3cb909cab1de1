"""The software second-level table: gfn -> (frame, access), kept as extents.

Owns the entries and how many table pages they take; must not know hypercalls. Pure and synchronous: one edit
costs the extents it touches, whether it spans a page or 64 GiB.
"""

from __future__ import annotations

from dataclasses import replace

from intercept_protocol.addresses import GfnRange
from intercept_protocol.outcomes import Access
from interceptd.mapping import Mapping
from interceptd.range_map import RangeMap

GFNS_PER_TABLE_PAGE = 512
"""A 4 KiB table page holds 512 entries of 8 bytes."""


class SoftwareSlat:
    """What the guest can reach. Entries without rights are NO_ACCESS."""

    __slots__ = ("_entries", "_no_access_gfns")

    def __init__(self) -> None:
        self._entries: RangeMap[Mapping] = RangeMap()
        self._no_access_gfns = 0

    def __len__(self) -> int:
        """Extents, NO_ACCESS included."""
        return len(self._entries)

    @property
    def gfn_count(self) -> int:
        return self._entries.page_count

    @property
    def no_access_gfns(self) -> int:
        return self._no_access_gfns

    @property
    def table_pages(self) -> int:
        return -(-self._entries.page_count // GFNS_PER_TABLE_PAGE)

    def entry(self, gfn: int) -> Mapping | None:
        return self._entries.find(gfn)

    def entries(self, gfns: GfnRange) -> list[Mapping]:
        """What is mapped in `gfns`, cut to them."""
        return self._entries.clipped(gfns)

    def new_gfns(self, gfns: GfnRange) -> list[tuple[int, int]]:
        """The parts of `gfns` that have no entry yet and so would take table space."""
        return self._entries.gaps(gfns)

    def replace(self, mapping: Mapping) -> None:
        """Write the entries of `mapping` over whatever is there."""
        self.clear(mapping.gfns)
        self._no_access_gfns += _no_access(mapping)
        self._entries.insert(mapping if mapping.access else self._joined(mapping))

    def _joined(self, mapping: Mapping) -> Mapping:
        """Take out the NO_ACCESS neighbours that `mapping` continues, and return them all as one: memory that
        is unmapped page by page must not cost an entry a page for ever."""
        before = self._entries.find(mapping.start - 1)
        if before is not None and _continues(before, mapping):
            self._entries.carve(before)
            mapping = replace(before, end=mapping.end)
        after = self._entries.find(mapping.end)
        if after is not None and _continues(mapping, after):
            self._entries.carve(after)
            mapping = replace(mapping, end=after.end)
        return mapping

    def clear(self, gfns: GfnRange) -> int:
        """Remove the entries in `gfns`; returns how many gfns had one."""
        taken = self._entries.carve(gfns)
        self._no_access_gfns -= sum(_no_access(entry) for entry in taken)
        return sum(entry.end - entry.start for entry in taken)


def _continues(first: Mapping, second: Mapping) -> bool:
    """Whether two entries are one NO_ACCESS range of one region."""
    return (
        first.access is second.access is Access.NONE
        and first.start_uaddr_page + second.start - first.start == second.start_uaddr_page
    )


def _no_access(entry: Mapping) -> int:
    return entry.end - entry.start if entry.access is Access.NONE else 0
