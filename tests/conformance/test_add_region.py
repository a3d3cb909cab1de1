"""`add_region`: which part of the VMM's memory backs the guest's pages, and with which rights."""

from __future__ import annotations

import pytest

from conformance.guests import GFN, PAGE, PAGES, PFN, UADDR, RawVmm, region, vma
from conformance.statements import statement
from conformance.wire import EXECUTE, READ, WRITE

LAST_GFN, LAST_UADDR = (1 << 52) - 1, (1 << 64) - PAGE


@statement("P-4", "E-2")
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (region(0, 0, UADDR), "page_count"),
        (region(0, 1, UADDR + 1), "start_uaddr"),
        (region(LAST_GFN, 2, UADDR), None),
        (region(2**64 - 1, 1, UADDR), None),
        (region(0, 2, LAST_UADDR), None),
        (region(0, 2**64 - 1, UADDR), None),
    ],
)
def test_a_range_that_is_empty_misaligned_or_ends_beyond_its_space_is_einval_that_names_a_field(
    vmm: RawVmm, fields: dict[str, object], field: str | None
) -> None:
    refusal = vmm.connection.refusal("add_region", fields)
    assert refusal.name == "EINVAL"
    assert refusal.details.get("field") in ({field} if field else {"start_gfn", "page_count", "start_uaddr"})
    assert vmm.ask("statistics")["regions"] == 0


@statement("P-4")
def test_a_range_may_end_just_where_its_space_ends(vmm: RawVmm) -> None:
    vmm.add_region(LAST_GFN, 1, LAST_UADDR)
    assert vmm.ask("statistics")["regions"] == 1


@statement("P-7")
@pytest.mark.parametrize(
    ("start", "count"), [(GFN, PAGES), (GFN - 1, 2), (GFN + PAGES - 1, 9), (GFN + 3, 1), (0, 4096)]
)
def test_an_overlap_is_eexist_that_says_with_what(vmm: RawVmm, start: int, count: int) -> None:
    vmm.add_region(GFN, PAGES, UADDR)
    refusal = vmm.connection.refusal("add_region", region(start, count, UADDR))
    assert (refusal.name, refusal.details.get("start_gfn"), refusal.details.get("page_count")) == (
        "EEXIST",
        GFN,
        PAGES,
    )
    assert vmm.ask("statistics")["regions"] == 1


@statement("P-7")
def test_neighbours_do_not_overlap_and_two_may_have_the_same_uaddrs(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, PAGES)
    for start in (GFN, GFN - PAGES, GFN + PAGES):
        vmm.add_region(start, PAGES, UADDR)
    vp = vmm.vp()
    assert [vp.intercept(gfn)[0] for gfn in (GFN, GFN - PAGES, GFN + PAGES)] == ["resume"] * 3
    assert vmm.ask("translate", gfn=GFN)["pfn"] == vmm.ask("translate", gfn=GFN + PAGES)["pfn"] == PFN


@statement("P-8")
@pytest.mark.parametrize("kind", ["mmio", "movable"])
def test_mmio_and_movable_are_mapped_at_the_first_touch(vmm: RawVmm, kind: str) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, kind)
    before = vmm.ask("translate", gfn=GFN)
    assert (before, vmm.vp().intercept(GFN)) == (None, ["resume", "mapped"])
    assert vmm.ask("translate", gfn=GFN)["pfn"] == PFN


@statement("P-8", "P-25")
def test_movable_is_known_as_inaccessible_before(vmm: RawVmm) -> None:
    vmm.add_region(GFN, PAGES, UADDR)
    seen = vmm.ask("statistics")
    assert (seen["no_access_gfns"], seen["mapped_gfns"]) == (PAGES, 0)


@statement("P-8")
def test_pinned_is_mapped_whole_before_the_answer(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, "pinned")
    assert [vmm.ask("translate", gfn=GFN + page)["pfn"] for page in (0, PAGES - 1)] == [PFN, PFN + PAGES - 1]


@statement("P-8")
def test_pinned_over_a_hole_is_efault_and_leaves_nothing(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, PAGES - 1)
    refusal = vmm.connection.refusal("add_region", region(GFN, PAGES, UADDR, kind="pinned"))
    seen = vmm.ask("statistics")
    assert (refusal.name, seen["regions"], seen["mapped_gfns"]) == ("EFAULT", 0, 0)
    vmm.add_region(GFN, PAGES, UADDR)


