"""The declared address space: the VMA table that a VMM feeds."""

from __future__ import annotations

import errno
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from itertools import pairwise

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from fakes.drawn import SPACE, ranges
from fakes.used_up_time import time_used_up_every
from intercept_protocol.addresses import PageRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access
from interceptd.address_space.declared import VMAS_PER_PART, DeclaredAddressSpace, Vma
from interceptd.pages.mapping import HOST_BACKING, Extent, Frame
from interceptd.quota import Quota

RW = Access.READ | Access.WRITE
EVERYWHERE = UaddrRange(start=0, end=1 << 40)


def uid(limit: int = 1 << 20) -> Quota:
    """The VMAs that a uid may have."""
    return Quota(7, "VMAs", "vmas_per_uid", lambda: limit)


def space(*vmas: Vma, limit: int = 1000, quota: Quota | None = None) -> DeclaredAddressSpace:
    declared = DeclaredAddressSpace(lambda: limit, quota or uid())
    for vma in vmas:
        declared.map_vma(vma)
    return declared


def vma(start: int, end: int, pfn: int = 7000, access: Access = RW, *, io: bool = False) -> Vma:
    return Vma(start, end, pfn, access, io)


# ------------------------------------------------ resolve


async def test_resolve_answers_with_the_part_of_the_vma_in_the_window() -> None:
    declared = space(vma(10, 30, 7000, io=True))
    extent = await declared.resolve(20, UaddrRange(start=15, end=100), EVERYWHERE)
    whole = UaddrRange(start=10, end=30)
    assert extent == Extent(UaddrRange(start=15, end=30), Frame(HOST_BACKING, 7005), RW, True, whole)


async def test_resolve_stops_at_the_vmas_ends_even_where_neighbours_touch() -> None:
    declared = space(vma(0, 10, 100), vma(10, 20, 110), vma(20, 30, 120))
    extent = await declared.resolve(15, EVERYWHERE, EVERYWHERE)
    assert extent is not None
    assert (extent.uaddrs, extent.frame.page) == (UaddrRange(start=10, end=20), 110)


async def test_resolve_of_a_hole_is_none() -> None:
    assert await space(vma(0, 10)).resolve(10, EVERYWHERE, EVERYWHERE) is None


async def test_is_io_of_a_hole_is_none() -> None:
    declared = space(vma(0, 10, io=True))
    assert [await declared.is_io(page) for page in (9, 10)] == [True, None]


# ------------------------------------------------ limits and refusals


def test_map_over_a_vma_is_eexist_and_names_it() -> None:
    with pytest.raises(WireError) as refused:
        space(vma(4, 8), vma(0, 5))
    assert refused.value.number == errno.EEXIST
    assert refused.value.details == {"start_uaddr": 4 << 12, "page_count": 4}


def test_map_at_the_limit_is_enospc() -> None:
    with pytest.raises(WireError, match="may have 1 VMAs") as refused:
        space(vma(0, 1), vma(1, 2), limit=1)
    assert refused.value.number == errno.ENOSPC
    assert refused.value.details == {"limit": "vmas_per_partition"}


async def test_unmap_that_cuts_a_hole_at_the_limit_is_enospc_and_changes_nothing() -> None:
    declared = space(vma(0, 10), limit=1)
    with pytest.raises(WireError) as refused:
        await declared.unmap_vma(UaddrRange(start=4, end=5))
    assert refused.value.number == errno.ENOSPC
    assert await declared.is_io(4) is False


async def test_unmap_of_an_end_at_the_limit_needs_no_room() -> None:
    declared = space(vma(0, 10), limit=1)
    await declared.unmap_vma(UaddrRange(start=8, end=12))
    assert (declared.vma_count, await declared.is_io(8)) == (1, None)


async def test_unmap_over_the_ends_of_two_vmas_at_the_limit_needs_no_room() -> None:
    declared = space(vma(0, 10), vma(10, 20), limit=2)
    await declared.unmap_vma(UaddrRange(start=8, end=12))
    assert declared.vma_count == 2


@pytest.mark.parametrize(("start", "end"), [(4, 5), (0, 5), (5, 10)])
async def test_protect_that_cuts_at_the_limit_is_enospc_and_changes_nothing(start: int, end: int) -> None:
    declared = space(vma(0, 10), limit=1)
    with pytest.raises(WireError) as refused:
        await declared.protect_vma(UaddrRange(start=start, end=end), Access.READ)
    assert refused.value.number == errno.ENOSPC
    extent = await declared.resolve(4, EVERYWHERE, EVERYWHERE)
    assert extent is not None
    assert (extent.uaddrs, extent.access) == (UaddrRange(start=0, end=10), RW)


async def test_protect_of_a_whole_vma_at_the_limit_needs_no_room() -> None:
    declared = space(vma(0, 10), limit=1)
    await declared.protect_vma(UaddrRange(start=0, end=10), Access.READ)
    assert declared.vma_count == 1


