"""`protect_vma`: new rights for mapped memory, from the answer on."""

from __future__ import annotations

from conformance.guests import GFN, PAGE, PAGES, UADDR, RawVmm
from conformance.statements import statement
from conformance.wire import READ, WRITE

READ_ONLY = {"readable": True, "writable": False, "executable": False}
READ_WRITE = {"readable": True, "writable": True, "executable": False}


@statement("P-14", "P-11")
def test_a_right_that_was_taken_is_out_of_the_guests_reach(vmm: RawVmm) -> None:
    vmm.add_memory()
    vp = vmm.vp()
    vp.intercept(GFN, WRITE)
    assert vmm.ask("protect_vma", start_uaddr=UADDR, page_count=PAGES, **READ_ONLY) is None
    assert vmm.ask("translate", gfn=GFN) is None
    assert (vp.intercept(GFN, WRITE), vp.intercept(GFN, READ)) == (
        ["forward", "permission"],
        ["resume", "mapped"],
    )
    assert vmm.ask("translate", gfn=GFN)["access"] == 1


@statement("P-14", "P-11")
def test_a_right_that_was_given_is_there_at_the_next_fault(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, PAGES, writable=False)
    vmm.add_region(GFN, PAGES, UADDR)
    vp = vmm.vp()
    assert vp.intercept(GFN, WRITE) == ["forward", "permission"]
    vmm.ask("protect_vma", start_uaddr=UADDR, page_count=PAGES, **READ_WRITE)
    assert vp.intercept(GFN, WRITE) == ["resume", "mapped"]


@statement("P-14")
def test_part_of_a_vma_or_no_vma_may_be_protected(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, 3)
    vmm.ask("protect_vma", start_uaddr=UADDR + PAGE, page_count=1, **READ_ONLY)
    assert vmm.ask("statistics")["vmas"] == 3
    assert vmm.ask("protect_vma", start_uaddr=UADDR + 8 * PAGE, page_count=1, **READ_ONLY) is None
