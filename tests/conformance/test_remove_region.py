"""`remove_region`: answered when the guest can no longer reach any of it."""

from __future__ import annotations

import pytest

from conformance.guests import GFN, PAGE, PAGES, UADDR, RawVmm
from conformance.statements import statement

THE_REGION = {"start_gfn": GFN, "page_count": PAGES, "start_uaddr": UADDR}


@statement("P-12")
@pytest.mark.parametrize("kind", ["mmio", "movable", "pinned"])
def test_a_removed_region_is_out_of_reach_and_its_gfns_are_free(vmm: RawVmm, kind: str) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, kind)
    vp = vmm.vp()
    vp.intercept(GFN)
    assert vmm.ask("remove_region", **THE_REGION) is None
    seen = vmm.ask("statistics")
    assert (vmm.ask("translate", gfn=GFN), seen["mapped_gfns"], seen["no_access_gfns"]) == (None, 0, 0)
    assert vp.intercept(GFN) == ["forward", "no_region"]
    vmm.add_region(GFN, PAGES, UADDR)


@statement("P-12")
@pytest.mark.parametrize("start_gfn", [GFN - 1, GFN + 1, GFN + PAGES])
def test_no_region_that_starts_there_is_enoent(vmm: RawVmm, start_gfn: int) -> None:
    vmm.add_region(GFN, PAGES, UADDR)
    assert vmm.connection.refusal("remove_region", {**THE_REGION, "start_gfn": start_gfn}).name == "ENOENT"
    assert vmm.ask("statistics")["regions"] == 1


@statement("P-12", "E-2")
@pytest.mark.parametrize(("field", "value"), [("page_count", PAGES - 1), ("start_uaddr", UADDR + PAGE)])
def test_a_region_of_another_extent_is_einval_that_names_the_field(
    vmm: RawVmm, field: str, value: int
) -> None:
    vmm.add_region(GFN, PAGES, UADDR)
    refusal = vmm.connection.refusal("remove_region", {**THE_REGION, field: value})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", field)
    assert vmm.ask("statistics")["regions"] == 1
