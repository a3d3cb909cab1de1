"""The MMU-notifier channel: windows, open ranges, the pending set. All but waiting is synchronous."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from itertools import cycle

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from fakes.counted_bounds import Bound, Counted
from fakes.drawn import SPACE, ranges
from intercept_protocol.addresses import PageRange, UaddrRange
from intercept_protocol.errors import WireError
from interceptd.mmu_notifier import ALWAYS_OPEN, EVERYTHING, FEW_OPEN, PENDING_PIECES, Batch, MmuNotifier
from interceptd.quota import Quota
from interceptd.telemetry.counters import Source
from interceptd.telemetry.event_bus import EventBus


def uaddrs(start: int, end: int) -> UaddrRange:
    return UaddrRange(start=start, end=end)


def of(pages: PageRange) -> UaddrRange:
    return UaddrRange(start=pages.start, end=pages.end)


# ------------------------------------------------ open invalidations


def test_the_age_of_the_oldest_open_invalidation_is_that_of_the_first_begin_that_has_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = iter((10, 20, 100, 100, 100))
    monkeypatch.setattr("interceptd.mmu_notifier.monotonic_ns", lambda: next(ticks) * 1_000_000)
    notifier = MmuNotifier(open_limit=lambda: 4, event_bus=EventBus())
    assert notifier.oldest_open_ms == 0
    for pages in (uaddrs(0, 8), uaddrs(4, 12), uaddrs(0, 8)):
        notifier.begin(pages)
    ages = [notifier.oldest_open_ms]
    for pages in (uaddrs(0, 8), uaddrs(0, 8), uaddrs(4, 12)):
        notifier.end(pages)
        ages.append(notifier.oldest_open_ms)
    assert ages == [90, 90, 80, 0]  # the third began within the first


# ------------------------------------------------ windows


@given(ranges(), st.lists(ranges()))
def test_a_window_is_stale_exactly_when_an_invalidation_touched_it(
    relied_on: PageRange, invalidated: list[PageRange]
) -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    window = notifier.open_window(of(relied_on))
    for pages in invalidated:
        notifier.invalidate(of(pages))
    assert window.stale == any(pages.overlaps(relied_on) for pages in invalidated)


def test_a_window_opened_after_an_invalidation_is_fresh() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    notifier.invalidate(uaddrs(0, 8))
    assert not notifier.open_window(uaddrs(0, 8)).stale


def test_a_closed_window_is_not_counted_as_stale() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    window = notifier.open_window(uaddrs(0, 8))
    notifier.close_window(window)
    notifier.invalidate(uaddrs(0, 8))
    assert notifier.stale_windows == 0


def test_a_stale_window_is_counted_once() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    notifier.open_window(uaddrs(0, 8))
    notifier.invalidate(uaddrs(0, 1))
    notifier.invalidate(uaddrs(1, 2))
    assert notifier.stale_windows == 1


def test_two_windows_on_one_range_are_two() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    first, second = notifier.open_window(uaddrs(0, 8)), notifier.open_window(uaddrs(0, 8))
    notifier.close_window(first)
    notifier.invalidate(uaddrs(0, 8))
    assert second.stale


def test_marking_many_ranges_stale_marks_what_each_would_and_tells_the_listeners_of_each() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    windows = [notifier.open_window(uaddrs(page, page + 2)) for page in range(0, 12, 2)]
    told: list[UaddrRange] = []
    notifier.listen(told.append)
    ranges = [uaddrs(9, 10), uaddrs(3, 5)]
    notifier.mark_all_stale(iter(ranges))
    assert [window.stale for window in windows] == [False, True, True, False, True, False]
    assert (notifier.stale_windows, told) == (3, ranges)
    notifier.mark_all_stale([])
    notifier.mark_all_stale([uaddrs(3, 4)])
    assert notifier.stale_windows == 3, "a window goes stale once"


def test_marking_many_ranges_stale_does_not_compare_each_with_each_window() -> None:
    """A change of 128 regions, while as many VPs as there may be are in flight, would take 5 ms."""
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    window = Counted(uaddrs(5000, 5001))
    notifier.open_window(window.pages)
    notifier.mark_all_stale(uaddrs(2 * page, 2 * page + 1) for page in range(1024))
    assert window.looks <= 2 * 11


# ------------------------------------------------ listeners


def test_a_listener_is_called_in_the_same_step_with_all_that_goes_stale() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    told: list[UaddrRange] = []
    notifier.listen(told.append)
    notifier.invalidate(uaddrs(0, 8))
    notifier.mark_stale(uaddrs(8, 9))
    notifier.begin(uaddrs(16, 24))
    assert told == [uaddrs(0, 8), uaddrs(8, 9), uaddrs(16, 24)]


def test_a_listener_is_called_again_when_the_last_of_equal_begins_ends() -> None:
    """What it learned in between may be of either."""
    notifier = MmuNotifier(open_limit=lambda: 2, event_bus=EventBus())
    notifier.begin(uaddrs(0, 8))
    notifier.begin(uaddrs(0, 8))
    told: list[UaddrRange] = []
    notifier.listen(told.append)
    notifier.end(uaddrs(0, 8))
    assert told == []
    notifier.end(uaddrs(0, 8))
    assert told == [uaddrs(0, 8)]


def test_a_listener_is_called_before_waiters_for_the_end_continue() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    notifier.begin(uaddrs(0, 8))
    over = notifier.open_at(uaddrs(0, 1))
    assert over is not None
    told: list[bool] = []
    notifier.listen(lambda _: told.append(over.over.is_set()))
    notifier.end(uaddrs(0, 8))
    assert (told, over.over.is_set()) == ([False], True)


# ------------------------------------------------ open ranges


def test_equal_begins_nest_and_only_the_last_end_opens_the_range() -> None:
    notifier = MmuNotifier(open_limit=lambda: 4, event_bus=EventBus())
    notifier.begin(uaddrs(0, 8))
    notifier.begin(uaddrs(0, 8))
    entry = notifier.open_at(uaddrs(3, 4))
    assert entry is not None
    notifier.end(uaddrs(0, 8))
    assert not entry.over.is_set()
    assert notifier.open_at(uaddrs(3, 4)) is entry
    notifier.end(uaddrs(0, 8))
    assert entry.over.is_set()
    assert notifier.open_at(uaddrs(3, 4)) is None


def test_a_range_that_was_ended_can_be_begun_again() -> None:
    notifier = MmuNotifier(open_limit=lambda: 4, event_bus=EventBus())
    notifier.begin(uaddrs(0, 8))
    notifier.end(uaddrs(0, 8))
    notifier.begin(uaddrs(0, 8))
    entry = notifier.open_at(uaddrs(3, 4))
    assert entry is not None
    assert not entry.over.is_set()


def test_overlapping_begins_of_different_ranges_end_apart() -> None:
    notifier = MmuNotifier(open_limit=lambda: 4, event_bus=EventBus())
    notifier.begin(uaddrs(0, 8))
    notifier.begin(uaddrs(4, 12))
    notifier.end(uaddrs(0, 8))
    assert notifier.open_at(uaddrs(0, 4)) is None
    assert notifier.open_at(uaddrs(4, 5)) is not None


def test_nothing_is_left_of_a_range_that_ended() -> None:
    notifier = MmuNotifier(open_limit=lambda: 4, event_bus=EventBus())
    notifier.begin(uaddrs(0, 9))
    notifier.begin(uaddrs(0, 8))
    notifier.end(uaddrs(0, 9))
    entry = notifier.open_at(uaddrs(0, 1))
    assert entry is not None
    assert entry.uaddrs == uaddrs(0, 8)
    notifier.end(uaddrs(0, 8))
    assert notifier.cut_back(uaddrs(0, 16), 12) == uaddrs(0, 16)


def test_begin_makes_attempts_stale_as_an_invalidation_does() -> None:
    notifier = MmuNotifier(open_limit=lambda: 4, event_bus=EventBus())
    window = notifier.open_window(uaddrs(0, 8))
    notifier.begin(uaddrs(7, 9))
    assert window.stale


def test_begin_at_the_limit_is_enospc_and_changes_nothing() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    notifier.begin(uaddrs(0, 1))
    with pytest.raises(WireError) as refused:
        notifier.begin(uaddrs(0, 1))
    assert refused.value.number == errno.ENOSPC
    assert refused.value.details == {"limit": "open_invalidations_per_partition"}
    assert (notifier.open_invalidations, notifier.invalidations) == (1, 1)


@given(st.lists(ranges(), max_size=12), ranges(), st.data())
def test_cut_back_is_the_largest_range_around_the_page_without_an_open_one(
    begun: list[PageRange], asked: PageRange, data: st.DataObject
) -> None:
    page = data.draw(st.integers(asked.start, asked.end - 1))
    elsewhere = [pages for pages in begun if page not in pages]
    notifier = MmuNotifier(open_limit=lambda: 100, event_bus=EventBus())
    for pages in elsewhere:
        notifier.begin(of(pages))
    taken = {taken for pages in elsewhere for taken in range(pages.start, pages.end)}
    before = [free for free in range(asked.start, page) if free in taken]
    behind = [free for free in range(page, asked.end) if free in taken]
    expected = uaddrs(max(before, default=asked.start - 1) + 1, min(behind, default=asked.end))
    assert notifier.cut_back(of(asked), page) == expected


def test_cut_back_to_the_page_that_an_open_one_ends_before() -> None:
    notifier = MmuNotifier(open_limit=lambda: 2, event_bus=EventBus())
    notifier.begin(uaddrs(0, 4))
    notifier.begin(uaddrs(5, 8))
    assert notifier.cut_back(uaddrs(0, 8), 4) == uaddrs(4, 5)


@pytest.mark.parametrize("lengths", [[1024], range(1, 1025), [1 << size for size in range(40)]], ids=len)
def test_a_fault_beside_many_open_invalidations_looks_at_few_of_them(lengths: Sequence[int]) -> None:
    """A VP's fault would else cost what another connection's begins amount to."""
    notifier = MmuNotifier(open_limit=lambda: 1024, event_bus=EventBus())
    page, end = 1 << 41, 1 << 42
    for place, length in zip(range(1024), cycle(lengths), strict=False):
        notifier.begin(uaddrs(page - place - length, page - place))
    faulting, looked = Counted(uaddrs(page, page + 1)), Bound(page)
    assert notifier.open_at(faulting.pages) is None
    assert notifier.cut_back(uaddrs(0, end), looked) == uaddrs(page, end)
    assert faulting.looks + looked.compared <= 4 * 11


@pytest.mark.parametrize("count", [FEW_OPEN, FEW_OPEN + 1, FEW_OPEN + 2])
def test_each_open_invalidation_is_found_until_its_end_however_many_there_are(count: int) -> None:
    notifier = MmuNotifier(open_limit=lambda: count, event_bus=EventBus())
    begun = [uaddrs(page, page + 1) for page in range(0, 4 * count, 4)]
    for pages in begun:
        notifier.begin(pages)
    found = [notifier.open_at(pages) for pages in begun]
    assert [entry.uaddrs for entry in found if entry] == begun
    for pages in begun:
        notifier.end(pages)
        assert notifier.open_at(pages) is None


# ------------------------------------------------ what is going


def test_a_page_is_going_from_its_invalidation_until_that_was_served() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    batch = notifier.invalidate(uaddrs(4, 8))
    pending = notifier.invalidation_of(4), notifier.invalidation_of(7)
    assert notifier.take() is batch
    serving = notifier.invalidation_of(4), notifier.invalidation_of(7)
    notifier.served(batch)
    assert (pending, serving, notifier.invalidation_of(4)) == ((batch, batch), (batch, batch), None)


@pytest.mark.parametrize("page", [3, 8])
def test_a_page_beside_an_invalidation_is_not_going(page: int) -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    notifier.invalidate(uaddrs(4, 8))
    pending = notifier.invalidation_of(page)
    notifier.take()
    assert (pending, notifier.invalidation_of(page)) == (None, None)


def test_of_several_pieces_all_pages_are_going_and_none_between_them() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    batch = notifier.invalidate(uaddrs(0, 1))
    assert notifier.invalidate(uaddrs(4, 8)) is batch
    assert [page for page in range(10) if notifier.invalidation_of(page)] == [0, 4, 5, 6, 7]
    assert [page for page in range(10) if notifier.is_invalidating(uaddrs(page, page + 1))] == [0, 4, 5, 6, 7]
    assert (batch.announced, batch.pieces) == (2, [uaddrs(0, 1), uaddrs(4, 8)])


def test_a_page_whose_invalidation_came_during_a_pass_is_going_after_it() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    notifier.invalidate(uaddrs(0, 1))
    first = notifier.take()
    second = notifier.invalidate(uaddrs(4, 8))
    notifier.served(first)
    assert notifier.invalidation_of(4) is second


@pytest.mark.parametrize(("asked", "expected"), [((0, 4), False), ((3, 5), True), ((8, 9), False)])
def test_pages_are_invalidating_while_some_of_them_are_pending_or_being_served(
    asked: tuple[int, int], *, expected: bool
) -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    batch = notifier.invalidate(uaddrs(4, 8))
    pending = notifier.is_invalidating(uaddrs(*asked))
    notifier.take()
    serving = notifier.is_invalidating(uaddrs(*asked))
    notifier.served(batch)
    assert (pending, serving) == (expected, expected)
    assert not notifier.is_invalidating(uaddrs(*asked))


# ------------------------------------------------ the pending set


@given(st.lists(ranges(), max_size=30))
def test_pending_pieces_are_disjoint_and_cover_exactly_the_invalidated_ranges(drawn: list[PageRange]) -> None:
    batch = Batch()
    for pages in drawn:
        batch.add(of(pages))
    pieces = batch.pieces
    covered = {page for piece in pieces for page in range(piece.start, piece.end)}
    assert covered == {page for pages in drawn for page in range(pages.start, pages.end)}
    assert sum(piece.page_count for piece in pieces) == len(covered) <= SPACE


def test_too_many_pending_pieces_become_everything() -> None:
    batch = Batch()
    for piece in range(PENDING_PIECES):
        batch.add(uaddrs(2 * piece, 2 * piece + 1))
    assert len(batch.pieces) == PENDING_PIECES
    batch.add(uaddrs(1 << 40, (1 << 40) + 1))
    assert batch.pieces == [EVERYTHING]


def test_pending_everything_stays_within_bounds_whatever_comes() -> None:
    batch = Batch()
    batch.add(EVERYTHING)
    for piece in range(3 * PENDING_PIECES):
        batch.add(uaddrs(2 * piece, 2 * piece + 1))
    assert len(batch.pieces) <= PENDING_PIECES
    assert sum(piece.page_count for piece in batch.pieces) == EVERYTHING.page_count


def test_take_leaves_an_empty_set_and_later_invalidations_go_to_the_next_batch() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    first = notifier.invalidate(uaddrs(0, 1))
    assert notifier.take() is first
    second = notifier.invalidate(uaddrs(2, 3))
    assert second is not first
    assert notifier.take().pieces == [uaddrs(2, 3)]


async def test_doorbell_rung_many_times_rings_once() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    for page in range(100):
        notifier.invalidate(uaddrs(page, page + 1))
    await notifier.wait_rung()
    with trio.move_on_after(1) as waited:
        await notifier.wait_rung()
    assert waited.cancelled_caught


async def test_doorbell_rung_before_anyone_waits_is_heard() -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    notifier.invalidate(uaddrs(0, 1))
    await notifier.wait_rung()
    assert notifier.take().pieces == [uaddrs(0, 1)]


def test_an_invalidation_needs_neither_a_task_nor_a_manager() -> None:
    """The source's munmap is blocked until we return: there is nothing here that could be waited for."""
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    for page in range(3 * PENDING_PIECES):
        notifier.invalidate(uaddrs(2 * page, 2 * page + 1))
    assert notifier.invalidations == 3 * PENDING_PIECES