@statement("P-9", "P-23")
@pytest.mark.parametrize(("io", "kind"), [(True, "mmio"), (False, "movable")])
def test_auto_gets_the_kind_of_the_vma(vmm: RawVmm, io: bool, kind: str) -> None:
    vmm.map_vma(UADDR, PAGES, io=io)
    assert vmm.ask("add_region", **region(GFN, PAGES, UADDR, kind="auto")) == {"kind": kind}


@statement("P-9")
def test_auto_over_nothing_is_einval(vmm: RawVmm) -> None:
    refusal = vmm.connection.refusal("add_region", region(GFN, PAGES, UADDR, kind="auto"))
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "start_uaddr")


@statement("P-9")
def test_auto_that_no_longer_fits_is_unbacked(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, PAGES, io=True)
    vmm.ask("add_region", **region(GFN, PAGES, UADDR, kind="auto"))
    vmm.ask("unmap_vma", start_uaddr=UADDR, page_count=PAGES)
    vmm.map_vma(UADDR, PAGES)
    assert vmm.vp().intercept(GFN) == ["forward", "unbacked"]


@statement("P-10", "L-1")
def test_one_region_too_many_is_enospc_that_names_the_limit(vmm: RawVmm, limits: dict[str, int]) -> None:
    limit = limits["regions_per_partition"]
    if limit > 5000:
        pytest.skip(f"limits.regions_per_partition is {limit}: set it lower")
    for gfn in range(limit):
        vmm.add_region(gfn, 1, UADDR)
    refusal = vmm.connection.refusal("add_region", region(limit, 1, UADDR))
    assert (refusal.name, refusal.details.get("limit")) == ("ENOSPC", "regions_per_partition")


@statement("P-10")
def test_a_region_that_the_pool_has_no_room_for_is_enomem_and_not_added(
    vmm: RawVmm, limits: dict[str, int]
) -> None:
    pages = limits["deposit_pages_per_partition"] * 512 + 1
    if pages > 1 << 40:
        pytest.skip("limits.deposit_pages_per_partition is beyond what a region can use up")
    refusal = vmm.connection.refusal("add_region", region(0, pages, 0))
    assert (refusal.name, vmm.ask("statistics")["regions"]) == ("ENOMEM", 0)


@statement("P-11")
@pytest.mark.parametrize(
    ("of_region", "of_vma", "access", "outcome"),
    [
        ({"writable": False}, {"writable": True}, WRITE, "forward"),
        ({"writable": True}, {"writable": False}, WRITE, "forward"),
        ({"writable": True}, {"writable": True}, WRITE, "resume"),
        ({"writable": False}, {"writable": False}, READ, "resume"),
        ({}, {"readable": False}, READ, "forward"),
        ({"executable": True}, {"executable": False}, EXECUTE, "resume"),
        ({"executable": False}, {"executable": True}, EXECUTE, "forward"),
        ({"executable": True}, {"readable": False, "executable": True}, EXECUTE, "forward"),
    ],
)
def test_rights_are_the_regions_and_the_vmas_together_but_for_executing(
    vmm: RawVmm, of_region: dict[str, object], of_vma: dict[str, object], access: int, outcome: str
) -> None:
    vmm.ask("map_vma", **{**vma(UADDR, PAGES), **of_vma})
    vmm.ask("add_region", **{**region(GFN, PAGES, UADDR), **of_region})
    reasons = {"forward": "permission", "resume": "mapped"}
    assert vmm.vp().intercept(GFN, access) == [outcome, reasons[outcome]]


@statement("P-3", "P-23", "E-2")
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": "ram"}, "kind"),
        ({"kind": None}, "kind"),
        ({"writable": 1}, "writable"),
        ({"start_gfn": -1}, "start_gfn"),
        ({"page_count": 1.0}, "page_count"),
        ({"start_uaddr": "0"}, "start_uaddr"),
        ({"executable": None}, "executable"),
        ({"io": True}, "io"),
    ],
)
def test_a_wrong_field_is_einval_that_names_it(vmm: RawVmm, change: dict[str, object], field: str) -> None:
    refusal = vmm.connection.refusal("add_region", {**region(GFN, PAGES, UADDR), **change})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", field)


@statement("Y-8")
def test_a_region_before_the_hypervisor_is_enotconn(hosted: RawVmm) -> None:
    assert hosted.connection.refusal("add_region", region(GFN, PAGES, UADDR)).name == "ENOTCONN"
    hosted.link()
    hosted.add_region(GFN, PAGES, UADDR, "mmio")
