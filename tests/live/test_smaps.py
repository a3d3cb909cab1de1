"""smaps is read no further than it must be, once for all who wait, and a lost record is never a "no"."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from fakes.closers import closer
from fakes.procmaps_parsed import asking_by_parsing
from intercept_client import libc
from intercept_client.libc import Sharing
from intercept_client.memory import open_userfaultfd
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space import Undecided
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.live_vma import LiveVma
from interceptd.address_space.proc_text import ProcText, Torn
from interceptd.address_space.process import ProcessAddressSpace
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.smaps import Smaps, parse_records
from interceptd.address_space.userfaultfd import Userfaultfd
from interceptd.mmu_notifier import MmuNotifier
from interceptd.telemetry.event_bus import EventBus

ORDINARY, DEVICE = b"rd wr mr mw me ac", b"rd wr io pf de dd"
HOLE = 0x9_0000_0000 // PAGE_SIZE
"""A page that nothing covers."""


@pytest.fixture
def maps() -> Iterator[ProcMaps]:
    opened = ProcMaps(os.open("/proc/self/maps", os.O_RDONLY))
    yield opened
    opened.close()


@pytest.fixture
def smaps() -> Iterator[Smaps]:
    opened = Smaps(os.open("/proc/self/smaps", os.O_RDONLY))
    yield opened
    opened.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a text was read."""
    counted: Counter[str] = Counter()
    read = ProcText.read

    def counting(self: ProcText) -> bytes:
        counted["reads"] += 1
        return read(self)

    monkeypatch.setattr(ProcText, "read", counting)
    return counted


def found(maps: ProcMaps, page: int) -> LiveVma:
    vma = maps.vma_at(page)
    assert vma is not None
    return vma


# ------------------------------------------------ how much is read


def test_reading_ends_at_the_vma_in_question(
    maps: ProcMaps, smaps: Smaps, crowd: list[UaddrRange], reads: Counter[str]
) -> None:
    first, last = crowd[0].start, crowd[-1].start
    assert smaps.read(found(maps, first), first) is False
    assert reads["reads"] == 1
    assert smaps.read(found(maps, last), last) is False
    assert reads["reads"] < len(crowd)


def test_records_passed_on_the_way_are_known_without_reading(
    maps: ProcMaps, smaps: Smaps, crowd: list[UaddrRange], reads: Counter[str]
) -> None:
    last = crowd[-1].start
    smaps.read(found(maps, last), last)
    spent = reads["reads"]
    vmas = {vma.start: found(maps, vma.start) for vma in crowd}
    assert {smaps.known(vma, page) for page, vma in vmas.items()} == {False}
    assert {smaps.read(vma, page) for page, vma in vmas.items()} == {False}
    assert reads["reads"] == spent


def test_all_vmas_one_after_the_other_cost_one_pass(
    maps: ProcMaps, smaps: Smaps, crowd: list[UaddrRange], reads: Counter[str]
) -> None:
    last = crowd[-1].start
    another = Smaps(os.open("/proc/self/smaps", os.O_RDONLY))
    another.read(found(maps, last), last)
    another.close()
    one_pass = reads.pop("reads")
    for vma in crowd:
        smaps.read(found(maps, vma.start), vma.start)
    assert reads["reads"] == one_pass


def test_an_invalidated_record_is_read_again_and_later_ones_are_not(
    maps: ProcMaps, smaps: Smaps, crowd: list[UaddrRange], reads: Counter[str]
) -> None:
    last = crowd[-1].start
    smaps.read(found(maps, last), last)
    smaps.forget(crowd[0])
    reads.clear()
    assert smaps.read(found(maps, crowd[0].start), crowd[0].start) is False
    assert reads["reads"] == 1