async def test_protect_of_a_whole_vma_beside_another_at_the_limit_needs_no_room() -> None:
    declared = space(vma(0, 10), vma(10, 20), limit=2)
    await declared.protect_vma(UaddrRange(start=0, end=10), Access.READ)
    assert declared.vma_count == 2


async def test_protect_of_a_vmas_first_page_beside_another_at_the_limit_is_enospc() -> None:
    declared = space(vma(0, 10), vma(10, 12), limit=2)
    with pytest.raises(WireError) as refused:
        await declared.protect_vma(UaddrRange(start=10, end=11), Access.READ)
    assert refused.value.number == errno.ENOSPC


# ------------------------------------------------ many at once: all or none


def held(declared: DeclaredAddressSpace) -> list[tuple[int, int]]:
    """What is mapped of the first pages."""
    found = {vma.start: vma.end for page in range(100) if (vma := declared.vma_at(page)) is not None}
    return sorted(found.items())


@pytest.mark.parametrize(
    ("vmas", "index", "overlapped"),
    [
        pytest.param([(0, 2), (5, 7), (8, 9)], 1, (6, 8), id="one that is there"),
        pytest.param([(0, 2), (20, 30), (12, 14), (25, 26)], 3, (20, 30), id="an earlier element"),
        pytest.param([(4, 5), (4, 5)], 1, (4, 5), id="itself"),
        pytest.param([(7, 8)], 0, (6, 8), id="the first element"),
    ],
)
def test_vmas_of_which_one_overlaps_are_eexist_that_says_which_and_none_is_mapped(
    vmas: list[tuple[int, int]], index: int, overlapped: tuple[int, int]
) -> None:
    quota = uid()
    declared = space(vma(6, 8), quota=quota)

    with pytest.raises(WireError) as refused:
        declared.map_vmas([vma(*pages) for pages in vmas])

    start, end = overlapped
    assert (refused.value.number, refused.value.details) == (
        errno.EEXIST,
        {"start_uaddr": start << 12, "page_count": end - start, "list": "vmas", "index": index},
    )
    assert (held(declared), declared.vma_count, quota.count) == ([(6, 8)], 1, 1)


def test_vmas_in_any_order_are_mapped() -> None:
    quota = uid(3)
    declared = space(vma(6, 8), quota=quota, limit=3)

    declared.map_vmas([vma(8, 9), vma(0, 6)])

    assert (held(declared), quota.count) == ([(0, 6), (6, 8), (8, 9)], 3)


@pytest.mark.parametrize(
    ("limit", "of_uid", "named"), [(3, 100, "vmas_per_partition"), (100, 3, "vmas_per_uid")]
)
def test_one_of_many_vmas_beyond_a_limit_is_enospc_and_none_is_mapped(
    limit: int, of_uid: int, named: str
) -> None:
    quota = uid(of_uid)
    declared = space(vma(6, 8), quota=quota, limit=limit)

    with pytest.raises(WireError) as refused:
        declared.map_vmas([vma(0, 1), vma(1, 2), vma(2, 3)])

    assert (refused.value.number, refused.value.details) == (
        errno.ENOSPC,
        {"limit": named},
    )
    assert (held(declared), declared.vma_count, quota.count) == ([(6, 8)], 1, 1)


# ------------------------------------------------ the limit of the uid


def test_the_vmas_of_all_partitions_count_against_their_uid() -> None:
    quota = uid(3)
    one, other = space(vma(0, 1), quota=quota), space(vma(0, 1), vma(1, 2), quota=quota)
    with pytest.raises(WireError, match="uid 7 may have 3 VMAs") as refused:
        one.map_vma(vma(1, 2))
    assert (refused.value.number, refused.value.details) == (errno.ENOSPC, {"limit": "vmas_per_uid"})
    assert (one.vma_count, other.vma_count, quota.count) == (1, 2, 3)


async def test_a_cut_at_the_limit_of_the_uid_is_enospc_and_changes_nothing() -> None:
    quota = uid(2)
    declared = space(vma(0, 10), quota=quota)
    space(vma(0, 1), quota=quota)
    for edit in (declared.unmap_vma, partial(declared.protect_vma, access=Access.READ)):
        with pytest.raises(WireError) as refused:
            await edit(UaddrRange(start=4, end=5))
        assert refused.value.details == {"limit": "vmas_per_uid"}
    assert (declared.vma_count, quota.count, await declared.is_io(4)) == (1, 2, False)


async def test_where_the_limit_was_lowered_vmas_may_be_unmapped_and_protected() -> None:
    limits = iter([3, 3, 3])  # at each VMA that is mapped
    declared = DeclaredAddressSpace(lambda: next(limits, 1), uid())
    for each in (vma(0, 2), vma(2, 4), vma(4, 6)):
        declared.map_vma(each)
    await declared.protect_vma(UaddrRange(start=2, end=4), Access.READ)
    await declared.unmap_vma(UaddrRange(start=1, end=2))
    await declared.unmap_vma(UaddrRange(start=4, end=6))
    assert [(each.start, each.end) for each in declared.first_vmas(3)] == [(0, 1), (2, 4)]


