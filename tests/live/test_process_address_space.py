"""The process address space by itself, over this process: both ways to ask, and what an answer takes in."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from fakes.closers import closer
from fakes.eventually import PATIENCE, eventually
from fakes.live_vmm import MAP_FIXED_NOREPLACE, QUIET_PAGE, RW
from fakes.procmaps_parsed import asking_by_parsing
from intercept_client import libc
from intercept_client.libc import Sharing
from intercept_client.memory import open_userfaultfd
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space import Caller, Undecided, process, procmaps
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.live_vma import LiveVma
from interceptd.address_space.proc_text import MmGone
from interceptd.address_space.process import WORKERS, ProcessAddressSpace
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.unmap_watch import UnmapWatch
from interceptd.address_space.userfaultfd import Userfaultfd
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import Frame, Mapping
from interceptd.telemetry.counters import Source
from interceptd.telemetry.event_bus import EventBus

PAGES = 8
SOON = 0.05
"""Seconds: short, for what is to be given up."""


def open_maps(pid: int | str = "self") -> ProcMaps:
    return ProcMaps(os.open(f"/proc/{pid}/maps", os.O_RDONLY))


@pytest.fixture
def memory() -> Iterator[UaddrRange]:
    """Anonymous pages, a file's pages without rights to write, a hole, and pages without rights."""
    at = UaddrRange(start=QUIET_PAGE, end=QUIET_PAGE + 4 * PAGES)
    whole = libc.mmap(at, Access.NONE, Sharing.PRIVATE, flags=MAP_FIXED_NOREPLACE)
    parts = [UaddrRange(start=whole.start + n * PAGES, end=whole.start + (n + 1) * PAGES) for n in range(4)]
    file = os.memfd_create("part")
    os.ftruncate(file, 3 * PAGES * 4096)
    libc.mmap(parts[0], RW, Sharing.PRIVATE, flags=libc.MAP_FIXED)
    libc.mmap(parts[1], Access.READ, Sharing.SHARED, flags=libc.MAP_FIXED, file=file, offset=PAGES * 4096)
    libc.munmap(parts[2])
    os.close(file)
    yield whole
    libc.munmap(whole)


def test_a_kernel_without_procmap_query_gives_the_same_answers(memory: UaddrRange) -> None:
    asked, parsed = open_maps(), asking_by_parsing(open_maps())
    everywhere = [memory.start - 1, *range(memory.start, memory.end + 1), 0, 1 << 35, (1 << 52) - 1]
    ways = (
        asked.vma_at,
        parsed.vma_at,
        *(
            maps.view([UaddrRange(start=page, end=page + 1) for page in everywhere], 1)
            for maps in (asked, parsed)
        ),
    )
    answers = [(page, *(told(vma_at(page)) for vma_at in ways)) for page in everywhere]
    asked.close()
    parsed.close()
    assert [page for page, by_query, *others in answers if others != [by_query] * 3] == []
    assert len({answer for _, answer, *_ in answers}) == 4


def test_a_kernel_without_procmap_query_is_read_once_for_many_pages(memory: UaddrRange) -> None:
    """The first question, with which memory is attached, finds out what the kernel lacks."""
    maps = asking_by_parsing(open_maps())
    maps.vma_at(0)
    vma_at = maps.view([memory], 4)
    maps.close()
    assert [vma_at(page) is not None for page in (memory.start, memory.start + 2 * PAGES)] == [True, False]


def test_of_the_vmas_in_a_file_few_are_kept_and_none_is_read_behind_the_last_that_is_wanted() -> None:
    """Of each range the first ones, where ranges overlap, hold each other, or have no VMA."""
    vmas = [vma_of(start) for start in range(10, 90, 2)]
    wanted = [(12, 40), (12, 14), (13, 15), (30, 31), (15, 16), (60, 64), (0, 5)]
    read = iter(vmas)
    kept = procmaps._first_in_each([UaddrRange(start=a, end=b) for a, b in wanted], 2, read)
    assert [vma.start for vma in kept] == [12, 14, 30, 60, 62]
    assert next(read).start == 66


def vma_of(start: int) -> LiveVma:
    """Two pages."""
    return LiveVma(start, start + 2, Access.READ, 0, (0, 0), 0, False, b"")


def told(vma: LiveVma | None) -> LiveVma | None:
    """A VMA without its pages' size, of which the maps file says nothing."""
    return None if vma is None else replace(vma, unit=1)


