"""What the process address space makes of a refusal: nothing backed only where that is decided.

The process asked about is this one. Refusals that the kernel does not give on demand are given in its place.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from fakes.closers import closer
from fakes.live_vmm import MAP_FIXED_NOREPLACE, QUIET_PAGE, RW
from intercept_client import libc
from intercept_client.libc import Sharing
from intercept_client.memory import open_userfaultfd
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access
from interceptd.address_space import Caller, KindUnknown, Undecided
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.descriptors import attach
from interceptd.address_space.fault_causes import PERIOD_SECONDS, FaultCauses
from interceptd.address_space.live_vma import LiveVma
from interceptd.address_space.process import ProcessAddressSpace
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.smaps import Smaps
from interceptd.address_space.userfaultfd import Userfaultfd
from interceptd.connections.peer import Peer
from interceptd.mmu_notifier import MmuNotifier
from interceptd.telemetry.event_bus import EventBus

PAGES = 8
OURS = Peer(os.getpid(), 0, 0)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[UaddrRange]:
    """Anonymous pages, and as many behind them of a file on disk, which no userfaultfd can watch."""
    at = UaddrRange(start=QUIET_PAGE, end=QUIET_PAGE + 2 * PAGES)
    whole = libc.mmap(at, RW, Sharing.PRIVATE, flags=MAP_FIXED_NOREPLACE)
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGES * 4096))
    with path.open("rb") as file:
        behind = UaddrRange(start=whole.start + PAGES, end=whole.end)
        libc.mmap(behind, Access.READ, Sharing.SHARED, flags=libc.MAP_FIXED, file=file.fileno())
    yield whole
    libc.munmap(whole)


class RefusingUserfaultfd(Userfaultfd):
    """Registers nothing, for the reason that the kernel would give."""

    def __init__(self, number: int) -> None:
        super().__init__(open_userfaultfd())
        self._number = number

    def register(self, uaddrs: UaddrRange) -> None:  # noqa: ARG002 - whatever it is
        raise OSError(self._number, os.strerror(self._number))


class UnreadableUserfaultfd(Userfaultfd):
    """Has no events at first, and then cannot be read."""

    def __init__(self) -> None:
        self._failing = False
        super().__init__(open_userfaultfd())
        self._failing = True

    def read_events(self) -> list[UaddrRange]:
        if self._failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read_events()


class FailingMaps(ProcMaps):
    """The kernel refuses the second question and those that follow; the first is that of `attach`."""

    def __init__(self, number: int) -> None:
        super().__init__(os.open("/proc/self/maps", os.O_RDONLY))
        self._questions = 0
        self._number = number

    def vma_at(self, page: int) -> LiveVma | None:
        self._questions += 1
        if self._questions > 1:
            raise OSError(self._number, os.strerror(self._number))
        return super().vma_at(page)


class MapsFromBefore(ProcMaps):
    """Shows, once, the VMA at `page` as long as `page_count`: as it was before its other half changed."""

    def __init__(self, page: int, page_count: int) -> None:
        super().__init__(os.open("/proc/self/maps", os.O_RDONLY))
        self._page = page
        self._page_count = page_count

    def vma_at(self, page: int) -> LiveVma | None:
        vma = super().vma_at(page)
        if page != self._page or vma is None:
            return vma
        self._page = -1
        return replace(vma, end=vma.start + self._page_count)


def open_maps() -> ProcMaps:
    return ProcMaps(os.open("/proc/self/maps", os.O_RDONLY))


async def attached(attachment: Attachment) -> ProcessAddressSpace:
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    space = ProcessAddressSpace(
        notifier, given=lambda _gfns, _most: [], timeout=math.inf, vmm=None, name="1", closer=closer()
    )
    await space.attach(attachment)
    return space


async def refused_to_watch(number: int, *, promised: bool = False) -> ProcessAddressSpace:
    return await attached(
        Attachment(open_maps(), None, RefusingUserfaultfd(number), promised=promised, closer=closer())
    )


@pytest.mark.parametrize("number", sorted(errno.errorcode.keys() - {errno.EINVAL, errno.EPERM}))
async def test_a_refusal_to_watch_that_is_not_about_the_vma_is_undecided(
    memory: UaddrRange, number: int
) -> None:
    """The V-4 table's rule, at the place where it counts: what the table does not have passes."""
    space = await refused_to_watch(number)
    with pytest.raises(Undecided, match=rf"UFFDIO_REGISTER: {errno.errorcode[number]}\)") as undecided:
        await space.resolve(memory.start, memory, memory, Caller.VMM)
    space.close()
    assert undecided.value.number == errno.EAGAIN


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM])
async def test_a_refusal_to_watch_that_is_about_the_vma_leaves_it_unbacked(
    memory: UaddrRange, number: int
) -> None:
    space = await refused_to_watch(number)
    found = await space.resolve(memory.start, memory, memory)
    space.close()
    assert found is None


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL])
async def test_promised_memory_is_backed_even_if_it_cannot_be_watched(
    memory: UaddrRange, number: int
) -> None:
    space = await refused_to_watch(number, promised=True)
    found = await space.resolve(memory.start, memory, memory)
    space.close()
    assert found is not None