async def test_what_makes_no_vma_more_needs_no_room_where_a_limit_was_lowered() -> None:
    limits = iter([2, 2])  # at each VMA that is mapped
    quota = Quota(7, "VMAs", "vmas_per_uid", lambda: next(limits, 0))
    declared = space(vma(0, 10), vma(10, 20), quota=quota)
    await declared.protect_vma(UaddrRange(start=0, end=10), Access.READ)
    await declared.unmap_vma(UaddrRange(start=8, end=10))
    assert quota.count == 2


async def test_a_partition_that_ends_gives_back_its_vmas() -> None:
    quota = uid(3)
    ended = space(vma(0, 1), vma(1, 2), quota=quota)
    space(vma(0, 1), quota=quota)
    await ended.discard()
    assert quota.count == 1


# ------------------------------------------------ long edits


async def passed_meanwhile(edit: Awaitable[None]) -> int:
    """Turns that another task got while the edit ran."""
    turns = 0

    async def another() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(another)
        with time_used_up_every(1):
            await edit
        nursery.cancel_scope.cancel()
    return turns


async def test_unmap_of_many_vmas_yields() -> None:
    many = 5 * VMAS_PER_PART
    declared = space(*(vma(page, page + 1) for page in range(many)), limit=many)
    assert await passed_meanwhile(declared.unmap_vma(EVERYWHERE)) >= 3
    assert declared.vma_count == 0


async def test_protect_of_many_vmas_yields() -> None:
    many = 5 * VMAS_PER_PART
    declared = space(*(vma(page, page + 1) for page in range(many)), limit=many)
    assert await passed_meanwhile(declared.protect_vma(EVERYWHERE, Access.READ)) >= 3
    assert declared.vma_count == many


async def test_an_edit_of_few_vmas_is_one_step() -> None:
    """Whatever time is left: nothing follows."""
    declared = space(*(vma(page, page + 1) for page in range(VMAS_PER_PART)), limit=VMAS_PER_PART)
    with time_used_up_every(1), trio.testing.assert_no_checkpoints():
        await declared.protect_vma(EVERYWHERE, Access.READ)
    with time_used_up_every(1), trio.testing.assert_no_checkpoints():
        await declared.unmap_vma(EVERYWHERE)
    assert declared.vma_count == 0


# ------------------------------------------------ oracle

Page = tuple[int, Access]
edits = st.lists(st.tuples(st.sampled_from(["map", "unmap", "protect"]), ranges()))


async def carry_out(
    declared: DeclaredAddressSpace, edit: str, pages: PageRange, pfn: int, oracle: dict[int, Page]
) -> dict[int, Page]:
    """One edit; returns what the VMM's pages are afterwards."""
    uaddrs = UaddrRange(start=pages.start, end=pages.end)
    match edit:
        case "map":
            declared.map_vma(vma(pages.start, pages.end, pfn))
            return oracle | {page: (pfn + page - pages.start, RW) for page in range(pages.start, pages.end)}
        case "unmap":
            await declared.unmap_vma(uaddrs)
            return {page: held for page, held in oracle.items() if page not in pages}
        case _:
            await declared.protect_vma(uaddrs, Access.READ)
            return {
                page: (pfn, Access.READ if page in pages else access)
                for page, (pfn, access) in oracle.items()
            }


async def read(declared: DeclaredAddressSpace) -> dict[int, Page]:
    extents = [
        (page, await declared.resolve(page, UaddrRange(start=page, end=page + 1), EVERYWHERE))
        for page in range(SPACE)
    ]
    return {page: (extent.frame.page, extent.access) for page, extent in extents if extent is not None}


@given(edits)
async def test_any_edits_agree_with_a_dict_of_pages(drawn: list[tuple[str, PageRange]]) -> None:
    quota = uid()
    declared = space(limit=6, quota=quota)
    oracle: dict[int, Page] = {}
    for number, (edit, pages) in enumerate(drawn):
        with suppress(WireError):  # refused, and then nothing has changed
            oracle = await carry_out(declared, edit, pages, 1000 * number, oracle)
    assert await read(declared) == oracle
    assert declared.vma_count == quota.count <= 6


@given(edits)
async def test_an_edit_is_refused_only_where_it_would_overlap_or_pass_the_limit(
    drawn: list[tuple[str, PageRange]],
) -> None:
    declared, roomy = space(limit=4), space(limit=1000)
    for number, (edit, pages) in enumerate(drawn):
        with suppress(WireError):
            await carry_out(declared, edit, pages, 1000 * number, {})
            await carry_out(roomy, edit, pages, 1000 * number, {})
    assert await read(declared) == await read(roomy)
    assert declared.vma_count == roomy.vma_count


def test_pairs_of_pages_within_a_vma_are_contiguous_frames() -> None:
    whole = vma(0, 10, 7000)
    parts = [whole.slice(page, page + 1) for page in range(10)]
    assert all(after.start_pfn == before.start_pfn + 1 for before, after in pairwise(parts))
