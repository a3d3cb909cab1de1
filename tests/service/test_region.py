"""A region: translation, windows and rights."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import MmioGranularity, RegionKind
from intercept_protocol.outcomes import Access
from interceptd.memory.region import FAULT_IN_PAGES, KindOrigin, Region, kind_of_vma
from interceptd.pages.mapping import HOST_BACKING, Cache, Extent, Frame, Mapping

RWX = Access.READ | Access.WRITE | Access.EXECUTE
EVERY_RIGHTS = [Access(bits) for bits in range(8)]


def region(
    kind: RegionKind = RegionKind.MMIO,
    *,
    page_count: int = 16,
    access: Access = RWX,
    kind_origin: KindOrigin = KindOrigin.STATED,
) -> Region:
    """Gfns from 0x103 on, uaddr pages from 0x9000 on: no alignment in common."""
    gfns = GfnRange(start=0x103, end=0x103 + page_count)
    return Region(gfns, UaddrRange(start=0x9000, end=0x9000 + page_count), kind, kind_origin, access)


def extent(access: Access = RWX, *, io: bool = False) -> Extent:
    uaddrs = UaddrRange(start=0x9004, end=0x9008)
    return Extent(uaddrs, Frame(HOST_BACKING, 70), access, io, vma=uaddrs)


@given(st.integers(0, 15), st.integers(1, 16))
def test_uaddrs_and_gfns_translate_into_each_other(offset: int, page_count: int) -> None:
    gfns = GfnRange(start=0x103 + offset, end=0x103 + offset + page_count)
    uaddrs = region().uaddrs_of(gfns)
    assert (uaddrs.start - 0x9000, uaddrs.page_count) == (offset, page_count)
    assert region().gfns_of(uaddrs) == gfns


def test_window_of_mmio_with_vma_granularity_is_the_region() -> None:
    mmio = region(RegionKind.MMIO)
    assert mmio.window(0x107, MmioGranularity.VMA) == mmio.gfns


def test_window_of_mmio_with_page_granularity_is_the_faulting_page() -> None:
    assert region(RegionKind.MMIO).window(0x107, MmioGranularity.PAGE) == GfnRange(start=0x107, end=0x108)


@pytest.mark.parametrize("granularity", MmioGranularity)
def test_window_of_pinned_is_the_region_whatever_the_policy(granularity: MmioGranularity) -> None:
    pinned = region(RegionKind.PINNED)
    assert pinned.window(0x107, granularity) == pinned.gfns


@given(st.integers(1, 2000), st.data())
def test_window_of_movable_is_512_pages_counted_from_the_region_start(
    page_count: int, data: st.DataObject
) -> None:
    movable = region(RegionKind.MOVABLE, page_count=page_count)
    gfn = 0x103 + data.draw(st.integers(0, page_count - 1))
    window = movable.window(gfn, MmioGranularity.PAGE)
    assert gfn in window
    assert movable.gfns.covers(window)
    assert (window.start - movable.gfns.start) % FAULT_IN_PAGES == 0
    assert window.end == min(window.start + FAULT_IN_PAGES, movable.gfns.end)


@pytest.mark.parametrize(
    ("offset", "start", "end"), [(0, 0, 512), (511, 0, 512), (512, 512, 1024), (1024, 1024, 1100)]
)
def test_a_window_of_movable_starts_every_512_pages(offset: int, start: int, end: int) -> None:
    movable = region(RegionKind.MOVABLE, page_count=1100)
    window = movable.window(0x103 + offset, MmioGranularity.VMA)
    assert window == GfnRange(start=0x103 + start, end=0x103 + end)


@pytest.mark.parametrize(("of_region", "of_vma"), [*product(EVERY_RIGHTS, EVERY_RIGHTS)])
def test_read_and_write_are_those_of_region_and_vma_together(of_region: Access, of_vma: Access) -> None:
    rights = region(access=of_region).rights(extent(of_vma))
    assert rights & (Access.READ | Access.WRITE) == of_region & of_vma & (Access.READ | Access.WRITE)


@pytest.mark.parametrize("of_region", EVERY_RIGHTS)
def test_execute_of_readable_memory_is_the_regions_alone(of_region: Access) -> None:
    rights = region(access=of_region | Access.READ).rights(extent(Access.READ))
    assert rights & Access.EXECUTE == of_region & Access.EXECUTE


def test_memory_that_may_not_be_read_is_not_executed() -> None:
    assert region().rights(extent(Access.WRITE | Access.EXECUTE)) == Access.WRITE


def test_mapping_of_an_extent_puts_its_first_frame_at_its_first_gfn() -> None:
    assert region().mapping(extent()) == Mapping(
        0x107, 0x10B, Frame(HOST_BACKING, 70), 0x9004, RWX, Cache.NOT_CACHED
    )


@pytest.mark.parametrize("kind", [RegionKind.MOVABLE, RegionKind.PINNED])
def test_mapping_of_memory_is_cached(kind: RegionKind) -> None:
    assert region(kind).mapping(extent()).cache is Cache.NORMAL


def test_no_access_has_neither_frame_nor_rights() -> None:
    waiting = region(RegionKind.MOVABLE).no_access(GfnRange(start=0x104, end=0x106))
    assert waiting == Mapping(0x104, 0x106, None, 0x9001, Access.NONE)


@pytest.mark.parametrize("io", [True, False])
def test_a_stated_kind_fits_every_vma(*, io: bool) -> None:
    assert region(RegionKind.MMIO).fits(extent(io=io))


@pytest.mark.parametrize(("kind", "io"), [*product([RegionKind.MMIO, RegionKind.MOVABLE], [True, False])])
def test_an_inferred_kind_fits_only_a_vma_of_that_kind(kind: RegionKind, *, io: bool) -> None:
    inferred = region(kind, kind_origin=KindOrigin.INFERRED)
    assert inferred.fits(extent(io=io)) == (kind_of_vma(io) is kind)


@pytest.mark.parametrize("kind", [RegionKind.MMIO, RegionKind.MOVABLE])
def test_an_inferred_kind_does_not_fit_a_vma_that_was_not_looked_at(kind: RegionKind) -> None:
    unknown = replace(extent(), io=None)
    assert not region(kind, kind_origin=KindOrigin.INFERRED).fits(unknown)
