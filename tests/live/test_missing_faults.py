"""A restored guest's memory over a real userfaultfd: what a process reads of it, and what the kernel does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fakes import faulting_vmm as vmms
from fakes.huge_pages import reserved
from fakes.puppet import Puppet
from fakes.served_memory import ServedMemory, page_word, served_memory
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Answer
from interceptd.address_space.missing_faults import MESSAGE_BYTES, removal_in
from interceptd.telemetry.counters import Source

PAGES = 64


@pytest.fixture
def vmm() -> Iterator[Puppet]:
    with Puppet() as puppet:
        yield puppet


def at(memory: ServedMemory, start: int, count: int = 1) -> UaddrRange:
    """Pages of the first region."""
    first = memory.regions[0].start + start
    return UaddrRange(start=first, end=first + count)


async def test_every_page_is_the_images_in_two_regions(vmm: Puppet, tmp_path: Path) -> None:
    async with served_memory(vmm, tmp_path, [PAGES, 5]) as memory:
        read = [await memory.do(vmms.read_words, region) for region in memory.regions]
        assert read[0] + read[1] == [page_word(page) for page in range(PAGES + 5)]
        assert memory.guest.answers == {Answer.MAPPED: PAGES // 8 + 1}


async def test_an_image_that_is_not_in_the_page_cache_is_read(vmm: Puppet, tmp_path: Path) -> None:
    async with served_memory(vmm, tmp_path, [PAGES]) as memory:
        memory.forget_cached()
        assert await memory.do(vmms.read_words, at(memory, 0, PAGES)) == [
            page_word(page) for page in range(PAGES)
        ]


async def test_what_was_given_back_is_zero_and_its_neighbours_are_not(vmm: Puppet, tmp_path: Path) -> None:
    async with served_memory(vmm, tmp_path, [PAGES]) as memory:
        await memory.do(vmms.read_word, at(memory, 9).start)
        await memory.do(vmms.give_back, at(memory, 10, 10))
        expected = [0 if 10 <= page < 20 else page_word(page) for page in range(PAGES)]
        assert await memory.do(vmms.read_words, at(memory, 0, PAGES)) == expected
        assert memory.guest.memory.removed_pages == 10


async def test_what_the_guest_wrote_is_left_and_given_back_again_it_is_zero(
    vmm: Puppet, tmp_path: Path
) -> None:
    async with served_memory(vmm, tmp_path, [PAGES]) as memory:
        page = at(memory, 3)
        await memory.do(vmms.give_back, page)
        await memory.do(vmms.write_word, page.start, 77)
        assert await memory.do(vmms.read_word, page.start) == 77
        await memory.do(vmms.give_back, page)
        assert await memory.do(vmms.read_word, page.start) == 0


async def test_a_thread_whose_page_is_in_already_is_woken(vmm: Puppet, tmp_path: Path) -> None:
    """The page is brought in by somebody else, who wakes nobody."""
    async with served_memory(vmm, tmp_path, [PAGES]) as memory:
        assert memory.guest.hypervisor.table.entry(0) is not None
        await memory.do(vmms.read_word, at(memory, 0).start)
        guest = memory.guest
        guest.hypervisor.table.replace(guest.regions[0].no_access(GfnRange(start=0, end=PAGES)))
        await guest.manager.remove(guest.regions[0])
        await guest.manager.add(guest.regions[0])  # nothing is recorded, and the first block is in
        assert await memory.do(vmms.read_words, at(memory, 0, PAGES)) == [
            page_word(page) for page in range(PAGES)
        ]
        await guest.prefetch([GfnRange(start=0, end=PAGES)])
        assert guest.hypervisor.counters().no_access_gfns == 0


async def test_memory_that_was_unmapped_is_left_alone(vmm: Puppet, tmp_path: Path) -> None:
    async with served_memory(vmm, tmp_path, [PAGES], around=64) as memory:
        await memory.do(vmms.unmap, at(memory, 3, 2))
        assert await memory.do(vmms.read_word, at(memory, 5).start) == page_word(5)
        assert await memory.do(vmms.read_word, at(memory, 63).start) == page_word(63)


async def test_once_all_is_in_the_kernel_is_left_alone_with_it(vmm: Puppet, tmp_path: Path) -> None:
    """Also what was given back and never touched again."""
    async with served_memory(vmm, tmp_path, [PAGES]) as memory:
        await memory.do(vmms.give_back, at(memory, 60, 4))
        assert not await memory.guest.completion.leave_to_kernel()
        await memory.guest.prefetch([GfnRange(start=0, end=PAGES)])
        assert memory.guest.hypervisor.prefetched_pages == 60
        assert await memory.guest.completion.leave_to_kernel()
        assert memory.guest.completion.reached
        await memory.do(vmms.give_back, at(memory, 0))
        assert await memory.do(vmms.read_words, at(memory, 0, PAGES)) == [
            0 if page == 0 or page >= 60 else page_word(page) for page in range(PAGES)
        ]
        assert memory.guest.answers.total() == 0


async def test_the_end_of_the_process_ends_its_memory(vmm: Puppet, tmp_path: Path) -> None:
    async with served_memory(vmm, tmp_path, [PAGES]) as memory:
        vmm.kill()
        vmm.wait_ended()
        await memory.guest.prefetch([GfnRange(start=0, end=8)])
        await memory.guest.memory.run()
        assert memory.guest.hypervisor.vmm_gone


async def test_huge_pages(vmm: Puppet, tmp_path: Path) -> None:
    with reserved(3) as are_there:
        if not are_there:
            pytest.skip("the machine gives no huge pages of 2 MiB")
        async with served_memory(vmm, tmp_path, [3 * 512], huge=True, around=1) as memory:
            await memory.do(vmms.give_back, at(memory, 512, 512))
            pages = [0, 511, 512, 1023, 1024, 1535]
            read = [await memory.do(vmms.read_word, at(memory, page).start) for page in pages]
            assert read == [0 if 512 <= page < 1024 else page_word(page) for page in pages]
            assert memory.guest.answers == {Answer.MAPPED: 3}
            await memory.do(vmms.give_back, at(memory, 0, 512))
            assert await memory.do(vmms.read_word, at(memory, 7).start) == 0


async def test_ioctls_of_a_worker_bring_in_the_same(vmm: Puppet, tmp_path: Path) -> None:
    async with served_memory(vmm, tmp_path, [PAGES]) as memory:
        memory.guest.hypervisor.be_patient(1 << 62)
        await memory.do(vmms.give_back, at(memory, 8, 3))
        assert await memory.do(vmms.read_words, at(memory, 0, PAGES)) == [
            0 if 8 <= page < 11 else page_word(page) for page in range(PAGES)
        ]


async def test_a_removal_lies_where_a_successor_finds_it_until_it_is_recorded(
    vmm: Puppet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    area = memoryview(bytearray(MESSAGE_BYTES))
    found: list[UaddrRange | None] = []

    async with served_memory(vmm, tmp_path, [PAGES]) as memory:
        announce = memory.guest.notifier.invalidate

        def invalidate(uaddrs: UaddrRange, source: Source) -> object:
            found.append(removal_in(area))
            return announce(uaddrs, source)

        monkeypatch.setattr(memory.guest.notifier, "invalidate", invalidate)
        memory.guest.uffd.read_into(area)
        await memory.do(vmms.read_word, at(memory, 0).start)
        assert removal_in(area) is None
        await memory.do(vmms.give_back, at(memory, 2, 3))
        assert found == [at(memory, 2, 3)]
        assert removal_in(area) is None


# ------------------------------------------------ pages that are given back while they are touched


class Race:
    """Drawn reads and removals, several at a time, each in a thread of the VMM."""

    def __init__(self, memory: ServedMemory, rng: random.Random) -> None:
        self._memory = memory
        self._rng = rng
        self._went = [False] * PAGES
        """Given back, by a call that has returned."""
        self._goes = [False] * PAGES
        """Given back, by a call that has at least begun."""
        self.wrong: list[str] = []

    async def run(self, steps: int) -> None:
        slots = trio.Semaphore(4)
        async with trio.open_nursery() as nursery:
            for _ in range(steps):
                await slots.acquire()
                draw = self._rng.random()
                if draw < 0.03:
                    self._memory.forget_cached()
                nursery.start_soon(self._remove if draw > 0.85 else self._read, slots)

    async def _read(self, slots: trio.Semaphore) -> None:
        page = self._rng.randrange(PAGES)
        went = self._went[page]
        word = await self._memory.do(vmms.read_word, at(self._memory, page).start)
        fits = word == 0 if went else word == page_word(page) or (word == 0 and self._goes[page])
        if not fits:
            self.wrong.append(
                f"page {page}: {word}, given back before: {went}, meanwhile: {self._goes[page]}"
            )
        slots.release()

    async def _remove(self, slots: trio.Semaphore) -> None:
        start = self._rng.randrange(PAGES)
        end = min(PAGES, start + self._rng.choice((1, 1, 2, 8)))
        pages = range(start, end)
        for page in pages:
            self._goes[page] = True
        await self._memory.do(vmms.give_back, at(self._memory, start, end - start))
        for page in pages:
            self._went[page] = True
        slots.release()


async def race(vmm: Puppet, directory: Path, rounds: range, steps: int) -> list[str]:
    wrong = []
    for number in rounds:
        rng = random.Random(number)
        async with served_memory(vmm, directory, [PAGES], around=rng.choice((1, 8))) as memory:
            if rng.random() < 0.3:
                memory.guest.hypervisor.be_patient(1 << 62)
            drawn = Race(memory, rng)
            await drawn.run(steps)
            wrong += [f"round {number}: {what}" for what in drawn.wrong]
            await memory.do(vmms.unmap, memory.regions[0])
    return wrong


async def test_old_content_never_comes_back(vmm: Puppet, tmp_path: Path) -> None:
    assert await race(vmm, tmp_path, range(4), 100) == []


@pytest.mark.verify
async def test_old_content_never_comes_back_in_ten_thousand_steps(vmm: Puppet, tmp_path: Path) -> None:
    assert await race(vmm, tmp_path, range(1000, 1100), 100) == []
