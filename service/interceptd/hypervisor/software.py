"""The software hypervisor: mshv's hypercall path over a software SLAT.

Owns batching, deposits, call counts and roll-back, as in drivers/hv/mshv_root_hv_call.c
(hv_do_map_gpa_hcall), with its known bugs fixed. The SLAT is edited once per request and the hypercalls are
only counted, because mapping a 64 GiB BAR takes 33,000. Must not know why something is mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from intercept_protocol.addresses import GfnRange
from intercept_protocol.messages import Remap
from intercept_protocol.outcomes import spelled
from interceptd.hypervisor import HypervisorCounters, HypervisorError
from interceptd.hypervisor.hv_status import HvStatus
from interceptd.hypervisor.slat import GFNS_PER_TABLE_PAGE, SoftwareSlat
from interceptd.ledger.journal import Journal
from interceptd.pages.mapping import Mapping

MAP_BATCH_GFNS = 509
"""HV_MAP_GPA_BATCH_SIZE: (4096 - 24) / 8, the pfns that fit into the hypercall's input page."""
UNMAP_BATCH_GFNS = 512
"""HV_UMAP_GPA_PAGES."""
DEPOSIT_PAGES = 256
"""HV_MAP_GPA_DEPOSIT_PAGES: pages per deposit after HV_STATUS_INSUFFICIENT_MEMORY."""


class SoftwareHypervisor:
    """A strict second-level table behind mshv's batches, deposits and status codes. Never blocks.

    `pool_pages` is what the table starts with, `pool_limit` where deposits end (ENOMEM).
    """

    def __init__(
        self,
        *,
        remap: Remap,
        pool_pages: int,
        pool_limit: Callable[[], int],
        journal: Journal | None = None,
    ) -> None:
        self._remap = remap
        self._pool_pages = pool_pages
        self._pool_limit = pool_limit
        self.table = SoftwareSlat(journal)
        self._map_calls = 0
        self._unmap_calls = 0
        self._deposits = 0

    may_block = False
    pieces_per_call = 8
    """Each saves a third of what a call of its own takes. More would make a step long, because a piece may
    hold many entries."""

    async def map_gpas(self, mappings: Sequence[Mapping]) -> None:
        """See `Hypervisor.map_gpas`."""
        for done, mapping in enumerate(mappings):
            self._map(mapping, done)

    def _map(self, mapping: Mapping, done: int) -> None:
        if self._remap is Remap.ERROR and mapping.access and self._is_accessible(mapping.gfns):
            self._map_calls += 1
            raise _refused(HvStatus.INVALID_PARAMETER, mapping, 0, done)
        completed, status = self._map_hypercalls(mapping)
        if status is HvStatus.SUCCESS and self.table.insert(mapping):  # as a rule there was nothing
            return
        before = self.table.entries(mapping.gfns)
        if completed:
            self.table.replace(mapping.slice(mapping.start, mapping.start + completed))
        if status is not HvStatus.SUCCESS:
            self._roll_back(GfnRange(start=mapping.start, end=mapping.start + completed), before)
            raise _refused(status, mapping, completed, done)

    async def unmap_gpas(self, ranges: Sequence[GfnRange]) -> None:
        """See `Hypervisor.unmap_gpas`. Of each range, one call per 512 gfns from the first to the last mapped
        one."""
        for gfns in ranges:
            entries = self.table.entries(gfns)
            if entries:
                self._unmap_calls += _calls(entries[-1].end - entries[0].start, UNMAP_BATCH_GFNS)
                self.table.clear(gfns)

    def translate(self, gfn: int) -> Mapping | None:
        entry = self.table.entry(gfn)
        return entry if entry is not None and entry.access else None

    async def discard(self) -> None:
        await self.table.discard()

    def counters(self) -> HypervisorCounters:
        return HypervisorCounters(
            mapped_gfns=self.table.gfn_count - self.table.no_access_gfns,
            no_access_gfns=self.table.no_access_gfns,
            slat_extents=len(self.table),
            map_calls=self._map_calls,
            unmap_calls=self._unmap_calls,
            deposits=self._deposits,
        )

    def _is_accessible(self, gfns: GfnRange) -> bool:
        """Whether the guest can access some of `gfns`."""
        return any(entry.access for entry in self.table.entries(gfns))

    def _map_hypercalls(self, mapping: Mapping) -> tuple[int, HvStatus]:
        """Count the calls that map `mapping`; returns the gfns completed and the last call's status.

        A call that runs out of table pages is continued from its completed reps after a deposit, and counts
        once. A failing call has completed nothing of its own batch.
        """
        room, status = self._make_room(mapping.gfns)
        calls = _calls(room, MAP_BATCH_GFNS) if status is HvStatus.SUCCESS else room // MAP_BATCH_GFNS + 1
        self._map_calls += calls
        return room, status

    def _make_room(self, gfns: GfnRange) -> tuple[int, HvStatus]:
        """Deposit until the table can hold `gfns`; returns how many of them, from the start, surely fit."""
        if self.table.gfn_count + gfns.page_count <= self._pool_pages * GFNS_PER_TABLE_PAGE:
            return gfns.page_count, HvStatus.SUCCESS  # even if none of them has an entry
        new = self.table.new_gfns(gfns)
        wanted = self.table.gfn_count + sum(end - start for start, end in new)
        while (capacity := self._pool_pages * GFNS_PER_TABLE_PAGE) < wanted:
            if self._pool_pages + DEPOSIT_PAGES > self._pool_limit():
                return _reach(gfns, new, capacity - self.table.gfn_count), HvStatus.INSUFFICIENT_MEMORY
            self._pool_pages += DEPOSIT_PAGES
            self._deposits += 1
        return gfns.page_count, HvStatus.SUCCESS

    def _roll_back(self, done: GfnRange, before: list[Mapping]) -> None:
        """Unmap what the completed batches mapped, and restore the extents that they replaced."""
        if done.page_count:
            self._unmap_calls += _calls(done.page_count, UNMAP_BATCH_GFNS)
            self.table.clear(done)
        for entry in before:
            restored = entry.gfns.clip(done)
            if restored is not None:
                self._map_calls += _calls(restored.page_count, MAP_BATCH_GFNS)
                self.table.replace(entry.slice(restored.start, restored.end))


def _reach(gfns: GfnRange, new: list[tuple[int, int]], room: int) -> int:
    """How many gfns from the start of `gfns` can be written when only `room` new ones fit, fewer than all."""
    gaps = iter(new)
    start, end = next(gaps)
    while room >= end - start:
        room -= end - start
        start, end = next(gaps)
    return start + room - gfns.start


def _calls(gfn_count: int, batch: int) -> int:
    return -(-gfn_count // batch)


def _refused(status: HvStatus, mapping: Mapping, completed: int, done: int) -> HypervisorError:
    return HypervisorError(
        status.errno,
        f"mapping gfns {mapping.gfns} with rights {spelled(mapping.access)} failed with "
        f"HV_STATUS_{status.name} after {completed} of {mapping.gfns.page_count} gfns, which were undone",
        done=done,
    )
