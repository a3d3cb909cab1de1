"""Large pages: how regions lie decides whether a fault maps a whole one."""

from __future__ import annotations

import pytest

from conformance.guests import RawVmm
from conformance.statements import statement

LARGE = 512
UADDR = 0x7F00_0020_0000
"""A multiple of 2 MiB, behind the first gfns that the cases use."""


def touched(vmm: RawVmm, start_gfn: int, page_count: int, kind: str) -> int:
    """A region of gfns that lie `start_gfn` pages behind `UADDR`, all touched: how many maps split a page."""
    vmm.map_vma(UADDR, 4 * LARGE)
    vmm.add_region(start_gfn, page_count, UADDR + start_gfn * 4096, kind)
    vp = vmm.vp()
    for gfn in range(start_gfn, start_gfn + page_count, LARGE // 2):
        vp.intercept(gfn)
    split: int = vmm.ask("statistics")["split_large_pages"]
    return split


@statement("P-39", "P-25")
@pytest.mark.parametrize("kind", ["mmio", "movable", "pinned"])
def test_a_region_that_starts_at_a_large_page_splits_none(vmm: RawVmm, kind: str) -> None:
    assert touched(vmm, LARGE, 2 * LARGE, kind) == 0


@statement("P-39", "P-25")
def test_a_movable_region_that_starts_elsewhere_splits_those_that_its_blocks_cut(vmm: RawVmm) -> None:
    """Three blocks, from 256, 768 and 1280 on, cut the large pages 1 and 2 in two."""
    assert touched(vmm, LARGE // 2, 2 * LARGE + LARGE // 2, "movable") == 3


@statement("P-39")
def test_what_lies_before_the_first_large_page_in_a_region_of_its_own_splits_none(vmm: RawVmm) -> None:
    assert touched(vmm, LARGE // 2, LARGE // 2, "movable") == 0
    vmm.add_region(LARGE, 2 * LARGE, UADDR + LARGE * 4096)
    vp = vmm.vp(1)
    assert [vp.intercept(gfn) for gfn in (LARGE, 2 * LARGE)] == [["resume", "mapped"]] * 2
    assert vmm.ask("statistics")["split_large_pages"] == 0


@statement("P-39")
def test_each_page_that_the_granularity_maps_alone_counts(vmm: RawVmm) -> None:
    vmm.ask("set_policy", mmio_granularity="page")
    assert touched(vmm, LARGE, LARGE, "mmio") == 2


@statement("P-39")
def test_gfns_and_uaddrs_that_do_not_lie_alike_have_no_large_pages(vmm: RawVmm) -> None:
    vmm.ask("set_policy", mmio_granularity="page")
    vmm.map_vma(UADDR, 4 * LARGE)
    vmm.add_region(LARGE, 2 * LARGE, UADDR + 4096, "mmio")
    vmm.vp().intercept(LARGE)
    assert vmm.ask("statistics")["split_large_pages"] == 0
