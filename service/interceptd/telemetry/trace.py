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
from collections.abc import Callable
from time import perf_counter_ns
from typing import Final, Protocol

from intercept_protocol import events
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import Fact
from intercept_protocol.hv_message import MemoryAccess
from intercept_protocol.outcomes import Access, Answer
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
)
from interceptd.pages.mapping import Extent, Frame, Mapping

_SEALED: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_F_SEAL_FUTURE_WRITE: Final = 0x10
"""include/uapi/linux/fcntl.h: who has it mapped may write it, and nobody else; no page can be given back."""
_HALF: Final = (1 << 32) - 1
_SOURCES: Final = {source: code for code, source in enumerate(SOURCES)}
_REGION_KINDS: Final = {kind: code for code, kind in enumerate(REGION_KINDS)}


class TraceRing:
    """A memfd of an operator: a header of `RING_HEADER` bytes, then a power of two of records.

    The memory is the operator's: it has to be allocated and sealed, so that writing it cannot fail.
    """

    def __init__(self, descriptor: int) -> None:
        """Maps it; the descriptor stays the caller's. Raises EINVAL for anything but such a memfd."""
        self.records = records = _records_of(descriptor)
        try:
            self._map = mmap.mmap(descriptor, RING_HEADER + records * RECORD_SIZE)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        except OSError as error:
            raise _unfit(os.strerror(error.errno or errno.EINVAL)) from error
        if os.fstat(descriptor).st_blocks * 512 < len(self._map):  # after the seal, which keeps them
            self._map.close()
            raise _unfit("its pages must be allocated (posix_fallocate)")
        self._view = memoryview(self._map)
        self._count = self._view[COUNT_PLACE : COUNT_PLACE + 8].cast("Q")
        self._count[0] = self._written = 0
        self._view[:COUNT_PLACE] = MAGIC + struct.pack("=II", RING_VERSION, RECORD_SIZE)
        self._mask = records - 1
        self._pack: Callable[..., None] = RECORD.pack_into

    def write(  # noqa: PLR0917 - keywords would double its time
        self, kind: int, vp_index: int, detail: int, a: int, b: int = 0, c: int = 0, d: int = 0, e: int = 0,
        f: int = 0,
    ) -> None:  # fmt: skip
        """Add a record, over the oldest one. It counts once it is whole."""
        written = self._written
        self._pack(
            self._view, RING_HEADER + (written & self._mask) * RECORD_SIZE,
            perf_counter_ns(), kind, vp_index, detail, a, b, c, d, e, f,
        )  # fmt: skip
        self._written = written + 1
        self._count[0] = written + 1

    def close(self) -> None:
        self._count.release()
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


def _unfit(why: str) -> WireError:
    return WireError(errno.EINVAL, f"trace: the descriptor is not fit for a ring: {why}")


class Times(Protocol):
    """How long the stages of an intercept took, in ns."""

    waited: bool
    decode_ns: int
    wait_ns: int
    resolve_ns: int
    map_ns: int


def _two(first: int, second: int) -> int:
    """In one number, each at most 4.3 s."""
    return min(first, _HALF) << 32 | min(second, _HALF)