def test_a_path_too_long_for_the_kernel_to_tell_is_a_path(
    memory: UaddrRange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PROCMAP_QUERY refuses, and the VMA is asked for without its name."""
    asked = open_maps()
    page = memory.start + PAGES
    named = asked.vma_at(page)
    monkeypatch.setattr(procmaps._NAMES, "buffer", ctypes.create_string_buffer(4))
    nameless = asked.vma_at(page)
    asked.close()
    assert named is not None
    assert nameless is not None
    assert nameless.backing == named.backing != "anonymous"


@pytest.mark.parametrize("reap", [True, False])
def test_a_kernel_without_procmap_query_says_that_the_process_is_gone(reap: bool) -> None:
    """A process without wait() is a zombie, whose maps file is still there."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        maps = asking_by_parsing(open_maps(process.pid))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | (0 if reap else os.WNOWAIT))
        with pytest.raises(MmGone):
            maps.vma_at(0)
        maps.close()


async def test_resolve_handles_pending_unmaps_before_it_answers(memory: UaddrRange) -> None:
    """Nobody else reads the event here: an answer without it would be mapped, and outlive the memory."""
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    space = ProcessAddressSpace(notifier, given=nothing, timeout=5, vmm=None, name="1", closer=closer())
    await space.attach(
        Attachment(open_maps(), None, Userfaultfd(open_userfaultfd()), promised=False, closer=closer())
    )
    try:
        part = UaddrRange(start=memory.start, end=memory.start + PAGES)
        found = await space.resolve(part.start, part, memory)
        assert found is not None
        window = notifier.open_window(part)
        unmapping = threading.Thread(target=libc.munmap, args=(part,))
        unmapping.start()
        wait_for_its_event(unmapping)
        assert await space.resolve(part.start, part, memory) is None
        assert window.stale
        assert set(notifier.by_source) == {Source.USERFAULTFD}
        unmapping.join(5)
        assert not unmapping.is_alive()
    finally:
        space.close()


async def test_an_event_that_is_not_read_yet_is_announced_before_what_was_learned_is_used(
    memory: UaddrRange,
) -> None:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    space = ProcessAddressSpace(notifier, given=nothing, timeout=5, vmm=None, name="1", closer=closer())
    forgotten: list[UaddrRange] = []
    notifier.learn_in_windows(forgotten.append)
    assert space.drain_nowait()
    await space.attach(
        Attachment(open_maps(), None, Userfaultfd(open_userfaultfd()), promised=False, closer=closer())
    )
    try:
        part = UaddrRange(start=memory.start, end=memory.start + PAGES)
        await space.resolve(part.start, part, memory)
        assert space.drain_nowait()
        unmapping = threading.Thread(target=libc.munmap, args=(part,))
        unmapping.start()
        wait_for_its_event(unmapping)
        with assert_no_checkpoints():
            assert not space.drain_nowait()
        assert forgotten == [part]
        assert space.drain_nowait()
        unmapping.join(5)
        assert not unmapping.is_alive()
    finally:
        space.close()


async def test_what_was_learned_of_a_process_that_is_gone_is_not_used() -> None:
    class Gone:
        def read_events(self) -> list[UaddrRange]:
            raise ProcessLookupError

    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    assert not UnmapWatch(Gone(), notifier).drain_nowait()  # type: ignore[arg-type] # it needs no more


def unwatched(timeout: float, name: str = "1") -> ProcessAddressSpace:
    """One that is not notified of invalidations."""
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    return ProcessAddressSpace(notifier, nothing, timeout, None, name, closer=closer())


def nothing(_: GfnRange, __: int) -> list[Mapping]:
    """What a guest has that has touched nothing."""
    return []


class HeldMaps(ProcMaps):
    """Answers once `released` is set: a process whose mmap lock is held till then."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self.released = threading.Event()
        self.released.set()

    def vma_at(self, page: int) -> LiveVma | None:
        assert self.released.wait(PATIENCE)
        return super().vma_at(page)


async def test_a_worker_is_busy_while_the_process_does_not_answer(memory: UaddrRange) -> None:
    maps = HeldMaps(os.open("/proc/self/maps", os.O_RDONLY))
    space = unwatched(PATIENCE)
    await space.attach(Attachment(maps, None, None, promised=True, closer=closer()))
    maps.released.clear()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(space.resolve, memory.start, memory, memory)
            await wait_all_tasks_blocked()
            assert space.busy_workers == 1
            maps.released.set()
        assert space.busy_workers == 0
    finally:
        maps.released.set()
        space.close()


async def test_catching_up_with_a_process_that_does_not_answer_is_undecided(
    memory: UaddrRange,
) -> None:
    maps = HeldMaps(os.open("/proc/self/maps", os.O_RDONLY))
    part = UaddrRange(start=memory.start, end=memory.start + PAGES)
    space = having(part, timeout=SOON)
    await space.attach(
        Attachment(maps, None, Userfaultfd(open_userfaultfd()), promised=False, closer=closer())
    )
    maps.released.clear()
    try:
        with pytest.raises(Undecided, match="no answer in time"):
            await space.catch_up()
    finally:
        maps.released.set()
        space.close()


async def test_catching_up_with_a_process_that_is_gone_is_left_to_the_end_of_its_partition(
    memory: UaddrRange,
) -> None:
    maps = MortalMaps(os.open("/proc/self/maps", os.O_RDONLY))
    space = having(UaddrRange(start=memory.start, end=memory.start + PAGES), timeout=PATIENCE)
    await space.attach(
        Attachment(maps, None, Userfaultfd(open_userfaultfd()), promised=False, closer=closer())
    )
    maps.dead = True
    await space.catch_up()
    with trio.move_on_after(PATIENCE) as life:
        await space.run()
    assert not life.cancelled_caught
    space.close()


class MortalMaps(ProcMaps):
    """The maps of a process that may have exited."""

    dead = False

    def vma_at(self, page: int) -> LiveVma | None:
        if self.dead:
            raise MmGone
        return super().vma_at(page)


def having(uaddrs: UaddrRange, timeout: float) -> ProcessAddressSpace:
    """One whose guest has these pages."""
    mapping = Mapping(0, uaddrs.page_count, Frame("anonymous", uaddrs.start), uaddrs.start, Access.READ)
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    return ProcessAddressSpace(
        notifier, lambda gfns, _: [mapping] if 0 in gfns else [], timeout, None, "1", closer=closer()
    )


class StuckMaps(ProcMaps):
    """The maps of a process in which a question about `page` blocks until `released`."""

    def __init__(self, page: int) -> None:
        super().__init__(os.open("/proc/self/maps", os.O_RDONLY))
        self.waiting = 0
        self.released = threading.Event()
        self._page = page

    def vma_at(self, page: int) -> LiveVma | None:
        if page == self._page:
            self.waiting += 1
            self.released.wait(PATIENCE)
        return super().vma_at(page)


async def test_faults_that_wait_for_the_mmap_lock_do_not_hold_up_the_vmms_own_calls(
    memory: UaddrRange,
) -> None:
    """Every worker for faults is stuck, and faults queue for them."""
    space = unwatched(PATIENCE)
    maps = StuckMaps(memory.end - 1)
    await space.attach(Attachment(maps, None, None, promised=True, closer=closer()))
    async with trio.open_nursery() as faults:
        for _ in range(2 * WORKERS[Caller.GUEST]):
            faults.start_soon(space.resolve, memory.end - 1, memory, memory)
        while maps.waiting < WORKERS[Caller.GUEST]:
            await trio.lowlevel.checkpoint()
        assert await space.resolve(memory.start, memory, memory, Caller.VMM) is not None
        assert not maps.released.is_set()
        maps.released.set()
    space.close()


async def attached_and_impatient(maps: ProcMaps) -> ProcessAddressSpace:
    """One that gives up soon, once it is attached: that alone may take a busy machine longer."""
    space = unwatched(PATIENCE)
    await space.attach(Attachment(maps, None, None, promised=True, closer=closer()))
    space._timeout = SOON
    return space


async def test_a_query_of_the_vmm_is_abandoned_at_the_deadline(memory: UaddrRange) -> None:
    maps = StuckMaps(memory.start)
    space = await attached_and_impatient(maps)
    with pytest.raises(Undecided, match="no answer in time"):
        await space.resolve(memory.start, memory, memory, Caller.VMM)
    assert space.busy_workers == 1
    maps.released.set()
    space.close()


async def test_only_its_intercept_abandons_a_fault(memory: UaddrRange) -> None:
    """Two deadlines for one wait would be one too many, which every fault would pay for."""
    maps = StuckMaps(memory.start)
    space = await attached_and_impatient(maps)
    with trio.move_on_after(4 * SOON) as intercept:
        await space.resolve(memory.start, memory, memory)
    assert intercept.cancelled_caught
    maps.released.set()
    space.close()


async def test_the_fault_thread_ends_when_idle_and_the_probe_thread_continues(
    memory: UaddrRange, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(process, "PROBE_SECONDS", SOON)
    space = unwatched(PATIENCE, "7")
    await space.attach(Attachment(open_maps(), None, None, promised=True, closer=closer()))
    nursery.start_soon(space.run)
    assert await space.resolve(memory.start, memory, memory) is not None
    (of_faults,) = threads("guest of 7")
    (of_probes,) = threads("vmm of 7")
    assert await trio.to_thread.run_sync(ended, of_faults)
    assert of_probes.is_alive()
    nursery.cancel_scope.cancel()
    space.close()


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def ended(thread: threading.Thread) -> bool:
    thread.join(PATIENCE)
    return not thread.is_alive()


def is_open(descriptor: int) -> bool:
    """Whether the number still is a maps file."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").endswith("/maps")
    except FileNotFoundError:
        return False


async def test_after_the_end_no_thread_and_no_descriptor_is_left(memory: UaddrRange) -> None:
    descriptor = os.open("/proc/self/maps", os.O_RDONLY)
    space = unwatched(PATIENCE, "8")
    await space.attach(Attachment(ProcMaps(descriptor), None, None, promised=True, closer=closer()))
    assert await space.resolve(memory.start, memory, memory) is not None
    assert is_open(descriptor)
    space.close()
    with trio.fail_after(PATIENCE):
        while threads("guest of 8") or threads("vmm of 8") or is_open(descriptor):
            await trio.lowlevel.checkpoint()


def wait_for_its_event(thread: threading.Thread) -> None:
    """Until the kernel has the thread wait for a reader of its event."""
    wchan = Path(f"/proc/self/task/{thread.native_id}/wchan")
    eventually(lambda: "userfaultfd" in wchan.read_text(), True)
