"""What the guest was given is compared with the VMAs: what is found, what is not, and how much at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space.comparison import (
    PIECES_PER_PROBE,
    PIECES_PER_QUESTION,
    PIECES_PER_ROUND,
    RETRIES,
    Compared,
    Comparison,
    compare,
)
from interceptd.address_space.live_vma import LiveVma
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import Frame, Mapping
from interceptd.pages.range_map import RangeMap
from interceptd.telemetry.counters import Source
from interceptd.telemetry.event_bus import EventBus

GFN, PAGE = 0x100, 0x7000
R, RW, RX = Access.READ, Access.READ | Access.WRITE, Access.READ | Access.EXECUTE
ALL = UaddrRange(start=PAGE, end=PAGE + 16)


def vma(start: int, end: int, *, offset: int | None = None, inode: int = 7, access: Access = RW) -> LiveVma:
    """Pages [start, end) of `ALL`, by default the same ones of the file."""
    return LiveVma(
        PAGE + start,
        PAGE + end,
        access,
        start if offset is None else offset,
        device=(0, 1),
        inode=inode,
        shared=True,
        name=b"/memfd:ram",
    )


def mapping_of(of: LiveVma, access: Access = RW) -> Mapping:
    """What a guest is given of all of a VMA."""
    frame = Frame(of.backing, of.backing_page(of.start))
    return Mapping(of.start - PAGE + GFN, of.end - PAGE + GFN, frame, of.start, access)


def pieces_at(vmas: list[LiveVma], page: int) -> LiveVma | None:
    return next((it for it in vmas if it.start <= page < it.end), None)


# ------------------------------------------------ what differs


@pytest.mark.parametrize(
    ("now", "differing"),
    [
        ([vma(0, 16)], []),
        ([vma(0, 4), vma(4, 8), vma(8, 16)], []),
        ([vma(0, 4), vma(4, 8, offset=0), vma(8, 16)], [(4, 8)]),
        ([vma(0, 4), vma(4, 8, inode=8), vma(8, 16)], [(4, 8)]),
        ([vma(0, 4), vma(4, 8, access=R), vma(8, 16)], [(4, 8)]),
        ([vma(0, 16, access=RW | Access.EXECUTE)], []),
        ([vma(0, 4)], [(4, 16)]),
        ([], [(0, 16)]),
    ],
    ids=[
        "nothing",
        "split",
        "other pages of the file",
        "another file",
        "fewer rights",
        "more rights",
        "a hole",
        "gone",
    ],
)
def test_differences_are_found_piece_by_piece(now: list[LiveVma], differing: list[tuple[int, int]]) -> None:
    compared = compare([mapping_of(vma(0, 16))], partial(pieces_at, now), most=64)
    assert [(it.start - GFN, it.end - GFN) for it in compared.differing] == differing
    assert compared.end == GFN + 16


def test_a_right_to_execute_is_the_regions_alone() -> None:
    compared = compare([mapping_of(vma(0, 16), access=RX)], partial(pieces_at, [vma(0, 16)]), most=64)
    assert compared.differing == []


def test_a_look_ends_after_the_most_pieces_in_the_middle_of_a_mapping() -> None:
    now = [vma(page, page + 1) for page in range(16)]
    compared = compare([mapping_of(vma(0, 16))], partial(pieces_at, now), most=5)
    assert (compared.pieces, compared.end) == (5, GFN + 5)


# ------------------------------------------------ rounds


class World:
    """A guest, the VMAs behind it, and what was asked about them. Each look takes a checkpoint."""

    def __init__(self) -> None:
        self.vmas: list[LiveVma] = []
        self.record: RangeMap[Mapping] = RangeMap()
        self.looked: list[int] = []
        """Pieces a look."""
        self.gfns: set[int] = set()
        """Where a mapping was looked at."""
        self.reported: list[UaddrRange] = []
        """What the kernel has reported and is still unread."""
        self.may_serve = trio.Event()
        self.may_serve.set()
        self.meanwhile: Callable[[], object] = lambda: None
        """Happens between a look and its answer."""
        self.notifier = MmuNotifier(open_limit=lambda: 4, event_bus=EventBus())
        self.comparison = Comparison(self.notifier, self._given, self._look, self._drain)

    def give(self, of: LiveVma) -> None:
        """Have a VMA, and the guest all of it."""
        self.vmas.append(of)
        self.record.insert(mapping_of(of))

    @property
    def found(self) -> int:
        return self.notifier.by_source[Source.COMPARISON]

    @property
    def guests_pages(self) -> list[int]:
        return [gfn - GFN for item in self.record for gfn in range(item.start, item.end)]

    async def serve(self) -> None:
        """A region manager that revokes what is invalidated."""
        while True:
            await self.notifier.wait_rung()
            await self.may_serve.wait()
            batch = self.notifier.take()
            for uaddrs in batch.pieces:
                self.record.carve(GfnRange(start=uaddrs.start - PAGE + GFN, end=uaddrs.end - PAGE + GFN))
            self.notifier.served(batch)

    def _given(self, gfns: GfnRange, count: int) -> list[Mapping]:
        return self.record.clipped(self.record.head(gfns, count))

    async def _drain(self) -> None:
        while self.reported:
            self.notifier.invalidate(self.reported.pop(), Source.USERFAULTFD)

    async def _look(self, given: list[Mapping], most: int) -> Compared:
        compared = compare(given, partial(pieces_at, list(self.vmas)), most)
        self.looked.append(compared.pieces)
        self.gfns.update(mapping.start for mapping in given if mapping.start < compared.end)
        self.meanwhile()
        await trio.lowlevel.checkpoint()
        return compared


@pytest.fixture
async def world(nursery: trio.Nursery) -> World:
    made = World()
    nursery.start_soon(made.serve)
    return made


def change(world: World, start: int, end: int) -> None:
    """Some pages of `ALL` are other pages of the file now, with no event."""
    world.vmas = [vma(0, start), vma(start, end, offset=100), vma(end, 16)]


async def test_a_round_revokes_only_what_differs(world: World) -> None:
    world.give(vma(0, 16))
    change(world, 4, 8)
    await world.comparison.round()
    await world.notifier.wait_served()
    assert world.guests_pages == [0, 1, 2, 3, *range(8, 16)]
    assert world.found == 1


async def test_a_fragmented_difference_is_revoked_as_a_whole(world: World) -> None:
    world.give(vma(0, 3 * PIECES_PER_QUESTION))
    world.vmas = []

    def map_other_pages() -> None:
        world.vmas = [vma(page, page + 1, offset=1000) for page in range(3 * PIECES_PER_QUESTION)]

    world.meanwhile = map_other_pages
    await world.comparison.round()
    await world.notifier.wait_served()
    assert world.guests_pages == []


@pytest.mark.parametrize(
    ("compared", "most"), [(Comparison.round, PIECES_PER_PROBE), (Comparison.catch_up, PIECES_PER_ROUND)]
)
async def test_each_round_compares_a_bounded_number_of_pieces_and_the_next_continues(
    world: World, compared: Callable[[Comparison], Awaitable[None]], most: int
) -> None:
    pieces = 2 * most + 100
    for page in range(0, 2 * pieces, 2):
        world.give(vma(page, page + 1))
    world.vmas.sort(key=lambda it: it.start)
    counts = []
    for _ in range(3):
        world.looked.clear()
        await compared(world.comparison)
        counts.append((sum(world.looked), max(world.looked), len(world.gfns)))
    at_once = PIECES_PER_QUESTION
    assert counts == [(most, at_once, most), (most, at_once, 2 * most), (most, at_once, pieces)]


async def test_a_question_is_about_few_pieces_also_of_one_mapping(world: World) -> None:
    world.give(vma(0, 2 * PIECES_PER_QUESTION + 5))
    world.vmas = [vma(page, page + 1) for page in range(2 * PIECES_PER_QUESTION + 5)]
    await world.comparison.round()
    assert world.looked == [PIECES_PER_QUESTION, PIECES_PER_QUESTION, 5]


async def test_a_round_of_few_pieces_compares_each_once_wherever_the_last_one_stopped(world: World) -> None:
    for page in range(0, 4 * PIECES_PER_ROUND, 2):
        world.give(vma(page, page + 1))
    await world.comparison.round()
    world.record.carve(GfnRange(start=GFN + 16, end=GFN + 4 * PIECES_PER_ROUND))
    world.give(vma(8 * PIECES_PER_ROUND, 8 * PIECES_PER_ROUND + 1))
    world.looked.clear()
    await world.comparison.round()
    assert sum(world.looked) == 9


# ------------------------------------------------ changes that are announced


async def test_memory_revoked_by_an_announced_change_is_not_found(world: World) -> None:
    """The munmap was seen before its begin was served, and its memory is gone at the second look."""
    world.give(vma(0, 16))
    change(world, 4, 8)
    world.notifier.begin(UaddrRange(start=PAGE + 4, end=PAGE + 8))
    await world.comparison.round()
    assert (world.found, world.guests_pages) == (0, [0, 1, 2, 3, *range(8, 16)])


async def test_memory_of_an_announced_change_in_progress_is_not_found(
    world: World, nursery: trio.Nursery
) -> None:
    world.give(vma(0, 16))
    change(world, 4, 8)
    world.may_serve = trio.Event()
    world.notifier.begin(UaddrRange(start=PAGE + 4, end=PAGE + 8))
    nursery.start_soon(world.comparison.round)
    await wait_all_tasks_blocked()
    world.may_serve.set()
    await wait_all_tasks_blocked()
    assert (world.found, world.guests_pages) == (0, [0, 1, 2, 3, *range(8, 16)])


async def test_memory_reported_by_the_kernel_is_not_found(world: World) -> None:
    world.give(vma(0, 16))
    change(world, 4, 8)
    world.reported.append(UaddrRange(start=PAGE + 4, end=PAGE + 8))
    await world.comparison.round()
    assert (world.found, world.guests_pages) == (0, [0, 1, 2, 3, *range(8, 16)])


async def test_memory_announced_during_a_check_is_checked_again(world: World) -> None:
    world.give(vma(0, 16))
    change(world, 4, 8)
    announced: list[object] = []

    def announce_once() -> None:
        if len(world.looked) == 2:
            announced.append(world.notifier.invalidate(UaddrRange(start=PAGE + 4, end=PAGE + 6)))

    world.meanwhile = announce_once
    await world.comparison.round()
    await world.notifier.wait_served()
    assert (len(announced), world.found, len(world.looked)) == (1, 1, 3)
    assert world.guests_pages == [0, 1, 2, 3, *range(8, 16)]


async def test_memory_announced_during_every_check_is_revoked_unchecked(world: World) -> None:
    """A VMM cannot keep stale what it changed silently by announcing something else all the time."""
    world.give(vma(0, 16))
    change(world, 4, 8)
    world.meanwhile = lambda: world.notifier.invalidate(UaddrRange(start=PAGE + 7, end=PAGE + 20))
    await world.comparison.round()
    await world.notifier.wait_served()
    assert (world.found, world.guests_pages) == (1, [0, 1, 2, 3])
    assert len(world.looked) == 1 + RETRIES


# ------------------------------------------------ catching up


async def test_catching_up_ends_when_all_differences_are_revoked(world: World) -> None:
    world.give(vma(0, 16))
    change(world, 0, 16)
    await world.comparison.catch_up()
    assert world.guests_pages == []


async def test_catching_up_waits_for_an_earlier_attempt_and_finds_its_mapping(
    world: World, nursery: trio.Nursery
) -> None:
    attempt = world.notifier.open_window(ALL)
    change(world, 0, 16)
    over = trio.Event()

    async def catch_up() -> None:
        await world.comparison.catch_up()
        over.set()

    nursery.start_soon(catch_up)
    await wait_all_tasks_blocked()
    assert not over.is_set()
    world.record.insert(mapping_of(vma(0, 16)))
    world.notifier.close_window(attempt)
    await over.wait()
    assert world.guests_pages == []


async def test_one_round_serves_all_callers_that_ask_during_another(
    world: World, nursery: trio.Nursery
) -> None:
    world.give(vma(0, 16))
    attempt = world.notifier.open_window(ALL)
    nursery.start_soon(world.comparison.round)
    await wait_all_tasks_blocked()
    async with trio.open_nursery() as asking:
        for _ in range(5):
            asking.start_soon(world.comparison.catch_up)
        await wait_all_tasks_blocked()
        world.notifier.close_window(attempt)
    assert len(world.looked) == 2


async def test_an_abandoned_round_serves_no_caller(world: World) -> None:
    world.give(vma(0, 16))
    first = world.notifier.open_window(ALL)
    leaving = trio.CancelScope()

    async def ask_and_leave() -> None:
        with leaving:
            await world.comparison.catch_up()

    async with trio.open_nursery() as asking:
        for ask in (world.comparison.catch_up, ask_and_leave, world.comparison.catch_up):
            asking.start_soon(ask)
            await wait_all_tasks_blocked()
        second = world.notifier.open_window(ALL)
        world.notifier.close_window(first)
        await wait_all_tasks_blocked()  # the second one's round has begun
        leaving.cancel()
        await wait_all_tasks_blocked()
        world.notifier.close_window(second)
    assert len(world.looked) == 2
