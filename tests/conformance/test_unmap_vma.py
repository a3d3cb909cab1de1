"""`unmap_vma`: answered when the guest can no longer reach what was there."""

from __future__ import annotations

import pytest

from conformance.guests import GFN, PAGE, PAGES, PFN, UADDR, RawVmm
from conformance.statements import statement


@statement("P-14")
@pytest.mark.parametrize("kind", ["mmio", "movable", "pinned"])
def test_unmapped_memory_is_out_of_the_guests_reach(vmm: RawVmm, kind: str) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, kind)
    vp = vmm.vp()
    vp.intercept(GFN)
    assert vmm.ask("unmap_vma", start_uaddr=UADDR, page_count=PAGES) is None
    assert (vmm.ask("translate", gfn=GFN), vmm.ask("statistics")["mapped_gfns"]) == (None, 0)
    assert vp.intercept(GFN) == ["forward", "unbacked"]


@statement("P-14")
def test_a_vma_is_cut_in_pieces_and_the_rest_stays(vmm: RawVmm) -> None:
    vmm.add_memory()
    vp = vmm.vp()
    vp.intercept(GFN)
    vmm.ask("unmap_vma", start_uaddr=UADDR + 4 * PAGE, page_count=2)
    assert vmm.ask("statistics")["vmas"] == 2
    assert [vmm.ask("translate", gfn=GFN + page) is None for page in (3, 4, 5, 6)] == [
        False,
        True,
        True,
        False,
    ]
    assert vmm.ask("translate", gfn=GFN + 6)["pfn"] == PFN + 6


@statement("P-14")
def test_several_vmas_or_none_may_be_covered(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, 2)
    vmm.map_vma(UADDR + 4 * PAGE, 2)
    for _ in range(2):
        assert vmm.ask("unmap_vma", start_uaddr=UADDR, page_count=PAGES) is None
    assert vmm.ask("statistics")["vmas"] == 0


@statement("P-4")
@pytest.mark.parametrize(
    ("start", "count", "field"), [(UADDR, 0, "page_count"), (UADDR + 8, 1, "start_uaddr")]
)
def test_a_range_that_is_empty_or_misaligned_is_einval(
    vmm: RawVmm, start: int, count: int, field: str
) -> None:
    refusal = vmm.connection.refusal("unmap_vma", {"start_uaddr": start, "page_count": count})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", field)


@statement("P-14", "P-25")
def test_it_counts_as_an_invalidation(vmm: RawVmm) -> None:
    vmm.ask("unmap_vma", start_uaddr=UADDR, page_count=1)
    seen = vmm.ask("statistics")
    assert (seen["invalidations"], seen["open_invalidations"]) == (1, 0)
