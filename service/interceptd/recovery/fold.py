"""The state of a partition that the records of its log add up to.

Owns the meaning of each record. Pure: no tasks and no I/O. Must not know how the state is restored.

A record may repeat known facts, or remove something that is not there, see `Fold.shortest_log`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from intercept_protocol import codec, messages
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind, RequestedKind
from intercept_protocol.outcomes import Access
from intercept_protocol.text import sentence
from interceptd.address_space.declared import Vma
from interceptd.hypervisor.slat import SoftwareSlat, mapped
from interceptd.ledger import records
from interceptd.ledger.ledger import LedgerUnreadable
from interceptd.ledger.records import KeptRegion, Record
from interceptd.memory.region import KindOrigin, Region, RegionState
from interceptd.pages.mapping import Cache, Frame
from interceptd.pages.mapping import Mapping as GuestMapping
from interceptd.pages.range_map import RangeMap, add_pages
from interceptd.scheduling.time_share import give_way_shielded
from interceptd.sessions.region_calls import access_of
from interceptd.sessions.vmm import vma_of

Call = TypeVar("Call", bound=messages.Call[Any])


class Fold:
    """The state so far. `apply` takes the next record."""

    def __init__(self) -> None:
        self.opened: records.Opened | None = None
        self.created: records.Created | None = None
        self.joined: dict[int, records.Joined] = {}
        """By inbox."""
        self.last: dict[int, records.Done] = {}
        """By inbox: the last request that was carried out. Its answer may be owed."""
        self.regions: dict[int, KeptRegion] = {}
        """By the first gfn."""
        self.vmas: RangeMap[Vma] = RangeMap()
        self.table = SoftwareSlat()
        self.begun: dict[int, Counter[UaddrRange]] = {}
        """By inbox: the ranges that its connection has begun to invalidate and not ended."""
        self.gone: dict[int, records.Gone] = {}
        """By number: memory that went, and that the guest may not have lost."""
        self.doubt: RangeMap[GfnRange] = RangeMap()
        """The gfns that the VMM's hypervisor was asked to change, with no outcome."""
        self._changing: list[GfnRange] = []
        """The gfns of the last `Changing`."""
        self.mmio_granularity: str | None = None
        self.attached: records.Attached | None = None
        self.restoring: records.Restoring | None = None
        """The request, if the guest's memory comes from an image."""
        self.handed_off: records.HandedOff | None = None
        self.removed: RangeMap[UaddrRange] = RangeMap()
        """What a restored guest has given back, at any time."""

    def read(self, frame: bytes) -> None:
        """Take the next record of a log. Raises `LedgerUnreadable` for one that makes no sense."""
        try:
            self.apply(records.decode(frame))
        except (msgspec.MsgspecError, WireError, KeyError, ValueError) as error:
            raise LedgerUnreadable(f"a record makes no sense: {sentence(error)}") from error

    def apply(self, record: Record) -> None:
        """Take the next record. Raises `WireError`, `KeyError`, `ValueError` for one that makes no sense."""
        _APPLY[type(record)](self, record)

    @property
    def gone_count(self) -> int:
        """The number after which the next `Gone` is counted."""
        return max(self.gone, default=0)

    def shortest_log(self) -> Iterator[Record]:
        """The shortest log with the same meaning. The requests of `last` come early: they may be needed for
        an answer, and later records override what they did."""
        first = (self.restoring, self.handed_off, self.opened, self.created)
        yield from (record for record in first if record is not None)
        yield from self.joined.values()
        yield from self.last.values()
        yield from self.gone.values()
        if self.mmio_granularity is not None:
            yield records.Policy(self.mmio_granularity)
        if self.attached is not None:
            yield self.attached
        yield from self.regions.values()
        for vma in self.vmas:
            yield records.KeptVma(vma.start, vma.end, vma.start_pfn, vma.access.value, vma.io)
        for inbox, begun in self.begun.items():
            for uaddrs, depth in begun.items():
                yield records.KeptBegin(inbox, uaddrs.start, uaddrs.end, depth)
        for entry in self.table:
            yield mapped(entry)
        for uaddrs in self.removed:
            yield records.Removed(uaddrs.start, uaddrs.end)
        yield from self._doubtful()

    def _doubtful(self) -> Iterator[records.Changing]:
        """The last `Changing` stays last: a later `Settled` refers to it."""
        last = {gfns for gfns in self._changing if self.doubt.touches(gfns)}
        before = [(gfns.start, gfns.end) for gfns in self.doubt if gfns not in last]
        if before:
            yield records.Changing(before)
        if before or last:
            yield records.Changing([(gfns.start, gfns.end) for gfns in self._changing if last])

    async def discard(self) -> None:
        """Free it in pieces, and let others run meanwhile."""
        while self.regions:
            self.regions.popitem()
            await give_way_shielded()
        while self.vmas.drop_some() or self.removed.drop_some():
            await give_way_shielded()
        await self.table.discard()

    # ------------------------------------------------ connections

    def _opened(self, record: records.Opened) -> None:
        self.opened = record

    def _created(self, record: records.Created) -> None:
        self.created = record

    def _joined(self, record: records.Joined) -> None:
        self.joined[record.inbox] = record

    def _left(self, record: records.Left) -> None:
        self.joined.pop(record.inbox, None)
        self.last.pop(record.inbox, None)
        self.begun.pop(record.inbox, None)

    def _done(self, record: records.Done) -> None:
        self.last[record.inbox] = record
        _DONE[record.method](self, record)

    # ------------------------------------------------ regions and VMAs

    def _add_region(self, done: records.Done) -> None:
        self._add(_call(messages.AddRegion, done), (done.reply or {})["kind"])

    def _remove_region(self, done: records.Done) -> None:
        self.regions.pop(_call(messages.RemoveRegion, done).start_gfn, None)

    def _change_regions(self, done: records.Done) -> None:
        call = _call(messages.ChangeRegions, done)
        for region in call.remove:
            self.regions.pop(region.start_gfn, None)
        for asked, kind in zip(call.add, (done.reply or {})["kinds"], strict=True):
            self._add(asked, kind)

    def _add(self, call: messages.AddRegion, kind: str) -> None:
        self.regions[call.start_gfn] = KeptRegion(
            start_gfn=call.start_gfn,
            end_gfn=call.start_gfn + call.page_count,
            uaddr_page=call.start_uaddr >> PAGE_SHIFT,
            kind=RegionKind(kind).value,
            inferred=call.kind is RequestedKind.AUTO,
            access=access_of(readable=True, writable=call.writable, executable=call.executable).value,
        )

    def _region(self, record: KeptRegion) -> None:
        self.regions[record.start_gfn] = record

    def _dangling(self, record: records.Dangling) -> None:
        region = self.regions.get(record.start_gfn)
        if region is not None:
            self.regions[record.start_gfn] = replace(region, dangling=True)

    def _map_vma(self, done: records.Done) -> None:
        self._put(vma_of(_call(messages.MapVma, done)))

    def _map_vmas(self, done: records.Done) -> None:
        for vma in _call(messages.MapVmas, done).vmas:
            self._put(vma_of(vma))

    def _unmap_vma(self, done: records.Done) -> None:
        call = _call(messages.UnmapVma, done)
        self.vmas.carve(UaddrRange.of_pages(call.start_uaddr, call.page_count))

    def _protect_vma(self, done: records.Done) -> None:
        call = _call(messages.ProtectVma, done)
        access = access_of(readable=call.readable, writable=call.writable, executable=call.executable)
        for vma in self.vmas.carve(UaddrRange.of_pages(call.start_uaddr, call.page_count)):
            self.vmas.insert(replace(vma, access=access))

    def _put(self, vma: Vma) -> None:
        self.vmas.carve(vma)
        self.vmas.insert(vma)

    def _vma(self, record: records.KeptVma) -> None:
        access = Access(record.access)
        self._put(Vma(record.start_page, record.end_page, record.start_pfn, access, record.io))

    def _begin(self, record: records.KeptBegin) -> None:
        uaddrs = UaddrRange(start=record.start_page, end=record.end_page)
        self.begun.setdefault(record.inbox, Counter())[uaddrs] = record.depth

    def _invalidate_begin(self, done: records.Done) -> None:
        call = _call(messages.InvalidateBegin, done)
        uaddrs = UaddrRange.of_bytes(call.start_uaddr, call.length)
        self.begun.setdefault(done.inbox, Counter())[uaddrs] += 1

    def _invalidate_end(self, done: records.Done) -> None:
        call = _call(messages.InvalidateEnd, done)
        begun = self.begun.get(done.inbox, Counter())
        uaddrs = UaddrRange.of_bytes(call.start_uaddr, call.length)
        if begun[uaddrs] > 1:
            begun[uaddrs] -= 1
        else:
            del begun[uaddrs]

    def _attach_memory(self, done: records.Done) -> None:
        self.attached = records.Attached(bool(_call(messages.AttachMemory, done).promise_begin_end))

    def _attached(self, record: records.Attached) -> None:
        self.attached = record

    def _policy(self, record: records.Policy) -> None:
        self.mmio_granularity = record.mmio_granularity

    # ------------------------------------------------ the guest's mappings

    def _asked(self, record: records.Changing) -> None:
        self._changing = [GfnRange(start=start, end=end) for start, end in record.gfns]
        for gfns in self._changing:
            self.doubt.carve(gfns)
            self.doubt.insert(gfns)

    def _settled(self, _: records.Settled) -> None:
        for gfns in self._changing:
            self.doubt.carve(gfns)
        self._changing = []

    def _mapped(self, record: records.Mapped) -> None:
        frame = None if record.backing is None else Frame(record.backing, record.page)
        cache = Cache.NORMAL if record.cached else Cache.NOT_CACHED
        access = Access(record.access)
        self.table.replace(GuestMapping(record.start, record.end, frame, record.uaddr_page, access, cache))

    def _unmapped(self, record: records.Unmapped) -> None:
        self.table.clear(GfnRange(start=record.start, end=record.end))

    def _gone(self, record: records.Gone) -> None:
        self.gone[record.number] = record
        if self.restoring is not None:
            add_pages(self.removed, UaddrRange(start=record.start_page, end=record.end_page))

    def _served(self, record: records.Served) -> None:
        while self.gone and (first := next(iter(self.gone))) <= record.number:
            del self.gone[first]

    # ------------------------------------------------ a restored guest

    def _restoring(self, record: records.Restoring) -> None:
        self.restoring = record

    def _handed_off(self, record: records.HandedOff) -> None:
        self.handed_off = record

    def _removed(self, record: records.Removed) -> None:
        add_pages(self.removed, UaddrRange(start=record.start_page, end=record.end_page))


