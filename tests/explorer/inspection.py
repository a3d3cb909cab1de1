"""Compares what a region manager has recorded with what the guest reaches.

Owns the comparison. It looks into private state on purpose: the rest of the product has no use for it. Must
not know what the VMM did: that is the truth's to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

from intercept_protocol.addresses import PAGE_LIMIT, GfnRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access
from interceptd.memory.guest_mappings import GuestMappings
from interceptd.pages.mapping import Frame, Mapping

from .model_partition import ModelPartition

EVERYWHERE = GfnRange(start=0, end=PAGE_LIMIT)


def disorder(model: ModelPartition) -> str | None:
    """I3: how the region list is not sorted, not disjoint, or wraps."""
    regions = list(model.regions._regions)
    for before, after in pairwise(regions):
        if before.gfns.end > after.gfns.start:
            return f"{before.gfns} and {after.gfns} are out of order or overlap"
    for region in regions:
        if region.gfns.page_count != region.uaddrs.page_count or region.gfns.end > PAGE_LIMIT:
            return f"{region.gfns} over {region.uaddrs}"
    return None


def being_changed(mappings: GuestMappings) -> list[Sequence[GfnRange]]:
    """What the holder of the lock is changing now: blocks within blocks, the innermost first."""
    blocks: list[Sequence[GfnRange]] = []
    change = mappings._change
    while change is not None:
        blocks.append(change.gfns)
        change = change.around
    return blocks


def misrecorded(model: ModelPartition, gfns: Iterable[int]) -> str | None:
    """I2 and I10: how the record of what is mapped lies outside its region, or differs from the SLAT at one
    of these gfns. Those that the holder of the lock is changing are not inspected."""
    busy = list(chain.from_iterable(being_changed(model.mappings)))
    records = list(model.mappings._record)
    for record in records:
        if not _overlaps(busy, record.gfns) and (how := _out_of_region(model, record)):
            return how
    slat = model.software.table.entries(EVERYWHERE)
    for gfn in gfns:
        if any(gfn in gfns for gfns in busy):
            continue
        recorded, reached = _held(records, gfn), _held(slat, gfn)
        if recorded != reached:
            return f"gfn {gfn}: recorded {recorded}, reached {reached}"
    return _no_access_astray(model, slat, busy)


def _out_of_region(model: ModelPartition, record: Mapping) -> str | None:
    region = model.regions._regions.find(record.start)
    if region is None:  # while one is removed: unlinked, and its runs are unmapped one after the other
        return None if model.regions._lock.locked() else f"{record.gfns} is recorded in no region"
    if not region.gfns.covers(record.gfns):
        return f"{record.gfns} is recorded beyond its region"
    if region.uaddrs_of(record.gfns).start != record.start_uaddr_page:
        return f"{record.gfns} stands for other uaddrs than its region does"
    if record.access not in region.access:
        return f"{record.gfns} has rights that its region has not"
    return None


def _no_access_astray(model: ModelPartition, slat: list[Mapping], busy: list[GfnRange]) -> str | None:
    for region in model.regions._regions:
        settled = region.kind is RegionKind.MOVABLE and not _overlaps(busy, region.gfns)
        if settled and (missing := model.software.table.new_gfns(region.gfns)):
            return f"movable {region.gfns} has neither frames nor NO_ACCESS at {missing}"
    for entry in slat:
        waiting = entry.access is Access.NONE and not _overlaps(busy, entry.gfns)
        if waiting and model.regions._regions.find(entry.start) is None:
            return f"NO_ACCESS at {entry.gfns} was left behind"
    return None


def _overlaps(busy: Iterable[GfnRange], gfns: GfnRange) -> bool:
    return any(gfns.overlaps(each) for each in busy)


def _held(mappings: Iterable[Mapping], gfn: int) -> tuple[Frame | None, Access] | None:
    for mapping in mappings:
        if mapping.start <= gfn < mapping.end and mapping.access:
            return mapping.frame_at(gfn), mapping.access
    return None
