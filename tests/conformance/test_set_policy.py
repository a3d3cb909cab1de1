"""`set_policy` of a VMM: the granularity of faults from now on."""

from __future__ import annotations

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, PAGES, UADDR, RawVmm
from conformance.statements import statement


def mapped(vmm: RawVmm) -> int:
    gfns: int = vmm.ask("statistics")["mapped_gfns"]
    return gfns


@statement("P-17", "P-22")
def test_a_policy_affects_later_faults_and_existing_mappings_stay(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, "mmio")
    vp = vmm.vp()
    vmm.ask("set_policy", mmio_granularity="page")
    vp.intercept(GFN)
    assert mapped(vmm) == 1
    vmm.ask("set_policy", mmio_granularity="vma")
    assert mapped(vmm) == 1
    vp.intercept(GFN + 1)
    assert mapped(vmm) == PAGES


@statement("P-17", "T-3")
@pytest.mark.parametrize("fields", [{}, {"mmio_granularity": None}, None])
def test_nil_and_absent_change_nothing(server: Server, fields: object) -> None:
    with RawVmm(server.socket, mmio_granularity="page") as vmm:
        vmm.map_vma(UADDR, PAGES)
        vmm.add_region(GFN, PAGES, UADDR, "mmio")
        assert vmm.connection.ask("set_policy", fields) is None
        vmm.vp().intercept(GFN)
        assert mapped(vmm) == 1


@statement("P-22")
def test_a_touch_of_movable_memory_maps_512_aligned_pages_at_most(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, 2000)
    vmm.add_region(7, 2000, UADDR)
    vmm.vp().intercept(7 + 600)
    reached = [vmm.ask("translate", gfn=7 + page) is not None for page in (511, 512, 1023, 1024)]
    assert (reached, mapped(vmm)) == ([False, True, True, False], 512)


@statement("P-3", "E-2")
def test_another_granularity_is_einval(vmm: RawVmm) -> None:
    refusal = vmm.connection.refusal("set_policy", {"mmio_granularity": "huge"})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "mmio_granularity")