# ------------------------------------------------ waiting


async def test_waiting_for_windows_is_over_once_those_that_were_open_are_closed(
    nursery: trio.Nursery,
) -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    first, second = notifier.open_window(uaddrs(0, 8)), notifier.open_window(uaddrs(8, 16))
    over: list[int] = []

    async def wait(number: int) -> None:
        await notifier.outlive_what_was_learned()
        over.append(number)

    nursery.start_soon(wait, 1)
    await wait_all_tasks_blocked()
    nursery.start_soon(wait, 2)
    later = notifier.open_window(uaddrs(0, 8))
    await wait_all_tasks_blocked()
    notifier.close_window(second)
    await wait_all_tasks_blocked()
    assert over == []
    notifier.close_window(first)
    await wait_all_tasks_blocked()
    assert over == [1]
    notifier.close_window(later)
    await wait_all_tasks_blocked()
    assert over == [1, 2]


async def test_waiting_for_an_invalidation_ends_when_its_batch_is_served(
    nursery: trio.Nursery,
) -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    over: list[int] = []

    async def wait(number: int) -> None:
        await notifier.wait_served()
        over.append(number)

    await wait(0)
    notifier.invalidate(uaddrs(0, 8))
    first = notifier.take()
    nursery.start_soon(wait, 1)
    await wait_all_tasks_blocked()
    notifier.invalidate(uaddrs(8, 16))
    nursery.start_soon(wait, 2)
    await wait_all_tasks_blocked()
    assert over == [0]
    notifier.served(first)
    await wait_all_tasks_blocked()
    assert over == [0, 1]
    notifier.served(notifier.take())
    await wait_all_tasks_blocked()
    assert over == [0, 1, 2]


# ------------------------------------------------ the uid's count


def test_open_invalidations_count_for_the_uid_until_they_end_or_the_partition_does() -> None:
    quota = Quota(7, "open invalidations", "any", lambda: 100)
    notifier = MmuNotifier(lambda: 100, EventBus(), quota=quota)
    for _ in range(3):
        notifier.begin(uaddrs(0, 8))
    notifier.reopen(uaddrs(8, 9))
    notifier.end(uaddrs(0, 8))
    assert quota.count == notifier.open_invalidations == 3
    notifier.discard()
    assert quota.count == 0


def test_a_few_begins_and_those_of_the_vmms_own_calls_need_no_room() -> None:
    notifier = MmuNotifier(lambda: 100, EventBus(), quota=Quota(7, "begins", "memory_mib", lambda: 0))
    for _ in range(ALWAYS_OPEN):
        notifier.begin(uaddrs(0, 8))
    with pytest.raises(WireError) as refused:
        notifier.begin(uaddrs(0, 8))
    assert refused.value.details == {"limit": "memory_mib"}
    notifier.begin(uaddrs(0, 8), Source.UNMAP_VMA)
    assert notifier.open_invalidations == ALWAYS_OPEN + 1