async def test_a_refusal_about_replaced_memory_does_not_apply_to_the_vma(
    memory: UaddrRange,
) -> None:
    """Register refuses all of what the first look found, because of the file that is behind the VMA now."""
    maps = MapsFromBefore(memory.start, 2 * PAGES)
    space = await attached(
        Attachment(maps, None, Userfaultfd(open_userfaultfd()), promised=False, closer=closer())
    )
    found = await space.resolve(memory.start, memory, memory)
    space.close()
    assert found is not None
    assert found.uaddrs == UaddrRange(start=memory.start, end=memory.start + PAGES)


async def test_where_the_events_cannot_be_read_an_attempt_is_stale(
    memory: UaddrRange,
) -> None:
    """A missing answer of the kernel does not mean that there are no events."""
    notifier = MmuNotifier(open_limit=lambda: 1, event_bus=EventBus())
    space = ProcessAddressSpace(
        notifier, given=lambda _gfns, _most: [], timeout=math.inf, vmm=None, name="1", closer=closer()
    )
    await space.attach(
        Attachment(open_maps(), None, UnreadableUserfaultfd(), promised=False, closer=closer())
    )
    window = notifier.open_window(memory)
    await space.resolve(memory.start, memory, memory)
    space.close()
    assert window.stale


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EINTR, errno.EIO])
async def test_maps_that_cannot_be_queried_are_undecided(memory: UaddrRange, number: int) -> None:
    space = await attached(Attachment(FailingMaps(number), None, None, promised=True, closer=closer()))
    with pytest.raises(Undecided, match=errno.errorcode[number]):
        await space.resolve(memory.start, memory, memory, Caller.VMM)
    space.close()


async def test_smaps_without_the_record_of_an_existing_vma_is_undecided(memory: UaddrRange) -> None:
    """The text moved while it was read."""
    other = os.memfd_create("smaps")
    os.write(other, b"00001000-00002000 rw-p 00000000 00:00 0 \nVmFlags: rd wr\n")
    space = await attached(Attachment(open_maps(), Smaps(other), None, promised=True, closer=closer()))
    with pytest.raises(Undecided, match="smaps does not show the VMA") as undecided:
        await space.is_io(memory.start, Caller.VMM)
    assert await space.is_io(memory.end, Caller.VMM) is None  # no VMA, which is decided
    space.close()
    assert undecided.value.number == errno.EAGAIN


async def test_without_smaps_no_kind_can_be_inferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no file is opened to infer it: the daemon may be allowed more than the VMM."""
    opened: list[object] = []
    maps = os.open("/proc/self/maps", os.O_RDONLY)
    with monkeypatch.context() as patched:
        patched.setattr("os.open", lambda *arguments: opened.append(arguments))
        attachment = attach([maps], 1, OURS, promised=True, closer=closer())
    space = await attached(attachment)
    with pytest.raises(KindUnknown, match="hand over /proc/self/smaps in attach_memory, or state the kind"):
        await space.is_io(QUIET_PAGE, Caller.VMM)
    space.close()
    assert opened == []


@pytest.mark.parametrize(
    ("number", "refusal"), [(errno.EACCES, WireError), (errno.ESTALE, WireError), (errno.ENOMEM, Undecided)]
)
def test_a_descriptor_that_cannot_be_looked_at_is_wrong_only_where_that_is_about_its_file(
    monkeypatch: pytest.MonkeyPatch, number: int, refusal: type[Exception]
) -> None:
    def refuse(_: str) -> str:
        raise OSError(number, os.strerror(number))

    maps = os.open("/proc/self/maps", os.O_RDONLY)
    monkeypatch.setattr("interceptd.address_space.descriptors.os.readlink", refuse)
    with pytest.raises(refusal, match=os.strerror(number)):
        attach([maps], 1, OURS, promised=True, closer=closer())


# ------------------------------------------------ a VP that retries at once, forever


async def test_a_lasting_obstacle_is_logged_at_once_and_then_once_a_minute_with_how_many_met_it(
    autojump_clock: MockClock,  # noqa: ARG001 - as above
) -> None:
    obstacles = FaultCauses()
    with structlog.testing.capture_logs() as logs:
        for _ in range(5):
            obstacles.undecided(Undecided("another userfaultfd"))
        await trio.sleep(PERIOD_SECONDS)
        obstacles.undecided(Undecided("another userfaultfd"))
        obstacles.undecided(Undecided("another userfaultfd"))
    line = {"event": "faults_undecided", "log_level": "warning", "error": "another userfaultfd"}
    assert logs == [line | {"faults": 1}, line | {"faults": 5}]


async def test_the_log_names_the_errno_that_faults_meet(
    memory: UaddrRange,
    autojump_clock: MockClock,  # noqa: ARG001 - as above
) -> None:
    space = await refused_to_watch(errno.EBUSY)
    with structlog.testing.capture_logs() as logs, pytest.raises(Undecided):
        await space.resolve(memory.start, memory, memory)
    space.close()
    assert [line["error"] for line in logs] == [
        "another userfaultfd still holds the VMA (UFFDIO_REGISTER: EBUSY)"
    ]
