"""The clients' examples, each run as it stands in their README, against a daemon."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.documents import ADDING_RAM, CHANGING, HANDING_OVER, HEARING, RESTORING, at, printed
from fakes.eventually import PATIENCE, eventually
from fakes.raw_vmm import RawVmm
from intercept_client import (
    Access,
    AddressSpaceKind,
    Answer,
    BlockingVmm,
    BlockingVp,
    GfnRange,
    HypervisorKind,
    RegionKind,
    UaddrRange,
    build_memory_intercept,
)


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon()


def command(example: str, daemon: DaemonProcess) -> list[str]:
    return [sys.executable, "-c", at(example, daemon.socket.parent)]


def test_the_handover_example_prints_what_its_comments_say(daemon: DaemonProcess) -> None:
    said = printed(HANDING_OVER)
    run = subprocess.run(
        command(HANDING_OVER, daemon), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (run.stdout.splitlines(), run.stderr) == (said, "")
    assert said[0] == "resume mapped"


def test_the_example_of_a_restore_asks_for_one_and_for_its_progress(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    names: dict[str, Any] = {}
    exec(RESTORING, names)
    image, listen = tmp_path / "memory", tmp_path / "uffd.sock"
    image.write_bytes(bytes(2 * 4096))
    partition_id = names["serve_restore"](daemon.socket, image, listen)
    told = names["how_far"](daemon.socket, partition_id)
    assert (told.state, told.image_pages, told.error) == ("waiting", 2, "")
    assert listen.is_socket()


def test_the_example_of_adding_ram_splits_no_large_page_where_one_region_would(daemon: DaemonProcess) -> None:
    names: dict[str, Any] = {}
    exec(ADDING_RAM, names)
    gfns, ram = GfnRange.of(0x100, 0x700), UaddrRange.of_pages(0x7000_0010_0000, 0x700)
    splits = []
    for laid_out in (True, False):
        with BlockingVmm.open(daemon.socket) as vmm:
            vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE)
            vmm.map_vma(ram, 0x10_0000, Access.READ | Access.WRITE)
            if laid_out:
                names["add_ram"](vmm, gfns, ram)
            else:
                vmm.add_region(gfns, ram, RegionKind.MOVABLE, writable=True, executable=True)
            assert vmm.prefault(gfns) == gfns.page_count
            splits.append(vmm.statistics().split_large_pages)
    assert splits == [0, 4]


def test_the_example_of_a_rom_shadow_lets_the_guest_write_where_it_only_read(daemon: DaemonProcess) -> None:
    names: dict[str, Any] = {}
    exec(CHANGING, names)
    gfns = GfnRange.of(0xF0, 16)
    rom, ram = UaddrRange.of_pages(0x7000_0000, 16), UaddrRange.of_pages(0x6000_0000, 16)
    with BlockingVmm.open(daemon.socket) as vmm:
        partition = vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE)
        vmm.map_vma(rom, 0x1000, Access.READ)
        vmm.map_vma(ram, 0x2000, Access.READ | Access.WRITE)
        vmm.add_region(gfns, rom, RegionKind.MOVABLE, writable=False, executable=True)
        with BlockingVp.open(daemon.socket, partition, vp_index=0) as vp:
            write = build_memory_intercept(gpa=0xF0 << 12, access=Access.WRITE)
            assert vp.intercept(write) is Answer.PERMISSION
            names["shadow_rom"](vmm, gfns, rom, ram)
            assert vp.intercept(write) is Answer.MAPPED


def test_the_example_of_a_moving_bar_leaves_the_overlap_and_gives_up_the_rest(daemon: DaemonProcess) -> None:
    names: dict[str, Any] = {}
    exec(CHANGING, names)
    bar, old, new = UaddrRange.of_pages(0x7000_0000, 4), GfnRange.of(0xF0, 4), GfnRange.of(0xF2, 4)
    with BlockingVmm.open(daemon.socket) as vmm:
        partition = vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE)
        vmm.map_vma(bar, 0x1000, Access.READ | Access.WRITE, io=True)
        vmm.add_region(old, bar, RegionKind.MMIO, writable=True, executable=False)
        with BlockingVp.open(daemon.socket, partition, vp_index=0) as vp:
            names["move_bar"](vmm, bar, old, new)
            reads = [build_memory_intercept(gpa=gfn << 12, access=Access.READ) for gfn in (0xF1, 0xF2)]
            assert [vp.intercept(read) for read in reads] == [Answer.NO_REGION, Answer.MAPPED]
            translation = vmm.translate(0xF2)
            assert translation is not None
            assert translation.pfn == 0x1000


def test_the_example_of_hearing_tells_of_a_lost_partition(daemon: DaemonProcess, tmp_path: Path) -> None:
    told = tmp_path / "told"

    def is_told_of_one_more() -> bool:
        with RawVmm(daemon.socket, hypervisor="vmm") as vmm:
            vmm.link().close()
            vmm.connection.receive()
        return "is lost: " in told.read_text()

    with told.open("w") as output:
        listening = subprocess.Popen([sys.executable, "-u", *command(HEARING, daemon)[1:]], stdout=output)
    with listening:
        eventually(is_told_of_one_more, True)
        listening.kill()
