"""Writes what happens in one partition into an operator's ring of records.

Owns the ring's layout and how a fact becomes a record; `intercept_protocol.trace` has the records. Writing is
one synchronous step that never waits: a reader that is too slow loses the oldest records, and sees that from
the count. Must not know who reads.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from time import perf_counter_ns
from typing import Final, Protocol

from intercept_protocol import events
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import Fact
from intercept_protocol.hv_message import MemoryAccess
from intercept_protocol.outcomes import Access, Answer
from intercept_protocol.text import sentence
from intercept_protocol.trace import (
    ANSWER_CODES,
    COUNT_PLACE,
    IO,
    MAGIC,
    NO_MEMORY,
    NO_VP,
    RECORD,
    RECORD_SIZE,
    RECORDS_AT_LEAST,
    RECORDS_LIMIT,
    REGION_KINDS,
    RING_HEADER,
    RING_VERSION,
    SOURCES,
    WAITED,
    Kind,
    backing_number,
)
from interceptd.pages.mapping import Extent, Frame, Mapping

_SEALED: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_F_SEAL_FUTURE_WRITE: Final = 0x10
"""include/uapi/linux/fcntl.h: who has it mapped may write it, and nobody else; no page can be given back."""
DECODE, WAIT, RESOLVE, MAP = range(4)
STAGES: Final = 4
"""The stages of an intercept, as metrics have them: the look-up, waiting, what backs the page, the map."""
_HALF: Final = (1 << 32) - 1
"""Half a value of a record, which holds the nanoseconds of two stages: 4.3 s."""
_INTERCEPT: Final = int(Kind.INTERCEPT)
_GUEST_MAPPED: Final = int(Kind.GUEST_MAPPED)
_BACKED: Final = int(Kind.BACKED)
"""Plain numbers, of the records of a first touch."""
_pack_into: Final = RECORD.pack_into
_pack_two_into: Final = struct.Struct("<QHHI2Q32s").pack_into
"""The same record, the last four values of which are 0."""
_SOURCES: Final = {source: code for code, source in enumerate(SOURCES)}
_REGION_KINDS: Final = {kind: code for code, kind in enumerate(REGION_KINDS)}


class TraceRing:
    """A memfd of an operator: a header of `RING_HEADER` bytes, then a power of two of records.

    The memory is the operator's: it has to be allocated and sealed, so that writing it cannot fail.
    """

    def __init__(self, descriptor: int) -> None:
        """Maps it; the descriptor stays the caller's. Raises EINVAL for anything but such a memfd."""
        self.records = records = _records_of(descriptor)
        size = RING_HEADER + records * RECORD_SIZE
        try:
            self._map = mmap.mmap(descriptor, size)
        except OSError as error:
            raise _unfit(sentence(error)) from error
        try:
            _keep_pages(descriptor, size)
        except BaseException:
            self._map.close()
            raise
        self._view = memoryview(self._map)
        self._count = self._view[COUNT_PLACE : COUNT_PLACE + 8].cast("Q")
        self._count[0] = self.written = 0
        self._slots = self._view[RING_HEADER:]
        self._view[:COUNT_PLACE] = MAGIC + struct.pack("=II", RING_VERSION, RECORD_SIZE)
        self._mask = records - 1

    def write(  # noqa: PLR0917 - on the path of a first touch
        self, time_ns: int, kind: int, vp_index: int, detail: int,
        a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0, f: int = 0,
    ) -> None:  # fmt: skip
        """Add a record, over the oldest one. It counts once it is whole."""
        written = self.written
        _pack_into(
            self._slots, (written & self._mask) * RECORD_SIZE, time_ns, kind, vp_index, detail,
            a, b, c, d, e, f,
        )  # fmt: skip
        self._count[0] = self.written = written + 1

    def write_two(  # noqa: PLR0917 - on the hot path
        self, time_ns: int, kind: int, vp_index: int, detail: int, a: int, b: int
    ) -> None:
        """`write` with two values, in two thirds of its time."""
        written = self.written
        _pack_two_into(
            self._slots, (written & self._mask) * RECORD_SIZE, time_ns, kind, vp_index, detail, a, b, b""
        )
        self._count[0] = self.written = written + 1

    def close(self) -> None:
        self._count.release()
        self._slots.release()
        self._view.release()
        self._map.close()


def _records_of(descriptor: int) -> int:
    """How many records a ring holds."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        raise _unfit("it is not a memfd that can be sealed") from None
    if seals & _SEALED != _SEALED:
        raise _unfit("it must be sealed with F_SEAL_SHRINK and F_SEAL_GROW")
    records, rest = divmod(os.fstat(descriptor).st_size - RING_HEADER, RECORD_SIZE)
    if rest or not RECORDS_AT_LEAST <= records <= RECORDS_LIMIT or records & (records - 1):
        raise _unfit(
            f"it must hold {RING_HEADER} bytes and a power of two of {RECORD_SIZE}, "
            f"{RECORDS_AT_LEAST} to {RECORDS_LIMIT} times"
        )
    return records


def _keep_pages(descriptor: int, size: int) -> None:
    """Have nobody take a page back, and see that none is missing. The memfd is mapped already."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        os.ftruncate(descriptor, size)  # which it has: pages behind its end would count for missing ones
    except OSError as error:
        raise _unfit(sentence(error)) from error
    if os.fstat(descriptor).st_blocks * 512 < size:
        raise _unfit("its pages must be allocated (posix_fallocate)")


def _unfit(why: str) -> WireError:
    return WireError(errno.EINVAL, f"trace: the descriptor is not fit for a ring: {why}")