def test_a_torn_record_is_undecided_and_the_next_question_starts_over(
    maps: ProcMaps, smaps: Smaps, crowd: list[UaddrRange], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = crowd[-1].start
    with monkeypatch.context() as patched:
        patched.setattr(ProcText, "read", torn)
        assert smaps.read(found(maps, page), page) is None
    assert smaps.read(found(maps, page), page) is False


def torn(_: ProcText) -> bytes:
    raise Torn


# ------------------------------------------------ what it says


def test_a_pfn_mapped_vma_is_device_memory(maps: ProcMaps, smaps: Smaps) -> None:
    vvar = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[vvar]"))
    page = int(vvar.split("-")[0], 16) // PAGE_SIZE
    assert smaps.read(found(maps, page), page) is True


class StandIn(Smaps):
    """A file that shows the real VMA at a page with flags that the test chooses, or not at all."""

    def __init__(self, page: int) -> None:
        self._file = os.memfd_create("stand-in")
        self._page = page
        super().__init__(self._file)

    def show(self, flags: bytes) -> None:
        for line in Path("/proc/self/maps").read_bytes().splitlines():
            start, end = (int(each, 16) // PAGE_SIZE for each in line.split()[0].split(b"-"))
            if start <= self._page < end:
                os.pwrite(self._file, line + b"\nVmFlags: " + flags + b"\n", 0)

    def show_another(self) -> None:
        os.pwrite(self._file, b"00010000-00011000 rw-p 00000000 00:00 0 \nVmFlags: rd wr\n", 0)


@pytest.fixture
async def space(crowd: list[UaddrRange]) -> AsyncIterator[tuple[ProcessAddressSpace, MmuNotifier, StandIn]]:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    space = ProcessAddressSpace(
        notifier, given=lambda _gfns, _most: [], timeout=5, vmm=None, name="1", closer=closer()
    )
    stand_in = StandIn(crowd[0].start)
    maps = ProcMaps(os.open("/proc/self/maps", os.O_RDONLY))
    await space.attach(Attachment(maps, stand_in, None, promised=True, closer=closer()))
    yield space, notifier, stand_in
    space.close()


Space = tuple[ProcessAddressSpace, MmuNotifier, StandIn]


async def test_a_vma_without_its_record_is_undecided(space: Space, crowd: list[UaddrRange]) -> None:
    """And not without a VMA, which would be FORWARD."""
    process, _, stand_in = space
    stand_in.show_another()
    with pytest.raises(Undecided):
        await process.is_io(crowd[0].start)


async def test_a_page_without_a_vma_is_none(space: Space) -> None:
    process, _, stand_in = space
    stand_in.show_another()
    assert await process.is_io(HOLE) is None


@pytest.mark.parametrize("invalidate", [MmuNotifier.invalidate, MmuNotifier.begin, MmuNotifier.mark_stale])
async def test_a_record_is_valid_until_an_invalidation_overlaps_it(
    space: Space, crowd: list[UaddrRange], invalidate: Callable[[MmuNotifier, UaddrRange], object]
) -> None:
    process, notifier, stand_in = space
    page, region = crowd[0].start, crowd[0]
    stand_in.show(ORDINARY)
    assert await process.is_io(page) is False
    stand_in.show(DEVICE)
    extent = await process.resolve(page, region, region)
    assert extent is not None
    assert extent.io is False
    invalidate(notifier, region)
    extent = await process.resolve(page, region, region)
    assert extent is not None
    assert extent.io is None
    assert await process.is_io(page) is True


async def test_watched_memory_is_ordinary_without_reading_smaps() -> None:
    """A userfaultfd takes no other: 8 VPs that touch 30,000 VMAs need no pass."""
    space = ProcessAddressSpace(
        MmuNotifier(lambda: 1, EventBus()),
        given=lambda _gfns, _most: [],
        timeout=5,
        vmm=None,
        name="1",
        closer=closer(),
    )
    maps = ProcMaps(os.open("/proc/self/maps", os.O_RDONLY))
    await space.attach(
        Attachment(maps, None, Userfaultfd(open_userfaultfd()), promised=True, closer=closer())
    )
    memory = libc.mmap(UaddrRange(start=0, end=4), Access.READ, Sharing.PRIVATE)
    extent = await space.resolve(memory.start, memory, memory)
    space.close()
    libc.munmap(memory)
    assert extent is not None
    assert extent.io is False


# ------------------------------------------------ hostile names


@pytest.mark.parametrize(
    "name",
    [
        "kernel 10000-7ffffffff000 rwxp 00000000 08:01 99",
        "kernel 00010000-7ffffffff000 rwxp 00000000 08:01 99",
        "a\n00010000-7ffffffff000 rwxp 00000000 08:01 99 ",
        "a\n00010000-7ffffffff000 rwxp 00000000 08:01 99 \nVmFlags: io pf\n",
        "00010000-7ffffffff000 rwxp 00000000 08:01 99 \rVmFlags: io pf\r",
    ],
)
def test_a_file_name_that_looks_like_a_vma_is_not_taken_for_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(PAGE_SIZE))
    file = os.open(path, os.O_RDONLY)
    mapped = libc.mmap(UaddrRange(start=0, end=1), Access.READ, Sharing.SHARED, file=file)
    os.close(file)
    maps = asking_by_parsing(ProcMaps(os.open("/proc/self/maps", os.O_RDONLY)))
    shown = parse_records(Path("/proc/self/smaps").read_bytes())
    assert maps.vma_at(HOLE) is None
    assert [vma for vma in shown if vma.start <= HOLE < vma.end] == []
    assert [vma.io for vma in shown if vma.start <= mapped.start < vma.end] == [False]
    libc.munmap(mapped)
    maps.close()
