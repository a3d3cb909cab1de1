"""The successor of a daemon that dies at this moment: a new partition, brought back from the log.

Owns the comparison of the log with the running partition, and how one is brought back. Must not know what
the VMM did: that is the truth's to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from typing import TypeVar

from intercept_protocol import messages
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access, Answer
from interceptd.ledger.records import KeptRegion
from interceptd.memory.fault_handler import Fault
from interceptd.memory.region import KindOrigin, Region, RegionState
from interceptd.pages.mapping import Mapping
from interceptd.recovery.fold import Fold
from interceptd.recovery.restore import announce, restore, settle

from .inspection import EVERYWHERE, disorder, misrecorded
from .kept_log import KeptLog, LoggedCall
from .model_partition import ModelPartition, Parts
from .pauses import Asked, Point
from .script import Pages

Result = TypeVar("Result")


def unlogged(model: ModelPartition, log: KeptLog, *, at_rest: bool) -> str | None:
    """I11: how what the log says differs from what is. While a call is carried out only the table is
    compared: the call is recorded when it is complete."""
    fold = log.fold
    compared: list[tuple[str, object, object]] = [
        ("the table", list(model.software.table), list(fold.table)),
    ]
    if at_rest:
        regions = sorted(fold.regions.values(), key=lambda region: region.start_gfn)
        begun: Counter[UaddrRange] = Counter()
        for each in fold.begun.values():
            begun += each
        compared += [
            ("the regions", [_kept(region) for region in model.regions._regions], regions),
            ("the VMAs", list(model.declared._vmas), list(fold.vmas)),
            ("the open ranges", {each.uaddrs: each.depth for each in model.notifier._open.values()}, begun),
        ]
    for what, running, logged in compared:
        if running != logged:
            return f"{what}: {running}, and in the log: {logged}"
    return None


def _kept(region: Region) -> KeptRegion:
    return KeptRegion(
        region.gfns.start,
        region.gfns.end,
        region.uaddrs.start,
        region.kind.value,
        region.kind_origin is KindOrigin.INFERRED,
        region.access.value,
        region.state is RegionState.DANGLING,
    )


class _NoPauses:
    async def at(self, point: Point, asked: Asked) -> None:
        pass


class Successor:
    """Its partition is brought back at once. Then nobody has asked it anything yet. `frames` is its log."""

    def __init__(
        self,
        parts: Parts,
        frames: Sequence[bytes],
        asked: Sequence[LoggedCall],
        going: Sequence[Pages],
        pieces_per_call: int,
    ) -> None:
        """`asked` is not recorded as done, and `going` is what a userfaultfd has announced."""
        fold = Fold()
        for frame in frames:
            fold.read(frame)
        self._log = parts.log()
        self._log.go_on_from(frames, fold)
        self._asked = asked
        self._going = going
        own = Parts(regions=parts.regions, notifier=parts.notifier)  # those that bring it back
        self.model = ModelPartition(pauses=_NoPauses(), parts=own, log=self._log)
        self.model.hypervisor.may_block = self.model.address_space.may_block = False
        self.model.hypervisor.pieces_per_call = pieces_per_call
        _at_once(self._bring_back(fold))
        self.frames = list(self._log.frames)

    async def _bring_back(self, fold: Fold) -> None:
        partition = self.model.partition
        strays = await restore(partition, fold)
        announce(partition, fold)
        await settle(partition, strays)
        await partition.regions.serve_pending()

    def wrong(self, gfns: Iterable[int]) -> str | None:
        """I2, I3, I10 and I11: how it contradicts itself."""
        return (
            disorder(self.model)
            or misrecorded(self.model, gfns)
            or self._still_there()
            or self._without_memory()
            or unlogged(self.model, self._log, at_rest=True)
        )

    def _still_there(self) -> str | None:
        """What is mapped although a userfaultfd has told that it goes."""
        for entry in self.reached():
            for gfn in range(entry.start, entry.end):
                page = entry.start_uaddr_page + gfn - entry.start
                if any(page in pages for pages in self._going):
                    return f"gfn {gfn} reaches page {page}, which is going"
        return None

    def _without_memory(self) -> str | None:
        """What is mapped of pages that no call is taking away, and has another frame or other rights."""
        for entry in self.reached():
            pages = UaddrRange.at_page(entry.start_uaddr_page, entry.end - entry.start)
            for page in range(pages.start, pages.end):
                if any(page in taken for taken in self._being_taken()):
                    continue
                vma, gfn = self.model.declared.vma_at(page), entry.start + page - pages.start
                frame = entry.frame_at(gfn)
                if vma is None or frame is None or frame.page != vma.start_pfn + page - vma.start:
                    return f"gfn {gfn} reaches {frame}, and page {page} is {vma}"
                if entry.access & ~Access.EXECUTE & ~vma.access:
                    return f"gfn {gfn} may be accessed {entry.access}, and page {page} is {vma}"
        return None

    def _being_taken(self) -> Iterable[UaddrRange]:
        for call in self._asked:
            if isinstance(call, messages.UnmapVma | messages.ProtectVma):
                yield UaddrRange.of_pages(call.start_uaddr, call.page_count)

    def reached(self) -> list[Mapping]:
        return [entry for entry in self.model.software.table.entries(EVERYWHERE) if entry.access]

    def mapping(self, gfn: int) -> Mapping | None:
        """What the guest reaches."""
        return self.model.hypervisor.translate(gfn)

    def touch(self, gfn: int, access: Access) -> Answer | None:
        """What a VP would be answered; None where it would have to wait."""
        match self.model.faults.lookup(gfn, access):
            case Mapping():
                return Answer.ALREADY_MAPPED
            case Answer() as answer:
                return answer
            case Region() as region:
                return _at_once(self.model.faults.handle_nowait(Fault(gfn, access, region)))
            case _:
                return None


def _at_once(work: Coroutine[object, object, Result]) -> Result:
    """The result of what has nobody to wait for."""
    try:
        work.send(None)
    except StopIteration as done:
        result: Result = done.value
        return result
    work.close()
    raise AssertionError("a successor that is alone waits for somebody")
