"""The software second-level table: gfn -> (frame, access), stored as extents.

Owns the entries, the capacity of a table page, and that a successor and a trace learn of every edit. Must not
know hypercalls. An edit is synchronous and costs what its extents cost, whether it spans a page or 64 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator

from intercept_protocol.addresses import GfnRange
from interceptd.ledger import records
from interceptd.ledger.journal import Journal
from interceptd.pages.mapping import Cache, Mapping, insert_joined
from interceptd.pages.range_map import RangeMap
from interceptd.scheduling.time_share import give_way_shielded
from interceptd.telemetry.trace import Trace

ENTRIES_PER_PART = 16
"""Entries that a walk looks at before it lets others run."""
GFNS_PER_TABLE_PAGE = 512
"""A 4 KiB table page holds 512 entries of 8 bytes."""


class SoftwareSlat:
    """What the guest can access. Entries without rights are NO_ACCESS."""

    __slots__ = ("_entries", "_journal", "_no_access_gfns", "trace")

    def __init__(self, journal: Journal | None = None) -> None:
        self._entries: RangeMap[Mapping] = RangeMap()
        self._journal = journal
        self._no_access_gfns = 0
        self.trace: Trace | None = None

    def __len__(self) -> int:
        """Extents, NO_ACCESS included."""
        return len(self._entries)

    @property
    def gfn_count(self) -> int:
        return self._entries.page_count

    @property
    def no_access_gfns(self) -> int:
        return self._no_access_gfns

    def entry(self, gfn: int) -> Mapping | None:
        return self._entries.find(gfn)

    def entries(self, gfns: GfnRange) -> list[Mapping]:
        """The entries in `gfns`, sliced to it."""
        return self._entries.clipped(gfns)

    def first_entries(self, gfns: GfnRange) -> tuple[GfnRange, list[Mapping]]:
        """A part from the start of `gfns`, and the few entries that there are, for walks that yield."""
        part = self._entries.head(gfns, ENTRIES_PER_PART)
        part = GfnRange(start=part.start, end=part.end)
        return part, self._entries.clipped(part)

    def new_gfns(self, gfns: GfnRange) -> list[tuple[int, int]]:
        """The parts of `gfns` without an entry, which would need table space."""
        return self._entries.gaps(gfns)

    def gaps(self, gfns: GfnRange) -> Iterator[list[GfnRange]]:
        """The parts of `gfns` without an entry, a few at a time; edit it between two only in what it gave."""
        rest = gfns
        while rest.page_count:
            part = self._entries.head(rest, ENTRIES_PER_PART)
            gaps = self._entries.gaps(part)
            rest = GfnRange(start=part.end, end=rest.end)
            yield [GfnRange(start=start, end=end) for start, end in gaps]

    def insert(self, mapping: Mapping) -> bool:
        """Write the entries of `mapping` if there are none yet; False if there is one."""
        inserted = insert_joined(self._entries, mapping)
        if inserted:
            self._no_access_gfns += _no_access(mapping)
            if self._journal is not None:
                self._journal.append(mapped(mapping))
            if self.trace is not None:
                self.trace.mapped(mapping)
        return inserted

    def replace(self, mapping: Mapping) -> None:
        """Write the entries of `mapping`, replacing existing ones. One record tells both."""
        self._carve(mapping)
        self.insert(mapping)

    def take_over(self, table: SoftwareSlat) -> None:
        """Have the entries of `table`, which a predecessor recorded; it must not be used any more."""
        self._entries, self._no_access_gfns = table._entries, table._no_access_gfns

    def __iter__(self) -> Iterator[Mapping]:
        """The entries in order; do not edit under it."""
        return iter(self._entries)

    async def discard(self) -> None:
        """Free all entries in pieces; for the end."""
        while self._entries.drop_some():
            await give_way_shielded()

    def clear(self, gfns: GfnRange) -> None:
        """Remove the entries in `gfns`."""
        if not self._carve(gfns):
            return
        if self._journal is not None:
            self._journal.append(records.Unmapped(gfns.start, gfns.end))
        if self.trace is not None:
            self.trace.unmapped(gfns)

    def _carve(self, pages: Mapping | GfnRange) -> bool:
        removed = self._entries.carve(pages)
        for entry in removed:
            self._no_access_gfns -= _no_access(entry)
        return bool(removed)


def mapped(entry: Mapping) -> records.Mapped:
    """The record of an entry."""
    frame = entry.frame
    return records.Mapped(
        entry.start,
        entry.end,
        entry.start_uaddr_page,
        entry.access,  # a number; `value` would cost as much as the encoding
        None if frame is None else frame.backing,
        0 if frame is None else frame.page,
        entry.cache is Cache.NORMAL,
    )


def _no_access(entry: Mapping) -> int:
    return 0 if entry.access else entry.end - entry.start