def _call(struct: type[Call], done: records.Done) -> Call:
    return codec.decode_fields(struct, done.method, [done.request])


_APPLY: Mapping[type, Callable[..., None]] = {
    records.Opened: Fold._opened,
    records.Created: Fold._created,
    records.Joined: Fold._joined,
    records.Left: Fold._left,
    records.Done: Fold._done,
    records.Changing: Fold._asked,
    records.Settled: Fold._settled,
    records.Mapped: Fold._mapped,
    records.Unmapped: Fold._unmapped,
    records.Gone: Fold._gone,
    records.Served: Fold._served,
    records.Dangling: Fold._dangling,
    records.Policy: Fold._policy,
    records.KeptRegion: Fold._region,
    records.KeptVma: Fold._vma,
    records.KeptBegin: Fold._begin,
    records.Attached: Fold._attached,
    records.Restoring: Fold._restoring,
    records.HandedOff: Fold._handed_off,
    records.Removed: Fold._removed,
}
_DONE: Mapping[str, Callable[[Fold, records.Done], None]] = {
    "add_region": Fold._add_region,
    "remove_region": Fold._remove_region,
    "change_regions": Fold._change_regions,
    "map_vma": Fold._map_vma,
    "map_vmas": Fold._map_vmas,
    "unmap_vma": Fold._unmap_vma,
    "protect_vma": Fold._protect_vma,
    "attach_memory": Fold._attach_memory,
    "invalidate_begin": Fold._invalidate_begin,
    "invalidate_end": Fold._invalidate_end,
}
"""By method: those whose calls are recorded."""


def region_of(kept: KeptRegion) -> Region:
    """The region that a record describes, without mappings."""
    gfns = GfnRange(start=kept.start_gfn, end=kept.end_gfn)
    return Region(
        gfns=gfns,
        uaddrs=UaddrRange(start=kept.uaddr_page, end=kept.uaddr_page + gfns.page_count),
        kind=RegionKind(kept.kind),
        kind_origin=KindOrigin.INFERRED if kept.inferred else KindOrigin.STATED,
        access=Access(kept.access),
        state=RegionState.DANGLING if kept.dangling else RegionState.LIVE,
    )
