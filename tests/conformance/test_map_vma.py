"""`map_vma`: what is mapped at the VMM's addresses, on declared memory."""

from __future__ import annotations

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, PAGE, PAGES, PFN, UADDR, RawVmm, region, vma
from conformance.statements import needs, statement


@statement("P-13")
@pytest.mark.parametrize(("start", "count"), [(0, PAGES), (-1, 2), (PAGES - 1, 2), (3, 1)])
def test_a_vma_over_a_part_of_another_is_eexist_that_says_which(vmm: RawVmm, start: int, count: int) -> None:
    vmm.map_vma(UADDR, PAGES)
    refusal = vmm.connection.refusal("map_vma", vma(UADDR + start * PAGE, count))
    assert (refusal.name, refusal.details.get("start_uaddr"), refusal.details.get("page_count")) == (
        "EEXIST",
        UADDR,
        PAGES,
    )
    assert vmm.ask("statistics")["vmas"] == 1


@statement("P-4")
@pytest.mark.parametrize(
    ("fields", "field"),
    [(vma(UADDR, 0), "page_count"), (vma(UADDR + 1, 1), "start_uaddr"), (vma(UADDR, 2, (1 << 52) - 1), None)],
)
def test_a_range_that_is_empty_misaligned_or_ends_beyond_its_space_is_einval(
    vmm: RawVmm, fields: dict[str, object], field: str | None
) -> None:
    refusal = vmm.connection.refusal("map_vma", fields)
    assert (refusal.name, refusal.details.get("field") in {field, "start_pfn", "page_count"}) == (
        "EINVAL",
        True,
    )


@statement("P-15", "L-1")
def test_one_vma_too_many_is_enospc_that_names_the_limit(vmm: RawVmm, limits: dict[str, int]) -> None:
    limit = limits["vmas_per_partition"]
    if limit > 5000:
        pytest.skip(f"limits.vmas_per_partition is {limit}: set it lower")
    for page in range(limit):
        vmm.map_vma(UADDR + 2 * page * PAGE, 1)
    refusal = vmm.connection.refusal("map_vma", vma(UADDR - PAGE, 1))
    assert (refusal.name, refusal.details.get("limit")) == ("ENOSPC", "vmas_per_partition")


@statement("P-24", "E-2")
@pytest.mark.parametrize("field", list(vma(UADDR, 1)))
def test_a_field_that_is_missing_is_einval_that_names_it(vmm: RawVmm, field: str) -> None:
    fields = {name: value for name, value in vma(UADDR, 1).items() if name != field}
    refusal = vmm.connection.refusal("map_vma", fields)
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", field)


@statement("P-24")
@needs("process")
@pytest.mark.parametrize("method", ["map_vma", "unmap_vma", "protect_vma"])
def test_vmas_are_not_declared_in_process_mode(server: Server, method: str) -> None:
    fields = vma(UADDR, 1)
    unused = {
        "unmap_vma": {"start_pfn", "io", "readable", "writable", "executable"},
        "protect_vma": {"start_pfn", "io"},
    }
    asked = {name: value for name, value in fields.items() if name not in unused.get(method, set())}
    with RawVmm(server.socket, address_space="process") as vmm:
        assert vmm.connection.refusal(method, asked).name == "EINVAL"


@statement("V-4")
def test_memory_mapped_behind_a_region_is_found_by_the_next_fault(vmm: RawVmm) -> None:
    vmm.ask("add_region", **region(GFN, PAGES, UADDR))
    vp = vmm.vp()
    assert vp.intercept(GFN + 2) == ["forward", "unbacked"]
    vmm.map_vma(UADDR, PAGES)
    assert vp.intercept(GFN + 2) == ["resume", "mapped"]
    assert vmm.ask("translate", gfn=GFN + 2)["pfn"] == PFN + 2
