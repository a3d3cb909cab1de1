"""Lists of a partition's regions, VMAs and mappings: pages that each start behind a key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import pytest

from fakes.model_partition import ModelPartition
from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.errors import WireError
from intercept_protocol.messages import MappingView, RegionKind, RegionPage, RegionView, VmaView
from intercept_protocol.outcomes import Access
from interceptd.address_space.process import ProcessAddressSpace
from interceptd.sessions import views

PAGE: Final = RegionPage.PAGE
MANY: Final = 2 * PAGE + 5
Listed = tuple[list[int], bool]


async def regions(model: ModelPartition, after: int | None = None) -> Listed:
    page = await views.region_page(model.partition, after)
    return [each.start_gfn for each in page.regions], page.more


async def vmas(model: ModelPartition, after: int | None = None) -> Listed:
    page = await views.vma_page(model.partition, None if after is None else after << PAGE_SHIFT)
    return [each.start_uaddr >> PAGE_SHIFT for each in page.vmas], page.more


async def mappings(model: ModelPartition, after: int | None = None) -> Listed:
    page = await views.mapping_page(model.partition, after)
    return [each.start_gfn for each in page.mappings], page.more


async def add(model: ModelPartition, pages: Iterable[int]) -> None:
    """A VMA, a region and a mapping of each page, under the page's own number; none continues another."""
    for page in pages:
        await model.map_vma(page, 1, 2 * page)
        await model.add_region(page, 1, page)
        await model.fault(page)


async def take(model: ModelPartition, pages: Iterable[int]) -> None:
    for page in pages:
        await model.remove_region(page, 1, page)
        await model.unmap_vma(page, 1)


LISTS: Final = [regions, vmas, mappings]
List = Callable[..., Awaitable[Listed]]


@pytest.mark.parametrize("listed", LISTS)
async def test_all_come_in_order_in_pages_of_256(model: ModelPartition, listed: List) -> None:
    await add(model, range(0, 2 * MANY, 2))
    seen, more = await listed(model)
    sizes = [len(seen)]
    while more:
        page, more = await listed(model, seen[-1])
        seen += page
        sizes.append(len(page))
    assert (sizes, seen) == ([PAGE, PAGE, 5], [*range(0, 2 * MANY, 2)])


@pytest.mark.parametrize("listed", LISTS)
async def test_the_last_page_is_full_and_no_more_follows(model: ModelPartition, listed: List) -> None:
    await add(model, range(0, 2 * PAGE, 2))
    assert await listed(model) == ([*range(0, 2 * PAGE, 2)], False)
    assert await listed(model, 2 * PAGE - 2) == ([], False)
    assert await listed(model, (1 << 52) - 1) == ([], False)


@pytest.mark.parametrize("listed", LISTS)
async def test_a_list_that_changes_between_its_pages_repeats_nothing_and_leaves_out_nothing_that_stays(
    model: ModelPartition, listed: List
) -> None:
    """What was listed goes, the last element included, and others come before and behind it."""
    await add(model, range(0, 2 * MANY, 2))
    first, _ = await listed(model)
    await take(model, [*first[:10], first[-1]])
    await add(model, [1, 2 * MANY - 3])
    second, _ = await listed(model, first[-1])
    third, more = await listed(model, second[-1])
    assert [*second, *third] == [*range(2 * PAGE, 2 * MANY - 3, 2), 2 * MANY - 3, 2 * MANY - 2]
    assert not more


async def test_a_uaddr_within_a_page_lists_what_starts_behind_it(model: ModelPartition) -> None:
    await add(model, [4, 6])
    page = await views.vma_page(model.partition, (5 << PAGE_SHIFT) + 1)
    assert [each.start_uaddr for each in page.vmas] == [6 << PAGE_SHIFT]


async def test_elements_have_the_values_that_they_were_made_with(model: ModelPartition) -> None:
    await model.map_vma(0x40, 8, 0x900, Access.READ | Access.EXECUTE, io=True)
    await model.add_region(0x10, 8, 0x3C, RegionKind.MMIO, Access.READ | Access.WRITE)
    await model.fault(0x15)
    assert (await views.region_page(model.partition, None)).regions == [
        RegionView(
            start_gfn=0x10, page_count=8, start_uaddr=0x3C000, kind="mmio", state="live", writable=True,
            executable=False, mapped_gfns=4,
        )
    ]  # fmt: skip
    assert (await views.vma_page(model.partition, None)).vmas == [
        VmaView(
            start_uaddr=0x40000, page_count=8, start_pfn=0x900, readable=True, writable=False,
            executable=True, io=True,
        )
    ]  # fmt: skip
    assert (await views.mapping_page(model.partition, None)).mappings == [
        MappingView(start_gfn=0x14, page_count=4, start_uaddr=0x40000, frame=("host", 0x900), access=1)
    ]


async def test_no_access_is_not_listed_as_mapped(model: ModelPartition) -> None:
    await model.add_region(0, 16, 0, RegionKind.MOVABLE)
    assert model.hypervisor.counters().no_access_gfns == 16
    assert await mappings(model) == ([], False)


async def test_vmas_of_live_memory_are_einval(model: ModelPartition, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.partition, "memory", object.__new__(ProcessAddressSpace))
    with pytest.raises(WireError, match="EINVAL: VMAs are declared only"):
        await views.vma_page(model.partition, None)
