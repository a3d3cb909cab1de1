"""Long searches of maps and smaps give way: one reads at a time, and an abandoned one leaves nothing held."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio

from fakes.closers import closer
from fakes.eventually import PATIENCE, eventually
from fakes.procmaps_parsed import asking_by_parsing
from intercept_client.memory import open_userfaultfd
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space import turn_queue, workers
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.live_vma import ANONYMOUS
from interceptd.address_space.proc_text import ProcText
from interceptd.address_space.process import ProcessAddressSpace
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.smaps import Smaps
from interceptd.address_space.turn_queue import TurnQueue
from interceptd.address_space.userfaultfd import Userfaultfd
from interceptd.address_space.workers import Turn, Workers
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import Frame, Mapping
from interceptd.telemetry.event_bus import EventBus

SPACES = 4
NAME = "searches"


class CountedTurns:
    def __init__(self) -> None:
        self.begun = 0
        self.allowed = 1 << 30

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        if self.begun == self.allowed:
            await trio.sleep_forever()
        self.begun += 1
        yield


class Reads:
    """The reads of all texts: how many, and how many at a time; held while `going` is clear."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.now = 0
        self.going = threading.Event()
        self.going.set()
        read, lock = ProcText._pread, threading.Lock()

        def counted(text: ProcText, size: int, position: int) -> bytes:
            with lock:
                self.count += 1
                self.now += 1
            assert self.going.wait(PATIENCE)
            try:
                return read(text, size, position)
            finally:
                with lock:
                    self.now -= 1

        monkeypatch.setattr(ProcText, "_pread", counted)


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A step is one read, and no turn passes on before its end. No thread outlives its test."""
    monkeypatch.setattr(workers, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(turn_queue, "PATIENCE", PATIENCE)
    yield
    eventually(lambda: any(NAME in thread.name for thread in threading.enumerate()), False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def turns() -> CountedTurns:
    return CountedTurns()


@pytest.fixture
def one(turns: CountedTurns) -> Iterator[Workers]:
    made = Workers(1, NAME, closer(), turns.turn)
    yield made
    made.close()


def open_maps() -> ProcMaps:
    return ProcMaps(os.open("/proc/self/maps", os.O_RDONLY))


def open_smaps() -> Smaps:
    return Smaps(os.open("/proc/self/smaps", os.O_RDONLY))


def of_smaps(maps: ProcMaps, smaps: Smaps, last: UaddrRange) -> object:
    vma = maps.vma_at(last.start)
    assert vma is not None
    return smaps.read(vma, last.start)


def by_parsing(maps: ProcMaps, _: Smaps, last: UaddrRange) -> object:
    return asking_by_parsing(maps).vma_at(last.start)


def to_compare(maps: ProcMaps, _: Smaps, last: UaddrRange) -> object:
    parsed = asking_by_parsing(maps)
    parsed._has_query = False
    return parsed.view([last], 1)(last.start)


def to_prove(maps: ProcMaps, _: Smaps, last: UaddrRange) -> object:
    return maps.first(lambda vma: vma.start == last.start, 1)


@pytest.mark.parametrize("search", [of_smaps, by_parsing, to_compare, to_prove])
async def test_a_search_gives_way_before_every_read(
    one: Workers,
    turns: CountedTurns,
    reads: Reads,
    crowd: list[UaddrRange],
    search: Callable[[ProcMaps, Smaps, UaddrRange], object],
) -> None:
    maps, smaps = open_maps(), open_smaps()
    found = await one.ask(lambda: search(maps, smaps, crowd[-1]))
    maps.close()
    smaps.close()
    assert found not in (None, [])
    assert turns.begun == reads.count > 1


async def test_one_search_reads_at_a_time_whatever_the_number_of_partitions(
    reads: Reads, crowd: list[UaddrRange], nursery: trio.Nursery
) -> None:
    queue, answers = TurnQueue(), list[bool | None]()
    spaces = [await a_space(lambda uid=uid: queue.turn(uid)) for uid in range(SPACES)]  # type: ignore[misc]
    reads.going.clear()

    async def ask(space: ProcessAddressSpace) -> None:
        answers.append(await space.is_io(crowd[-1].start))

    for space in spaces:
        nursery.start_soon(ask, space)
    with trio.fail_after(PATIENCE):
        while len(queue._waiting) < SPACES - 1 and reads.now < SPACES:
            await trio.lowlevel.checkpoint()
    eventually(lambda: reads.now, 1)
    assert len(queue._waiting) == SPACES - 1
    reads.going.set()
    with trio.fail_after(PATIENCE):
        while len(answers) < SPACES:
            await trio.lowlevel.checkpoint()
    for space in spaces:
        space.close()
    assert answers == [False] * SPACES


async def test_a_comparison_waits_for_its_turn(turns: CountedTurns, crowd: list[UaddrRange]) -> None:
    """Every partition makes one a second."""
    compared = Mapping(0, 1, Frame(ANONYMOUS, crowd[0].start), crowd[0].start, Access.READ)

    def given(gfns: GfnRange, _most: int) -> list[Mapping]:
        return [compared] if gfns.start == 0 and gfns.page_count else []

    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    space = ProcessAddressSpace(
        notifier, given, timeout=PATIENCE, vmm=None, name=NAME, closer=closer(), turn=turns.turn
    )
    await space.attach(
        Attachment(open_maps(), None, Userfaultfd(open_userfaultfd()), promised=True, closer=closer())
    )
    assert turns.begun == 0
    await space.catch_up()
    space.close()
    assert turns.begun == 1


async def a_space(turn: Turn) -> ProcessAddressSpace:
    """A partition's, of this process's memory."""
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    space = ProcessAddressSpace(
        notifier,
        given=lambda _gfns, _most: [],
        timeout=PATIENCE,
        vmm=None,
        name=NAME,
        closer=closer(),
        turn=turn,
    )
    await space.attach(Attachment(open_maps(), open_smaps(), None, promised=True, closer=closer()))
    return space


async def test_after_a_search_that_is_abandoned_between_two_reads_the_next_one_goes_on_there(
    one: Workers, turns: CountedTurns, reads: Reads, crowd: list[UaddrRange], nursery: trio.Nursery
) -> None:
    maps, smaps, another = open_maps(), open_smaps(), open_smaps()
    await one.ask(lambda: of_smaps(maps, another, crowd[-1]))
    one_pass, reads.count = reads.count, 0
    scope = trio.CancelScope()

    async def ask() -> None:
        with scope:
            await one.ask(lambda: of_smaps(maps, smaps, crowd[-1]))

    turns.begun, turns.allowed = 0, one_pass - 2
    nursery.start_soon(ask)
    with trio.fail_after(PATIENCE):
        while reads.count < turns.allowed:
            await trio.lowlevel.checkpoint()
    scope.cancel()
    turns.allowed = 1 << 30
    assert await one.ask(lambda: of_smaps(maps, smaps, crowd[-1])) is False
    for each in (maps, smaps, another):
        each.close()
    assert reads.count == one_pass
