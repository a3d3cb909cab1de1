"""Which memslots there are, and what must change for a map or an unmap.

Owns the table and its plans; pure, and must not know KVM's ioctls nor who runs. KVM can neither shrink nor
split a slot: what overlaps a change goes whole, and what must stay of it comes back as slots of its own.
Slots are not merged: an invalidation that splits one makes its other half exit for a moment, so those that
come from different extents stay apart.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sortedcontainers import SortedDict, SortedList

from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access


@dataclass(frozen=True, slots=True)
class Memslot:
    """`gfns` and `uaddrs` have the same length. `access` is what the daemon said; KVM knows writable or
    not."""

    slot_id: int
    gfns: GfnRange
    uaddrs: UaddrRange
    access: Access

    @property
    def gpa(self) -> int:
        return self.gfns.start << PAGE_SHIFT

    @property
    def is_writable(self) -> bool:
        return Access.WRITE in self.access

    def uaddr_page(self, gfn: int) -> int:
        return gfn - self.gfns.start + self.uaddrs.start

    def part(self, gfns: GfnRange, slot_id: int) -> Memslot:
        """The same memory at some of the gfns."""
        start = self.uaddr_page(gfns.start)
        return replace(
            self, slot_id=slot_id, gfns=gfns, uaddrs=UaddrRange(start=start, end=start + gfns.page_count)
        )


@dataclass(frozen=True, slots=True)
class Change:
    """First all of `removed` goes, then `added` comes: ids of the former may be those of the latter."""

    removed: tuple[Memslot, ...] = ()
    added: tuple[Memslot, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.removed or self.added)


class MemslotTable:
    """At most `limit` slots, disjoint by gfn."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_start: SortedDict[int, Memslot] = SortedDict()
        self._free: SortedList[int] = SortedList()  # ids that were used before
        self._unused = 0  # ids from here on never were

    def __len__(self) -> int:
        return len(self._by_start)

    def __iter__(self) -> Iterator[Memslot]:
        return iter(self._by_start.values())

    def find(self, gfn: int) -> Memslot | None:
        index = self._by_start.bisect_right(gfn) - 1
        if index < 0:
            return None
        slot: Memslot = self._by_start.peekitem(index)[1]
        return slot if gfn in slot.gfns else None

    def overlapping(self, gfns: GfnRange) -> list[Memslot]:
        first = max(self._by_start.bisect_right(gfns.start) - 1, 0)
        starts = self._by_start.islice(first, self._by_start.bisect_left(gfns.end))
        return [slot for start in starts if (slot := self._by_start[start]).gfns.overlaps(gfns)]

    def behind(self, uaddrs: UaddrRange) -> list[GfnRange]:
        """The gfns at which the guest reaches part of `uaddrs`; a walk over all slots."""
        found = []
        for slot in self:
            if (clipped := slot.uaddrs.clip(uaddrs)) is not None:
                start = clipped.start - slot.uaddrs.start + slot.gfns.start
                found.append(GfnRange(start=start, end=start + clipped.page_count))
        return found

    def plan_map(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access) -> Change:
        """What makes the guest reach `uaddrs` at `gfns`; nothing where it does so already."""
        new = Memslot(-1, gfns, uaddrs, access)
        overlapping = self.overlapping(gfns)
        if len(overlapping) == 1 and overlapping[0].gfns.covers(gfns):
            (held,) = overlapping
            if held.access == access and held.uaddr_page(gfns.start) == uaddrs.start:
                return Change()
        return self._plan(overlapping, gfns, [new])

    def plan_unmap(self, gfns: GfnRange) -> Change:
        """What leaves the guest nothing at `gfns`."""
        return self._plan(self.overlapping(gfns), gfns, [])

    def apply(self, change: Change) -> None:
        """Record a change that was carried out."""
        for slot in change.removed:
            del self._by_start[slot.gfns.start]
            self._free.add(slot.slot_id)
        for slot in change.added:
            self._by_start[slot.gfns.start] = slot
            self._free.discard(slot.slot_id)
            self._unused = max(self._unused, slot.slot_id + 1)

    def _plan(self, removed: list[Memslot], gfns: GfnRange, new: list[Memslot]) -> Change:
        """Raises ENOSPC when it takes more slots than there are."""
        rests = [
            slot.part(rest, -1) for slot in removed for rest in _outside(slot.gfns, gfns) if rest is not None
        ]
        wanted = rests + new
        if len(self) - len(removed) + len(wanted) > self._limit:
            raise WireError(errno.ENOSPC, f"KVM has {self._limit} memslots, and {len(self)} are in use")
        ids = self._ids([slot.slot_id for slot in removed], len(wanted))
        return Change(tuple(removed), tuple(replace(slot, slot_id=next(ids)) for slot in wanted))

    def _ids(self, returned: list[int], count: int) -> Iterator[int]:
        known = sorted([*returned, *self._free.islice(0, count)])[:count]
        return iter([*known, *range(self._unused, self._unused + count - len(known))])


def _outside(gfns: GfnRange, cut: GfnRange) -> tuple[GfnRange | None, GfnRange | None]:
    """What of `gfns` lies before and behind `cut`."""
    before = GfnRange(start=gfns.start, end=cut.start) if gfns.start < cut.start else None
    behind = GfnRange(start=cut.end, end=gfns.end) if cut.end < gfns.end else None
    return before, behind
