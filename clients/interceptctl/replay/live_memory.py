"""Live memory, repeated as declared memory.

What faults found is declared just before they are repeated, and taken back when it is invalidated. How much
of a VMA such a fault mapped depends on what the kernel said then, so the guest's mappings are made as they
were. Owns what is declared; what contradicts it is a difference. Must not know which records invalidate.
"""

from __future__ import annotations

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access, spelled
from intercept_protocol.trace import Traced

from .model import Mapping, Model, Vma
from .refused import ask
from .restoring import Restored
from .survey import Survey
from .verdict import Difference


class LiveMemory:
    """Of a restored partition."""

    def __init__(self, restored: Restored, survey: Survey) -> None:
        self.restored = restored
        self._survey = survey

    async def forget(self, record: Traced, uaddrs: UaddrRange) -> None:
        self.restored.model.forget(uaddrs)
        await ask(self.restored.verdict, record, "unmap_vma", self.restored.partition.vmm.unmap_vma(uaddrs))

    async def learn(self, record: Traced, found: Vma) -> None:
        """Declare what a fault found, where that is not declared yet."""
        model, wrong = self.restored.model, False
        for known in model.vmas.clipped(found.start, found.end):
            part = found.slice(known.start, known.end)
            same_frame = (known.page, known.backing) == (part.page, part.backing)
            if same_frame and known.access == part.access:
                continue
            if same_frame and known.since is None:
                pass  # the guest's mappings show fewer rights than there are
            elif self._survey.told_later(record, known.start, known.end):
                self.restored.verdict.told_late += 1
            else:
                self._contradiction(record, known, part)
            wrong = True
            await self.forget(record, UaddrRange(start=known.start, end=known.end))
        for start, end in model.vmas.gaps(found.start, found.end):
            vma = found.slice(start, end)
            model.vmas.put(vma)
            request = self.restored.partition.declare([self.restored.pages.declared(vma)])
            await ask(self.restored.verdict, record, "map_vmas", request)
        if wrong:
            for region in list(model.regions):
                if region.uaddrs.start < found.end and found.start < region.uaddrs.end:
                    await self.restored.settle(record, region)

    def _contradiction(self, record: Traced, known: Vma, found: Vma) -> None:
        since = "since the state" if known.since is None else f"since record {known.since:,}"
        self.restored.verdict.differ(
            Difference(
                record=record.number,
                time_ns=record.time_ns,
                gfn=self.restored.model.gfn_of(found.start),
                page=found.start,
                what="what backs memory of the VMM",
                recorded=_backing(found),
                replayed=f"{_backing(known)}, {since}",
                why="nothing was invalidated in between",
            )
        )


def derive_vmas(model: Model) -> None:
    """What must be behind the guest's mappings. Of two that show it, that with more rights says more."""
    for mapping in sorted(model.table, key=lambda mapping: mapping.access):
        model.vmas.put(behind(mapping))


def behind(mapping: Mapping, record: Traced | None = None) -> Vma:
    """The VMA that a mapping shows, with the rights that it must have at least."""
    start = mapping.uaddr_page
    return Vma(
        start, start + mapping.end - mapping.start, mapping.page, mapping.access & ~Access.EXECUTE, False,
        mapping.backing, None if record is None else record.number, 0 if record is None else record.time_ns,
    )  # fmt: skip


def _backing(vma: Vma) -> str:
    return f"page {vma.page:#x} of backing {vma.backing or 0:#x}, {spelled(vma.access)}"
