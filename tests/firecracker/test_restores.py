"""Real Firecrackers in all their kinds, many of them, and deaths of those who take part. Takes minutes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.huge_pages import reserved
from fakes.puppet import ENVIRONMENT, TESTS
from firecracker.content import GAP, GAP_END, PAGE
from firecracker.machine import MIB, Snapshot
from firecracker.restoring import (
    FIRST,
    SAVED_MIB,
    SOCKET,
    Guest,
    Restores,
    all_memory,
    pages,
    save,
)

pytestmark = pytest.mark.verify
PAGES = SAVED_MIB * MIB // PAGE
ALL = all_memory(SAVED_MIB)
HUGE_PAGE = 2 * MIB
BIG_MIB = 3500
GUESTS = 10


@pytest.mark.parametrize("around", [1, 16, 512])
def test_every_page_is_right_however_many_come_with_it(
    saved: Snapshot, restores: Restores, around: int
) -> None:
    guest = restores.start(saved, around_pages=around)
    guest.inflate(40 * MIB // PAGE + 5, 77)
    assert guest.looks(*ALL) == guest.must_find(*ALL)
    guest.inflate(41 * MIB // PAGE, 600)
    assert guest.looks(*ALL) == guest.must_find(*ALL)


@pytest.mark.alone
@pytest.mark.parametrize("prefetch", [None, [(0, PAGES)]], ids=["by demand", "prefetched"])
def test_pages_of_2_mib(
    kernel: Path, restores: Restores, tmp_path: Path, prefetch: list[tuple[int, int]] | None
) -> None:
    """Snapshot and restored guest need them at the same time: Firecracker leaves only with its process."""
    with reserved(2 * SAVED_MIB * MIB // HUGE_PAGE) as enough:
        if not enough:
            pytest.skip("this machine has no huge pages of 2 MiB to give")
        saved = save(kernel, tmp_path, SAVED_MIB, huge=True)
        with Restores(restores.daemon, tmp_path / "guests") as of_huge_pages:
            guest = of_huge_pages.start(saved, prefetch=prefetch)
            assert guest.looks(*ALL) == guest.must_find(*ALL)
            eventually(lambda: restores.progress(guest)["state"], "complete")


@pytest.fixture
def big(kernel: Path, tmp_path: Path) -> Iterator[Snapshot]:
    """More than fits below the gap; one page in sixteen is not zero."""
    snapshot = save(kernel, tmp_path, BIG_MIB, apart=16)
    yield snapshot
    snapshot.memory.unlink()


@pytest.mark.alone
def test_two_regions_of_which_the_second_lies_below_the_first(big: Snapshot, restores: Restores) -> None:
    guest = restores.start(big)
    last = GAP_END + 60 * MIB
    guest.inflate(GAP // PAGE - 300, 300)
    guest.inflate(last // PAGE, 300)
    guest.write(last + PAGE, 0xABCD)
    assert word_in_vmm(guest, 60 * MIB + PAGE) == 0xABCD, "Firecracker has another order of its regions now"
    everything = all_memory(BIG_MIB)
    assert guest.looks(*everything) == guest.must_find(*everything)


def test_ten_guests_of_one_image(saved: Snapshot, restores: Restores) -> None:
    """Each gives other pages away and writes others; none sees what another did."""
    with ThreadPoolExecutor(GUESTS) as together:
        guests = list(together.map(lambda _: restores.start(saved), range(GUESTS)))
        for index, guest in enumerate(guests):
            guest.inflate((30 + index) * MIB // PAGE, 100 + index)
            guest.write((60 + index) * MIB, index)
        found = list(together.map(lambda guest: guest.looks(*ALL), guests))
    assert found == [guest.must_find(*ALL) for guest in guests]


def test_full_snapshots_of_a_restored_guest(saved: Snapshot, restores: Restores, tmp_path: Path) -> None:
    """Firecracker reads all of its guest's memory, which is partly there, partly not yet, and partly zero.
    The second snapshot is of the first's restored guest."""
    for turn in ("first", "second"):
        guest = restores.start(saved)
        guest.inflate(50 * MIB // PAGE - 7, 200)
        guest.looks(pages(20 * MIB, 22 * MIB))
        guest.write(70 * MIB, 0x1234)
        directory = tmp_path / turn
        directory.mkdir()
        saved = Snapshot(directory / "state", directory / "memory")
        guest.machine.snapshot(saved)
        written = saved.memory.read_bytes()
        assert written[FIRST:] == guest.content.bytes_from(FIRST)
        assert guest.looks(*ALL) == guest.must_find(*ALL)


def test_the_balloon_inflates_while_pages_are_prefetched(saved: Snapshot, restores: Restores) -> None:
    """From the end of memory on: most of it is given away before the prefetch comes there."""
    for _ in range(GUESTS):
        guest = restores.start(saved, prefetch=[(0, PAGES)])
        for page in range(PAGES - 512, FIRST // PAGE, -1024):
            guest.inflate(page, 256)
        assert guest.looks(*ALL) == guest.must_find(*ALL)
        eventually(lambda: restores.progress(guest)["state"], "complete")  # noqa: B023 - called within
        guest.machine.kill()


def test_firecracker_is_killed_in_the_middle_of_its_faults(
    saved: Snapshot, restores: Restores, daemon: DaemonProcess
) -> None:
    """The daemon lets go of everything that it held for it."""
    idle = daemon.footprint()
    for around in (1, 64):
        guest = restores.start(saved, around_pages=around)
        faults = restores.progress(guest)["faults"]
        guest.machine.say("hash", *ALL[0])
        eventually(lambda: restores.progress(guest)["faults"] > faults, True)  # noqa: B023 - called within
        guest.machine.kill()
        eventually(lambda: restores.progress(guest)["state"], "ended")  # noqa: B023 - called within
    eventually(daemon.footprint, idle)


@pytest.mark.parametrize("when", ["before Firecracker comes", "in the middle of its faults"])
def test_the_asker_is_killed(saved: Snapshot, restores: Restores, when: str) -> None:
    directory = restores.new_directory()
    command: list[str | Path] = [sys.executable, "-m", "firecracker.asker"]
    command += [restores.daemon, saved.memory, directory / SOCKET]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=TESTS) as asker:
        assert asker.stdout is not None
        partition_id = int(asker.stdout.readline())
        if when == "before Firecracker comes":
            asker.kill()
        guest = restores.begin(saved, directory, partition_id)
        guest.machine.say("hash", *ALL[0])
        asker.kill()
        assert asker.wait(PATIENCE) == -signal.SIGKILL
        assert guest.machine.answer() == guest.content.hash(*ALL[0])
    guest.inflate(40 * MIB // PAGE, 300)
    assert guest.looks(*ALL) == guest.must_find(*ALL)


def word_in_vmm(guest: Guest, offset: int) -> int:
    """What Firecracker has so many bytes after the start of the guest's memory, whose regions adjoin."""
    process = Path(f"/proc/{guest.machine.pid}")
    maps = re.findall(r"^(\w+)-(\w+)", (process / "maps").read_text(), re.MULTILINE)
    [start] = [int(start, 16) for start, end in maps if int(end, 16) - int(start, 16) == BIG_MIB * MIB]
    with (process / "mem").open("rb") as memory:
        memory.seek(start + offset)
        return int.from_bytes(memory.read(8), "little")
