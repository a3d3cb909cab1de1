"""The software hypervisor: batches, deposits, status codes and the roll-back."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from explorer.failing_hypervisor import FailingHypervisor
from intercept_protocol.addresses import GfnRange
from intercept_protocol.messages import Remap
from intercept_protocol.outcomes import Access
from interceptd.hypervisor import HypervisorError
from interceptd.hypervisor.hv_status import HvStatus
from interceptd.hypervisor.software import (
    DEPOSIT_PAGES,
    MAP_BATCH_GFNS,
    UNMAP_BATCH_GFNS,
    SoftwareHypervisor,
)
from interceptd.pages.mapping import HOST_BACKING, Frame, Mapping

LONG = 2000
"""Pages: four map batches, the last one short."""
Reach = list[int | None]


def hypervisor(
    *,
    remap: Remap = Remap.REPLACE,
    pool_pages: int = DEPOSIT_PAGES,
    pool_limit: int = 4 * DEPOSIT_PAGES,
    failing_calls: dict[int, HvStatus] | None = None,
) -> SoftwareHypervisor:
    return FailingHypervisor(
        remap=remap, pool_pages=pool_pages, pool_limit=lambda: pool_limit, failing_calls=failing_calls
    )


def mapping(start: int, page_count: int, pfn: int = 0x5000) -> Mapping:
    return Mapping(start, start + page_count, Frame(HOST_BACKING, pfn), 0x9000, Access.READ)


def no_access(start: int, page_count: int) -> Mapping:
    return Mapping(start, start + page_count, None, 0x9000, Access.NONE)


def reach(hypervisor: SoftwareHypervisor, page_count: int = LONG + 10) -> Reach:
    """The pfn that the guest reaches, gfn by gfn."""
    frames = [
        None if (entry := hypervisor.translate(gfn)) is None else entry.frame_at(gfn)
        for gfn in range(page_count)
    ]
    return [None if frame is None else frame.page for frame in frames]


# ------------------------------------------------ batches


@given(st.integers(1, 5000))
async def test_map_takes_one_call_per_509_gfns_rounded_up(page_count: int) -> None:
    software = hypervisor()
    await software.map_gpas([mapping(0, page_count)])
    assert software.counters().map_calls == -(-page_count // 509)


@given(st.integers(1, 5000))
async def test_unmap_takes_one_call_per_512_gfns_rounded_up(page_count: int) -> None:
    software = hypervisor()
    await software.map_gpas([mapping(0, page_count)])
    await software.unmap_gpas([GfnRange(start=0, end=page_count)])
    assert software.counters().unmap_calls == -(-page_count // 512)


@pytest.mark.parametrize(("page_count", "calls"), [(509, 1), (510, 2), (1018, 2), (1019, 3)])
async def test_a_map_call_takes_509_gfns_and_no_more(page_count: int, calls: int) -> None:
    software = hypervisor()
    await software.map_gpas([mapping(0, page_count)])
    assert software.counters().map_calls == calls


@pytest.mark.parametrize(("page_count", "calls"), [(512, 1), (513, 2), (1024, 2), (1025, 3)])
async def test_an_unmap_call_takes_512_gfns_and_no_more(page_count: int, calls: int) -> None:
    software = hypervisor()
    await software.map_gpas([mapping(0, page_count)])
    await software.unmap_gpas([GfnRange(start=0, end=page_count)])
    assert software.counters().unmap_calls == calls


@pytest.mark.parametrize(("table_pages", "deposits"), [(256, 1), (257, 2)])
async def test_a_deposit_is_256_table_pages(table_pages: int, deposits: int) -> None:
    software = hypervisor(pool_pages=0)
    await software.map_gpas([mapping(0, 512 * table_pages)])
    assert software.counters().deposits == deposits


async def test_unmap_of_unmapped_pages_makes_no_call() -> None:
    software = hypervisor()
    await software.map_gpas([mapping(0, 4)])
    await software.unmap_gpas([GfnRange(start=0, end=8)])
    await software.unmap_gpas([GfnRange(start=0, end=8)])
    assert software.counters().unmap_calls == 1


async def test_unmap_calls_run_from_the_first_to_the_last_mapped_gfn() -> None:
    software = hypervisor()
    await software.map_gpas([mapping(10_000, 1)])
    await software.map_gpas([mapping(10_000 + UNMAP_BATCH_GFNS, 1)])
    await software.unmap_gpas([GfnRange(start=0, end=1 << 30)])
    assert software.counters().unmap_calls == 2


async def test_no_access_is_counted_apart_and_translates_to_nothing() -> None:
    software = hypervisor()
    await software.map_gpas([no_access(0, 8)])
    counters = software.counters()
    assert (counters.no_access_gfns, counters.mapped_gfns, software.translate(3)) == (8, 0, None)


# ------------------------------------------------ deposits


async def test_map_beyond_the_pool_deposits_256_pages_at_a_time_and_counts_no_more_calls() -> None:
    software = hypervisor(pool_pages=0)
    await software.map_gpas([mapping(0, DEPOSIT_PAGES * 512 + 1)])
    counters = software.counters()
    assert (counters.deposits, counters.map_calls) == (2, -(-(DEPOSIT_PAGES * 512 + 1) // 509))


async def test_map_within_the_pool_deposits_nothing() -> None:
    software = hypervisor(pool_pages=1)
    await software.map_gpas([mapping(0, 512)])
    assert software.counters().deposits == 0


async def test_mapping_over_mapped_pages_needs_no_more_room() -> None:
    software = hypervisor(pool_pages=1, pool_limit=1)
    await software.map_gpas([no_access(0, 512)])
    await software.map_gpas([mapping(0, 512)])
    assert software.counters().mapped_gfns == 512


async def test_unmap_gives_its_room_back() -> None:
    software = hypervisor(pool_pages=1, pool_limit=1)
    await software.map_gpas([mapping(0, 512)])
    await software.unmap_gpas([GfnRange(start=0, end=512)])
    await software.map_gpas([mapping(1024, 512)])
    assert software.counters().mapped_gfns == 512


async def test_map_beyond_the_pool_limit_is_enomem_and_leaves_nothing() -> None:
    software = hypervisor(pool_pages=1, pool_limit=1)
    with pytest.raises(HypervisorError, match="INSUFFICIENT_MEMORY after 512 of 513") as refused:
        await software.map_gpas([mapping(0, 513)])
    assert refused.value.number == errno.ENOMEM
    assert software.counters().slat_extents == 0
    assert software.counters().map_calls == 2


async def test_map_that_fills_the_pool_with_whole_calls_counts_the_one_that_is_refused_as_well() -> None:
    software = hypervisor(pool_pages=1, pool_limit=1)
    await software.map_gpas([no_access(5000, 512 - MAP_BATCH_GFNS)])
    with pytest.raises(HypervisorError, match="INSUFFICIENT_MEMORY after 509 of 510"):
        await software.map_gpas([mapping(0, MAP_BATCH_GFNS + 1)])
    assert software.counters().map_calls == 1 + 2


async def test_deposits_reach_the_pool_limit_itself() -> None:
    software = hypervisor(pool_pages=0, pool_limit=DEPOSIT_PAGES)
    await software.map_gpas([mapping(0, 512 * DEPOSIT_PAGES)])
    assert software.counters().mapped_gfns == 512 * DEPOSIT_PAGES


@pytest.mark.parametrize(("elsewhere", "reached"), [(312, 200), (262, 250), (412, 0)])
async def test_map_beyond_the_pool_limit_reaches_as_far_as_new_gfns_find_room(
    elsewhere: int, reached: int
) -> None:
    """What has an entry already takes no room: of 512, so many are elsewhere and 100 in the range."""
    software = hypervisor(pool_pages=1, pool_limit=1)
    await software.map_gpas([no_access(7100, 100)])
    await software.map_gpas([no_access(50_000, elsewhere)])
    with pytest.raises(HypervisorError, match=f"after {reached} of 1000 gfns"):
        await software.map_gpas([mapping(7000, 1000)])


async def test_map_beyond_the_pool_limit_puts_back_no_access_and_other_mappings() -> None:
    software = hypervisor(pool_pages=2, pool_limit=2)
    await software.map_gpas([no_access(0, 100)])
    await software.map_gpas([mapping(200, 100, pfn=0x8000)])
    before, no_access_before = reach(software), software.counters().no_access_gfns
    with pytest.raises(HypervisorError):
        await software.map_gpas([mapping(0, LONG)])
    assert reach(software) == before
    assert software.counters().no_access_gfns == no_access_before == 100


# ------------------------------------------------ failing calls


CALLS = -(-LONG // MAP_BATCH_GFNS)


@pytest.mark.parametrize("failing", [1, 2, CALLS])
async def test_map_that_fails_at_the_nth_call_rolls_back_exactly_the_batches_before_it(failing: int) -> None:
    software = hypervisor(failing_calls={failing: HvStatus.OPERATION_FAILED})
    completed = (failing - 1) * MAP_BATCH_GFNS
    with pytest.raises(HypervisorError, match=f"OPERATION_FAILED after {completed} of {LONG} gfns"):
        await software.map_gpas([mapping(0, LONG)])
    counters = software.counters()
    assert (counters.slat_extents, counters.map_calls) == (0, failing)
    assert counters.unmap_calls == -(-completed // UNMAP_BATCH_GFNS)


@pytest.mark.parametrize("failing", [1, 2, CALLS])
async def test_map_that_fails_puts_back_no_access_and_frames_that_it_replaced(failing: int) -> None:
    software = hypervisor(failing_calls={3 + failing: HvStatus.OPERATION_FAILED})
    await software.map_gpas([no_access(0, 300)])
    await software.map_gpas([mapping(400, 300, pfn=0x8000)])
    await software.map_gpas([no_access(1900, 100)])
    before = reach(software)
    with pytest.raises(HypervisorError):
        await software.map_gpas([mapping(0, LONG)])
    assert reach(software) == before
    assert (software.counters().no_access_gfns, software.counters().mapped_gfns) == (400, 300)


@pytest.mark.parametrize("status", sorted(set(HvStatus) - {HvStatus.SUCCESS}))
async def test_map_fails_at_any_status_but_success(status: HvStatus) -> None:
    software = hypervisor(failing_calls={1: status})
    with pytest.raises(HypervisorError, match=f"HV_STATUS_{status.name} after 0 of 8"):
        await software.map_gpas([mapping(0, 8)])
    assert software.counters().slat_extents == 0


async def test_map_over_several_failing_calls_fails_at_the_first_with_its_status() -> None:
    software = hypervisor(failing_calls={3: HvStatus.TIME_OUT, 2: HvStatus.NO_RESOURCES})
    with pytest.raises(HypervisorError, match="NO_RESOURCES after 509 of"):
        await software.map_gpas([mapping(0, LONG)])
    assert software.counters().map_calls == 2


async def test_map_that_fails_at_its_first_call_leaves_the_extents_in_one_piece() -> None:
    software = hypervisor(failing_calls={2: HvStatus.OPERATION_FAILED})
    await software.map_gpas([no_access(0, 8)])
    with pytest.raises(HypervisorError, match="after 0 of 2"):
        await software.map_gpas([mapping(4, 2)])
    assert software.counters().slat_extents == 1


async def test_calls_of_a_roll_back_are_counted() -> None:
    software = hypervisor(failing_calls={3: HvStatus.OPERATION_FAILED})
    await software.map_gpas([no_access(0, 300)])
    with pytest.raises(HypervisorError):
        await software.map_gpas([mapping(0, LONG)])
    assert (software.counters().map_calls, software.counters().unmap_calls) == (1 + 2 + 1, 1)


async def test_map_after_a_failed_one_succeeds() -> None:
    software = hypervisor(failing_calls={2: HvStatus.OPERATION_FAILED})
    with pytest.raises(HypervisorError):
        await software.map_gpas([mapping(0, LONG)])
    await software.map_gpas([mapping(0, LONG)])
    assert software.counters().mapped_gfns == LONG


def test_every_status_of_too_little_memory_is_enomem() -> None:
    too_little = {status for status in HvStatus if status.errno == errno.ENOMEM}
    assert too_little == {0xB, 0x73, 0x75, 0x83}


def test_every_status_of_a_wrong_argument_is_einval_and_the_rest_eio() -> None:
    wrong = {status for status in HvStatus if status.errno == errno.EINVAL}
    assert wrong == {2, 3, 5, 0xD, 0xE}
    assert {status.errno for status in set(HvStatus) - wrong} == {0, errno.ENOMEM, errno.EIO}


# ------------------------------------------------ mapping what is mapped


async def test_remap_replace_lets_the_last_frame_win() -> None:
    software = hypervisor(remap=Remap.REPLACE)
    await software.map_gpas([mapping(0, 8)])
    await software.map_gpas([mapping(4, 8, pfn=0x8000)])
    assert reach(software, 12) == [*range(0x5000, 0x5004), *range(0x8000, 0x8008)]


async def test_remap_error_refuses_a_gfn_that_the_guest_reaches_and_changes_nothing() -> None:
    software = hypervisor(remap=Remap.ERROR)
    await software.map_gpas([mapping(0, 8)])
    before = reach(software)
    with pytest.raises(HypervisorError, match="INVALID_PARAMETER after 0 of 8 gfns") as refused:
        await software.map_gpas([mapping(4, 8, pfn=0x8000)])
    assert refused.value.number == errno.EINVAL
    assert (reach(software), software.counters().map_calls) == (before, 2)


async def test_remap_error_allows_no_access_to_be_mapped_and_put_back() -> None:
    software = hypervisor(remap=Remap.ERROR)
    await software.map_gpas([no_access(0, 8)])
    await software.map_gpas([mapping(2, 4)])
    await software.map_gpas([no_access(0, 8)])
    assert software.counters().no_access_gfns == 8


# ------------------------------------------------ oracle


steps = st.lists(
    st.tuples(st.sampled_from(["map", "no access", "unmap"]), st.integers(0, 1500), st.integers(1, 1200)),
    max_size=8,
)


def reach_of(wanted: Mapping) -> Reach:
    frames = [wanted.frame_at(gfn) for gfn in range(wanted.start, wanted.end)]
    return [None if frame is None else frame.page for frame in frames]


async def test_of_several_pieces_those_before_a_refused_one_are_mapped_and_no_others() -> None:
    software = hypervisor(failing_calls={3: HvStatus.INSUFFICIENT_MEMORY})

    with pytest.raises(HypervisorError) as refused:
        await software.map_gpas([mapping(0, 1, 10), no_access(2, 1), mapping(4, 1, 30), mapping(6, 1, 40)])

    assert refused.value.done == 2
    assert reach(software, 8) == [10, *[None] * 7]
    assert (software.counters().mapped_gfns, software.counters().no_access_gfns) == (1, 1)


async def test_several_pieces_are_unmapped_and_nothing_between_them() -> None:
    software = hypervisor()
    await software.map_gpas([mapping(0, 6, 10)])

    await software.unmap_gpas([GfnRange.of(0, 1), GfnRange.of(2, 2), GfnRange.of(7, 1)])

    assert reach(software, 8) == [None, 11, None, None, 14, 15, None, None]


async def carry_out(software: SoftwareHypervisor, step: str, wanted: Mapping) -> Reach:
    """Ask for one step; returns what the guest is to reach there afterwards."""
    match step:
        case "map":
            await software.map_gpas([wanted])
            return reach_of(wanted)
        case "no access":
            await software.map_gpas([replace(wanted, frame=None, access=Access.NONE)])
        case _:
            await software.unmap_gpas([wanted.gfns])
    return [None] * wanted.gfns.page_count


@given(steps, st.dictionaries(st.integers(1, 12), st.just(HvStatus.OPERATION_FAILED)))
async def test_any_requests_with_any_failures_agree_with_a_dict_of_pages(
    drawn: list[tuple[str, int, int]], failing_calls: dict[int, HvStatus]
) -> None:
    software = hypervisor(failing_calls=failing_calls, pool_pages=2, pool_limit=2)
    oracle: Reach = [None] * 2800
    for number, (step, start, page_count) in enumerate(drawn):
        with suppress(HypervisorError):  # then all is as it was before
            oracle[start : start + page_count] = await carry_out(
                software, step, mapping(start, page_count, pfn=10_000 * number)
            )
    assert reach(software, len(oracle)) == oracle