class Trace:
    """One partition's, while an operator records it."""

    def __init__(self, ring: TraceRing) -> None:
        self._ring = ring

    def close(self) -> None:
        self._ring.close()

    def intercept(
        self, vp_index: int, wanted: MemoryAccess | None, answer: Answer, total_ns: int, times: Times | None
    ) -> None:
        """An answered one; `times` of one that the look-up did not decide."""
        detail, gfn = ANSWER_CODES[answer], 0
        if wanted is None:
            detail |= NO_MEMORY
        else:
            gfn, access = wanted
            detail |= access << 8
        if times is None:
            self._ring.write(Kind.INTERCEPT, vp_index, detail, gfn, total_ns)
            return
        if times.waited:
            detail |= WAITED
        self._ring.write(
            Kind.INTERCEPT, vp_index, detail, gfn, total_ns,
            _two(times.decode_ns, times.wait_ns), _two(times.resolve_ns, times.map_ns),
        )  # fmt: skip

    def fact(self, fact: Fact) -> None:
        """What operators see as an event, too."""
        write = self._ring.write
        match fact:
            case events.RegionAdded():
                write(
                    Kind.REGION_ADDED, NO_VP, _REGION_KINDS[fact.kind], fact.start_gfn, fact.page_count,
                    fact.start_uaddr >> PAGE_SHIFT, _rights(fact.writable, fact.executable),
                )  # fmt: skip
            case events.RegionRemoved():
                write(Kind.REGION_REMOVED, NO_VP, 0, fact.start_gfn, fact.page_count)
            case events.PinnedRegionDangling():
                write(Kind.REGION_DANGLING, NO_VP, 0, fact.start_gfn, fact.page_count)
            case events.InvalidationBegun():
                self._invalidation(Kind.INVALIDATION_BEGUN, fact)
            case events.InvalidationEnded():
                self._invalidation(Kind.INVALIDATION_ENDED, fact)
            case events.RangeInvalidated():
                self._invalidation(Kind.RANGE_INVALIDATED, fact)
            case events.VpAttached():
                write(Kind.VP_ATTACHED, fact.vp_index, 0, 0)
            case events.VpDetached():
                write(Kind.VP_DETACHED, fact.vp_index, 0, 0)
            case events.PolicySet():
                write(Kind.POLICY_SET, NO_VP, fact.mmio_granularity == "page", 0)
            case events.PartitionEnded():
                write(Kind.PARTITION_ENDED, NO_VP, 0, 0)

    def _invalidation(self, kind: Kind, fact: events.InvalidationFact) -> None:
        self._ring.write(kind, NO_VP, _SOURCES[fact.source], fact.start_uaddr >> PAGE_SHIFT, fact.page_count)

    def served(self, took_ns: int) -> None:
        """A pass of the region manager: the guest lost everything that was invalidated before it."""
        self._ring.write(Kind.INVALIDATION_SERVED, NO_VP, 0, took_ns)

    def mapped(self, mapping: Mapping) -> None:
        """The guest's table has it."""
        self._ring.write(
            Kind.GUEST_MAPPED, NO_VP, mapping.access, mapping.start, mapping.end - mapping.start,
            mapping.start_uaddr_page, *_frame(mapping.frame),
        )  # fmt: skip

    def unmapped(self, gfns: GfnRange) -> None:
        """The guest's table has nothing there any more."""
        self._ring.write(Kind.GUEST_UNMAPPED, NO_VP, 0, gfns.start, gfns.end - gfns.start)

    def backed(self, extent: Extent) -> None:
        """A fault learned what backs these pages of the VMM."""
        self._ring.write(
            Kind.BACKED, NO_VP, extent.access | (IO if extent.io else 0), extent.uaddrs.start,
            extent.uaddrs.page_count, *_frame(extent.frame),
        )  # fmt: skip

    def vma_mapped(self, start: int, end: int, start_pfn: int, access: Access, io: bool) -> None:
        """The VMM declared pages [start, end)."""
        self._ring.write(Kind.VMA_MAPPED, NO_VP, access | (IO if io else 0), start, end - start, start_pfn)

    def vma_unmapped(self, start: int, end: int) -> None:
        self._ring.write(Kind.VMA_UNMAPPED, NO_VP, 0, start, end - start)

    def vma_protected(self, start: int, end: int, access: Access) -> None:
        self._ring.write(Kind.VMA_PROTECTED, NO_VP, access, start, end - start)


def _rights(writable: bool, executable: bool) -> int:
    return Access.READ | (Access.WRITE if writable else 0) | (Access.EXECUTE if executable else 0)


def _frame(frame: Frame | None) -> tuple[int, int]:
    """Its page, and a number that only the same backing has, with all but certainty."""
    return (0, 0) if frame is None else (frame.page, hash(frame.backing) & (1 << 64) - 1)
