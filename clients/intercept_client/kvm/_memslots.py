"""Which memslots there are, and what must change for a map or an unmap.

Owns the table and its plans; pure, and must not know KVM's ioctls nor who runs. KVM can neither shrink, grow
nor split a slot: what overlaps a change goes whole, and what must stay of it comes back as slots of its own.

Slots that continue each other are merged only when a change would not fit otherwise. The daemon maps RAM in
windows of 2 MiB, so without merging the guest's RAM would end at 2 MiB times the number of slots. Merging
earlier would cost more than it saves: it takes slots out, which stops every vCPU for a moment, and so does
splitting a merged slot when part of it is unmapped. Slots of two regions are never merged, so unmapping a
whole region never takes an additional slot.
"""

from __future__ import annotations

import errno
import heapq
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from sortedcontainers import SortedDict, SortedList

from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access

MERGE_STEP: Final = 64
"""The most slots that one change merges. It bounds how long the vCPUs stand still (`make verify` prints the
time), and one merge makes room for the next 63 maps."""
SLOT_PAGE_LIMIT: Final = 2**31 - 1
"""The most pages of one slot: KVM_MEM_MAX_NR_PAGES, include/linux/kvm_host.h."""


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

    def continues(self, other: Memslot) -> bool:
        """Whether one slot could hold both, `other` first."""
        return (
            self.gfns.start == other.gfns.end
            and self.uaddrs.start == other.uaddrs.end
            and self.access == other.access
        )

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
    """At most `limit` slots, disjoint by gfn.

    Maps leave an eighth of them to unmaps, which split slots and may not fail: a refused map stops a vCPU, a
    refused unmap ends the partition.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._map_limit = limit - limit // 8
        self._by_start: SortedDict[int, Memslot] = SortedDict()
        self._free: SortedList[int] = SortedList()  # ids that were used before
        self._unused = 0  # ids from here on never were
        self._merged_to = 0
        """The gfn where the next search for slots to merge begins: going round, small slots are merged before
        large ones, which take KVM longer to make."""
        self._boundaries: Counter[int] = Counter()
        """The gfns where regions begin and end, with the number of regions that do so."""

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

    def add_region(self, gfns: GfnRange) -> None:
        """Merge nothing across the ends of `gfns` from now on; counted."""
        self._boundaries.update((gfns.start, gfns.end))

    def remove_region(self, gfns: GfnRange) -> None:
        """Take back one `add_region`."""
        self._boundaries -= Counter((gfns.start, gfns.end))

    def plan_map(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access) -> Change:
        """What makes the guest reach `uaddrs` at `gfns`; nothing where it does so already."""
        new = Memslot(-1, gfns, uaddrs, access)
        overlapping = self.overlapping(gfns)
        if len(overlapping) == 1 and overlapping[0].gfns.covers(gfns):
            (held,) = overlapping
            if held.access == access and held.uaddr_page(gfns.start) == uaddrs.start:
                return Change()
        return self._plan(overlapping, gfns, [new], max(self._map_limit, len(self)))

    def plan_unmap(self, gfns: GfnRange) -> Change:
        """What leaves the guest nothing at `gfns`."""
        return self._plan(self.overlapping(gfns), gfns, [], self._limit)

    def apply(self, change: Change) -> None:
        """Record a change that was carried out."""
        for slot in change.removed:
            del self._by_start[slot.gfns.start]
            self._free.add(slot.slot_id)
        for slot in change.added:
            self._by_start[slot.gfns.start] = slot
            self._free.discard(slot.slot_id)
            self._unused = max(self._unused, slot.slot_id + 1)

    def _plan(self, removed: list[Memslot], gfns: GfnRange, new: list[Memslot], limit: int) -> Change:
        """Merges where there would be more than `limit` slots. Raises ENOSPC if there are even so."""
        rests = [
            slot.part(rest, -1) for slot in removed for rest in _outside(slot.gfns, gfns) if rest is not None
        ]
        wanted = sorted(rests + new, key=_start)
        missing = len(self) - len(removed) + len(wanted) - limit
        if missing > 0:
            removed, wanted = self._merge(removed, wanted, missing)
        ids = self._ids([slot.slot_id for slot in removed], len(wanted))
        return Change(tuple(removed), tuple(replace(slot, slot_id=next(ids)) for slot in wanted))

    def _merge(
        self, removed: list[Memslot], wanted: list[Memslot], missing: int
    ) -> tuple[list[Memslot], list[Memslot]]:
        """What to remove and what to add instead, so that the change takes `missing` slots fewer."""
        going = {slot.slot_id for slot in removed}
        for begin in (self._merged_to, 0):  # from 0 too: a run may lie across `_merged_to`
            runs = list(_first_runs(self._after(begin, going, wanted), self._boundaries))
            if sum(len(run) - 1 for run in runs) >= missing:
                break
        else:
            raise WireError(
                errno.ENOSPC,
                f"KVM has {self._limit} memslots, {len(self)} are in use, and merging frees too few",
            )
        self._merged_to = runs[-1][-1].gfns.end
        parts = [slot for run in runs for slot in run]
        return (
            removed + [slot for slot in parts if slot.slot_id >= 0],
            [slot for slot in wanted if slot not in parts] + [_joined(run) for run in runs],
        )

    def _after(self, begin: int, going: set[int], wanted: list[Memslot]) -> Iterator[Memslot]:
        """The slots after a change, by gfn: those from `begin` on, then those before it."""
        for low, high in ((begin, None), (None, begin)):
            kept = (self._by_start[start] for start in self._by_start.irange(low, high, (True, False)))
            yield from heapq.merge(
                (slot for slot in kept if slot.slot_id not in going),
                (slot for slot in wanted if (slot.gfns.start >= begin) is (high is None)),
                key=_start,
            )

    def _ids(self, returned: list[int], count: int) -> Iterator[int]:
        known = sorted([*returned, *self._free.islice(0, count)])[:count]
        return iter([*known, *range(self._unused, self._unused + count - len(known))])


def _outside(gfns: GfnRange, cut: GfnRange) -> tuple[GfnRange | None, GfnRange | None]:
    """What of `gfns` lies before and behind `cut`."""
    before = GfnRange(start=gfns.start, end=cut.start) if gfns.start < cut.start else None
    behind = GfnRange(start=cut.end, end=gfns.end) if cut.end < gfns.end else None
    return before, behind


def _start(slot: Memslot) -> int:
    return slot.gfns.start


def _first_runs(slots: Iterable[Memslot], boundaries: Container[int]) -> Iterator[list[Memslot]]:
    """Runs of `slots` in which each continues the one before and none begins at one of `boundaries` but the
    first, until they hold `MERGE_STEP` slots together."""
    room = MERGE_STEP
    run: list[Memslot] = []
    for slot in slots:
        if run and not (
            slot.continues(run[-1])
            and slot.gfns.start not in boundaries
            and slot.gfns.end - run[0].gfns.start <= SLOT_PAGE_LIMIT
        ):
            if len(run) > 1:
                yield run
                room -= len(run)
            run = []
        run.append(slot)
        if len(run) >= room:
            break
    if len(run) > 1:
        yield run


def _joined(run: list[Memslot]) -> Memslot:
    """One slot for all of a run."""
    first, last = run[0], run[-1]
    return replace(
        first,
        slot_id=-1,
        gfns=GfnRange(start=first.gfns.start, end=last.gfns.end),
        uaddrs=UaddrRange(start=first.uaddrs.start, end=last.uaddrs.end),
    )
