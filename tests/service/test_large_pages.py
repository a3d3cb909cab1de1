"""Large pages that are mapped in parts, although region and VMA have them whole."""

from __future__ import annotations

from typing import Final

import pytest

from fakes.model_partition import ModelPartition
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import MmioGranularity, RegionKind
from intercept_protocol.outcomes import Access
from interceptd.memory.region import LARGE_PAGE, KindOrigin, Region
from interceptd.pages.mapping import HOST_BACKING, Extent, Frame

L: Final = LARGE_PAGE
HALF: Final = L // 2


@pytest.mark.parametrize(
    ("region", "vma", "extent", "split"),
    [
        pytest.param((0, 4 * L), (0, 4 * L), (L, 2 * L), False, id="a whole one"),
        pytest.param((0, 4 * L), (0, 4 * L), (L, 3 * L), False, id="two whole ones"),
        pytest.param((0, 4 * L), (0, 4 * L), (L, L + 1), True, id="the first page of one"),
        pytest.param((0, 4 * L), (0, 4 * L), (L + 1, 2 * L), True, id="all but the first page of one"),
        pytest.param((0, 4 * L), (0, 4 * L), (L, 2 * L + 1), True, id="one and a page of the next"),
        pytest.param((0, 4 * L), (0, 4 * L), (L - 1, 2 * L), True, id="one and a page of the last"),
        pytest.param((0, 4 * L), (0, 4 * L), (L + 3, L + 9), True, id="some in the middle of one"),
        pytest.param((HALF, 4 * L), (0, 4 * L), (HALF, L), False, id="the region begins in it"),
        pytest.param((0, L + HALF), (0, 4 * L), (L, L + HALF), False, id="the region ends in it"),
        pytest.param((0, 4 * L), (HALF, 4 * L), (HALF, L), False, id="the VMA begins in it"),
        pytest.param((0, 4 * L), (0, L + HALF), (L, L + HALF), False, id="the VMA ends in it"),
        pytest.param((HALF, 4 * L), (0, 4 * L), (HALF, L + HALF), True, id="the next one is cut"),
        pytest.param(
            (L, 2 * L), (L, 2 * L), (L + 1, 2 * L), True, id="all but the first page of the only one"
        ),
        pytest.param(
            (L, 2 * L), (L, 2 * L), (L, 2 * L - 1), True, id="all but the last page of the only one"
        ),
        pytest.param((HALF, 4 * L), (0, 4 * L), (HALF, L - 1), False, id="part of where the region begins"),
        pytest.param((0, L + HALF), (0, 4 * L), (L + 1, L + HALF), False, id="part of where it ends"),
        pytest.param((1, 4 * L), (0, 4 * L), (L, L + 1), True, id="the region begins one page behind one"),
    ],
)
def test_a_large_page_is_split_if_region_and_vma_have_all_of_it_and_the_extent_a_part(
    region: tuple[int, int], vma: tuple[int, int], extent: tuple[int, int], *, split: bool
) -> None:
    assert area(region).splits_large_page(resolved(extent, vma)) is split


def test_gfns_and_uaddrs_that_do_not_agree_have_no_large_page() -> None:
    assert not area((0, 4 * L), shift=1).splits_large_page(resolved((L, L + 1), (0, 4 * L)))


def area(pages: tuple[int, int], *, shift: int = 0) -> Region:
    """Of uaddrs from the first page on, and gfns that lie `shift` and some large pages behind them."""
    uaddrs = UaddrRange(start=pages[0], end=pages[1])
    gfns = GfnRange(start=pages[0] + 8 * L + shift, end=pages[1] + 8 * L + shift)
    return Region(gfns, uaddrs, RegionKind.MOVABLE, KindOrigin.STATED, Access.READ)


def resolved(pages: tuple[int, int], vma: tuple[int, int]) -> Extent:
    uaddrs, whole = UaddrRange(start=pages[0], end=pages[1]), UaddrRange(start=vma[0], end=vma[1])
    return Extent(uaddrs, Frame(HOST_BACKING, 0), Access.READ, io=False, vma=whole)


# ------------------------------------------------ counted


async def touched(model: ModelPartition, gfn: int, page_count: int, kind: RegionKind) -> int:
    """How many were split when all pages of a region on a VMA of four large pages were touched."""
    await model.map_vma(0, 4 * L, 0)
    await model.add_region(gfn, page_count, gfn, kind)
    for each in range(gfn, gfn + page_count):
        await model.fault(each)
    return model.partition.statistics().split_large_pages


@pytest.mark.parametrize("kind", RegionKind)
async def test_a_region_that_begins_at_a_large_page_splits_none(
    model: ModelPartition, kind: RegionKind
) -> None:
    assert await touched(model, L, 2 * L, kind) == 0


@pytest.mark.parametrize(
    ("kind", "split"), [(RegionKind.MMIO, 0), (RegionKind.MOVABLE, 3), (RegionKind.PINNED, 0)]
)
async def test_blocks_of_a_movable_region_that_begins_elsewhere_split_what_they_cut(
    model: ModelPartition, kind: RegionKind, split: int
) -> None:
    """Blocks are counted from the region's start: [1/2, 3/2), [3/2, 5/2) and the rest cut pages 1 and 2."""
    assert await touched(model, HALF, 2 * L + HALF, kind) == split


async def test_a_region_cut_where_its_first_large_page_begins_splits_none(model: ModelPartition) -> None:
    assert await touched(model, HALF, HALF, RegionKind.MOVABLE) == 0
    await model.add_region(L, 2 * L, L, RegionKind.MOVABLE)
    for gfn in range(L, 3 * L):
        await model.fault(gfn)
    assert model.partition.statistics().split_large_pages == 0


async def test_each_map_of_a_single_page_of_one_counts(model: ModelPartition) -> None:
    model.regions.mmio_granularity = MmioGranularity.PAGE
    assert await touched(model, 0, 3, RegionKind.MMIO) == 0, "the region has none whole"
    await model.remove_region(0, 3, 0)
    await model.add_region(0, L, 0)
    for gfn in (0, 7, 7):
        await model.fault(gfn)
    assert model.partition.statistics().split_large_pages == 2
    assert model.partition.totals().split_large_pages == 2


async def test_a_fault_that_maps_nothing_counts_nothing(model: ModelPartition) -> None:
    model.regions.mmio_granularity = MmioGranularity.PAGE
    await model.map_vma(0, L, 0, Access.READ)
    await model.add_region(0, L, 0)
    await model.fault(1, Access.WRITE)
    model.hypervisor.refuse_map()
    await model.fault(2)
    assert model.partition.statistics().split_large_pages == 0
