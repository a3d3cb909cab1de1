"""A walk over what a region manager holds and what the guest reaches: do they tell the same story?

Owns the comparison. It looks into private state on purpose; the product has no use for such a walk. Must not
know what the VMM did: that is the world's to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from intercept_protocol.addresses import PAGE_LIMIT, GfnRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access
from interceptd.mapping import Frame, Mapping

from .model_partition import ModelPartition

Reach = dict[int, tuple[Frame | None, Access]]
EVERYWHERE = GfnRange(0, PAGE_LIMIT)


@dataclass(frozen=True)
class Violation:
    """An invariant by its number in the design, and how it was broken."""

    invariant: str
    how: str


def inspect(model: ModelPartition) -> list[Violation]:
    """What is wrong right now; the gfns that the lock's holder is changing are nobody's business."""
    return [*_regions(model), *_records(model), *_slat(model)]


def misrecorded(model: ModelPartition, gfns: Iterable[int]) -> str | None:
    """Where the record and the SLAT differ at these gfns, those being changed right now left out."""
    records, slat, busy = list(model.regions._mappings), model.software._slat.entries(EVERYWHERE), changing(model)
    for gfn in gfns:
        if gfn in busy:
            continue
        recorded, reached = _held(records, gfn), _held(slat, gfn)
        if recorded != reached:
            return f"gfn {gfn}: recorded {recorded}, reached {reached}"
    return None


def slat_reach(model: ModelPartition) -> Reach:
    """What the guest reaches, gfn by gfn."""
    return _pages(entry for entry in model.software._slat.entries(EVERYWHERE) if entry.access)


def changing(model: ModelPartition) -> GfnRange:
    change = model.regions._change
    return GfnRange(0, 0) if change is None else change.gfns


def _regions(model: ModelPartition) -> Iterator[Violation]:
    listed = list(model.regions._regions)
    for before, after in pairwise(listed):
        if before.gfns.end > after.gfns.start:
            yield Violation("I3", f"{before.gfns} and {after.gfns} are out of order or overlap")
    for region in listed:
        if region.gfns.page_count != region.uaddrs.page_count or region.gfns.end > PAGE_LIMIT:
            yield Violation("I3", f"{region.gfns} over {region.uaddrs}")


def _records(model: ModelPartition) -> Iterator[Violation]:
    """I2: a record lies in a region, and its uaddrs are the region's."""
    for record in model.regions._mappings:
        region = model.regions._regions.find(record.start)
        if record.gfns.overlaps(changing(model)):
            continue
        if region is None and model.regions._lock.locked():
            continue  # unlinked, and its runs are unmapped one after the other
        if region is None or not region.gfns.covers(record.gfns):
            yield Violation("I2", f"{record.gfns} is mapped in no region")
        elif region.uaddrs_of(record.gfns).start != record.start_uaddr_page:
            yield Violation("I2", f"{record.gfns} stands for other uaddrs than its region does")
        elif record.access not in region.access:
            yield Violation("I2", f"{record.gfns} has rights that its region has not")


def _slat(model: ModelPartition) -> Iterator[Violation]:
    """I10: nothing is reached that nobody knows of, and nothing is told that is not reached."""
    recorded = _outside(changing(model), _pages(model.regions._mappings))
    reached = _outside(changing(model), slat_reach(model))
    for gfn in recorded.keys() | reached.keys():
        if recorded.get(gfn) != reached.get(gfn):
            yield Violation("I10", f"{gfn:#x}: recorded {recorded.get(gfn)}, reached {reached.get(gfn)}")
    slat = model.software._slat
    for region in model.regions._regions:
        settled = region.kind is RegionKind.MOVABLE and not region.gfns.overlaps(changing(model))
        if settled and (missing := slat.new_gfns(region.gfns)):
            yield Violation("I10", f"movable {region.gfns} has neither frames nor NO_ACCESS at {missing}")
    for entry in slat.entries(EVERYWHERE):
        waiting = entry.access is Access.NONE and not entry.gfns.overlaps(changing(model))
        if waiting and model.regions._regions.find(entry.start) is None:
            yield Violation("I10", f"NO_ACCESS at {entry.gfns} was left behind")


def _held(mappings: Iterable[Mapping], gfn: int) -> tuple[Frame | None, Access] | None:
    for mapping in mappings:
        if mapping.start <= gfn < mapping.end and mapping.access:
            return mapping.frame_at(gfn), mapping.access
    return None


def _pages(mappings: Iterable[Mapping]) -> Reach:
    return {
        gfn: (mapping.frame_at(gfn), mapping.access)
        for mapping in mappings
        for gfn in range(mapping.start, mapping.end)
    }


def _outside(gfns: GfnRange, reach: Reach) -> Reach:
    return {gfn: held for gfn, held in reach.items() if gfn not in gfns}
