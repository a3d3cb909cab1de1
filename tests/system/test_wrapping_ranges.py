"""Ranges at the end of the address spaces: a range may end exactly there, one page more is an error (I3)."""

from __future__ import annotations

import pytest

from fakes.raw_client import READ
from fakes.raw_vmm import GFN, PAGE, UADDR, RawVmm, region, vma

LAST_PAGE = (1 << 52) - 1
"""Of gfns, of pfns and of uaddr pages alike."""
LAST_UADDR = LAST_PAGE * PAGE
U64 = (1 << 64) - 1

WRONG_REGIONS = [
    (region(GFN, 0, UADDR), "page_count"),
    (region(LAST_PAGE, 2, UADDR), "page_count"),
    (region(LAST_PAGE + 1, 1, UADDR), "start_gfn"),
    (region(U64, 1, UADDR), "start_gfn"),
    (region(U64, U64, UADDR), "start_gfn"),
    (region(1, U64, UADDR), "page_count"),
    (region(0, (1 << 52) + 1, UADDR), "page_count"),
    (region(GFN, 2, LAST_UADDR), "page_count"),
    (region(GFN, 1, UADDR + 1), "start_uaddr"),
    (region(GFN, 1, U64), "start_uaddr"),
]
WRONG_VMAS = [
    (vma(UADDR, 0), "page_count"),
    (vma(LAST_UADDR, 2), "page_count"),
    (vma(0, U64), "page_count"),
    (vma(UADDR + 2048, 1), "start_uaddr"),
    (vma(UADDR, 2, LAST_PAGE), "page_count"),
    (vma(UADDR, 1, LAST_PAGE + 1), "start_pfn"),
    (vma(UADDR, 1, U64), "start_pfn"),
]
WRONG_INVALIDATIONS = [
    ({"start_uaddr": UADDR, "length": 0}, "length"),
    ({"start_uaddr": UADDR, "length": PAGE - 1}, "length"),
    ({"start_uaddr": LAST_UADDR, "length": 2 * PAGE}, "length"),
    ({"start_uaddr": 2 * PAGE, "length": U64 - PAGE + 1}, "length"),
    ({"start_uaddr": U64, "length": PAGE}, "start_uaddr"),
]


@pytest.mark.parametrize(("fields", "field"), WRONG_REGIONS)
def test_a_region_that_is_empty_misaligned_or_wraps_is_einval(
    vmm: RawVmm, fields: dict[str, object], field: str
) -> None:
    refusal = vmm.connection.refusal("add_region", fields)
    assert (refusal.name, refusal.details) == ("EINVAL", {"field": field})
    assert vmm.ask("statistics")["regions"] == 0


@pytest.mark.parametrize(("fields", "field"), WRONG_REGIONS)
def test_removing_a_region_that_is_empty_misaligned_or_wraps_is_einval(
    vmm: RawVmm, fields: dict[str, object], field: str
) -> None:
    ranges = {name: fields[name] for name in ("start_gfn", "page_count", "start_uaddr")}
    refusal = vmm.connection.refusal("remove_region", ranges)
    assert (refusal.name, refusal.details) == ("EINVAL", {"field": field})


@pytest.mark.parametrize(("fields", "field"), WRONG_VMAS)
def test_a_vma_that_is_empty_misaligned_or_wraps_is_einval(
    vmm: RawVmm, fields: dict[str, object], field: str
) -> None:
    refusal = vmm.connection.refusal("map_vma", fields)
    assert (refusal.name, refusal.details) == ("EINVAL", {"field": field})
    assert vmm.ask("statistics")["vmas"] == 0


@pytest.mark.parametrize("method", ["invalidate", "invalidate_begin", "invalidate_end"])
@pytest.mark.parametrize(("fields", "field"), WRONG_INVALIDATIONS)
def test_an_invalidation_that_is_empty_misaligned_or_wraps_is_einval(
    vmm: RawVmm, method: str, fields: dict[str, object], field: str
) -> None:
    refusal = vmm.notifier().refusal(method, fields)
    assert (refusal.name, refusal.details) == ("EINVAL", {"field": field})
    assert vmm.ask("statistics")["open_invalidations"] == 0


def test_the_last_page_of_every_address_space_is_served(vmm: RawVmm) -> None:
    vmm.map_vma(LAST_UADDR, 1, LAST_PAGE)
    vmm.add_region(LAST_PAGE, 1, LAST_UADDR)
    vp = vmm.vp()
    assert vp.intercept(LAST_PAGE, READ) == ["resume", "mapped"]
    assert vmm.ask("translate", gfn=LAST_PAGE)["pfn"] == LAST_PAGE
    assert vmm.notifier().ask("invalidate", {"start_uaddr": LAST_UADDR, "length": PAGE}) is None
    assert vmm.ask("translate", gfn=LAST_PAGE) is None


def test_a_region_of_the_whole_address_space_is_added_unmapped_and_removed(vmm: RawVmm) -> None:
    whole = region(0, LAST_PAGE + 1, 0)
    assert vmm.connection.ask("add_region", region(0, LAST_PAGE + 1, 0, kind="mmio")) == {"kind": "mmio"}
    vmm.ask("unmap_vma", start_uaddr=0, page_count=LAST_PAGE + 1)
    ranges = {name: whole[name] for name in ("start_gfn", "page_count", "start_uaddr")}
    assert vmm.connection.ask("remove_region", ranges) is None


def test_a_movable_region_of_the_whole_address_space_is_refused_and_not_added(vmm: RawVmm) -> None:
    refusal = vmm.connection.refusal("add_region", region(0, LAST_PAGE + 1, 0))
    assert refusal.name == "ENOMEM"
    assert vmm.ask("statistics")["regions"] == 0


@pytest.mark.parametrize("gfn", [LAST_PAGE, LAST_PAGE + 1, U64])
def test_translating_any_gfn_is_answered(vmm: RawVmm, gfn: int) -> None:
    assert vmm.ask("translate", gfn=gfn) is None