class Times(Protocol):
    """How an intercept went that the look-up did not decide."""

    waited: bool
    spent: list[int]
    """Nanoseconds, by stage."""
    decided_at: int | None
    """What `Trace.written` was at the decision; None if nothing could come in between."""


class Trace:
    """One partition's, while an operator records it."""

    def __init__(self, ring: TraceRing) -> None:
        self._ring = ring

    @property
    def written(self) -> int:
        """How many records there are."""
        return self._ring.written

    def close(self) -> None:
        self._ring.close()

    def intercept(  # noqa: PLR0917 - as `TraceRing.write`
        self, now_ns: int, vp_index: int, wanted: MemoryAccess | None, answer: Answer, took_ns: int,
        times: Times | None,
    ) -> None:  # fmt: skip
        """One that is answered now; `times` of one that the look-up did not decide."""
        detail, gfn = ANSWER_CODES[answer], 0
        if wanted is None:
            detail |= NO_MEMORY
        else:
            gfn, access = wanted
            detail |= access << 8
        if times is None:
            self._ring.write_two(now_ns, _INTERCEPT, vp_index, detail, gfn, took_ns)
            return
        spent = times.spent
        if took_ns > _HALF:  # no stage takes longer than the whole
            spent = [min(stage, _HALF) for stage in spent]
        if times.waited:
            detail |= WAITED
        self._ring.write(
            now_ns, _INTERCEPT, vp_index, detail, gfn, took_ns,
            spent[DECODE] << 32 | spent[WAIT], spent[RESOLVE] << 32 | spent[MAP],
            0 if times.decided_at is None else max(self.written - times.decided_at, 0),
        )  # fmt: skip

    def _write(self, kind: Kind, detail: int, *values: int, vp_index: int = NO_VP) -> None:
        self._ring.write(perf_counter_ns(), kind, vp_index, detail, *values)

    def fact(self, fact: Fact) -> None:
        """What operators see as an event, too; of regions only that one is dangling."""
        write = self._write
        match fact:
            case events.PinnedRegionDangling():
                write(Kind.REGION_DANGLING, 0, fact.start_gfn, fact.page_count)
            case events.InvalidationBegun():
                self._invalidation(Kind.INVALIDATION_BEGUN, fact)
            case events.InvalidationEnded():
                self._invalidation(Kind.INVALIDATION_ENDED, fact)
            case events.RangeInvalidated():
                self._invalidation(Kind.RANGE_INVALIDATED, fact)
            case events.VpAttached():
                write(Kind.VP_ATTACHED, 0, vp_index=fact.vp_index)
            case events.VpDetached():
                write(Kind.VP_DETACHED, 0, vp_index=fact.vp_index)
            case events.PolicySet():
                write(Kind.POLICY_SET, fact.mmio_granularity == "page")
            case events.PartitionEnded():
                write(Kind.PARTITION_ENDED, 0)

    def _invalidation(self, kind: Kind, fact: events.InvalidationFact) -> None:
        self._write(kind, _SOURCES[fact.source], fact.start_uaddr >> PAGE_SHIFT, fact.page_count)

    def region_added(self, fact: events.RegionAdded) -> None:
        """Faults find the region from now on."""
        self._write(
            Kind.REGION_ADDED, _REGION_KINDS[fact.kind], fact.start_gfn, fact.page_count,
            fact.start_uaddr >> PAGE_SHIFT, _rights(fact.writable, fact.executable),
        )  # fmt: skip

    def region_removed(self, fact: events.RegionRemoved) -> None:
        """Faults do not find the region any more."""
        self._write(Kind.REGION_REMOVED, 0, fact.start_gfn, fact.page_count)

    def served(self, took_ns: int, announced: int) -> None:
        """A pass of the region manager: the guest lost what so many announcements said, the oldest ones."""
        self._write(Kind.INVALIDATION_SERVED, 0, took_ns, announced)

    def mapped(self, mapping: Mapping) -> None:
        """The guest's table has it."""
        page, backing = _frame(mapping.frame)
        self._ring.write(
            perf_counter_ns(), _GUEST_MAPPED, NO_VP, mapping.access, mapping.start,
            mapping.end - mapping.start, mapping.start_uaddr_page, page, backing,
        )  # fmt: skip

    def unmapped(self, gfns: GfnRange) -> None:
        """The guest's table has nothing there any more."""
        self._write(Kind.GUEST_UNMAPPED, 0, gfns.start, gfns.end - gfns.start)

    def backed(self, extent: Extent) -> None:
        """A fault learned what backs these pages of the VMM."""
        uaddrs, rights = extent.uaddrs, int(extent.access)  # `|` of flags takes longer than the record
        page, backing = _frame(extent.frame)
        self._ring.write(
            perf_counter_ns(), _BACKED, NO_VP, rights | IO if extent.io else rights, uaddrs.start,
            uaddrs.end - uaddrs.start, page, backing,
        )  # fmt: skip

    def vma_mapped(self, start: int, end: int, start_pfn: int, access: Access, io: bool) -> None:
        """The VMM declared pages [start, end)."""
        self._write(Kind.VMA_MAPPED, access | (IO if io else 0), start, end - start, start_pfn)

    def vma_unmapped(self, start: int, end: int) -> None:
        self._write(Kind.VMA_UNMAPPED, 0, start, end - start)

    def vma_protected(self, start: int, end: int, access: Access) -> None:
        self._write(Kind.VMA_PROTECTED, access, start, end - start)


def _rights(writable: bool, executable: bool) -> int:
    return Access.READ | (Access.WRITE if writable else 0) | (Access.EXECUTE if executable else 0)


def _frame(frame: Frame | None) -> tuple[int, int]:
    return (0, 0) if frame is None else (frame.page, backing_number(frame.backing))
