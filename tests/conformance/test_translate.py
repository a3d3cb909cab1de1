"""`translate`: what the guest reaches."""

from __future__ import annotations

import pytest

from conformance.guests import GFN, PAGES, PFN, UADDR, RawVmm
from conformance.statements import statement
from conformance.wire import READ, WRITE


@statement("P-18")
def test_it_says_frame_pfn_and_access_bits(vmm: RawVmm) -> None:
    vmm.add_memory()
    vmm.vp().intercept(GFN, WRITE)
    seen = vmm.ask("translate", gfn=GFN + 5)
    assert (seen["frame"], seen["pfn"], seen["access"]) == (["host", PFN + 5], PFN + 5, 3)


@statement("P-18")
def test_execute_is_bit_4(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, PAGES, writable=False)
    vmm.ask(
        "add_region",
        start_gfn=GFN,
        page_count=PAGES,
        start_uaddr=UADDR,
        kind="mmio",
        writable=True,
        executable=True,
    )
    vmm.vp().intercept(GFN, READ)
    assert vmm.ask("translate", gfn=GFN)["access"] == 5


@statement("P-18")
def test_unmapped_and_no_access_pages_are_nil(vmm: RawVmm) -> None:
    vmm.add_memory()
    assert [vmm.ask("translate", gfn=gfn) for gfn in (GFN, 0, 2**64 - 1)] == [None, None, None]


@statement("P-3", "E-2")
@pytest.mark.parametrize("gfn", [-1, 1.0, "1", True])
def test_a_gfn_that_is_not_a_number_is_einval(vmm: RawVmm, gfn: object) -> None:
    refusal = vmm.connection.refusal("translate", {"gfn": gfn})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "gfn")
